// The GPU kernels on threads of the host, for ThreadSanitizer: a std::thread for each thread of a block, several blocks
// at a time. The tool sees every access to shared and global memory, and reports two unordered ones in whichever order
// they happen. It covers neither all effects of a memory weaker than this processor's on relaxed accesses nor the
// device's own instructions.
//
// Therefore nothing here may order memory unless it does on a device. Block and warp barriers acquire and release;
// votes, messages and tickets are relaxed; lanes of a warp meet at its barriers alone. Waiting is a call of futex,
// which the tool does not see: std::barrier and std::atomic::wait count their waiters in words that all barriers share,
// and that would order unrelated blocks. An asynchronous copy lands, by chance, at once or when its thread waits for
// it, the earliest and the latest that a device may choose. The words of a message appear in any order, and late.
//
// Relaxed messages suffice, because a word is data and flag in one. A reader waits for each word, uses the floats in it
// and no other memory that its writer wrote: an acquire would make nothing further visible. It may see the
// words of a message in any order, as it waits for all. The launch orders the setting of all bits before it. A ticket
// is unique because fetch_add is atomic; it grants a position, whose inputs are constant and whose outputs no other
// block touches. The protocol that needs acquire and release, data beside a flag, is here for comparison: relaxed, it
// is reported.
//
// The command line plants faults. A barrier loses its order alone: its threads still wait for one another, so that the
// results stay correct, no thread is lost, and only the tool can detect it.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <source_location>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

// Functions of target.h that this program replaces.
#define store_relaxed store_relaxed_always
#define load_relaxed load_relaxed_always
#define copy_async copy_at_once
#define wait_for_copies wait_for_nothing
#include "gpu/target.h"
#undef store_relaxed
#undef load_relaxed
#undef copy_async
#undef wait_for_copies

namespace wkv {

// Constant while threads run.
struct {
  bool plain_stores, plain_loads, late_copies;
  std::string kernel;  // whose barriers order nothing in these lines, file:line
  std::set<std::string> lines;
} planted;

struct Random {
  uint64_t state;

  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  bool one_in(uint32_t count) { return next() % count == 0; }
};

// The state of a block's thread beyond the kernel's own.
struct Lane {
  struct Copy {
    void* shared;
    const void* global;
  };

  struct Store {
    Word* target;
    Word word;
  };

  Random random;
  bool jitters;
  std::vector<Store> stores;  // not visible to any thread yet
  std::vector<Copy> copies;   // not landed yet
  bool awaits_copies = false;
  uint64_t pauses = 0;

  void land_copies() {
    for (const Copy& copy : copies) copy_at_once(copy.shared, copy.global);
    copies.clear();
    awaits_copies = false;
  }
  // Publishes the stores at a barrier or when the thread waits, in any order, some later than others.
  void show_stores() {
    while (!stores.empty()) {
      std::swap(stores[random.next() % stores.size()], stores.back());
      const auto [target, word] = stores.back();
      stores.pop_back();
      if (jitters && random.one_in(4)) std::this_thread::sleep_for(std::chrono::microseconds(random.next() % 200));
      if (planted.plain_stores) {
        *target = word;
      } else {
        store_relaxed_always(target, word);
      }
    }
  }
  void pause() {
    ++pauses;
    show_stores();
    if (random.one_in(4)) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    } else {
      std::this_thread::yield();
    }
  }
  // Delays a thread now and then, or all of its warp, whose threads draw the same `of_warp`.
  void jitter(Random of_warp) {
    if (!jitters) return;
    if (of_warp.one_in(8)) std::this_thread::sleep_for(std::chrono::microseconds(of_warp.next() % 300));
    if (random.one_in(32)) std::this_thread::sleep_for(std::chrono::microseconds(random.next() % 100));
    if (random.one_in(8)) std::this_thread::yield();
  }
};
thread_local Lane* lane_of_this_thread;

void pause_on_host() { lane_of_this_thread->pause(); }

inline void store_relaxed(Word* target, Word word) { lane_of_this_thread->stores.push_back({target, word}); }
inline Word load_relaxed(const Word* source) { return planted.plain_loads ? *source : load_relaxed_always(source); }
inline void copy_async(void* shared, const void* global) {
  Lane& lane = *lane_of_this_thread;
  if (lane.random.one_in(2)) {
    copy_at_once(shared, global);
  } else {
    lane.copies.push_back({shared, global});
  }
}
inline void wait_for_copies() {
  Lane& lane = *lane_of_this_thread;
  if (planted.late_copies) {
    lane.awaits_copies = true;  // which land after the barrier
  } else {
    lane.land_copies();
  }
}

}  // namespace wkv

