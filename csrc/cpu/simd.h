// SIMD vectors of WKV_SIMD_BYTES bytes on the vector extensions of GCC and Clang, with the functions that common/math.h
// needs of a Real, and loads and stores that convert from and to the element types.
//
// Everything is inlined and lives in namespace wkv::cpu::WKV_ISA: one binary holds this file once per instruction set,
// and nothing compiled for a larger one may be linked into a smaller one.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// `nothrow`, since GCC takes intrinsics for functions that may throw, ends a basic block at each where something would
// be cleaned up, and fuses products with sums within a block alone.
#define WKV_INLINE inline __attribute__((always_inline, nothrow))
#define WKV_INLINE_LAMBDA __attribute__((always_inline))

namespace wkv::cpu {
namespace WKV_ISA {

inline constexpr double kLog2OfE = 1.44269504088896340736;

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class T, int lanes>
struct NativeOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

template <class Real>
struct Vec {
  static constexpr int lanes = WKV_SIMD_BYTES / sizeof(Real);
  using Native = typename NativeOf<Real, lanes>::type;
  using NativeInteger = typename NativeOf<std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>, lanes>::type;
  struct Mask {
    NativeInteger native;
  };

  Native native;

  Vec() = default;
  WKV_INLINE Vec(Native value) : native(value) {}
  WKV_INLINE explicit Vec(Real value) : native(Native{} + value) {}

