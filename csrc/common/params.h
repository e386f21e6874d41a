// What every kernel is told: sizes, strides, element type and raw pointers. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace wkv {

enum class DType { float32, float16, bfloat16, float64 };

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// States, parameters and every accumulation: float64 for float64, float32 for the rest.
constexpr int64_t state_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Backward replays from a saved state every so many steps: 3 · state_bytes / interval = 12/64 bytes per element.
constexpr int64_t checkpoint_interval(DType dtype) { return 16 * state_bytes(dtype); }

// The first interval starts from the given state, so it needs no checkpoint. The state after the last step is one,
// because the gradient that arrives at it is relative to its max.
template <class Integer>
constexpr Integer checkpoint_count(DType dtype, Integer T) {
  // Unsigned, so that it is a shift.
  using Unsigned = std::make_unsigned_t<Integer>;
  const auto interval = static_cast<Unsigned>(checkpoint_interval(dtype));
  return static_cast<Integer>((static_cast<Unsigned>(T) + interval - 1) / interval);
}

// Of sequence b, the state after t steps: a multiple of the interval, or all T.
template <class Integer>
constexpr Integer checkpoint_row(DType dtype, Integer T, Integer b, Integer t) {
  return b * checkpoint_count(dtype, T) + checkpoint_count(dtype, t) - 1;
}

// A [B, T, C] tensor whose channels are contiguous.
struct Sequence {
  const void* data;
  int64_t batch_stride, time_stride;  // in elements
};

// Pointers marked "state" are state_bytes wide, those marked "element" are of `dtype`; outputs are contiguous.
struct ForwardProblem {
  DType dtype;
  int64_t B, T, C;
  Sequence k, v;      // element [B, T, C]
  void* y;            // element [B, T, C] or null for the state alone
  void* state_out;    // state [B, 3, C]
  void* checkpoints;  // state [B, checkpoint_count, 3, C] or null
};

struct StepProblem {
  DType dtype;
  int64_t C;
  Sequence k, v;  // element [B, 1, C]
  Sequence r;     // element [B, 1, C], or null where nothing gates y
  void* y;        // element [B, C]
  void* state;    // state [B, 3, C], overwritten by the one after the token
};

struct BackwardProblem {
  DType dtype;
  int64_t B, T, C;
  Sequence k, v, gy;
  const void* state;        // state [B, 3, C], the first one
  const void* checkpoints;  // as forward left them
  void* gw;                 // state [C], with respect to the raw decay
  void* gu;                 // state [C]
  void* gk;                 // element [B, T, C]
  void* gv;                 // element [B, T, C]
};

}  // namespace wkv