#include "gpu/kernels.h"
#include "gpu/plan.h"

namespace wkv {
namespace {

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(1);  // other threads are running
}

// ---- threads ----

void wait_while(const std::atomic<int>& word, int value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(const std::atomic<int>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Kept from launch to launch: under the tool a thread takes a millisecond to make.
class Pool {
 public:
  // Calls function(i) on a separate thread for each i of `order`, started in this order, and waits for all.
  void run(const std::vector<int>& order, const std::function<void(int)>& function) {
    while (workers_.size() < order.size()) {
      Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
      worker.thread = std::thread([this, &worker, i = static_cast<int>(workers_.size()) - 1] { work(worker, i); });
    }
    function_ = &function;
    running_.store(static_cast<int>(order.size()), std::memory_order_relaxed);
    for (const int i : order) start(*workers_[i]);
    for (int running; (running = running_.load(std::memory_order_acquire)) > 0;) wait_while(running_, running);
  }
  ~Pool() {
    function_ = nullptr;
    for (const auto& worker : workers_) start(*worker);
    for (const auto& worker : workers_) worker->thread.join();
  }

 private:
  struct Worker {
    std::atomic<int> starts{0};
    std::thread thread;
  };

  static void start(Worker& worker) {
    worker.starts.fetch_add(1, std::memory_order_release);
    wake_all(worker.starts);
  }
  void work(Worker& worker, int i) {
    for (int starts = 0;; ++starts) {
      while (worker.starts.load(std::memory_order_acquire) == starts) wait_while(worker.starts, starts);
      if (function_ == nullptr) return;
      (*function_)(i);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) wake_all(running_);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(int)>* function_ = nullptr;
  std::atomic<int> running_{0};
};

// ---- a block ----

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait(bool orders) {
    if (orders) {
      wait<std::memory_order_acq_rel, std::memory_order_acquire, std::memory_order_release>();
    } else {
      wait<std::memory_order_relaxed, std::memory_order_relaxed, std::memory_order_relaxed>();
    }
  }

 private:
  template <std::memory_order kArrive, std::memory_order kLook, std::memory_order kOpen>
  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, kArrive) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, kOpen);
      wake_all(round_);
    } else {
      while (round_.load(kLook) == round) wait_while(round_, round);
    }
  }

  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

struct BlockOfThreads {
  static constexpr int kVotes = 64;

  Barrier whole;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::atomic<bool> disagreed[kVotes] = {};  // by the number of the vote

  explicit BlockOfThreads(int threads) : whole(threads) {
    for (int first = 0; first < threads; first += kWarpThreads)
      warps.push_back(std::make_unique<Barrier>(kWarpThreads));
  }
};

using Site = std::source_location;

