// The machine that a translated kernel runs on: threads as fibers of one thread of the host, memory that is checked,
// barriers, exchanges in warps, asynchronous copies, and the order of blocks and threads.
#pragma once

#include <sys/mman.h>
#include <time.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "values.h"

struct Range {
  u64 begin, end;
  bool holds(u64 address, u32 bytes) const { return address >= begin && address + bytes <= end; }
};

// As kernel.py has it.
struct Launch {
  u32 grid[3], block[3];
  u32 shared_bytes;
  u32 order;     // 0 forward, 1 reversed, 2 shuffled
  u32 resident;  // blocks at once, or 0
  u32 ranges;
  const Range* memory;  // what may be accessed
  const char* parameters;
  u64 parameter_bytes, stack_bytes, seed;
  f64 timeout;  // seconds
};

// The number of threads that take part, and of those that vote yes; in a warp, their masks.
struct Votes {
  u32 all, yes;
};

struct Barrier {
  u32 arrived, generation, yes;
  Votes result;
};

// The exchange of values between the lanes of one mask.
struct Exchange {
  struct Result {
    u32 lanes;
    u64 values[32];
  };
  u32 mask, arrived, unread, generation;
  int line;
  Result results[2];  // of the last generation, which slower lanes still read, and of this one
};

struct Warp {
  u32 alive;
  Exchange exchanges[6];
};

struct Thread;

struct Block {
  u32 index[3];
  u32 alive;
  char* shared;
  Barrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
};

struct Copy {
  char* to;
  const char* from;
  u32 bytes, group;
};

struct Thread {
  u32 index[3];
  u32 lane;
  Warp* warp;
  Block* block;
  void* stack_pointer;
  char* stack;
  bool done;
  u32 spins;  // looks at memory that other threads write
  int line;   // where it waits
  std::vector<Copy> copies;
  u32 groups;
};

static const Launch* launch;
static Thread* running;
static void* scheduler;
static char error[512];  // empty until something fails
static u64 progress;     // arrivals and exits; while no thread spins, no progress is a deadlock
static Range recent;     // accessed last

// ---- fibers

// Saves the callee-saved registers and the stack pointer, and restores another stack's.
extern "C" void switch_stack(void** from, void* to);
#ifdef __x86_64__
asm(R"(
.text
.local switch_stack
.type switch_stack, @function
switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr int SAVED_REGISTERS = 6;
#endif

INLINE void yield(Thread* t) { switch_stack(&t->stack_pointer, scheduler); }

[[gnu::noinline, noreturn]] static void fail(Thread* t, const char* format, ...) {
  if (!error[0]) {
    const u32 *block = t->block->index, *thread = t->index;
    const int written = snprintf(error, sizeof error, "block (%u, %u, %u), thread (%u, %u, %u): ", block[0], block[1],
                                 block[2], thread[0], thread[1], thread[2]);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error + written, sizeof error - written, format, arguments);
    va_end(arguments);
  }
  for (;;) yield(t);
}

// A thread that waits for memory to change lets others run.
INLINE void spin(Thread* t) {
  if (++t->spins % 8 == 0) yield(t);
}

INLINE void sleep(Thread* t) {
  t->spins++;
  yield(t);
}

// ---- memory

[[gnu::noinline]] static void find_range(Thread* t, u64 address, u32 bytes, int line, const char* access,
                                         bool generic) {
  for (u32 i = 0; i < launch->ranges; i++) {
    if (launch->memory[i].holds(address, bytes)) {
      recent = launch->memory[i];
      return;
    }
  }
  const u64 shared = u64(t->block->shared), stack = u64(t->stack), parameters = u64(launch->parameters);
  const Range others[] = {{shared, shared + launch->shared_bytes},
                          {stack, stack + launch->stack_bytes},
                          {parameters, parameters + launch->parameter_bytes}};
  for (const Range& range : others) {
    if (generic && range.holds(address, bytes)) return;
  }
  fail(t, "%s of %u bytes at 0x%llx is out of bounds (PTX line %d)", access, bytes, (unsigned long long)address, line);
}

