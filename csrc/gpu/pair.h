// Pair, two neighbouring channels that behave like a number: the Real that the float kernels pass to the formulas of
// common/math.h. Scaled, sums with an explicit exponent, in which subchunks, chunks and blocks exchange states.
#pragma once

#include "target.h"

namespace wkv {

struct Pair {
  float x, y;

  Pair() = default;
  WKV_HD Pair(float x, float y) : x(x), y(y) {}
  WKV_HD Pair(FloatPair pair) : x(pair.x), y(pair.y) {}
  WKV_HD explicit Pair(double both) : x(static_cast<float>(both)), y(static_cast<float>(both)) {}
  WKV_HD explicit Pair(int both) : x(static_cast<float>(both)), y(static_cast<float>(both)) {}
  WKV_HD Pair(int x, int y) : x(static_cast<float>(x)), y(static_cast<float>(y)) {}
};

struct PairOfBool {
  bool x, y;
};

WKV_HD Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
WKV_HD Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
WKV_HD Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
WKV_HD Pair operator-(Pair a) { return {-a.x, -a.y}; }
WKV_HD Pair reciprocal(Pair a) { return {reciprocal_approximate(a.x), reciprocal_approximate(a.y)}; }
WKV_HD Pair operator/(Pair a, Pair b) { return a * reciprocal(b); }
WKV_HD Quotients<Pair> divide(Pair first, Pair second, Pair by) {
  const Pair factor = reciprocal(by);
  return {first * factor, second * factor};
}
WKV_HD Pair fused(Pair a, Pair b, Pair c) { return {fused(a.x, b.x, c.x), fused(a.y, b.y, c.y)}; }
WKV_HD PairOfBool operator<(Pair a, Pair b) { return {a.x < b.x, a.y < b.y}; }
WKV_HD PairOfBool operator<=(Pair a, Pair b) { return {a.x <= b.x, a.y <= b.y}; }
WKV_HD PairOfBool operator>=(Pair a, Pair b) { return {a.x >= b.x, a.y >= b.y}; }
WKV_HD PairOfBool operator==(Pair a, Pair b) { return {a.x == b.x, a.y == b.y}; }
WKV_HD bool all(PairOfBool condition) { return condition.x && condition.y; }
WKV_HD Pair select(PairOfBool condition, Pair a, Pair b) { return {condition.x ? a.x : b.x, condition.y ? a.y : b.y}; }
WKV_HD Pair larger(Pair a, Pair b) { return {larger_float(a.x, b.x), larger_float(a.y, b.y)}; }
WKV_HD Pair smaller(Pair a, Pair b) { return {smaller_float(a.x, b.x), smaller_float(a.y, b.y)}; }
WKV_HD Pair abs(Pair a) { return {std::fabs(a.x), std::fabs(a.y)}; }
WKV_HD Pair ceil(Pair a) { return {std::ceil(a.x), std::ceil(a.y)}; }
WKV_HD Pair exp2(Pair a) { return {exp2_approximate(a.x), exp2_approximate(a.y)}; }
WKV_HD Pair log2(Pair a) { return {log2_approximate(a.x), log2_approximate(a.y)}; }
WKV_HD Pair exp_nonpositive(Pair a) { return exp2(a * Pair(kLog2E)); }
WKV_HD Pair exp2_clamped(Pair a) { return exp2(a); }

// Keeps r: one product where r < 0, under a predicate, instead of a selection and a product.
template <>
struct Gate<Pair> {
  Pair r, lesser;