  friend WKV_INLINE Vec operator+(Vec a, Vec b) { return a.native + b.native; }
  friend WKV_INLINE Vec operator-(Vec a, Vec b) { return a.native - b.native; }
  friend WKV_INLINE Vec operator*(Vec a, Vec b) { return a.native * b.native; }
  friend WKV_INLINE Vec operator/(Vec a, Vec b) { return a.native / b.native; }
  friend WKV_INLINE Vec operator-(Vec a) { return -a.native; }
  friend WKV_INLINE Mask operator<(Vec a, Vec b) { return {a.native < b.native}; }
  friend WKV_INLINE Mask operator>=(Vec a, Vec b) { return {a.native >= b.native}; }
  friend WKV_INLINE Mask operator<=(Vec a, Vec b) { return {a.native <= b.native}; }
  friend WKV_INLINE Mask operator==(Vec a, Vec b) { return {a.native == b.native}; }
  friend WKV_INLINE Vec select(Mask mask, Vec a, Vec b) { return mask.native ? a.native : b.native; }
  friend WKV_INLINE Vec abs(Vec a) { return select(a < Vec(Real(0)), -a, a); }
};

WKV_INLINE bool all(Vec<float>::Mask mask) {
#if WKV_SIMD_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask.native) == 0xffff;
#elif WKV_SIMD_BYTES == 32
  return _mm256_movemask_ps((__m256)mask.native) == 0xff;
#elif defined(__aarch64__)
  return vminvq_u32((uint32x4_t)mask.native) != 0;
#else
  const auto& lanes = mask.native;
  return lanes[0] && lanes[1] && lanes[2] && lanes[3];
#endif
}

WKV_INLINE bool all(Vec<double>::Mask mask) {
  bool result = true;
  for (int lane = 0; lane < Vec<double>::lanes; ++lane) result = result && mask.native[lane];
  return result;
}

// The value that a register holds: a product that is rounded before it is added to anything, where compilers would fuse
// the two.
template <class Real>
WKV_INLINE Vec<Real> rounded(Vec<Real> x) {
#if defined(__x86_64__)
  asm("" : "+x"(x.native));
#elif defined(__aarch64__)
  asm("" : "+w"(x.native));
#else
  asm("" : "+m"(x.native));
#endif
  return x;
}

// a·b + c, rounded once where the processor can. Compilers fuse a product on their own, but not always one that is used
// twice.
#if WKV_SIMD_BYTES > 16 || defined(__aarch64__)
inline constexpr bool kFuses = true;
#else
inline constexpr bool kFuses = false;
#endif
WKV_INLINE Vec<float>::Native fused(Vec<float>::Native a, float b, Vec<float>::Native c) {
#if WKV_SIMD_BYTES == 64
  return (Vec<float>::Native)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#elif WKV_SIMD_BYTES == 32
  return (Vec<float>::Native)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>::Native)vfmaq_n_f32((float32x4_t)c, (float32x4_t)a, b);
#else
  return a * b + c;
#endif
}

// `factor` times 2^f for f in [-1/2, 1/2]: the minimax fit of degree 6, 2e-9 relative.
template <class Native>
WKV_INLINE Native exp2_of_fraction(Native f, float factor) {
  Native p = factor * 1.5353362e-4f * f + factor * 1.3398875e-3f;
  p = p * f + factor * 9.6184369e-3f;
  p = p * f + factor * 5.5503324e-2f;
  p = p * f + factor * 0.24022648f;
  p = p * f + factor * 0.69314718f;
  return p * f + factor;
}

// Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits. With 128 more it is an exponent of twice the
// result, as 127, being odd, would round ties to the other side.
inline constexpr float kRound = 12582912.0f + 128.0f;
// `half`, which is half of a number, times twice the power of 2 whose exponent was added to kRound. A product rather
// than a sum of exponents, so that NaN stays NaN.
WKV_INLINE Vec<float> times_exp2(Vec<float>::Native half, Vec<float>::Native shifted) {
  return half * (Vec<float>::Native)((Vec<float>::NativeInteger)shifted << 23);
}

// 2^x for x < 127, down to x = -128, where it is 0.
WKV_INLINE Vec<float> exp2_in_range(Vec<float> x) {
  using Native = Vec<float>::Native;
#if WKV_SIMD_BYTES == 64
  // These map -inf to 0 and underflow gradually: any x is in range.
  const __m512 whole = _mm512_roundscale_ps((__m512)x.native, _MM_FROUND_TO_NEAREST_INT);
  const Native f = (Native)_mm512_reduce_ps((__m512)x.native, _MM_FROUND_TO_NEAREST_INT);
  return (Native)_mm512_scalef_ps((__m512)exp2_of_fraction(f, 1.0f), whole);
#else
  const Native shifted = x.native + kRound;
  return times_exp2(exp2_of_fraction(x.native - (shifted - kRound), 0.5f), shifted);
#endif
}

// e^x / 2^whole for whole numbers, as exp2_in_range has its range; both may have six digits. The exponent's fraction is
// rounded once, however large x is.
WKV_INLINE Vec<float> exp_over_exp2(Vec<float> x, Vec<float> whole) {
  using Native = Vec<float>::Native;
  constexpr float kFactor = kLog2OfE;
#if WKV_SIMD_BYTES == 64
  const Native nearest = (Native)_mm512_roundscale_ps((__m512)(x.native * kFactor), _MM_FROUND_TO_NEAREST_INT);
  const Native p = exp2_of_fraction(fused(x.native, kFactor, -nearest), 1.0f);
  return (Native)_mm512_scalef_ps((__m512)p, (__m512)(nearest - whole.native));
#elif WKV_SIMD_BYTES == 32
  // The exponent to the nearest eighth: 2^(i/8) from a table, less i at the place where i is added, and 2^f for f in
  // [-1/16, 1/16] by the minimax fit of degree 3, 3e-8 relative. A third of the products and half the latency of the
  // other forms.
  const __m256i eighths =
      _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  const Native round = 0x1.8p20f - whole.native;
  const Native shifted = fused(x.native, kFactor, round);
  const Native f = fused(x.native, kFactor, round - shifted);
  const Native power = (Native)_mm256_add_epi32(_mm256_permutevar8x32_epi32(eighths, (__m256i)shifted),
                                                _mm256_slli_epi32((__m256i)shifted, 20));
  return power * (f * ((5.5496223e-2f * f + 0.24025764f) * f + 0.69314724f)) + power;
#else
  const Native round = kRound - whole.native;
  const Native shifted = fused(x.native, kFactor, round);
  return times_exp2(exp2_of_fraction(fused(x.native, kFactor, round - shifted), 0.5f), shifted);
#endif
}

// x, or `least` where it is below; NaN stays.
WKV_INLINE Vec<float> clamped(Vec<float> x, Vec<float> least) {
#if WKV_SIMD_BYTES == 64
  return (Vec<float>::Native)_mm512_max_ps((__m512)least.native, (__m512)x.native);
#elif WKV_SIMD_BYTES == 32
  return (Vec<float>::Native)_mm256_max_ps((__m256)least.native, (__m256)x.native);
#elif defined(__aarch64__)
  return (Vec<float>::Native)vmaxq_f32((float32x4_t)x.native, (float32x4_t)least.native);
#else
  return select(x < least, least, x);
#endif
}
// The same for exp2_in_range.
WKV_INLINE Vec<float> clamped(Vec<float> x, float least) {
#if WKV_SIMD_BYTES == 64
  return x;
#else
  return clamped(x, Vec<float>(least));
#endif
}

WKV_INLINE Vec<float> nearest_whole(Vec<float> x) { return (x.native + kRound) - kRound; }

// The base-2 logarithm of e^x / 2^whole, with log2(e) to twice the digits.
WKV_INLINE Vec<float> excess_log2(Vec<float> x, Vec<float> whole) {
  constexpr float kHigh = kLog2OfE, kLow = kLog2OfE - double(kHigh);
  return fused(x.native, kLow, fused(x.native, kHigh, -whole.native));
}
// 2^x for x in [-1/2, 1/2].
WKV_INLINE Vec<float> exp2_small(Vec<float> x) { return exp2_of_fraction(x.native, 1.0f); }

// 2^x for x <= 0.
WKV_INLINE Vec<float> exp2_clamped(Vec<float> x) { return exp2_in_range(clamped(x, -126.0f)); }

// e^x for x <= 0; 0 where float32 would be subnormal, so that -inf gives a weight of exactly 0.
WKV_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> x_log2 = x * Vec<float>(kLog2OfE);
  return select(x_log2 <= Vec<float>(-126.0f), Vec<float>(0.0f), exp2_clamped(x_log2));
}