INLINE void check_alignment(Thread* t, u64 address, u32 bytes, int line, const char* access) {
  if (__builtin_expect(address & (bytes - 1), 0)) {
    fail(t, "%s of %u bytes at 0x%llx is misaligned (PTX line %d)", access, bytes, (unsigned long long)address, line);
  }
}

INLINE char* global_memory(Thread* t, u64 address, u32 bytes, int line, const char* access) {
  check_alignment(t, address, bytes, line, access);
  if (__builtin_expect(!recent.holds(address, bytes), 0)) find_range(t, address, bytes, line, access, false);
  return (char*)address;
}

INLINE char* generic_memory(Thread* t, u64 address, u32 bytes, int line, const char* access) {
  check_alignment(t, address, bytes, line, access);
  if (__builtin_expect(!recent.holds(address, bytes), 0)) find_range(t, address, bytes, line, access, true);
  return (char*)address;
}

INLINE char* parameter_memory(Thread* t, u64 address, u32 bytes, int line, const char* access) {
  check_alignment(t, address, bytes, line, access);
  const u64 parameters = u64(launch->parameters);
  if (__builtin_expect(!Range{parameters, parameters + launch->parameter_bytes}.holds(address, bytes), 0)) {
    fail(t, "%s of %u bytes at %lld of the parameters is out of bounds (PTX line %d)", access, bytes,
         (long long)(address - parameters), line);
  }
  return (char*)address;
}

INLINE char* shared_memory(Thread* t, u64 address, u32 bytes, int line, const char* access) {
  const u32 offset = u32(address);
  check_alignment(t, offset, bytes, line, access);
  if (__builtin_expect(u64(offset) + bytes > launch->shared_bytes, 0)) {
    fail(t, "%s of %u bytes at %u of %u in shared memory is out of bounds (PTX line %d)", access, bytes, offset,
         launch->shared_bytes, line);
  }
  return t->block->shared + offset;
}

template <class T>
INLINE T load(const char* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
INLINE void store(char* to, T value) {
  memcpy(to, &value, sizeof value);
}

// ---- asynchronous copies, which arrive as late as allowed

INLINE void copy_later(Thread* t, char* to, const char* from, u32 bytes) {
  t->copies.push_back({to, from, bytes, t->groups});
}

// All copies but those of the newest groups have arrived.
[[gnu::noinline]] static void await_copies(Thread* t, u32 groups) {
  size_t arrived = 0;
  for (; arrived < t->copies.size() && t->copies[arrived].group + groups < t->groups; arrived++) {
    const Copy& copy = t->copies[arrived];
    memcpy(copy.to, copy.from, copy.bytes);
  }
  t->copies.erase(t->copies.begin(), t->copies.begin() + arrived);
}

INLINE void await_all_copies(Thread* t) {
  t->groups++;
  await_copies(t, 0);
}

// ---- barriers and exchanges

// Waits until all have arrived; the first thread that sees it completes the generation.
template <class Full, class Complete>
INLINE void meet(Thread* t, u32& generation, int line, Full full, Complete complete) {
  const u32 mine = generation;
  progress++;
  t->line = line;
  for (;;) {
    if (full()) {
      complete();
      generation++;
      progress++;
    }
    if (generation != mine) return;
    yield(t);
    if (generation != mine) return;
  }
}

// A barrier of `threads` threads, or with 0 of all that have not exited.
[[gnu::noinline]] static Votes barrier(Thread* t, u32 number, u32 threads, bool vote, int line) {
  if (number >= 16) fail(t, "barrier %u of 16 (PTX line %d)", number, line);
  Barrier& b = t->block->barriers[number];
  b.arrived++;
  b.yes += vote;
  meet(
      t, b.generation, line, [&] { return b.arrived >= (threads ? threads : t->block->alive); },
      [&] {
        b.result = {b.arrived, b.yes};
        b.arrived = b.yes = 0;
      });
  return b.result;
}

// Every lane of the mask contributes a value and receives all of them.
[[gnu::noinline]] static const Exchange::Result& exchange(Thread* t, u32 mask, u64 value, int line) {
  Warp& warp = *t->warp;
  if (!(mask >> t->lane & 1)) fail(t, "lane %u is not in its mask 0x%x (PTX line %d)", t->lane, mask, line);
  Exchange* found = nullptr;
  for (Exchange& e : warp.exchanges) {
    if (e.mask == mask) found = &e;
  }
  for (Exchange& e : warp.exchanges) {
    if (!found && !e.arrived && !e.unread) found = &e;
  }
  if (!found) fail(t, "the lanes of one warp wait under more masks than are kept here (PTX line %d)", line);
  Exchange& e = *found;
  e.mask = mask;
  if (e.arrived && e.line != line) fail(t, "lanes of one warp meet at PTX lines %d and %d", e.line, line);
  e.line = line;
  Exchange::Result& result = e.results[e.generation & 1];
  result.values[t->lane] = value;
  e.arrived |= 1u << t->lane;
  meet(
      t, e.generation, line, [&] { return !(mask & warp.alive & ~e.arrived); },
      [&] {
        result.lanes = e.unread = e.arrived;
        e.arrived = 0;
      });
  e.unread &= ~(1u << t->lane);
  return result;
}

[[gnu::noinline]] static Votes vote(Thread* t, bool yes, u32 mask, int line) {
  const Exchange::Result& result = exchange(t, mask, yes, line);
  Votes votes = {result.lanes, 0};
  for (u32 lane = 0; lane < 32; lane++) {
    if (result.lanes >> lane & result.values[lane] & 1) votes.yes |= 1u << lane;
  }
  return votes;
}

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BFLY, SHUFFLE_IDX };

