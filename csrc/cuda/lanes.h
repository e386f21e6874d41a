// The channels of one GPU thread as a Real of wkv_math.h, and how they come from and go to memory.
//
// A thread of the float kernels has two neighbouring channels, `Pair`; one of the float64 kernels has a double. On the
// device exponentials and reciprocals are the approximate instructions, which are off by at most 2 ulp; on the host,
// where tests run the same code, they are the standard library's.
#pragma once

#include <cstdint>
#include <cstring>

#include "../wkv_math.h"
#include "../wkv_problem.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace wkv {

template <class To, class From>
WKV_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

WKV_HD float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

WKV_HD float reciprocal_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// The larger one that is not NaN.
WKV_HD float larger_float(float x, float known) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, known);
#else
  return known < x ? x : known;
#endif
}
WKV_HD float smaller_float(float x, float known) {
#if defined(__CUDA_ARCH__)
  return fminf(x, known);
#else
  return x < known ? x : known;
#endif
}

struct Pair {
  float x, y;

  Pair() = default;
  WKV_HD Pair(float x, float y) : x(x), y(y) {}
  WKV_HD explicit Pair(double both) : x(static_cast<float>(both)), y(static_cast<float>(both)) {}
  WKV_HD explicit Pair(int both) : x(static_cast<float>(both)), y(static_cast<float>(both)) {}
};

struct PairOfBool {
  bool x, y;
};

WKV_HD Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
WKV_HD Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
WKV_HD Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
WKV_HD Pair reciprocal(Pair a) { return {reciprocal_approximate(a.x), reciprocal_approximate(a.y)}; }
WKV_HD Pair operator/(Pair a, Pair b) { return a * reciprocal(b); }
WKV_HD Quotients<Pair> divide(Pair first, Pair second, Pair by) {
  const Pair factor = reciprocal(by);
  return {first * factor, second * factor};
}
WKV_HD Pair operator-(Pair a) { return {-a.x, -a.y}; }
WKV_HD PairOfBool operator<(Pair a, Pair b) { return {a.x < b.x, a.y < b.y}; }
WKV_HD PairOfBool operator<=(Pair a, Pair b) { return {a.x <= b.x, a.y <= b.y}; }
WKV_HD PairOfBool operator>=(Pair a, Pair b) { return {a.x >= b.x, a.y >= b.y}; }
WKV_HD PairOfBool operator==(Pair a, Pair b) { return {a.x == b.x, a.y == b.y}; }
WKV_HD bool all(PairOfBool condition) { return condition.x && condition.y; }
WKV_HD Pair select(PairOfBool condition, Pair a, Pair b) { return {condition.x ? a.x : b.x, condition.y ? a.y : b.y}; }
WKV_HD Pair larger(Pair x, Pair known) { return {larger_float(x.x, known.x), larger_float(x.y, known.y)}; }
WKV_HD Pair smaller(Pair x, Pair known) { return {smaller_float(x.x, known.x), smaller_float(x.y, known.y)}; }
WKV_HD Pair abs(Pair a) { return {std::fabs(a.x), std::fabs(a.y)}; }
WKV_HD Pair exp2_clamped(Pair a) { return {exp2_approximate(a.x), exp2_approximate(a.y)}; }
WKV_HD Pair exp_nonpositive(Pair a) { return exp2_clamped(a * Pair(kLog2E)); }
WKV_HD Pair exponential(Pair a) { return exp2_clamped(a * Pair(kLog2E)); }
WKV_HD double exponential(double a) { return std::exp(a); }

// x = significand · 2^exponent with the significand in [1, 2); `inverse_power` is 2^-exponent.
template <class Lanes>
struct Exponent {
  Lanes exponent, inverse_power;
};

WKV_HD Exponent<float> exponent_of(float x) {
  const uint32_t biased = (bits_as<uint32_t>(x) >> 23) & 255;
  // 2^23 + an integer has the integer in its lowest bits, which is cheaper than a conversion.
  return {bits_as<float>(0x4b000000u + biased) - 8388735.0f, bits_as<float>((254 - biased) << 23)};
}
WKV_HD Exponent<double> exponent_of(double x) {
  const uint64_t biased = (bits_as<uint64_t>(x) >> 52) & 2047;
  return {static_cast<double>(static_cast<int>(biased) - 1023), bits_as<double>((2046 - biased) << 52)};
}
WKV_HD Exponent<Pair> exponent_of(Pair x) {
  const Exponent<float> first = exponent_of(x.x), second = exponent_of(x.y);
  return {{first.exponent, second.exponent}, {first.inverse_power, second.inverse_power}};
}

