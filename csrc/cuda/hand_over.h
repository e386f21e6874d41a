// How the blocks of one launch hand states from chunk to chunk, in a single pass over the data.
//
// The blocks of a column, which have the same channels of the same sequence, take their chunks in the order in which
// they begin: whatever a block waits for belongs to one that runs already and waits only for still earlier ones, so
// that no wait is for ever, however few blocks the device holds. A chunk makes known either what it alone gives or, as
// the last one of its group, what all chunks up to it give. A chunk waits for the last one of the group before, and for
// those of its own group before it, and joins what they gave in their order: the result does not depend on who came
// first.
#pragma once

#include "block.h"

#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

namespace wkv {

// The threads of a warp see what each of them has seen and written.
WKV_HD void meet() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

// Where a block stands in its column. One thread finds out for all.
struct Place {
  uint32_t column, position;       // position: of its chunk in the order of handing over
  uint32_t first_heard, per_span;  // it hears of the positions from here to its own, each of its spans of so many
  bool starts_group, ends_group, hears_group, is_heard;

  WKV_HD static Place of(uint32_t column, uint32_t position, uint32_t group, int64_t chunks, int block_spans) {
    const uint32_t in_group = position % group, spans = static_cast<uint32_t>(block_spans);
    const bool hears_group = position >= group;
    const uint32_t first_heard = hears_group ? position - in_group - 1 : 0;
    return {column,        position,
            first_heard,   (position - first_heard + spans - 1) / spans,
            in_group == 0, in_group + 1 == group,
            hears_group,   position + 1 < chunks};
  }
};
static_assert(sizeof(Place) <= kPlaceBytes);

// A counter for each column, of the blocks that have begun, and a flag for each block.
struct Signals {
  HandOver hand_over;
  uint32_t columns;

  WKV_HD Signals(const HandOver& hand_over, int64_t B)
      : hand_over(hand_over), columns(static_cast<uint32_t>(B) * hand_over.channel_tiles) {}

  WKV_HD Place take_place(BlockIndex block, int64_t chunks, int spans) const {
    const uint32_t column = block.y * hand_over.channel_tiles + block.x;
#if defined(__CUDA_ARCH__)
    const cuda::atomic_ref<uint32_t, cuda::thread_scope_device> begun(hand_over.signals[column]);
    const uint32_t position = begun.fetch_add(1, cuda::memory_order_relaxed);
#else
    const uint32_t position = hand_over.signals[column]++;
#endif
    return Place::of(column, position, hand_over.group, chunks, spans);
  }

  // What this thread's warp wrote before its last `meet` is seen by whoever awaits the flag.
  WKV_HD void raise(uint32_t column, uint32_t position) const {
#if defined(__CUDA_ARCH__)
    cuda::atomic_ref<uint32_t, cuda::thread_scope_device>(flag(column, position)).store(1, cuda::memory_order_release);
#else
    flag(column, position) = 1;
#endif
  }

  WKV_HD void await(uint32_t column, uint32_t position) const {
#if defined(__CUDA_ARCH__)
    const cuda::atomic_ref<uint32_t, cuda::thread_scope_device> raised(flag(column, position));
    while (raised.load(cuda::memory_order_acquire) == 0) __nanosleep(20);
#else
    // On the host blocks run one after the other, in the order of their positions.
    if (flag(column, position) == 0) __builtin_trap();
#endif
  }

 private:
  WKV_HD uint32_t& flag(uint32_t column, uint32_t position) const {
    return hand_over.signals[(1 + position) * columns + column];
  }
};

// What one chunk has to do with the others. All threads of a warp use it together.
struct Neighbours {
  Signals signals;
  Place place;

  // The first chunk knows all there is when it knows its own; the last one is heard by nobody.
  WKV_HD bool gives_own() const { return place.is_heard && (place.position == 0 || !place.ends_group); }
  WKV_HD bool gives_all() const { return place.is_heard && place.position != 0 && place.ends_group; }
  // Of those that are heard.
  WKV_HD bool ended_group(uint32_t position) const { return place.hears_group && position == place.first_heard; }

  // What each span of the block hears of.
  struct Part {
    uint32_t begin, end;

    WKV_HD bool empty() const { return begin >= end; }
    WKV_HD int count() const { return static_cast<int>(end - begin); }
  };
  WKV_HD Part heard_by(int span) const {
    const uint32_t begin = place.first_heard + static_cast<uint32_t>(span) * place.per_span;
    const uint32_t end = begin + place.per_span;
    return {begin, end < place.position ? end : place.position};
  }

  // All of the part have spoken after this.
  WKV_HD void listen(Part part, int lane) const {
    const uint32_t position = part.begin + static_cast<uint32_t>(lane);
    if (position < part.end) signals.await(place.column, position);
    meet();
  }
  WKV_HD void speak(int lane) const {
    meet();
    if (lane == 0) signals.raise(place.column, place.position);
  }
};

}  // namespace wkv
