// The path between memory and registers: rows of a tile staged in shared memory, channels' parameters, states.
#pragma once

#include "../common/bidirectional.h"
#include "pair.h"
#include "params.h"
#include "tuning.h"

namespace wkv {

// The kernel report counts the instructions of a full tile: whole subchunks that share an exponent, moved by vectors.
// It compiles only these.
#if defined(WKV_FULL_TILES_ONLY)
inline constexpr bool kFullTilesOnly = true;
#else
inline constexpr bool kFullTilesOnly = false;
#endif

template <class Element>
inline constexpr DType kTypeOf = std::is_same_v<Element, float>      ? DType::float32
                                 : std::is_same_v<Element, Half>     ? DType::float16
                                 : std::is_same_v<Element, Bfloat16> ? DType::bfloat16
                                                                     : DType::float64;

WKV_HD int clamp_count(int64_t count, int limit) {
  return count <= 0 ? 0 : count < limit ? static_cast<int>(count) : limit;
}

// ---- parameters ----

template <class Real>
WKV_HD Real load_parameter(const void* values, DType dtype, int64_t c) {
  return with_dtype(dtype, [=](auto constant) {
    return static_cast<Real>(to_real(static_cast<const ElementOf<constant.value, Half, Bfloat16>*>(values)[c]));
  });
}

template <class Real>
WKV_HD void store_parameter(void* values, DType dtype, int64_t c, Real value) {
  with_dtype(dtype, [=](auto constant) {
    from_real(static_cast<RealOf<constant.value>>(value),
              static_cast<ElementOf<constant.value, Half, Bfloat16>*>(values)[c]);
  });
}

template <class Real, bool is_raw = true>
WKV_HD Channel<Real> load_channel(const ChannelParameters& parameters, int64_t c) {
  const Real w = load_parameter<Real>(parameters.w, parameters.w_dtype, c);
  return {is_raw ? log_decay_of(w) : bounded_log_decay(w), load_parameter<Real>(parameters.u, parameters.u_dtype, c)};
}

// ---- threads and their columns ----

struct TileThread {
  int index;

  // Unsigned, so that they are a mask and a shift.
  WKV_HD int lane() const { return static_cast<unsigned>(index) % kWarpThreads; }
  WKV_HD int warp() const { return static_cast<unsigned>(index) / kWarpThreads; }
};

// A lane's pairs of a row of 64 floats in shared memory, for several rows.
struct Rows64 {
  Pair* first;

  WKV_HD Pair get(int row, int lane) const { return first[row * kWarpThreads + lane]; }
  WKV_HD void set(int row, int lane, Pair value) const { first[row * kWarpThreads + lane] = value; }

  WKV_HD Rows64 from(int row) const { return {first + row * kWarpThreads}; }

  WKV_HD Scaled get_scaled(int lane) const { return {{get(0, lane), get(1, lane)}, get(2, lane)}; }
  WKV_HD void set_scaled(int lane, Scaled value) const {
    set(0, lane, value.sums.num);
    set(1, lane, value.sums.den);
    set(2, lane, value.exponent);
  }
  WKV_HD Sums<Pair> get_sums(int lane) const { return {get(0, lane), get(1, lane)}; }
  WKV_HD void set_sums(int lane, Sums<Pair> value) const {
    set(0, lane, value.num);
    set(1, lane, value.den);
  }
};

// A block's channels in shared memory: log2 of the decay, decay and bonus.
struct SharedChannels {
  Rows64 rows;