// The value of another lane and whether it is in range; ones, which are a NaN, of a lane that takes no part.
template <Shuffle mode>
[[gnu::noinline]] static std::pair<u32, bool> shuffle(Thread* t, u32 value, u32 by, u32 limits, u32 mask, int line) {
  const u32 segment = limits >> 8 & 31, first = t->lane & segment, last = first | (limits & 31 & ~segment);
  const Exchange::Result& result = exchange(t, mask, value, line);
  by &= 31;
  const int source = mode == SHUFFLE_UP     ? int(t->lane) - int(by)
                     : mode == SHUFFLE_DOWN ? t->lane + by
                     : mode == SHUFFLE_BFLY ? t->lane ^ by
                                            : first | (by & ~segment);
  const bool in_range = mode == SHUFFLE_UP ? source >= int(last) : source <= int(last);
  const u32 lane = in_range ? source : t->lane;
  return {result.lanes >> lane & 1 ? u32(result.values[lane]) : ~0u, in_range};
}

// ---- the launch

static void kernel(Thread* t, const char* parameters);  // the translation

static void run_thread() {
  Thread* t = running;
  kernel(t, launch->parameters);
  t->done = true;
  progress++;
  t->block->alive--;
  t->warp->alive &= ~(1u << t->lane);
  for (;;) yield(t);
}

static f64 seconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

class Machine {
 public:
  Machine() : block_order_(blocks_), thread_order_(threads_), blocks_here_(resident_), state_(resident_ * threads_) {
    const bool reversed = launch->order == 1;
    for (u64 i = 0; i < blocks_; i++) block_order_[i] = reversed ? blocks_ - 1 - i : i;
    for (u32 i = 0; i < threads_; i++) thread_order_[i] = reversed ? threads_ - 1 - i : i;
    shuffle_if_asked(block_order_);
    stacks_ = (char*)mmap(nullptr, state_.size() * launch->stack_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks_ == MAP_FAILED) abort();
    for (Block& block : blocks_here_)
      block.shared = (char*)aligned_alloc(1024, (launch->shared_bytes + 1024) / 1024 * 1024);
  }

  ~Machine() {
    munmap(stacks_, state_.size() * launch->stack_bytes);
    for (Block& block : blocks_here_) free(block.shared);
  }