// Fewer instructions than exp_nonpositive of -abs(x): the sign is set by its bit, and the range is that of the result.
WKV_INLINE Vec<float> exp_minus_abs(Vec<float> x) {
  using Integer = Vec<float>::NativeInteger;
  const Integer bits = (Integer)(x.native * float(kLog2OfE)) | (Integer{} + INT32_MIN);
  return exp2_in_range(clamped((Vec<float>::Native)bits, -128.0f));
}

// e of x = 2^e times a number from 1 to 2; -127, in float64 -1023, for zero.
template <class Real>
WKV_INLINE Vec<Real> exponent_of(Vec<Real> x) {
  constexpr int kBits = sizeof(Real) == 4 ? 23 : 52, kBias = sizeof(Real) == 4 ? 127 : 1023;
  const auto exponent = ((typename Vec<Real>::NativeInteger)x.native >> kBits) - kBias;
  return __builtin_convertvector(exponent, typename Vec<Real>::Native);
}

template <class Function>
WKV_INLINE Vec<double> lane_by_lane(Vec<double> x, Function function) {
  for (int lane = 0; lane < Vec<double>::lanes; ++lane) x.native[lane] = function(x.native[lane]);
  return x;
}
WKV_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return std::exp(a); });
}
WKV_INLINE Vec<double> exp2_clamped(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return std::exp2(a); });
}

WKV_INLINE Vec<double> exp2_in_range(Vec<double> x) { return exp2_clamped(x); }
WKV_INLINE Vec<double> exp_over_exp2(Vec<double> x, Vec<double> whole) {
  return exp2_clamped(x * Vec<double>(kLog2OfE) - whole);
}
WKV_INLINE Vec<double> clamped(Vec<double> x, Vec<double> least) { return select(x < least, least, x); }
WKV_INLINE Vec<double> excess_log2(Vec<double> x, Vec<double> whole) { return x * Vec<double>(kLog2OfE) - whole; }
WKV_INLINE Vec<double> exp2_small(Vec<double> x) { return exp2_clamped(x); }
WKV_INLINE Vec<double> nearest_whole(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return std::nearbyint(a); });
}

template <class T, int lanes>
WKV_INLINE typename NativeOf<T, lanes>::type load_bits(const void* source) {
  typename NativeOf<T, lanes>::type value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

WKV_INLINE Vec<float> load(const float* source) { return load_bits<float, Vec<float>::lanes>(source); }
WKV_INLINE Vec<double> load(const double* source) { return load_bits<double, Vec<double>::lanes>(source); }

using Words = NativeOf<uint32_t, Vec<float>::lanes>::type;
using HalfWords = NativeOf<uint16_t, Vec<float>::lanes>::type;

WKV_INLINE Vec<float> load(const Bfloat16* source) {
#if WKV_SIMD_BYTES == 32
  // Loaded into both halves of the register, whence one instruction takes each number to its place.
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)source));
  const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (Vec<float>::Native)_mm256_shuffle_epi8(twice, places);
#else
  const HalfWords bits = load_bits<uint16_t, Vec<float>::lanes>(source);
  // GCC 12 takes five instructions for the conversion where one is enough, and a dozen scalar ones for NEON.
#if WKV_SIMD_BYTES == 64
  const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__aarch64__)
  const Words words = (Words)vmovl_u16((uint16x4_t)bits);
#else
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return (Vec<float>::Native)(words << 16);
#endif
}