// ---- elements in memory ----

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class Element>
struct ElementTraits;
template <>
struct ElementTraits<float> {
  using Lanes = Pair;
  using Real = float;
  static constexpr DType dtype = DType::float32;
};
template <>
struct ElementTraits<Half> {
  using Lanes = Pair;
  using Real = float;
  static constexpr DType dtype = DType::float16;
};
template <>
struct ElementTraits<Bfloat16> {
  using Lanes = Pair;
  using Real = float;
  static constexpr DType dtype = DType::bfloat16;
};
template <>
struct ElementTraits<double> {
  using Lanes = double;
  using Real = double;
  static constexpr DType dtype = DType::float64;
};

WKV_HD float to_real(float x) { return x; }
WKV_HD double to_real(double x) { return x; }
WKV_HD float to_real(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
WKV_HD float to_real(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bits_as<__half>(x.bits));
#else
  return static_cast<float>(bits_as<_Float16>(x.bits));
#endif
}

WKV_HD void from_real(float x, float& element) { element = x; }
WKV_HD void from_real(double x, double& element) { element = x; }
WKV_HD void from_real(float x, Half& element) {
#if defined(__CUDA_ARCH__)
  element.bits = bits_as<uint16_t>(__float2half_rn(x));
#else
  element.bits = bits_as<uint16_t>(static_cast<_Float16>(x));
#endif
}
WKV_HD void from_real(float x, Bfloat16& element) {
#if defined(__CUDA_ARCH__)
  element.bits = bits_as<uint16_t>(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  element.bits = static_cast<uint16_t>((x == x ? rounded : 0x7fc00000) >> 16);
#endif
}

// A lane's channels, side by side in shared memory and aligned together.
WKV_HD double load_lanes(const double* source) { return *source; }
WKV_HD void store_lanes(double* target, double value) { *target = value; }

WKV_HD Pair load_lanes(const float* source) {
#if defined(__CUDA_ARCH__)
  const float2 both = *reinterpret_cast<const float2*>(source);
  return {both.x, both.y};
#else
  return {source[0], source[1]};
#endif
}
WKV_HD void store_lanes(float* target, Pair value) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<float2*>(target) = make_float2(value.x, value.y);
#else
  target[0] = value.x;
  target[1] = value.y;
#endif
}

WKV_HD Pair load_lanes(const Bfloat16* source) {
#if defined(__CUDA_ARCH__)
  const uint32_t both = *reinterpret_cast<const uint32_t*>(source);
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
#else
  return {to_real(source[0]), to_real(source[1])};
#endif
}
WKV_HD void store_lanes(Bfloat16* target, Pair value) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(value.x, value.y);
#else
  from_real(value.x, target[0]);
  from_real(value.y, target[1]);
#endif
}

WKV_HD Pair load_lanes(const Half* source) {
#if defined(__CUDA_ARCH__)
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(source));
  return {both.x, both.y};
#else
  return {to_real(source[0]), to_real(source[1])};
#endif
}
WKV_HD void store_lanes(Half* target, Pair value) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(value.x, value.y);
#else
  from_real(value.x, target[0]);
  from_real(value.y, target[1]);
#endif
}

// The lane's channels from or to global memory, of which `count` exist: rare accesses, of any alignment.
WKV_HD Pair load_some(const float* source, int count) {
  return {count > 0 ? source[0] : 0.0f, count > 1 ? source[1] : 0.0f};
}
WKV_HD double load_some(const double* source, int count) { return count > 0 ? *source : 0.0; }
WKV_HD void store_some(float* target, Pair value, int count) {
  if (count > 0) target[0] = value.x;
  if (count > 1) target[1] = value.y;
}
WKV_HD void store_some(double* target, double value, int count) {
  if (count > 0) *target = value;
}

}  // namespace wkv