std::string line_of(Site site) {
  const std::string_view file = site.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

// The lines of a kernel's barriers, and the kind of each.
using Sites = std::map<std::string, const char*>;

template <class Thread>
class LaneTeam {
  static_assert(std::is_trivially_copyable_v<Thread>);

 public:
  LaneTeam(BlockOfThreads& block, int index, Lane& lane, uint64_t seed, bool is_planted)
      : block_(block), lane_(lane), seed_(seed + index / kWarpThreads), is_planted_(is_planted) {
    std::memset(static_cast<void*>(&thread_), 0xff, sizeof thread_);
    thread_.index = index;
  }

  template <class Phase>
  void phase(const Phase& function, Site site = Site::current()) {
    run(function);
    meet(block_.whole, site, "block");
  }
  template <class Phase>
  void warp_phase(const Phase& function, Site site = Site::current()) {
    run(function);
    meet(*block_.warps[thread_.index / kWarpThreads], site, "warp");
  }
  template <class Phase>
  bool agree(const Phase& function, Site site = Site::current()) {
    if (votes_ == BlockOfThreads::kVotes) fail("more votes than there is room for");
    std::atomic<bool>& disagreed = block_.disagreed[votes_++];
    if (!run(function)) disagreed.store(true, std::memory_order_relaxed);
    meet(block_.whole, site, "vote");
    return !disagreed.load(std::memory_order_relaxed);
  }
  template <class Phase>
  void last_phase(const Phase& function) {
    run(function);
  }

  Sites& sites() { return sites_; }

 private:
  template <class Phase>
  auto run(const Phase& function) {
    lane_.jitter({seed_ + phases_++ * 0x9e3779b97f4a7c15u});
    return function(thread_);
  }
  void meet(Barrier& barrier, Site site, const char* kind) {
    if (thread_.index == 0) sites_[line_of(site)] = kind;
    lane_.show_stores();
    barrier.wait(!(is_planted_ && planted.lines.contains(line_of(site))));
    if (lane_.awaits_copies) lane_.land_copies();
  }

  Thread thread_;
  BlockOfThreads& block_;
  Lane& lane_;
  const uint64_t seed_;  // of the warp
  const bool is_planted_;
  uint64_t phases_ = 0;
  int votes_ = 0;
  Sites sites_;
};

// ---- a launch ----

struct Schedule {
  uint64_t seed;
  int resident;  // blocks at a time
  bool in_order;
};

struct Statistics {
  std::atomic<uint64_t> pauses{0};  // relaxed, as everything here that threads of several blocks touch
  std::map<std::string, Sites> sites;
} statistics;

struct Grid {
  unsigned x, y, z;
};

// Runs one block after the other on the same threads; their accesses are ordered as by a new launch.
template <class Kernel>
class Place {
 public:
  Place(const char* name, const typename Kernel::Params& params, Grid grid, int threads, int shared_bytes,
        Schedule schedule, const std::vector<unsigned>& blocks, std::atomic<size_t>& next)
      : is_planted_(planted.kernel == name),
        params_(params),
        grid_(grid),
        threads_(threads),
        schedule_(schedule),
        blocks_(blocks),
        next_(next),
        shared_(shared_bytes / sizeof(Line) + 1),
        all_(threads) {}

  // The work of thread i in this place.
  void run(int i) {
    for (;;) {
      if (i == 0) take_block();
      all_.wait(true);
      if (block_ == nullptr) return;
      run_thread(i);
      all_.wait(true);
    }
  }

  Sites sites;

 private:
  struct alignas(128) Line {
    char bytes[128];
  };

  void take_block() {
    const size_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= blocks_.size()) {
      block_ = nullptr;
      return;
    }
    number_ = blocks_[i];
    block_ = std::make_unique<BlockOfThreads>(threads_);
    std::memset(static_cast<void*>(shared_.data()), 0xff, shared_.size() * sizeof(Line));
  }

  void run_thread(int i) {
    const BlockIndex index = {number_ % grid_.x, number_ / grid_.x % grid_.y, number_ / grid_.x / grid_.y};
    const uint64_t seed = (schedule_.seed * 1000003 + number_ + 1) * 0xbf58476d1ce4e5b9u;
    Lane lane{
        .random = {seed ^ (i + 1) * 0x9e3779b97f4a7c15u}, .jitters = !schedule_.in_order, .stores = {}, .copies = {}};
    lane_of_this_thread = &lane;
    LaneTeam<typename Kernel::Thread> team(*block_, i, lane, seed, is_planted_);
    Kernel::run(params_, index, threads_, team, shared_.data()->bytes);
    lane.show_stores();
    if (!lane.copies.empty()) fail("a copy was not waited for");
    statistics.pauses.fetch_add(lane.pauses, std::memory_order_relaxed);
    if (i == 0) sites.merge(team.sites());
  }

  const bool is_planted_;
  const typename Kernel::Params& params_;
  const Grid grid_;
  const int threads_;
  const Schedule schedule_;
  const std::vector<unsigned>& blocks_;
  std::atomic<size_t>& next_;
  std::vector<Line> shared_;
  Barrier all_;
  std::unique_ptr<BlockOfThreads> block_;  // null after the last one
  unsigned number_ = 0;
};

template <class Kernel>
void run(Pool& pool, const char* name, const typename Kernel::Params& params, Grid grid, int threads, int shared_bytes,
         Schedule schedule) {
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  // Tickets make every order correct.
  if (!schedule.in_order) std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(schedule.seed));
  std::atomic<size_t> next{0};
  std::vector<std::unique_ptr<Place<Kernel>>> places;
  const int resident = std::min(schedule.resident, static_cast<int>(blocks.size()));
  for (int i = 0; i < resident; ++i) {
    places.push_back(
        std::make_unique<Place<Kernel>>(name, params, grid, threads, shared_bytes, schedule, blocks, next));
  }
  std::vector<int> order(resident * threads);
  std::iota(order.begin(), order.end(), 0);
  if (!schedule.in_order) std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule.seed));
  pool.run(order, [&](int i) { places[i / threads]->run(i % threads); });
  for (const auto& place : places) statistics.sites[name].merge(place->sites);
}

