// What the block programs share: where a block and a thread stand, parameters and states from memory, and the staging
// of tiles in shared memory.
//
// A block program is a sequence of phases. A phase is what one thread does between two barriers; threads meet only in
// shared memory. `Team` runs a phase for the block's threads: on the device each thread runs its own and then waits at
// the barrier, on the host a loop runs all of them, in any order, which must not change a bit of the result.
#pragma once

#include "../wkv_launch.h"
#include "lanes.h"

namespace wkv {

// The kernel report counts the instructions of what a full tile takes: whole spans that share an exponent, moved by
// vectors. It compiles that alone.
#if defined(WKV_FULL_TILES_ONLY)
inline constexpr bool kFullTilesOnly = true;
#else
inline constexpr bool kFullTilesOnly = false;
#endif

struct BlockIndex {
  unsigned x, y, z;
};

template <class Element>
struct Geometry {
  using Lanes = typename ElementTraits<Element>::Lanes;
  using Real = typename ElementTraits<Element>::Real;
  static constexpr DType dtype = ElementTraits<Element>::dtype;
  static constexpr int kLanes = lane_count(dtype);
  static constexpr int kLaneChannels = channels_per_lane(dtype);
  static constexpr int kTileChannels = tile_channels(dtype);
  static constexpr int kInterval = static_cast<int>(checkpoint_interval(dtype));
};

// ---- parameters and states ----

template <class Real>
WKV_HD Real load_parameter(const void* values, DType dtype, int64_t c) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(values)[c];
    case DType::float16:
      return to_real(static_cast<const Half*>(values)[c]);
    case DType::bfloat16:
      return to_real(static_cast<const Bfloat16*>(values)[c]);
    default:
      return static_cast<Real>(static_cast<const double*>(values)[c]);
  }
}

template <class Real>
WKV_HD void store_parameter(void* values, DType dtype, int64_t c, Real value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(values)[c] = static_cast<float>(value);
      break;
    case DType::float16:
      from_real(static_cast<float>(value), static_cast<Half*>(values)[c]);
      break;
    case DType::bfloat16:
      from_real(static_cast<float>(value), static_cast<Bfloat16*>(values)[c]);
      break;
    default:
      static_cast<double*>(values)[c] = static_cast<double>(value);
  }
}

template <class Lanes>
struct ChannelLanes {
  Channel<Lanes> channel;
  Lanes decay, bonus;
};

// The channels of a block, in shared memory.
template <class Lanes, int lanes>
struct SharedChannels {
  Lanes* rows;

  // A thread's share of them, from channel c of all; those that do not exist have parameters of zero.
  template <class Real>
  WKV_HD void load(const ChannelParameters& parameters, int64_t c, int columns, int thread, int threads) const {
    constexpr int kChannels = lanes * sizeof(Lanes) / sizeof(Real);
    Real* const values = reinterpret_cast<Real*>(rows);
#pragma unroll 1
    for (int i = thread; i < 2 * kChannels; i += threads) {
      const bool is_u = i >= kChannels;
      const int column = is_u ? i - kChannels : i;
      Real value = 0;
      if (column < columns) {
        value = load_parameter<Real>(is_u ? parameters.u : parameters.w, is_u ? parameters.u_dtype : parameters.w_dtype,
                                     c + column);
      }
      if (!is_u) value = log_decay_of(value);
      values[i] = value;
      values[2 * kChannels + i] = std::exp(value);
    }
  }
  WKV_HD ChannelLanes<Lanes> get(int lane) const {
    return {{rows[lane], rows[lanes + lane]}, rows[2 * lanes + lane], rows[3 * lanes + lane]};
  }
  WKV_HD Lanes log_decay(int lane) const { return rows[lane]; }
};

template <class Lanes>
WKV_HD State<Lanes> empty_state() {
  return {{Lanes(0), Lanes(0)}, Lanes(kEmptyMax)};
}

template <class Real, class Lanes>
WKV_HD State<Lanes> load_state(const Real* state, int64_t C, int count, Lanes) {
  return {{load_some(state, count), load_some(state + C, count)}, load_some(state + 2 * C, count)};
}

template <class Real, class Lanes>
WKV_HD void store_state(Real* state, int64_t C, int count, State<Lanes> value) {
  store_some(state, value.sums.num, count);
  store_some(state + C, value.sums.den, count);
  store_some(state + 2 * C, value.max, count);
}

// The caller's state, or the empty one; den == 0 means empty, whatever the other two say.
template <class Real, class Lanes>
WKV_HD State<Lanes> load_first_state(const Real* state, int64_t C, int count, Lanes type) {
  const State<Lanes> none = empty_state<Lanes>();
  if (state == nullptr) return none;
  const State<Lanes> given = load_state(state, C, count, type);
  const auto empty = given.sums.den == Lanes(0);
  return {{select(empty, none.sums.num, given.sums.num), select(empty, none.sums.den, given.sums.den)},
          select(empty, none.max, given.max)};
}

// States in shared memory, a row of lanes for each of their parts.
template <class Lanes, int lanes>
struct SharedStates {
  Lanes* rows;

