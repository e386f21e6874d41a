// The kernels' parameters; null stands for an absent argument. Pointers marked "state" are state_bytes wide, those
// marked "element" are of the kernel's type; outputs are contiguous.
#pragma once

#include <cstdint>
#include <iterator>

#include "../common/params.h"

namespace wkv {

// w and u as the caller has them, [C] each, contiguous; kernels convert.
struct ChannelParameters {
  const void *w, *u;
  DType w_dtype, u_dtype;
};

// The mapping of a launch's blocks to the problem, and the memory of look-back between the chunks of a column, the same
// channels of the same sequence: lookback.h.
struct Chunking {
  uint32_t first_batch;        // of this launch; a grid has no room for more than 65535 sequences
  uint32_t chunks;             // of a sequence
  int32_t chunk_tiles;         // tiles of a chunk
  uint32_t channel_tiles;      // columns of a sequence
  uint32_t anchor;             // a power of two: every `anchor`-th chunk publishes its inclusive state
  uint32_t* tickets;           // for each column, of the chunks that blocks have taken; null where there is one chunk
  void* messages;              // of each column's chunks but the last
  uint32_t log2_packed_steps;  // of the steps of a packed sequence's chunk
};

// The params of forward and backward.
struct SequenceParams {
  ChannelParameters parameters;
  uint32_t B, T, C;        // below 2^31; B·T/64 and B·C/64 below 2^32
  uint32_t N;              // sequences: B, or those that are packed
  Boundaries boundaries;   // mixing: of packed sequences, in the range of T
  Sequence inputs[3];      // element [B, T, C]: k, v and, backward, gy
  Sequence r;              // mixing: likewise, or null data where nothing gates y
  const void* state;       // state [N, 3, C], or null for an empty one
  void* outputs[2];        // element [B, T, C]: y, or gk and gv
  void* gr;                // mixing, backward: element [B, T, C], or null as r
  void* checkpoints;       // state [B, rows, 3, C], or null: written by forward, read by backward
  void* state_out;         // state [N, 3, C]: the final state, or the gradient of the first one
  const void* gstate_out;  // backward: state [N, 3, C], the gradient of the final state, or null for zero
  void* partials;          // backward: state [B, chunks, 2, C], of the gradients of the log-decay and of u
  Chunking chunking;
};

// The params of the bidirectional kernels, in whose parameters w is the log-decay itself.
//
// A row of a table is an interval, and has (num, den, exponent) of the steps before it and of those after it: first
// their sums within each interval, then, joined, what comes in to it from either side. Checkpoints are such a table.
struct BiParams : SequenceParams {
  uint32_t rows;         // of the table, over all sequences
  void* adjoints;        // backward: state [B, rows, 6, C], a table of the adjoints of the states
  bool joins_adjoints;   // which table is joined
  void* steps;           // float64: [B, T, step_height, C], what is kept of each step
  uint32_t step_height;  // 3, backward 6
};

struct ReduceParams {
  ChannelParameters parameters;
  bool is_raw = true;  // w is the raw decay, and not the log-decay itself
  int64_t C;
  const void* partials;  // state [rows, 2, C]
  int64_t rows;
  void *gw, *gu;  // as w and u
};

struct StepParams {
  ChannelParameters parameters;
  int64_t B, C;
  const void *k, *v;  // element [B, C], channels contiguous
  const void* r;      // likewise, or null where nothing gates y
  int64_t k_stride, v_stride, r_stride;
  void* y;      // element [B, C]
  void* state;  // state [B, 3, C] of any strides, in elements
  int64_t state_batch_stride, state_row_stride, state_channel_stride;
};

enum class Kernel {
#define WKV_KERNEL(name, Type) name,
#include "kernels.def"
#undef WKV_KERNEL
};

inline constexpr const char* kKernelNames[] = {
#define WKV_KERNEL(name, Type) #name,
#include "kernels.def"
#undef WKV_KERNEL
};
inline constexpr int kKernels = static_cast<int>(std::size(kKernelNames));
inline const char* name_of(Kernel kernel) { return kKernelNames[static_cast<int>(kernel)]; }

}  // namespace wkv