// ---- problems ----

struct Problem {
  int64_t B, T, C;
  int warps;            // of forward
  int64_t chunk_tiles;  // 1, or more than make_plan gives so few blocks
  bool keys_spread;
  bool with_state;
};

template <class Element>
struct Tensors {
  std::vector<float> w, u, state, gstate_out;
  std::vector<Element> k, v, gy;

  Tensors(const Problem& problem, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& values, int64_t count, auto value) {
      values.resize(count);
      for (auto& element : values) from_real(value(), element);
    };
    const auto [B, T, C] = std::tie(problem.B, problem.T, problem.C);
    fill(w, C, [&] { return normal(random) - 2; });
    fill(u, C, [&] { return normal(random); });
    fill(k, B * T * C, [&] { return normal(random) * (problem.keys_spread && random() % 8 == 0 ? 20.0f : 1.0f); });
    fill(v, B * T * C, [&] { return normal(random); });
    fill(gy, B * T * C, [&] { return normal(random); });
    fill(state, B * 3 * C, [&] { return normal(random); });
    fill(gstate_out, B * 3 * C, [&] { return normal(random); });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) {
        float& den = state[(b * 3 + 1) * C + c];
        den = c % 7 == 3 ? 0 : std::fabs(den) + 0.1f;
      }
    }
  }
};

// The outputs of a launch, NaN until it writes them.
struct Outputs {
  std::vector<std::vector<char>> buffers;

  void* add(int64_t bytes) {
    buffers.emplace_back(bytes, '\xff');
    return buffers.back().data();
  }
  bool operator==(const Outputs&) const = default;
};

template <class Element>
class Case {
 public:
  Case(Pool& pool, const Problem& problem) : pool_(pool), problem_(problem), tensors_(problem, 1) {}

  void run_forward(Schedule schedule, Outputs& out) const {
    const auto [B, T, C] = std::tie(problem_.B, problem_.T, problem_.C);
    SequenceParams params = {.parameters = parameters(),
                             .B = static_cast<uint32_t>(B),
                             .T = static_cast<uint32_t>(T),
                             .C = static_cast<uint32_t>(C),
                             .inputs = {sequence(tensors_.k), sequence(tensors_.v)},
                             .state = problem_.with_state ? tensors_.state.data() : nullptr,
                             .outputs = {out.add(B * T * C * sizeof(Element))},
                             .checkpoints = out.add(B * checkpoint_count(kType, T) * 3 * C * 4),
                             .state_out = out.add(B * 3 * C * 4)};
    launch<Forward<Element>>("forward", Operation::forward, params, schedule);
  }

  // Takes the checkpoints from forward's outputs.
  void run_backward(Schedule schedule, const Outputs& from_forward, Outputs& out) const {
    const auto [B, T, C] = std::tie(problem_.B, problem_.T, problem_.C);
    SequenceParams params = {.parameters = parameters(),
                             .B = static_cast<uint32_t>(B),
                             .T = static_cast<uint32_t>(T),
                             .C = static_cast<uint32_t>(C),
                             .inputs = {sequence(tensors_.k), sequence(tensors_.v), sequence(tensors_.gy)},
                             .state = problem_.with_state ? tensors_.state.data() : nullptr,
                             .outputs = {out.add(B * T * C * sizeof(Element)), out.add(B * T * C * sizeof(Element))},
                             .checkpoints = const_cast<char*>(from_forward.buffers[1].data()),  // backward reads them
                             .state_out = out.add(B * 3 * C * 4),
                             .gstate_out = problem_.with_state ? tensors_.gstate_out.data() : nullptr,
                             .partials = out.add(B * plan_of(Operation::backward).chunks * 2 * C * 4)};
    launch<Backward<Element>>("backward", Operation::backward, params, schedule);
  }

