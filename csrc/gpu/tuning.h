// Every tuning constant, with its evidence. None is confirmed on a GPU yet: they are counted or modelled.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace wkv {

enum class Operation { forward, backward, mixing_forward, mixing_backward, summary, adjoint_summary };
constexpr bool is_forward(Operation operation) {
  return operation == Operation::forward || operation == Operation::mixing_forward || operation == Operation::summary;
}
constexpr bool is_mixing(Operation operation) {
  return operation == Operation::mixing_forward || operation == Operation::mixing_backward ||
         operation == Operation::adjoint_summary;
}
constexpr bool has_partials(Operation operation) {
  return operation == Operation::backward || operation == Operation::mixing_backward;
}

// A row of a tile is 128 bytes or more, a whole cache line.
inline constexpr int kWarpThreads = 32;
inline constexpr int kTileChannels = 2 * kWarpThreads;

// Rows of a tile's channels in float32, in shared memory: of the channels log2 of the decay, decay and bonus, of a
// state or a message num, den and exponent.
inline constexpr int kRowBytes = 4 * kTileChannels;
inline constexpr int kChannelRows = 3;
inline constexpr int kStateBytes = 3 * kRowBytes;
inline constexpr int kTicketBytes = 16;
// Of the mixing kernels, where the chunk of a block lies.
inline constexpr int kPlaceBytes = 48;

// Steps of a subchunk. Counted: with twice as many, the other work of a thread costs half as much per step. The values
// kept for the steps stay in registers: 64 for 32 steps forward, and 96 for 16 backward, the state and the weight of
// each.
inline constexpr int kForwardSteps = 32;
inline constexpr int kBackwardSteps = 16;
inline constexpr int kDoubleSteps = 16;

// Every kAnchor-th chunk publishes its inclusive state, the others their partial: a chunk waits for at most kAnchor
// messages, all at once. The state of a long sequence passes from anchor to anchor, about 1 µs each: modelled.
inline constexpr int kAnchor = 8;

// The most warps of a forward tile. The plan takes as many, a power of two, as leave shared memory for two blocks on a
// multiprocessor, one of which works while the other waits. Registers are a further bound: 128 for each of 2 * 256
// threads, with which nvcc 13.0 spills on Blackwell; or 168 for each thread of 3 blocks of 128. In float32 nvcc 13.0
// spills with 168 except on Hopper, which alone has shared memory for 3 blocks.
constexpr int forward_warps(DType dtype, int64_t architecture) {
  return dtype != DType::float32 && (architecture == 800 || architecture == 900) ? 8 : 4;
}
constexpr int forward_blocks(DType dtype, int64_t architecture) {
  const bool has_spills = dtype == DType::float32 && architecture != 900;
  return forward_warps(dtype, architecture) == 8 || has_spills ? 2 : 3;
}
// Rows for messages, the warps' sums and the tile's own message in forward.
constexpr int forward_message_rows(int warps) { return 3 * (kAnchor + warps); }
// The fewest warps of a forward tile: the place of k must hold these rows.
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
// Whether backward stages r in shared memory beside k, v and gy. In float32 four inputs are more than Turing has, and
// leave room for one block instead of two on 8.6, 8.9 and 12.0: threads read and write there step by step.
constexpr bool backward_stages_gate(DType dtype, int64_t architecture) {
  return element_bytes(dtype) == 2 || architecture == 800 || architecture == 900 || architecture == 1000;
}

// From kColumnsPerMultiprocessor columns for each multiprocessor on, the predecessors of a chunk have ended when it
// starts. Then every chunk is an anchor, and chunks may have several tiles while kBlocksPerMultiprocessor blocks remain
// for each multiprocessor to balance the end of the launch: modelled.
inline constexpr int64_t kColumnsPerMultiprocessor = 4;
inline constexpr int64_t kBlocksPerMultiprocessor = 32;

// Steps of a bidirectional kernel's subchunk, whose tile is an interval. Counted: what a thread does once costs as much
// as six to twelve of its steps. Of a step `bi_backward` keeps four pairs, `bi_forward` and `bi_adjoint_sums` keep two
// and `bi_sums` none for long: so many steps take all registers, of which a multiprocessor has enough for 8 warps. In
// float32 the shared memory of most does not have room for the tiles of so many warps.
constexpr int bi_steps(DType dtype) { return element_bytes(dtype) == 2 ? 32 : 16; }
constexpr int bi_sums_steps(DType dtype) { return 2 * bi_steps(dtype); }
inline constexpr int kBiBackwardSteps = 16;
// Rows of its sums.
inline constexpr int kBiRowsOfWarp = 6;
constexpr int bi_warps(int steps) { return static_cast<int>(checkpoint_interval(DType::float32)) / steps; }

// Rows of a grid for the chunks of packed sequences, which may be more than a grid's y or z has room for.
inline constexpr unsigned kPackedRows = 32768;

// Threads of a block in the kernels of one thread for each channel.
inline constexpr int kPlainThreads = 128;
inline constexpr int kDoubleThreads = 32;

// Threads of a reduction's block along channels and along rows.
inline constexpr int kReduceLanes = 32;
inline constexpr int kReduceGroups = 32;

// States that float64's backward keeps in shared memory for each thread: one every 16 steps of an interval.
inline constexpr int kDoubleSegments = static_cast<int>(checkpoint_interval(DType::float64)) / kDoubleSteps;

}  // namespace wkv
