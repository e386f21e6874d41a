// From a plan to kernel launches, as data: which kernel, how many threads, how much shared memory, which arguments. The
// CUDA operators launch them on a stream; tests run the same ones on the CPU.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "wkv_plan.h"
#include "wkv_problem.h"

namespace wkv {

// w and u as the caller has them, [C] each, contiguous; kernels convert.
struct ChannelParameters {
  const void *w, *u;
  DType w_dtype, u_dtype;
};

// ---- what the kernels are given; null pointers where the caller has nothing ----

// In a single pass the blocks of a launch hand states from chunk to chunk: docs/kernels.md.
struct HandOver {
  uint32_t* signals;  // Plan::signal_count, all zero before the launch
  uint32_t channel_tiles;
  uint32_t group;  // chunks that start from the same state before them
};

// The kernels "summarise_states", "forward" and "forward_single_pass". `chunk_states` [B, chunks - 1, 3, C] has the
// state before chunk i + 1, once carried; before that, what chunk i alone sums up to.
struct ForwardArguments {
  ChannelParameters parameters;
  int64_t B, T, C;
  Sequence k, v;
  const void* state;  // or null for an empty one
  void* y;
  void* state_out;
  void* checkpoints;  // or null
  void* chunk_states;
  int64_t chunk_len, chunks;
  int buffers;  // Plan::buffers
  HandOver hand_over;
};

struct CarryStatesArguments {
  ChannelParameters parameters;
  int64_t C;
  void* chunk_states;
  int64_t chunk_len, chunks;
};

// The kernels "summarise_adjoints", "backward" and "backward_single_pass". `chunk_adjoints` [B, chunks - 1, 2, C] has
// the gradient of (num, den) after chunk i, once carried; before that, what chunk i + 1 alone gives. `partials` [B,
// chunks, 2, C] has the gradients of log_decay and u.
struct BackwardArguments {
  ChannelParameters parameters;
  int64_t B, T, C;
  Sequence k, v, gy;
  const void* state;  // or null for an empty one
  const void* checkpoints;
  const void* gstate_out;  // state [B, 3, C], or null for zero
  void* gk;
  void* gv;
  void* gstate;
  void* chunk_adjoints;
  void* partials;
  int64_t chunk_len, chunks;
  HandOver hand_over;
};

struct CarryAdjointsArguments {
  ChannelParameters parameters;
  int64_t T, C;
  const void* checkpoints;
  void* chunk_adjoints;
  int64_t chunk_len, chunks;
};

struct ReduceArguments {
  ChannelParameters parameters;
  int64_t C;
  const void* partials;
  int64_t rows;  // B · chunks
  void* gw;      // as w and u
  void* gu;
};

struct ClearArguments {
  uint32_t* words;
  int64_t count;
};

struct StepArguments {
  ChannelParameters parameters;
  int64_t B, C;
  const void *k, *v;  // element [B, C], channels contiguous
  const void* r;      // likewise, or null where nothing gates y
  int64_t k_stride, v_stride, r_stride;
  void* y;
  void* state;  // state [B, 3, C] of any strides, in elements
  int64_t state_batch_stride, state_row_stride, state_channel_stride;
};

// Of the threads of a block of the kernel "reduce", so many lie along channels and along rows.
inline constexpr int kReduceLanes = 32;
inline constexpr int kReduceGroups = 32;

struct Extent {
  unsigned x, y, z;
};

enum class Kernel {
  summarise_states,
  carry_states,
  forward,
  forward_single_pass,
  summarise_adjoints,
  carry_adjoints,
  backward,
  backward_single_pass,
  reduce,
  clear,
  step
};

const char* name_of(Kernel kernel);

struct Launch {
  Kernel kernel;
  DType dtype;
  Extent grid, block;
  int shared_bytes;
  std::variant<ForwardArguments, CarryStatesArguments, BackwardArguments, CarryAdjointsArguments, ReduceArguments,
               ClearArguments, StepArguments>
      arguments;
};

// `workspace` has plan.workspace_bytes; the fields of the arguments that point into it, and chunk_len and chunks, are
// filled in here. Nothing may be empty: B, T and C are at least 1.
std::vector<Launch> forward_launches(const Plan& plan, ForwardArguments arguments, void* workspace);
std::vector<Launch> backward_launches(const Plan& plan, BackwardArguments arguments, void* gw, void* gu,
                                      void* workspace);
std::vector<Launch> step_launches(DType dtype, const StepArguments& arguments);

}  // namespace wkv
