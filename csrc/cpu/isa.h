// The interface between the CPU operator, which cuts the work, and its kernels, which exist once per instruction set.
// Pointers marked "state" are state_bytes wide, those marked "element" are of `dtype`; all but sequences are
// contiguous.
#pragma once

#include <array>

#include "plan.h"

namespace wkv::cpu {

// One row for each parameter, state [C].
struct Channels {
  const void* log_decay;  // -exp(w)
  const void* u;
  const void* decay;  // exp(log_decay)
  const void* bonus;  // exp(u)
};

// The parameters that every operation has.
struct Params {
  DType dtype;
  int64_t B, T, C;
  int64_t N;      // sequences: B, or those that are packed into B = 1
  Sequence k, v;  // element [B, T, C]; T is 1 in a step
  Sequence r;     // likewise, or null where nothing gates y
  Channels channels;
};

struct ForwardParams : Params {
  void* y;            // element [B, T, C], or null: the kernel then moves `states` and writes nothing else
  const void* state;  // state [N, 3, C], the first ones, or null where they are empty
  void* states;       // state [rows, 3, C]: that before each chunk of a cut sequence, overwritten by the one after it
  void* state_out;    // state [N, 3, C]
  void* checkpoints;  // state [rows, 3, C], or null
};

struct StepParams : Params {
  void* y;      // element [B, C]
  void* state;  // state [B, 3, C], overwritten by the one after the token
};

struct BackwardParams : Params {
  Sequence gy;              // element [B, T, C]
  const void* state;        // as forward had it
  const void* checkpoints;  // as forward left them
  const void* gstate_out;   // state [N, 3, C], or null for zero
  void* gstate;             // state [N, 3, C]
  void* adjoints;      // state [rows, 2, C]: of (num, den) after each chunk of a cut sequence, overwritten by the one
                       // before it
  double* partials;    // [rows, 2, C]: the gradients of log_decay and u are added; null: only `adjoints` are written
  void *gk, *gv, *gr;  // element [B, T, C]; gr null where r is
};

// Of the bidirectional operator. Time is not cut, so that an item is a column of a whole sequence.
struct BiForwardParams : Params {
  void* y;      // element [B, T, C]
  void* sides;  // state [rows, 2, 3, C]: those before and after each interval, as the checkpoints are
};

struct BiBackwardParams : Params {
  Sequence gy;        // element [B, T, C]
  const void* sides;  // as forward left them
  void* adjoints;     // state [rows, 2, C]: of (num, den) after the first step of each interval
  double* partials;   // as in backward
  void *gk, *gv, *gr;
};

struct Kernels {
  const char* name;
  // Fills the last two of the rows [4, C] of Channels from the first two.
  void (*exponentiate)(DType dtype, int64_t C, void* rows);
  void (*forward)(const ForwardParams& params, const WorkItem& item);
  void (*step)(const StepParams& params, const WorkItem& item);
  void (*backward)(const BackwardParams& params, const WorkItem& item);
  void (*bi_forward)(const BiForwardParams& params, const WorkItem& item);
  void (*bi_backward)(const BiBackwardParams& params, const WorkItem& item);
  // Ends a thread's items: what it has written past the caches is then seen by all.
  void (*finish)();
};

// Null where the compiler or the processor's family has no such instruction set.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

// From the smallest instruction set to the largest.
inline std::array<const Kernels*, 3> built_kernels() { return {kernels_baseline(), kernels_avx2(), kernels_avx512()}; }

// The kernels of the largest instruction set that is built, that the processor has, and that ATEN_CPU_CAPABILITY,
// torch's variable for the same purpose, allows: default, avx2 or avx512.
const Kernels& selected_kernels();

}  // namespace wkv::cpu