WKV_INLINE Vec<float> load(const Half* source) {
  const HalfWords halves = load_bits<uint16_t, Vec<float>::lanes>(source);
#if WKV_SIMD_BYTES == 64
  return (Vec<float>::Native)_mm512_cvtph_ps((__m256i)halves);
#elif WKV_SIMD_BYTES == 32
  return (Vec<float>::Native)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__aarch64__)
  return (Vec<float>::Native)vcvt_f32_f16((float16x4_t)halves);
#else
  // Exponent and mantissa moved to float32's place and rescaled by 2^112; inf and NaN get float32's exponent.
  using Native = Vec<float>::Native;
  const Words words = __builtin_convertvector(halves, Words);
  const Words magnitude = words & 0x7fff;
  const Words finite = (Words)((Native)(magnitude << 13) * 0x1p112f);
  const Words special = (magnitude << 13) | 0x7f800000;
  return (Native)((magnitude >= 0x7c00 ? special : finite) | ((words & 0x8000) << 16));
#endif
}

template <class Real>
WKV_INLINE void store(Real* target, Vec<Real> x) {
  std::memcpy(target, &x.native, sizeof x.native);
}

// To nearest, ties to even. Rounding could carry a NaN with a full lower half into a number, but none occurs: NaN of
// 16-bit inputs and of arithmetic have a lower half of zeros, and canonical_nan makes the others so.
WKV_INLINE void store(Bfloat16* target, Vec<float> x) {
#if WKV_SIMD_BYTES == 64
  // The lines below by masks, which GCC 12 does not derive from them.
  const __m512i words = (__m512i)x.native;
  const __mmask16 odd = _mm512_test_epi32_mask(words, _mm512_set1_epi32(0x10000));
  const __m512i rounding = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(words, rounding), 16));
#else
  const Words words = (Words)x.native;
  const Words rounded = words + ((words >> 16) & 1) + 0x7fff;
#if WKV_SIMD_BYTES == 32
  const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i in_lanes = _mm256_shuffle_epi8((__m256i)rounded, upper);
  const __m128i halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(in_lanes, 0x08));
#elif defined(__aarch64__)
  const uint16x4_t halves = vshrn_n_u32((uint32x4_t)rounded, 16);
#else
  const HalfWords halves = __builtin_convertvector(rounded >> 16, HalfWords);
#endif
#endif
  std::memcpy(target, &halves, sizeof halves);
}