  // Channels beyond the last have parameters of zero. `is_raw`: w is the raw decay, and not the log-decay itself.
  // `has_bonus`: it is of use.
  template <bool is_raw = true, bool has_bonus = true>
  WKV_HD void load(const ChannelParameters& parameters, uint32_t c, int columns, unsigned thread, int threads) const {
    float* const values = reinterpret_cast<float*>(rows.first);
#pragma unroll 1
    for (unsigned i = thread; i < (has_bonus ? 2 : 1) * kTileChannels; i += threads) {
      const bool is_u = has_bonus && i >= kTileChannels;
      const unsigned column = i % kTileChannels;
      float value = 0;
      if (kFullTilesOnly || static_cast<int>(column) < columns) {
        value = load_parameter<float>(is_u ? parameters.u : parameters.w,
                                      is_u ? parameters.u_dtype : parameters.w_dtype, c + column);
      }
      if (!is_raw && !is_u) values[column] = (value = bounded_log_decay(value)) * float(kLog2E);
      // e^u, or -e^w and then e^-e^w.
#pragma unroll 1
      for (int power = is_u || !is_raw ? 1 : 0; power < 2; ++power) {
        if (power == 0) value = smaller(float(kLargestRawDecay), value);
        value = std::exp(value);
        if (power == 0) values[column] = (value = -value) * float(kLog2E);
      }
      values[kTileChannels + i] = value;
    }
  }
  WKV_HD Pair log_decay(int lane) const { return rows.get(0, lane) * Pair(1 / kLog2E); }
  WKV_HD Pair decay(int lane) const { return rows.get(1, lane); }
  WKV_HD Pair bonus(int lane) const { return rows.get(2, lane); }
  // Log2 of the decay over this many steps.
  WKV_HD Pair decay_log2(int lane, int steps) const { return Pair(steps) * rows.get(0, lane); }
};

// ---- states in memory, of the channels of a lane, of which `count` exist; of any alignment ----

// A row of them.
struct ChannelRow {
  float* first;
  int count;
  bool is_aligned;  // to pairs

  WKV_HD Pair load(int64_t offset) const {
    float* const at = first + offset;
    if (kFullTilesOnly || (is_aligned && count > 1)) return *reinterpret_cast<const FloatPair*>(at);
    return {count > 0 ? at[0] : 0.0f, count > 1 ? at[1] : 0.0f};
  }
  WKV_HD void store(int64_t offset, Pair value) const {
    float* const at = first + offset;
    if (kFullTilesOnly || (is_aligned && count > 1)) {
      *reinterpret_cast<FloatPair*>(at) = {value.x, value.y};
      return;
    }
    if (count > 0) at[0] = value.x;
    if (count > 1) at[1] = value.y;
  }
};

// ---- staging ----

// A sequence from one channel on.
template <class Element>
struct Rows {
  Element* data;
  uint32_t stride;  // in elements; op.h ensures that 32 bits suffice for it and for T

  // One instruction, as a product of 32-bit numbers.
  WKV_HD Element* at(int t) const { return data + static_cast<uint64_t>(static_cast<uint32_t>(t)) * stride; }
};

template <class Element>
WKV_HD Rows<const Element> rows_from(const Sequence& sequence, uint32_t b, uint32_t c) {
  return {static_cast<const Element*>(sequence.data) + b * sequence.batch_stride + c,
          static_cast<uint32_t>(sequence.time_stride)};
}
template <class Element>
WKV_HD Rows<Element> rows_from(void* contiguous, int64_t T, int64_t C, uint32_t b, uint32_t c) {
  return {static_cast<Element*>(contiguous) + b * (T * C) + c, static_cast<uint32_t>(C)};
}

// A lane's share of a subchunk's rows of 16-byte vectors: one column, and every kRowStep-th row.
template <class Element>
struct VectorShare {
  static constexpr int kPerVector = static_cast<int>(sizeof(Vector) / sizeof(Element));
  static constexpr int kVectorsOfRow = kTileChannels / kPerVector;
  static constexpr int kRowStep = kWarpThreads / kVectorsOfRow;
  int column, first_row;

  WKV_HD explicit VectorShare(unsigned lane)
      : column(lane % kVectorsOfRow * kPerVector), first_row(lane / kVectorsOfRow) {}

  // The number of `columns` that are moved by vectors: 0 where an address is not a multiple of 16.
  WKV_HD static int vectored(Rows<const Element> rows, int columns) {
    if (kFullTilesOnly) return kTileChannels;
    const auto address = reinterpret_cast<uintptr_t>(rows.data);
    const uint64_t stride = rows.stride * uint64_t{sizeof(Element)};
    return (address | stride) % sizeof(Vector) == 0 ? columns - columns % kPerVector : 0;
  }