  WKV_HD static Gate from(Pair r, Pair lesser) { return {r, lesser}; }
  WKV_HD Pair times_share(Pair value) const { return select(r >= Pair(0), value, value * lesser); }
};

WKV_HD Sums<Pair> operator*(Pair factor, Sums<Pair> sums) { return {factor * sums.num, factor * sums.den}; }
WKV_HD Sums<Pair> operator+(Sums<Pair> a, Sums<Pair> b) { return {a.num + b.num, a.den + b.den}; }

// ---- sums times 2^exponent ----

// Exponents are whole numbers, so that a change of scale is exact. States are such sums, and so are their gradients.
struct Scaled {
  Sums<Pair> sums;
  Pair exponent;
};

// The exponent of sums that are zero: finite, and so low that it never determines a common exponent.
inline constexpr double kEmptyExponent = -1e30;

// 2^x of a whole x < 128, 0 below the smallest normal float.
WKV_HD Pair power_of_two(Pair x) {
  const auto one = [](float x) {
    // 2^23 + an integer has the integer in its lowest bits.
    return bits_as<float>(bits_as<uint32_t>(larger_float(x, -127.0f) + 8388735.0f) << 23);
  };
  return {one(x.x), one(x.y)};
}

WKV_HD Scaled empty_scaled() { return {{Pair(0), Pair(0)}, Pair(kEmptyExponent)}; }

// Brings `magnitude`, which is positive, to [1, 2) by a power of two. NaN and infinity stay.
WKV_HD Scaled normalised(Scaled value, Pair magnitude) {
  // A positive float is its exponent + 127, times 2^23, and something smaller.
  constexpr uint32_t kLargest = 254u << 23;
  const auto exponent_of = [](float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    return (bits < kLargest ? bits : kLargest) & ~0x7fffffu;
  };
  const uint32_t x = exponent_of(magnitude.x), y = exponent_of(magnitude.y);
  const auto factor_of = [](uint32_t exponent) {
    constexpr uint32_t kLeast = 0x400000;  // 2^-127, a subnormal number
    const uint32_t bits = kLargest - exponent;
    return bits_as<float>(bits > kLeast ? bits : kLeast);
  };
  // In this order, so that sums are exact.
  const Pair exponent = value.exponent + (Pair(static_cast<int>(x), static_cast<int>(y)) * Pair(0x1p-23) - Pair(127));
  return {Pair(factor_of(x), factor_of(y)) * value.sums, select(magnitude == Pair(0), Pair(kEmptyExponent), exponent)};
}
WKV_HD Scaled normalised_state(Scaled state) { return normalised(state, state.sums.den); }
WKV_HD Scaled normalised_adjoint(Scaled adjoint) {
  return normalised(adjoint, larger(abs(adjoint.sums.num), abs(adjoint.sums.den)));
}

// The sum of `first` and the steps after it, `second`, over which `decay` is the log2 of the total decay.
WKV_HD Scaled join(Scaled first, Pair decay, Scaled second) {
  // The fraction of the decay stays separate: added to an exponent it would be rounded.
  const Pair whole = ceil(decay), decayed = first.exponent + whole;
  const Pair exponent = larger(decayed, second.exponent);
  return {exp2((decayed - exponent) + (decay - whole)) * first.sums +
              power_of_two(second.exponent - exponent) * second.sums,
          exponent};
}

// log2 of e^logarithm · 2^exponent, to the last bit where the two nearly cancel.
WKV_HD Pair sum_log2(Pair logarithm, Pair exponent) {
  constexpr float kHigh = static_cast<float>(kLog2E), kLow = static_cast<float>(kLog2E - kHigh);
  const auto one = [](float a, float b) { return fused(a, kLow, fused(a, kHigh, b)); };
  return {one(logarithm.x, exponent.x), one(logarithm.y, exponent.y)};
}

// Sums times e^logarithm.
WKV_HD Scaled scaled_by_exp(Sums<Pair> sums, Pair logarithm) {
  const Pair exponent = ceil(logarithm * Pair(kLog2E));
  // From 2^23 on every float is whole, and the difference is only rounding.
  const Pair rest = select(abs(exponent) < Pair(8388608.0), sum_log2(logarithm, -exponent), Pair(0));
  return {exp2(rest) * sums, exponent};
}

WKV_HD Scaled scaled(State<Pair> state) {
  const Scaled value = scaled_by_exp(state.sums, state.max);
  return {value.sums, select(state.sums.den == Pair(0), Pair(kEmptyExponent), value.exponent)};
}

WKV_HD State<Pair> state_of(Scaled value) {
  const Pair max = value.exponent * Pair(1 / kLog2E);
  // The rounding error of max.
  const Pair rest = select(abs(value.exponent) < Pair(8388608.0), sum_log2(-max, value.exponent), Pair(0));
  return {exp2(rest) * value.sums, select(value.sums.den == Pair(0), Pair(kEmptyMax), max)};
}

}  // namespace wkv