WKV_INLINE void store(Half* target, Vec<float> x) {
#if WKV_SIMD_BYTES == 64
  const __m256i halves = _mm512_cvtps_ph((__m512)x.native, _MM_FROUND_TO_NEAREST_INT);
#elif WKV_SIMD_BYTES == 32
  const __m128i halves = _mm256_cvtps_ph((__m256)x.native, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const float16x4_t halves = vcvt_f16_f32((float32x4_t)x.native);
#else
  using Native = Vec<float>::Native;
  const Words sign = ((Words)x.native >> 16) & 0x8000;
  const Native magnitude = (Native)((Words)x.native & 0x7fffffff);
  // Subnormal halves: adding 1/2 aligns the mantissa to 2^-24 and rounds. Normal ones: rebias, round to nearest even.
  const Words subnormal = (Words)(magnitude + 0.5f) - 0x3f000000;
  const Words words = (Words)magnitude;
  const Words normal = (words - 0x38000000 + 0xfff + ((words >> 13) & 1)) >> 13;
  const Words special = magnitude == magnitude ? Words{} + 0x7c00 : Words{} + 0x7e00;
  const Words rounded = magnitude < 0x1p-14f ? subnormal : normal;
  const HalfWords halves = __builtin_convertvector((magnitude < 65520.0f ? rounded : special) | sign, HalfWords);
#endif
  std::memcpy(target, &halves, sizeof halves);
}

// Two vectors as one: what is done for a subchunk beside its steps is done for both at once, and each row of a line is
// come to half as often.
template <class Part>
struct Pair {
  static constexpr int lanes = 2 * Part::lanes;
  struct Mask {
    typename Part::Mask low, high;
  };

  Part low, high;

  Pair() = default;
  WKV_INLINE Pair(Part low, Part high) : low(low), high(high) {}
  template <class Real>
  WKV_INLINE explicit Pair(Real value) : low(value), high(value) {}

  friend WKV_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
  friend WKV_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
  friend WKV_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
  friend WKV_INLINE Pair operator/(Pair a, Pair b) { return {a.low / b.low, a.high / b.high}; }
  friend WKV_INLINE Pair operator-(Pair a) { return {-a.low, -a.high}; }
  friend WKV_INLINE Mask operator<(Pair a, Pair b) { return {a.low < b.low, a.high < b.high}; }
  friend WKV_INLINE Mask operator>=(Pair a, Pair b) { return {a.low >= b.low, a.high >= b.high}; }
  friend WKV_INLINE Mask operator<=(Pair a, Pair b) { return {a.low <= b.low, a.high <= b.high}; }
  friend WKV_INLINE Mask operator==(Pair a, Pair b) { return {a.low == b.low, a.high == b.high}; }
  friend WKV_INLINE Pair select(Mask mask, Pair a, Pair b) {
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  }
  friend WKV_INLINE bool all(Mask mask) { return all(mask.low) && all(mask.high); }

  friend WKV_INLINE Pair abs(Pair a) { return {abs(a.low), abs(a.high)}; }
  friend WKV_INLINE Pair rounded(Pair x) { return {rounded(x.low), rounded(x.high)}; }
  friend WKV_INLINE Pair clamped(Pair x, Pair least) {
    return {clamped(x.low, least.low), clamped(x.high, least.high)};
  }
  friend WKV_INLINE Pair nearest_whole(Pair x) { return {nearest_whole(x.low), nearest_whole(x.high)}; }
  friend WKV_INLINE Pair exponent_of(Pair x) { return {exponent_of(x.low), exponent_of(x.high)}; }
  friend WKV_INLINE Pair excess_log2(Pair x, Pair whole) {
    return {excess_log2(x.low, whole.low), excess_log2(x.high, whole.high)};
  }
  friend WKV_INLINE Pair exp2_small(Pair x) { return {exp2_small(x.low), exp2_small(x.high)}; }
  friend WKV_INLINE Pair exp2_in_range(Pair x) { return {exp2_in_range(x.low), exp2_in_range(x.high)}; }
  friend WKV_INLINE Pair exp2_clamped(Pair x) { return {exp2_clamped(x.low), exp2_clamped(x.high)}; }
  friend WKV_INLINE Pair exp_nonpositive(Pair x) { return {exp_nonpositive(x.low), exp_nonpositive(x.high)}; }
  friend WKV_INLINE Pair exp_minus_abs(Pair x) { return {exp_minus_abs(x.low), exp_minus_abs(x.high)}; }
  friend WKV_INLINE Pair exp_over_exp2(Pair x, Pair whole) {
    return {exp_over_exp2(x.low, whole.low), exp_over_exp2(x.high, whole.high)};
  }
};

template <class Wide, class Element>
WKV_INLINE Wide load_as(const Element* source) {
  using Loaded = decltype(load(source));
  if constexpr (std::is_same_v<Wide, Loaded>) {
    return load(source);
  } else {
    return {load(source), load(source + Loaded::lanes)};
  }
}

template <class Element, class Part>
WKV_INLINE void store(Element* target, Pair<Part> x) {
  store(target, x.low);
  store(target + Part::lanes, x.high);
}

// The first `count` lanes; the rest are zero. Only a row's last vector is partial.
template <class Wide, class Element>
WKV_INLINE Wide load_some(const Element* source, int count) {
  if (count == Wide::lanes) return load_as<Wide>(source);
  Element padded[Wide::lanes] = {};
  std::memcpy(padded, source, count * sizeof(Element));
  return load_as<Wide>(padded);
}

template <class Element, class Wide>
WKV_INLINE void store_some(Element* target, Wide x, int count) {
  if (count == Wide::lanes) {
    store(target, x);
    return;
  }
  Element padded[Wide::lanes];
  store(padded, x);
  std::memcpy(target, padded, count * sizeof(Element));
}

constexpr int kLineBytes = 64;

// Writes a whole cache line past the caches: it is neither read from memory first nor kept. Other threads may see it
// once finish_streaming has been called.
WKV_INLINE void stream_line(void* target, const void* line) {
#if WKV_SIMD_BYTES == 64
  _mm512_stream_si512((__m512i*)target, *(const __m512i*)line);
#elif WKV_SIMD_BYTES == 32
  for (int i = 0; i < kLineBytes / 32; ++i) _mm256_stream_si256((__m256i*)target + i, ((const __m256i*)line)[i]);
#elif defined(__x86_64__)
  for (int i = 0; i < kLineBytes / 16; ++i) _mm_stream_si128((__m128i*)target + i, ((const __m128i*)line)[i]);
#else
  std::memcpy(target, line, kLineBytes);
#endif
}

WKV_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace WKV_ISA
}  // namespace wkv::cpu
