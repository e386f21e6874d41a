// How the blocks of one launch hand states from chunk to chunk, in a single pass over the data.
//
// A block takes a number when it begins, and numbers go chunk by chunk: whatever a block waits for belongs to a lower
// number, hence to a block that runs already and waits only for still lower ones, so that no wait is for ever, however
// few blocks the device holds. A chunk makes known either what it alone gives or, as the last one of its group, what
// all chunks up to it give. A chunk waits for the last one of the group before, and for those of its own group before
// it, and joins what they gave in their order: the result does not depend on who came first.
#pragma once

#include "block.h"

#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

namespace wkv {

struct Signals {
  uint32_t* words;  // the counter of blocks, then the flags

  WKV_HD uint32_t take_number() const {
#if defined(__CUDA_ARCH__)
    return cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(words[0]).fetch_add(1, cuda::memory_order_relaxed);
#else
    return words[0]++;
#endif
  }

  // What this thread's warp wrote before its last `meet` is seen by whoever awaits the flag.
  WKV_HD void raise(int64_t flag) const {
#if defined(__CUDA_ARCH__)
    cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(words[1 + flag]).store(1, cuda::memory_order_release);
#else
    words[1 + flag] = 1;
#endif
  }

  WKV_HD void await(int64_t flag) const {
#if defined(__CUDA_ARCH__)
    const cuda::atomic_ref<uint32_t, cuda::thread_scope_device> word(words[1 + flag]);
    while (word.load(cuda::memory_order_acquire) == 0) __nanosleep(20);
#else
    // On the host blocks run one after the other, in the order of their numbers.
    if (words[1 + flag] == 0) __builtin_trap();
#endif
  }
};

// The threads of a warp see what each of them has seen and written.
WKV_HD void meet() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

// Where a block stands: its number, its chunk by the order of handing over, and which channels of which sequence.
struct Place {
  uint32_t number, position, b, tile;

  WKV_HD static Place of(uint32_t number, int64_t B, int64_t tiles) {
    const uint32_t columns = static_cast<uint32_t>(B * tiles), column = number % columns;
    return {number, number / columns, column / static_cast<uint32_t>(tiles), column % static_cast<uint32_t>(tiles)};
  }
};

// How many chunks a thread asks for at once; backward has few registers left.
inline constexpr int kHandOverBatch = 1;

// What one chunk has to do with the others. All threads of a warp use it together.
struct Neighbours {
  Signals signals;
  Place place;
  int64_t columns;
  uint32_t group;
  int64_t chunks;

  // The first chunk knows all there is when it knows its own; the last one is heard by nobody.
  WKV_HD bool gives_own() const { return is_heard() && (place.position == 0 || !last_of_group()); }
  WKV_HD bool gives_all() const { return is_heard() && !gives_own(); }
  WKV_HD bool is_heard() const { return place.position + 1 < chunks; }
  WKV_HD bool last_of_group() const { return place.position % group == group - 1; }

  // The positions that this chunk hears of go from here to its own; each of the block's spans takes a part of them, in
  // order.
  WKV_HD int64_t first_heard() const {
    return place.position < group ? 0 : place.position - place.position % group - 1;
  }
  WKV_HD bool hears_one() const { return first_heard() + 1 == place.position; }
  struct Part {
    int64_t begin, end;
  };
  WKV_HD Part heard_by(int span, int spans) const {
    const int64_t first = first_heard();
    const int count = static_cast<int>(place.position - first);
    return {first + count * span / spans, first + count * (span + 1) / spans};
  }

  // All of the part have spoken after this.
  WKV_HD void listen(Part part, int lane) const {
    const int64_t position = part.begin + lane;
    if (position < part.end) signals.await(place.number - (place.position - position) * columns);
    meet();
  }
  WKV_HD void speak(int lane) const {
    meet();
    if (lane == 0) signals.raise(place.number);
  }
};

}  // namespace wkv