  void run() {
    std::vector<u64> live(resident_);
    for (u64 slot = 0; slot < resident_; slot++) start(live[slot] = slot);
    const f64 begin = seconds();
    for (u64 round = 1, idle = 0; !live.empty() && !error[0]; round++) {
      const u64 progress_before = progress;
      bool spun = false;
      for (size_t i = 0; i < live.size() && !error[0];) {
        Block& block = blocks_here_[live[i]];
        spun |= run_each_thread(block);
        if (block.alive || error[0]) {
          i++;
        } else if (started_ < blocks_) {
          start(live[i++]);
        } else {
          live.erase(live.begin() + i);
        }
      }
      idle = progress == progress_before && !spun ? idle + 1 : 0;
      if (error[0]) return;
      if (idle > 2) report_deadlock(blocks_here_[live[0]]);
      if (round % 256 == 0 && seconds() - begin > launch->timeout) {
        snprintf(error, sizeof error, "not done after %.0f s; %llu of %llu blocks have started", launch->timeout,
                 (unsigned long long)started_, (unsigned long long)blocks_);
      }
    }
  }

 private:
  // Whether any thread spins.
  bool run_each_thread(Block& block) {
    bool spun = false;
    shuffle_if_asked(thread_order_);
    for (u32 i = 0; i < threads_ && !error[0]; i++) {
      Thread* t = block.threads[thread_order_[i]];
      if (t->done) continue;
      const u32 spins = t->spins;
      running = t;
      switch_stack(&scheduler, t->stack_pointer);
      spun |= t->spins != spins;
    }
    return spun;
  }

  void start(u64 slot) {
    Block& block = blocks_here_[slot];
    const u64 number = block_order_[started_++];
    const u32* grid = launch->grid;
    block.index[0] = number % grid[0];
    block.index[1] = number / grid[0] % grid[1];
    block.index[2] = number / grid[0] / grid[1];
    block.alive = threads_;
    memset(block.shared, 0xff, launch->shared_bytes);  // NaN
    memset(block.barriers, 0, sizeof block.barriers);
    block.warps.assign((threads_ + 31) / 32, Warp{});
    block.threads.resize(threads_);
    for (u32 i = 0; i < threads_; i++) {
      const u64 place = slot * threads_ + i;
      Thread& t = *(block.threads[i] = &state_[place]);
      t = {};
      t.index[0] = i % launch->block[0];
      t.index[1] = i / launch->block[0] % launch->block[1];
      t.index[2] = i / launch->block[0] / launch->block[1];
      t.lane = i % 32;
      t.warp = &block.warps[i / 32];
      t.warp->alive |= 1u << t.lane;
      t.block = &block;
      t.stack = stacks_ + place * launch->stack_bytes;
      // Stacks begin in different sets of the cache.
      void** top = (void**)(t.stack + launch->stack_bytes - 64 * (1 + (5 * i + slot) % 56));
      *--top = nullptr;
      *--top = (void*)run_thread;
      for (int k = 0; k < SAVED_REGISTERS; k++) *--top = nullptr;
      t.stack_pointer = top;
    }
  }

  void report_deadlock(Block& block) {
    for (Thread* t : block.threads) {
      if (!t->done) {
        snprintf(error, sizeof error,
                 "deadlock: block (%u, %u, %u), thread (%u, %u, %u) and all others wait (PTX line %d)", block.index[0],
                 block.index[1], block.index[2], t->index[0], t->index[1], t->index[2], t->line);
        return;
      }
    }
  }

  template <class T>
  void shuffle_if_asked(std::vector<T>& items) {
    if (launch->order != 2) return;
    for (size_t i = items.size(); i > 1; i--) {
      random_ ^= random_ << 13;
      random_ ^= random_ >> 7;
      random_ ^= random_ << 17;
      std::swap(items[i - 1], items[random_ % i]);
    }
  }

  const u32 threads_ = launch->block[0] * launch->block[1] * launch->block[2];
  const u64 blocks_ = u64(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  const u64 wanted_ = launch->resident ? launch->resident : std::max<u64>(2, 512 / threads_);
  const u64 resident_ = std::min(wanted_, blocks_);
  u64 random_ = launch->seed * 2862933555777941757 + 3037000493;
  u64 started_ = 0;
  std::vector<u64> block_order_;
  std::vector<u32> thread_order_;
  std::vector<Block> blocks_here_;
  std::vector<Thread> state_;
  char* stacks_;
};

// The error, or an empty string.
extern "C" const char* run(const Launch* given) {
  launch = given;
  error[0] = 0;
  recent = {0, 0};
  Machine().run();
  return error;
}