  // Reduces the partials of backward's outputs.
  void run_reduce(Schedule schedule, const Outputs& from_backward, Outputs& out) const {
    const int64_t C = problem_.C;
    const ReduceParams params = {.parameters = parameters(),
                                 .C = C,
                                 .partials = from_backward.buffers[3].data(),
                                 .rows = problem_.B * plan_of(Operation::backward).chunks,
                                 .gw = out.add(C * 4),
                                 .gu = out.add(C * 4)};
    constexpr int kThreads = kReduceLanes * kReduceGroups;
    run<Reduce<float>>(pool_, "reduce", params, {static_cast<unsigned>((C + kReduceLanes - 1) / kReduceLanes), 1, 1},
                       kThreads, kThreads * 2 * static_cast<int>(sizeof(double)), schedule);
  }

  // Compares with plain loops in float64.
  void check(const Outputs& forward, const Outputs& backward, const Outputs& reduced) const {
    const auto [B, T, C] = std::tie(problem_.B, problem_.T, problem_.C);
    check_finite(forward, {kType, DType::float32, DType::float32});
    check_finite(backward, {kType, kType, DType::float32, DType::float32});
    check_finite(reduced, std::vector(reduced.buffers.size(), DType::float32));
    Comparison y{"y"}, gk{"gk"}, gv{"gv"}, gw{"gw"}, gu{"gu"};
    std::vector<double> num(T), den(T);
    double largest_logit = 1, gy_times_v = 0;
    for (int64_t c = 0; c < C; ++c) {
      const double log_decay = -std::exp(double{tensors_.w[c]}), decay = std::exp(log_decay), u = tensors_.u[c];
      double g_log_decay = 0, gu_exact = 0;
      for (int64_t b = 0; b < B; ++b) {
        const auto of_state = [&](const std::vector<float>& values, int row) {
          return problem_.with_state ? double{values[(b * 3 + row) * C + c]} : 0.0;
        };
        const auto of = [&](const auto& values, int64_t t) {
          return static_cast<double>(to_real(reinterpret_cast<const Element*>(values.data())[(b * T + t) * C + c]));
        };
        const double max = of_state(tensors_.state, 1) == 0 ? -INFINITY : of_state(tensors_.state, 2);
        double num_t = max == -INFINITY ? 0 : of_state(tensors_.state, 0) * std::exp(max);
        double den_t = max == -INFINITY ? 0 : of_state(tensors_.state, 1) * std::exp(max);
        for (int64_t t = 0; t < T; ++t) {
          const double k = of(tensors_.k, t), v = of(tensors_.v, t), present = std::exp(u + k);
          num[t] = num_t;
          den[t] = den_t;
          y.add(of(forward.buffers[0], t), (num_t + present * v) / (den_t + present));
          num_t = decay * num_t + std::exp(k) * v;
          den_t = decay * den_t + std::exp(k);
          largest_logit = std::max({largest_logit, std::fabs(k), std::fabs(u + k)});
          gy_times_v = std::max(gy_times_v, std::fabs(of(tensors_.gy, t) * v));
        }
        // Relative to the max that forward gave to the final state.
        const float* const state_out = reinterpret_cast<const float*>(forward.buffers[2].data());
        const double unit = std::exp(-double{state_out[(b * 3 + 2) * C + c]});
        double gnum = of_state(tensors_.gstate_out, 0) * unit, gden = of_state(tensors_.gstate_out, 1) * unit;
        for (int64_t t = T; t-- > 0;) {
          const double k = of(tensors_.k, t), v = of(tensors_.v, t);
          const double present = std::exp(u + k), total = den[t] + present, y_t = (num[t] + present * v) / total;
          const double h = of(tensors_.gy, t) / total, gu_t = present * h * (v - y_t);
          gk.add(of(backward.buffers[0], t), gu_t + std::exp(k) * (v * gnum + gden));
          gv.add(of(backward.buffers[1], t), present * h + std::exp(k) * gnum);
          g_log_decay += decay * (num[t] * gnum + den[t] * gden);
          gu_exact += gu_t;
          gnum = decay * gnum + h;
          gden = decay * gden - h * y_t;
        }
      }
      if (reduced.buffers.empty()) continue;
      gw.add(reinterpret_cast<const float*>(reduced.buffers[0].data())[c], g_log_decay * log_decay);
      gu.add(reinterpret_cast<const float*>(reduced.buffers[1].data())[c], gu_exact);
    }
    // As tests/problems.py derives it.
    const double accumulated = 6 * std::ldexp(1.0, -24) * std::sqrt(static_cast<double>(T)) * (2 + largest_logit);
    const double rounding = std::ldexp(1.0, kType == DType::float32 ? -24 : -8);
    for (const auto& [comparison, least] : {std::pair{&y, 0.0}, {&gk, gy_times_v}, {&gv, 0.0}}) {
      comparison->require((accumulated + rounding) * std::max(comparison->largest, least));
    }
    for (const Comparison* comparison : {&gw, &gu}) {
      comparison->require((accumulated + std::ldexp(1.0, -24)) * std::max(comparison->largest, gy_times_v));
    }
  }

