// Every number that is a choice, with its evidence. No GPU has confirmed one yet: they are counted or modelled.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace wkv {

enum class Operation { forward, backward };

// A row of a tile is 128 bytes or more, a whole cache line.
inline constexpr int kWarpThreads = 32;
inline constexpr int kTileChannels = 2 * kWarpThreads;

// Rows of a tile's channels in float32, in shared memory: of the channels log2 of the decay, decay and bonus, of a
// state or a message num, den and exponent.
inline constexpr int kRowBytes = 4 * kTileChannels;
inline constexpr int kChannelRows = 3;
inline constexpr int kStateBytes = 3 * kRowBytes;
inline constexpr int kTicketBytes = 16;

// Steps that a thread walks at once. Counted: what it does besides weighs half as much with twice as many. What it
// keeps of them stays in registers, 64 of 32 steps forward and 96 of 16 backward, which have the state and the weight
// of each.
inline constexpr int kForwardSteps = 32;
inline constexpr int kBackwardSteps = 16;
inline constexpr int kDoubleSteps = 16;

// Forward takes as many warps for a tile, a power of two, as leave room for two blocks on a multiprocessor, one of
// which works while the other waits: these at most, by what shared memory has room for. Registers bound it, too: 128
// for each of 2 * 256 threads, with which nvcc 13.0 spills on Blackwell; or, of 128 threads, 168 for each of 3 blocks.
// In float32 nvcc 13.0 spills with these but for Hopper, which alone has shared memory for 3 blocks.
constexpr int forward_warps(DType dtype, int64_t architecture) {
  return dtype != DType::float32 && (architecture == 800 || architecture == 900) ? 8 : 4;
}
constexpr int forward_blocks(DType dtype, int64_t architecture) {
  const bool has_spills = dtype == DType::float32 && architecture != 900;
  return forward_warps(dtype, architecture) == 8 || has_spills ? 2 : 3;
}
// So few have room for messages and their sums in the place of k.
constexpr int forward_least_warps(DType dtype) { return dtype == DType::float32 ? 1 : 2; }

// A tile of backward lies between two checkpoints. Three blocks fit if a thread takes 168 registers; by shared memory
// they do in 16 bits on every architecture but Turing, and in float32 on those of servers, where nvcc 13.0 spills for
// all but Hopper.
inline constexpr int kBackwardWarps = 4;
constexpr int backward_blocks(DType dtype, int64_t architecture) {
  if (dtype == DType::float32) return architecture == 900 ? 3 : 2;
  return architecture < 800 ? 2 : 3;
}
static_assert(kBackwardWarps * kBackwardSteps == checkpoint_interval(DType::float32));

// Every so-many-th chunk publishes the state after it, the others what they alone sum up to: a chunk waits for at most
// so many messages, all at once. The sum over a long sequence is handed from anchor to anchor, about 1 µs each:
// modelled.
inline constexpr int kAnchor = 8;

// With so many columns for each multiprocessor, chunks that are to start have predecessors that have ended. Then every
// chunk is an anchor, and chunks may have several tiles, as long as there are so many blocks for each multiprocessor to
// even out the end of the launch: modelled.
inline constexpr int64_t kColumnsPerMultiprocessor = 4;
inline constexpr int64_t kBlocksPerMultiprocessor = 32;

// A kernel of one thread for each channel.
inline constexpr int kPlainThreads = 128;
inline constexpr int kDoubleThreads = 32;

// Of the threads of a reduction, so many lie along channels and along rows.
inline constexpr int kReduceLanes = 32;
inline constexpr int kReduceGroups = 32;

// The sums of a float64 thread's walk that lie in shared memory: states every 16 steps of an interval.
inline constexpr int kDoubleSegments = static_cast<int>(checkpoint_interval(DType::float64)) / kDoubleSteps;

}  // namespace wkv
