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

WKV_HD Pair load_parameters(const void* values, DType dtype, int64_t c, int count, Pair) {
  return {count > 0 ? load_parameter<float>(values, dtype, c) : 0.0f,
          count > 1 ? load_parameter<float>(values, dtype, c + 1) : 0.0f};
}
WKV_HD double load_parameters(const void* values, DType dtype, int64_t c, int count, double) {
  return count > 0 ? load_parameter<double>(values, dtype, c) : 0.0;
}

template <class Lanes>
WKV_HD Lanes load_log_decay(const ChannelParameters& parameters, int64_t c, int count) {
  return -exp_accurate(load_parameters(parameters.w, parameters.w_dtype, c, count, Lanes()));
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

  WKV_HD static ChannelLanes load(const ChannelParameters& parameters, int64_t c, int count) {
    const Lanes log_decay = load_log_decay<Lanes>(parameters, c, count);
    const Lanes u = load_parameters(parameters.u, parameters.u_dtype, c, count, Lanes());
    return {{log_decay, u}, exp_accurate(log_decay), exp_accurate(u)};
  }
};

// The channels of a block, in shared memory.
template <class Lanes, int lanes>
struct SharedChannels {
  Lanes* rows;

  WKV_HD void set(int lane, const ChannelLanes<Lanes>& value) const {
    rows[lane] = value.channel.log_decay;
    rows[lanes + lane] = value.channel.u;
    rows[2 * lanes + lane] = value.decay;
    rows[3 * lanes + lane] = value.bonus;
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

// To shared memory; it has landed after `wait_for_copies` of the same thread.
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

WKV_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// How a block's threads share a tile's rows of 16-byte vectors: each has one column and every so-many-th row.
template <class Element>
struct VectorShare {
  static constexpr int kPerVector = kVectorBytes / sizeof(Element);
  static constexpr int kVectorsOfRow = Geometry<Element>::kTileChannels / kPerVector;
  int column, first_row, row_step;

  WKV_HD VectorShare(int thread, int threads)
      : column(thread % kVectorsOfRow * kPerVector),
        first_row(thread / kVectorsOfRow),
        row_step(threads / kVectorsOfRow) {}
};

// A thread's part of bringing rows × columns to a tile; columns that do not exist become zero, so that no result
// depends on what shared memory held.
template <class Element>
WKV_HD void stage(Element* tile, Rows<const Element> source, int rows, int columns, int thread, int threads) {
  constexpr int kColumns = Geometry<Element>::kTileChannels;
  const VectorShare<Element> share(thread, threads);
  const int vectored = vectors_are_aligned(source) ? columns - columns % share.kPerVector : 0;
  if (share.column < vectored) {
    const Element* from = source.data + share.first_row * source.stride + share.column;
    Element* to = tile + share.first_row * kColumns + share.column;
#pragma unroll 4
    for (int row = share.first_row; row < rows; row += share.row_step) {
      copy_vector(to, from);
      from += share.row_step * source.stride;
      to += share.row_step * kColumns;
    }
  }
  const int single = kColumns - vectored;
  if (kFullTilesOnly || single == 0) return;
  for (int i = thread; i < rows * single; i += threads) {
    const int row = i / single, column = vectored + i % single;
    tile[row * kColumns + column] = column < columns ? source.data[row * source.stride + column] : Element();
  }
}

// The way back.
template <class Element>
WKV_HD void unstage(Rows<Element> target, const Element* tile, int rows, int columns, int thread, int threads) {
  constexpr int kColumns = Geometry<Element>::kTileChannels;
  const VectorShare<Element> share(thread, threads);
  const int vectored = vectors_are_aligned(target) ? columns - columns % share.kPerVector : 0;
  if (share.column < vectored) {
    Element* to = target.data + share.first_row * target.stride + share.column;
    const Element* from = tile + share.first_row * kColumns + share.column;
#pragma unroll 4
    for (int row = share.first_row; row < rows; row += share.row_step) {
      *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
      to += share.row_step * target.stride;
      from += share.row_step * kColumns;
    }
  }
  const int single = columns - vectored;
  if (kFullTilesOnly || single == 0) return;
  for (int i = thread; i < rows * single; i += threads) {
    const int row = i / single, column = vectored + i % single;
    target.data[row * target.stride + column] = tile[row * kColumns + column];
  }
}

// Takes `carried` from `begin` to `end`: take(i, carried, own) for each i in order, own being load(i). Loads do not
// wait for what is carried, so `kBatch` are asked for at once.
template <int kBatch, class Carried, class Load, class Take>
WKV_HD Carried fold(int64_t begin, int64_t end, Carried carried, const Load& load, const Take& take) {
  for (int64_t first = begin; first < end; first += kBatch) {
    decltype(load(begin)) own[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < end) own[i] = load(first + i);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < end) carried = take(first + i, carried, own[i]);
    }
  }
  return carried;
}

WKV_HD int clamp_count(int64_t count, int limit) {
  return count <= 0 ? 0 : count < limit ? static_cast<int>(count) : limit;
}

}  // namespace wkv
