// Element types, what they are accumulated in, checkpoints, and how a sequence lies in memory. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace wkv {

enum class DType { float32, float16, bfloat16, float64 };
inline constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16, DType::float64};
inline constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16", "float64"};
constexpr const char* name_of(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

// The C++ type of an element; the 16-bit types are those of the backend.
template <DType dtype, class Half, class Bfloat16>
using ElementOf = std::tuple_element_t<static_cast<int>(dtype), std::tuple<float, Half, Bfloat16, double>>;

// Calls function(dtype), with the dtype as a constant: its type has it as `value`.
template <class Function>
constexpr auto with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return function(std::integral_constant<DType, DType::float32>{});
    case DType::float16:
      return function(std::integral_constant<DType, DType::float16>{});
    case DType::bfloat16:
      return function(std::integral_constant<DType, DType::bfloat16>{});
    default:
      return function(std::integral_constant<DType, DType::float64>{});
  }
}

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// States, parameters and every accumulation: float64 for float64, float32 for the rest.
constexpr DType state_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
constexpr int64_t state_bytes(DType dtype) { return element_bytes(state_type(dtype)); }
template <DType dtype>
using RealOf = std::conditional_t<dtype == DType::float64, double, float>;

// Steps between the saved states that backward replays from: 3 · state_bytes / interval = 12/64 bytes per element.
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

// The row of sequence b's state after t steps, t being a multiple of the interval or T.
template <class Integer>
constexpr Integer checkpoint_row(DType dtype, Integer T, Integer b, Integer t) {
  return b * checkpoint_count(dtype, T) + checkpoint_count(dtype, t) - 1;
}

// A [B, T, C] tensor whose channels are contiguous.
struct Sequence {
  const void* data;
  int64_t batch_stride, time_stride;  // in elements
};

// ---- packed sequences: N of them, one after the other in the `total` steps of a [1, total, C] tensor ----

// Sequence n has the steps from the n-th boundary to the next one, [N + 1], int32 or int64; null data: not packed.
struct Boundaries {
  const void* data;
  bool is_wide;  // int64

  constexpr int64_t operator[](int64_t n) const {
    return is_wide ? static_cast<const int64_t*>(data)[n] : static_cast<const int32_t*>(data)[n];
  }
};

// Rows for pieces of `steps` steps, which begin anew in each sequence: packed sequence n, whose first step is `begin`,
// has those from the returned one on, and `begin` = total, n = N gives the count of all. They do not overlap:
// ceil(length / steps) <= floor((begin + length) / steps) - floor(begin / steps) + 1, and at most one remains unused.
template <class Integer>
constexpr Integer packed_row(Integer begin, Integer n, Integer steps) {
  using Unsigned = std::make_unsigned_t<Integer>;
  return static_cast<Integer>(static_cast<Unsigned>(begin) / static_cast<Unsigned>(steps)) + n;
}

// Where a sequence lies, packed or not. It is a sequence of its own from there on: its state is row n of the states.
template <class Integer>
struct SequenceView {
  Integer b, begin;     // the first step, in [B, T, C] tensors
  Integer steps;        // of the sequence
  Integer checkpoints;  // its first row of them

  // The row of the state after t steps, t being a multiple of the interval or `steps`.
  constexpr Integer checkpoint_row(DType dtype, Integer t) const {
    return checkpoints + checkpoint_count(dtype, t) - 1;
  }
};

template <class Integer>
constexpr SequenceView<Integer> view_of_batch(DType dtype, Integer T, Integer b) {
  return {b, 0, T, b * checkpoint_count(dtype, T)};
}

// In range whatever the boundaries are, which a GPU cannot have checked.
template <class Integer>
constexpr SequenceView<Integer> view_of_packed(DType dtype, Boundaries boundaries, Integer total, Integer n) {
  const auto within = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x < high ? x : high; };
  const int64_t begin = within(boundaries[n], 0, total), end = within(boundaries[int64_t{n} + 1], begin, total);
  return {0, static_cast<Integer>(begin), static_cast<Integer>(end - begin),
          packed_row(static_cast<Integer>(begin), n, static_cast<Integer>(checkpoint_interval(dtype)))};
}

}  // namespace wkv