 private:
  static constexpr DType kType = kTypeOf<Element>;

  struct Comparison {
    const char* what;
    double worst = 0, largest = 0;

    void add(double found, double exact) {
      worst = std::max(worst, std::fabs(found - exact));
      largest = std::max(largest, std::fabs(exact));
    }
    void require(double allowed) const {
      if (!(worst <= allowed)) {
        fail(std::string(what) + " is off by " + std::to_string(worst) + ", " + std::to_string(allowed) +
             " is allowed");
      }
    }
  };

  void check_finite(const Outputs& out, const std::vector<DType>& dtypes) const {
    for (size_t i = 0; i < dtypes.size(); ++i) {
      const std::vector<char>& buffer = out.buffers[i];
      const size_t size = element_bytes(dtypes[i]);
      for (size_t at = 0; at < buffer.size(); at += size) {
        // The upper half of a float is a bfloat16.
        Bfloat16 upper;
        std::memcpy(&upper, buffer.data() + at + size - 2, 2);
        if (!std::isfinite(to_real(upper))) fail("output " + std::to_string(i) + " is not finite");
      }
    }
  }

  ChannelParameters parameters() const {
    return {tensors_.w.data(), tensors_.u.data(), DType::float32, DType::float32};
  }
  Sequence sequence(const std::vector<Element>& values) const {
    return {values.data(), problem_.T * problem_.C, problem_.C};
  }

  Plan plan_of(Operation operation) const {
    const int64_t shared = forward_shared_bytes(kType, problem_.warps) + kReservedShared;
    Plan plan = make_plan(operation, kType, problem_.B, problem_.T, problem_.C,
                          {.multiprocessors = 100,
                           .shared_per_block = 65536,
                           .shared_per_multiprocessor = 2 * shared,
                           .architecture = 900});
    if (problem_.chunk_tiles > 1) {
      plan.chunk_tiles = problem_.chunk_tiles;
      plan.chunks = plan_detail::ceil_div(plan_detail::ceil_div(problem_.T, plan.tile_steps), plan.chunk_tiles);
      plan.anchor = 1;
    }
    return plan;
  }

  template <class Kernel>
  void launch(const char* kernel, Operation operation, SequenceParams& params, Schedule schedule) const {
    const Plan plan = plan_of(operation);
    std::vector<Word> exchange(plan.exchange_bytes / sizeof(Word) + 1, ~Word{0});
    params.chunking = chunking_of(plan, problem_.B, exchange.data());
    run<Kernel>(pool_, kernel, params,
                {static_cast<unsigned>(plan.channel_tiles), static_cast<unsigned>(problem_.B),
                 static_cast<unsigned>(plan.chunks)},
                plan.threads, plan.shared_bytes, schedule);
  }

  Pool& pool_;
  const Problem problem_;
  Tensors<Element> tensors_;
};

// ---- commands ----

template <class Element>
void run_in_many_orders(Pool& pool, const Problem& problem, int seeds) {
  const Case<Element> tested(pool, problem);
  const Schedule in_order{.seed = 0, .resident = 1, .in_order = true};
  Outputs forward, backward;
  tested.run_forward(in_order, forward);
  tested.run_backward(in_order, forward, backward);
  tested.check(forward, backward, {});
  statistics.pauses = 0;
  for (int seed = 1; seed <= seeds; ++seed) {
    const Schedule schedule{.seed = static_cast<uint64_t>(seed), .resident = 2 + seed % 3, .in_order = false};
    Outputs forward_again, backward_again;
    tested.run_forward(schedule, forward_again);
    tested.run_backward(schedule, forward, backward_again);
    if (forward_again != forward || backward_again != backward) {
      fail("the result is another one with seed " + std::to_string(seed));
    }
  }
  std::printf("%d runs are equal to the one in order; %llu looks at messages found none yet\n", seeds,
              static_cast<unsigned long long>(statistics.pauses.load()));
  if (statistics.pauses == 0) fail("no block has waited for another one");
}