  // Calls move(in memory, in shared memory) for the vectors of this lane, from time t on; `steps` rows exist.
  template <int kSteps, class Memory, class Move>
  WKV_HD void for_vectors(Rows<Memory> rows, int t, Element* subchunk, int steps, const Move& move) const {
    const Rows<Memory> from_here{rows.at(t + first_row) + column, rows.stride};
    Element* const shared = subchunk + (first_row * kTileChannels + column);
    if (kFullTilesOnly || steps == kSteps) {
#pragma unroll
      for (int row = 0; row < kSteps; row += kRowStep) move(from_here.at(row), shared + row * kTileChannels);
    } else {
#pragma unroll 1
      for (int row = 0; row < steps - first_row; row += kRowStep) move(from_here.at(row), shared + row * kTileChannels);
    }
  }
};

// Moves a lane's part of rows, steps × columns, between memory and shared memory, `columns` of `all` being in memory:
// by vectors(in memory, in shared memory) where it can, else by element(in memory, in shared memory, exists).
template <int kSteps, class Element, class Memory, class MoveVector, class MoveElement>
WKV_HD void move_rows(Rows<Memory> rows, int t, Element* subchunk, int steps, int columns, int all, int lane,
                      const MoveVector& vector, const MoveElement& element) {
  const VectorShare<Element> share(lane);
  const int vectored = share.vectored({rows.data, rows.stride}, columns);
  if (share.column < vectored) share.template for_vectors<kSteps>(rows, t, subchunk, steps, vector);
  if (kFullTilesOnly || vectored == all) return;
  for (int row = 0; row < steps; ++row) {
    for (int column = vectored + lane; column < all; column += kWarpThreads) {
      element(rows.at(t + row) + column, subchunk + (row * kTileChannels + column), column < columns);
    }
  }
}

// Stages rows in shared memory. Columns beyond the last become zero, so that no result depends on the earlier contents
// of shared memory.
template <int kSteps, class Element>
WKV_HD void stage(Element* subchunk, Rows<const Element> source, int t, int steps, int columns, int lane) {
  move_rows<kSteps>(
      source, t, subchunk, steps, columns, kTileChannels, lane,
      [](const Element* from, Element* to) { copy_async(to, from); },
      [](const Element* from, Element* to, bool exists) { *to = exists ? *from : Element(); });
}

template <int kSteps, class Element>
WKV_HD void unstage(Rows<Element> target, int t, Element* subchunk, int steps, int columns, int lane) {
  move_rows<kSteps>(
      target, t, subchunk, steps, columns, columns, lane,
      [](Element* to, const Element* from) { *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from); },
      [](Element* to, const Element* from, bool) { *to = *from; });
}

// ---- a thread's steps ----

// A lane's column of a subchunk in shared memory.
template <class Element>
struct Column {
  Element* first;

  WKV_HD Packed<Element>& at(int step) const {
    return *reinterpret_cast<Packed<Element>*>(first + step * kTileChannels);
  }
  WKV_HD Pair get(int step) const { return unpack(at(step)); }
  WKV_HD void set(int step, Pair value) const { at(step) = pack<Element>({value.x, value.y}); }
};

// Clears an array over steps that is only partly written: where a block takes several tiles, the compiler would
// otherwise keep registers for the values of the tile before.
template <class Value, int kSteps>
WKV_HD void clear_unless_full(int count, Value (&values)[kSteps]) {
  if (kFullTilesOnly || count == kSteps) return;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) values[step] = Value{};
}

// Calls function(step) for the first `count` steps of a subchunk, or from the last of these to the first, all unrolled,
// so that arrays over them can be registers; a whole subchunk, the usual case, compares nothing at each step, at the
// price of a second loop.
template <int kSteps, bool kBack = false, bool kOneLoop = false, class Function>
WKV_HD void for_steps(int count, const Function& function) {
  if (kFullTilesOnly || (!kOneLoop && count == kSteps)) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) function(kBack ? kSteps - 1 - i : i);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = kBack ? kSteps - 1 - i : i;
      if (step < count) function(step);
    }
  }
}
template <int kSteps, class Function>
WKV_HD void for_steps_back(int count, const Function& function) {
  for_steps<kSteps, true>(count, function);
}

// A line of 128 bytes for each lane, of at most 32 lines.
template <class Element>
WKV_HD void prefetch_rows(Rows<const Element> rows, uint32_t t, int steps, int columns, unsigned lane) {
  constexpr unsigned kColumns = 128 / sizeof(Element), kLines = kTileChannels / kColumns;
  const int row = static_cast<int>(lane / kLines), column = static_cast<int>(lane % kLines * kColumns);
  if (row < steps && column < columns) prefetch(rows.at(t + row) + column);
}

}  // namespace wkv
