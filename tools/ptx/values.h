// PTX's types and its operations on values.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define INLINE [[gnu::always_inline]] inline

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using pred = bool;
using f16 = _Float16;
using f32 = float;
using f64 = double;

// Bits of S as a D: cut off, or filled up with zeros.
template <class D, class S>
INLINE D as(S x) {
  if constexpr (std::is_same_v<D, S>) {
    return x;
  } else if constexpr (std::is_same_v<S, bool>) {
    return as<D>(u8(x));
  } else if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    return D(std::make_unsigned_t<S>(x));
  } else {
    D result{};
    memcpy(&result, &x, sizeof(D) < sizeof(S) ? sizeof(D) : sizeof(S));
    return result;
  }
}

struct bf16 {
  u16 bits;
  bf16() = default;
  INLINE explicit bf16(f32 x) {
    const u32 all = as<u32>(x);
    bits = std::isnan(x) ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  INLINE operator f32() const { return as<f32>(u32(bits) << 16); }
};

template <class T>
INLINE u32 pack(T low, T high) {
  return u32(as<u16>(high)) << 16 | as<u16>(low);
}

// ---- integers

template <int bytes>
struct Twice;
template <>
struct Twice<2> {
  using type = s32;
};
template <>
struct Twice<4> {
  using type = s64;
};
template <>
struct Twice<8> {
  using type = __int128;
};
template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, typename Twice<sizeof(T)>::type,
                                std::make_unsigned_t<typename Twice<sizeof(T)>::type>>;

template <class T>
INLINE T quotient(T a, T b) {
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(0 - a) : T(a / b);
}

template <class T>
INLINE T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

template <class T>
INLINE T shift_left(T a, u32 places) {
  return places < 8 * sizeof(T) ? T(a << places) : T(0);
}

template <class T>
INLINE T shift_right(T a, u32 places) {
  if (places < 8 * sizeof(T)) return T(a >> places);
  return T(a < 0 ? -1 : 0);
}

// The lowest `count` bits.
template <class T>
INLINE T low_bits(u32 count) {
  return T(shift_left<T>(1, count) - 1);
}

template <class T>
INLINE T extract(T a, u32 position, u32 count) {
  position &= 255, count &= 255;
  const u32 last = 8 * sizeof(T) - 1, end = position + count - 1;
  const bool negative = std::is_signed_v<T> && count && (a >> (end < last ? end : last) & 1);
  const T field = T(shift_right<std::make_unsigned_t<T>>(a, position) & low_bits<T>(count));
  const u32 known = position > last ? 0 : last + 1 - position;
  return negative ? T(field | ~low_bits<T>(count < known ? count : known)) : field;
}

template <class T>
INLINE T insert(T field, T into, u32 position, u32 count) {
  const T mask = shift_left(low_bits<T>(count & 255), position & 255);
  return T((into & ~mask) | (shift_left(field, position & 255) & mask));
}

// ---- floating point

INLINE f32 flush(f32 x) { return std::fabs(x) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, x) : x; }

template <class T>
INLINE T saturate(T x) {
  return x >= 1 ? T(1) : x > 0 ? x : T(0);
}

template <class T>
INLINE T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}

template <class T>
INLINE T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

// Keeps arithmetic on one side of a change of the rounding mode.
template <class T>
INLINE T opaque(T x) {
  asm volatile("" : "+x"(x));
  return x;
}

template <class D, class S>
INLINE D convert(S x) {
  if constexpr (std::is_integral_v<D> && !std::is_integral_v<S>) {
    using Limits = std::numeric_limits<D>;
    if (std::isnan(x)) return 0;
    // S holds the smallest integer, and the largest but for its last bits.
    if (x <= S(Limits::min())) return Limits::min();
    if (x >= S(Limits::max())) return Limits::max();
  }
  return D(x);
}