// Small, with every barrier and every kind of message: chunks that wait for several others, of keys that spread, then
// chunks of two tiles. With a fault planted in a kernel, the kernels before it run in order, and those after it not at
// all.
void run_all_once(Pool& pool) {
  const std::string& kernel = planted.kernel;
  const auto schedule_for = [&](const char* name, int resident) -> Schedule {
    if (kernel.empty() || kernel == name) return {.seed = 1, .resident = resident, .in_order = false};
    return {.seed = 0, .resident = 1, .in_order = true};
  };
  for (const int64_t chunk_tiles : {1, 2}) {
    const Problem problem{.B = 1,
                          .T = 140,
                          .C = 64,
                          .warps = 2,
                          .chunk_tiles = chunk_tiles,
                          .keys_spread = chunk_tiles == 1,
                          .with_state = true};
    const Case<Bfloat16> tested(pool, problem);
    Outputs forward, backward, reduced;
    tested.run_forward(schedule_for("forward", 3), forward);
    if (kernel == "forward") continue;
    tested.run_backward(schedule_for("backward", 2), forward, backward);
    if (chunk_tiles == 2 && kernel != "backward") tested.run_reduce(schedule_for("reduce", 1), backward, reduced);
    tested.check(forward, backward, reduced);
  }
}

// Data beside a flag, where the order of the flag matters.
template <std::memory_order kStore, std::memory_order kLoad>
void publish_by_flag() {
  double data = 0;
  std::atomic<bool> is_written{false};
  std::thread reader([&] {
    while (!is_written.load(kLoad)) std::this_thread::yield();
    if (data != 1) fail("the flag came before the data");
  });
  data = 1;
  is_written.store(true, kStore);
  reader.join();
}

int main_of(const std::vector<std::string>& arguments) {
  Pool pool;
  const std::string what = arguments.empty() ? "" : arguments[0];
  if (what == "run" && arguments.size() == 3) {
    const std::string& name = arguments[1];
    const int seeds = std::atoi(arguments[2].c_str());
    if (name == "partials") {
      run_in_many_orders<Bfloat16>(pool, {1, 560, 80, 2, 1, false, false}, seeds);
    } else if (name == "anchors") {
      run_in_many_orders<float>(pool, {1, 560, 66, 1, 1, false, true}, seeds);
    } else if (name == "spread_keys") {
      run_in_many_orders<float>(pool, {1, 300, 64, 8, 1, true, true}, seeds);
    } else if (name == "several_tiles") {
      run_in_many_orders<Bfloat16>(pool, {2, 300, 63, 2, 2, true, true}, seeds);
    } else {
      fail("no such problem");
    }
  } else if (what == "barriers") {
    run_all_once(pool);
    for (const auto& [kernel, sites] : statistics.sites) {
      for (const auto& [line, kind] : sites) std::printf("%s %s %s\n", kernel.c_str(), line.c_str(), kind);
    }
  } else if (what == "without-order" && arguments.size() > 2) {
    planted.kernel = arguments[1];
    for (size_t i = 2; i < arguments.size(); ++i) planted.lines.insert(arguments[i]);
    run_all_once(pool);
    for (const std::string& line : planted.lines) {
      if (!statistics.sites[planted.kernel].contains(line)) fail("no barrier there");
    }
  } else if (what == "plain-stores" || what == "plain-loads" || what == "late-copies") {
    planted.plain_stores = what == "plain-stores";
    planted.plain_loads = what == "plain-loads";
    planted.late_copies = what == "late-copies";
    run_all_once(pool);
  } else if (what == "relaxed-flag") {
    publish_by_flag<std::memory_order_relaxed, std::memory_order_relaxed>();
  } else if (what == "ordered-flag") {
    publish_by_flag<std::memory_order_release, std::memory_order_acquire>();
  } else if (what != "nothing") {
    std::printf(
        "memory_order run PROBLEM SEEDS | barriers | without-order KERNEL FILE:LINE... | plain-stores | plain-loads | "
        "late-copies | relaxed-flag | ordered-flag | nothing\n");
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace wkv

// The first report is enough.
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

int main(int count, char** arguments) { return wkv::main_of({arguments + 1, arguments + count}); }