  WKV_HD State<Lanes> get(int i, int lane) const {
    const Lanes* at = rows + 3 * i * lanes + lane;
    return {{at[0], at[lanes]}, at[2 * lanes]};
  }
  WKV_HD void set(int i, int lane, State<Lanes> value) const {
    Lanes* at = rows + 3 * i * lanes + lane;
    at[0] = value.sums.num;
    at[lanes] = value.sums.den;
    at[2 * lanes] = value.max;
  }
};

// ---- staging: rows of a tile between global and shared memory ----

// A sequence from one time and one channel on.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
};

template <class Element>
WKV_HD Rows<const Element> rows_from(const Sequence& sequence, int64_t b, int64_t t, int64_t c) {
  return {static_cast<const Element*>(sequence.data) + b * sequence.batch_stride + t * sequence.time_stride + c,
          sequence.time_stride};
}

template <class Element>
WKV_HD Rows<Element> rows_from(void* contiguous, int64_t T, int64_t C, int64_t b, int64_t t, int64_t c) {
  return {static_cast<Element*>(contiguous) + (b * T + t) * C + c, C};
}

inline constexpr int kVectorBytes = 16;

struct alignas(kVectorBytes) Vector {
  uint32_t words[4];
};

template <class Element>
WKV_HD bool vectors_are_aligned(Rows<Element> rows) {
  if (kFullTilesOnly) return true;
  const auto address = reinterpret_cast<uintptr_t>(rows.data);
  return ((address | static_cast<uintptr_t>(rows.stride * static_cast<int64_t>(sizeof(Element)))) % kVectorBytes) == 0;
}

// To shared memory; it has landed when the same thread has waited for it.
WKV_HD void copy_vector(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#else
  *static_cast<Vector*>(shared) = *static_cast<const Vector*>(global);
#endif
}

// Ends a thread's group of copies.
WKV_HD void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// For all groups but the latest `kPending`.
template <int kPending>
WKV_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// How the lanes of a span share its rows of 16-byte vectors: each has one column and every so-many-th row.
template <class Element, int kSteps>
struct VectorShare {
  using Geo = Geometry<Element>;
  static constexpr int kPerVector = kVectorBytes / sizeof(Element);
  static constexpr int kVectorsOfRow = Geo::kTileChannels / kPerVector;
  static constexpr int kRowStep = Geo::kLanes / kVectorsOfRow;
  static constexpr int kTurns = kSteps / kRowStep;
  int column, first_row;

  WKV_HD explicit VectorShare(int lane) : column(lane % kVectorsOfRow * kPerVector), first_row(lane / kVectorsOfRow) {}

  // Calls move(in memory, in shared memory) for the vectors of this lane; `steps` rows exist.
  template <class Memory, class Shared, class Move>
  WKV_HD void for_vectors(Rows<Memory> rows, Shared* span, int steps, const Move& move) const {
    Memory* at = rows.data + first_row * rows.stride + column;
    Shared* of_span = span + first_row * Geo::kTileChannels + column;
    const auto take_turn = [&] {
      move(at, of_span);
      at += kRowStep * rows.stride;
      of_span += kRowStep * Geo::kTileChannels;
    };
    if (kFullTilesOnly || steps == kSteps) {
#pragma unroll 4
      for (int turn = 0; turn < kTurns; ++turn) take_turn();
    } else {
#pragma unroll 1
      for (int row = first_row; row < steps; row += kRowStep) take_turn();
    }
  }
};

// A lane's part of bringing the rows of a span, steps × columns, to shared memory; columns that do not exist become
// zero, so that no result depends on what shared memory held.
template <int kSteps, class Element>
WKV_HD void stage(Element* span, Rows<const Element> source, int steps, int columns, int lane) {
  constexpr int kColumns = Geometry<Element>::kTileChannels, kLanes = Geometry<Element>::kLanes;
  const VectorShare<Element, kSteps> share(lane);
  const int vectored = vectors_are_aligned(source) ? columns - columns % share.kPerVector : 0;
  if (share.column < vectored) {
    share.for_vectors(source, span, steps, [](const Element* from, Element* to) { copy_vector(to, from); });
  }
  if (kFullTilesOnly || vectored == kColumns) return;
  for (int row = 0; row < steps; ++row) {
    for (int column = vectored + lane; column < kColumns; column += kLanes) {
      span[row * kColumns + column] = column < columns ? source.data[row * source.stride + column] : Element();
    }
  }
}

// The way back.
template <int kSteps, class Element>
WKV_HD void unstage(Rows<Element> target, const Element* span, int steps, int columns, int lane) {
  constexpr int kColumns = Geometry<Element>::kTileChannels, kLanes = Geometry<Element>::kLanes;
  const VectorShare<Element, kSteps> share(lane);
  const int vectored = vectors_are_aligned(target) ? columns - columns % share.kPerVector : 0;
  if (share.column < vectored) {
    share.for_vectors(target, span, steps, [](Element* to, const Element* from) {
      *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
    });
  }
  if (kFullTilesOnly || vectored == columns) return;
  for (int row = 0; row < steps; ++row) {
    for (int column = vectored + lane; column < columns; column += kLanes) {
      target.data[row * target.stride + column] = span[row * kColumns + column];
    }
  }
}

WKV_HD int clamp_count(int64_t count, int limit) {
  return count <= 0 ? 0 : count < limit ? static_cast<int>(count) : limit;
}

}  // namespace wkv
