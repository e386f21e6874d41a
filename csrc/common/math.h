// The mathematics of the WKV operator; every kernel is written in terms of this header.
//
//   y_t = (num_t + e^{u+k_t} v_t) / (den_t + e^{u+k_t})                                    read
//   (num, den)_{t+1} = e^{log_decay} (num, den)_t + e^{k_t} (v_t, 1)                       advance
//
// Both lines are one operation: a weighted sum of past and present, `mix`; only the weights differ. The true sums are
// num·e^max and den·e^max, one state however max is chosen; docs/wkv.md derives all of this.
//
// `Real` is float, double or a SIMD vector of either. This header owns the formulas and knows nothing of tensors,
// threads or memory.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define WKV_HD __host__ __device__ __forceinline__
#else
#define WKV_HD inline __attribute__((always_inline))
#endif

namespace wkv {

// Finite, because -inf - -inf is NaN; so low that no key comes near it.
inline constexpr double kEmptyMax = -1e38;

inline constexpr double kLog2E = 1.44269504088896340736;
inline constexpr double kLn2 = 0.693147180559945309417;

// ---- a scalar as a Real; a vector type brings its own ----

WKV_HD bool all(bool condition) { return condition; }
template <class Scalar>
WKV_HD Scalar select(bool condition, Scalar a, Scalar b) {
  return condition ? a : b;
}
WKV_HD float abs(float x) { return std::fabs(x); }
WKV_HD double abs(double x) { return std::fabs(x); }
// e^x for x <= 0, exactly 0 for -inf.
WKV_HD float exp_nonpositive(float x) { return std::exp(x); }
WKV_HD double exp_nonpositive(double x) { return std::exp(x); }
// 2^x for x <= 0; results below 2^-126 are negligible.
WKV_HD float exp2_clamped(float x) { return std::exp2(x); }
WKV_HD double exp2_clamped(double x) { return std::exp2(x); }

// e of x = 2^e times a number from 1 to 2; of zero something that is small beside kEmptyMax.
template <class Scalar>
WKV_HD Scalar exponent_of(Scalar x) {
  int exponent;
  std::frexp(x, &exponent);
  return static_cast<Scalar>(exponent - 1);
}

// Two quotients with the same divisor.
template <class Real>
struct Quotients {
  Real first, second;
};
template <class Real>
WKV_HD Quotients<Real> divide(Real first, Real second, Real by) {
  return {first / by, second / by};
}

// ---- the operator ----

// Beyond w = 64 a decay is zero for any keys; up to there its multiples over any number of steps are finite.
// An infinite one would make NaN: times zero in the gradient of w and over no steps, and beside a key of -inf.
inline constexpr double kLargestRawDecay = 64.0;

// A NaN in x is ignored: it reaches the sums by its own weight and need not spoil the bounds as well.
template <class Real>
WKV_HD Real larger(Real x, Real known) {
  return select(known < x, x, known);
}
template <class Real>
WKV_HD Real smaller(Real x, Real known) {
  return select(x < known, x, known);
}

// -e^w, finite for any w but NaN.
template <class Real>
WKV_HD Real log_decay_of(Real w) {
  return -std::exp(smaller(Real(kLargestRawDecay), w));
}

template <class Real>
struct Sums {
  Real num, den;
};

template <class Real>
struct State {
  Sums<Real> sums;
  Real max;
};

template <class Real>
WKV_HD State<Real> empty_state() {
  return {{Real(0), Real(0)}, Real(kEmptyMax)};
}

// den alone decides: every step adds at least its own weight to it.
template <class Real>
WKV_HD auto is_empty(State<Real> state) {
  return state.sums.den == Real(0);
}

// A state from outside; an empty one is the same whatever it was given as.
template <class Real>
WKV_HD State<Real> or_empty(State<Real> given) {
  const auto empty = is_empty(given);
  return {{select(empty, Real(0), given.sums.num), select(empty, Real(0), given.sums.den)},
          select(empty, Real(kEmptyMax), given.max)};
}

// NaN with a lower half of zeros: rounding to bfloat16 by an addition to the bits could carry a full payload into a
// number.
template <class Real>
WKV_HD Real canonical_nan(Real x) {
  return select(x == x, x, Real(NAN));
}

// A state from outside as or_empty has it, and every NaN as the canonical one.
template <class Real>
WKV_HD State<Real> normal_form(State<Real> given) {
  const auto [sums, max] = or_empty(given);
  return {{canonical_nan(sums.num), canonical_nan(sums.den)}, canonical_nan(max)};
}

template <class Real>
struct Weights {
  Real past, present;
};

template <class Real>
WKV_HD Weights<Real> weigh(Real past_log, Real present_log) {
  // The larger weight is 1, so one exponential serves both.
  const Real gap = past_log - present_log;
  const Real lesser = exp_nonpositive(-abs(gap));
  const auto past_is_larger = gap >= Real(0);
  return {select(past_is_larger, Real(1), lesser), select(past_is_larger, lesser, Real(1))};
}

template <class Real>
WKV_HD Sums<Real> mix(Sums<Real> past, Weights<Real> weights, Real v) {
  return {weights.present * v + weights.past * past.num, weights.past * past.den + weights.present};
}

// ---- the gate: sigmoid(r), which multiplies y ----

struct NoGate {};

// sigmoid(r) = share / (1 + lesser). Both are in [0, 1], and exactly 0 or 1 at the ends; e^-r would not stay in range.
// A vector type may keep something else than share.
template <class Real>
struct Gate {
  Real share, lesser;

  WKV_HD static Gate from(Real r, Real lesser) { return {select(r >= Real(0), Real(1), lesser), lesser}; }
  WKV_HD Real times_share(Real value) const { return value * share; }
};

// e^-|r|, exactly 1 at 0 and 0 at either end. A vector type may bring its own.
template <class Real>
WKV_HD Real exp_minus_abs(Real r) {
  return exp_nonpositive(-abs(r));
}

template <class Real>
WKV_HD Gate<Real> gate_of(Real r) {
  return Gate<Real>::from(r, exp_minus_abs(r));
}

template <class Real>
WKV_HD Real sigmoid(Real r) {
  const Gate<Real> gate = gate_of(r);
  return gate.share / (gate.lesser + Real(1));
}

// num/den times the gate. `share` may be the smallest number that there is: it comes last, and times num alone it might
// leave the range.
template <class Real>
WKV_HD Real gated_mean(Sums<Real> sums, NoGate) {
  return sums.num / sums.den;
}
template <class Real>
WKV_HD Real gated_mean(Sums<Real> sums, Gate<Real> gate) {
  return gate.times_share(sums.num / (sums.den * gate.lesser + sums.den));
}

// Of gated_mean: y = num/den without the gate, the gradients h of num and gr of r; that of den is -h·y.
template <class Real>
struct MeanAdjoint {
  Real y, h, gr;
};
template <class Real>
WKV_HD MeanAdjoint<Real> gated_mean_adjoint(Sums<Real> sums, NoGate, Real g) {
  const auto [y, h] = divide(sums.num, g, sums.den);
  return {y, h, Real(0)};
}
template <class Real>
WKV_HD MeanAdjoint<Real> gated_mean_adjoint(Sums<Real> sums, Gate<Real> gate, Real g) {
  // One division for all: 1 / (1 + lesser) is `factor` times den.
  const Real factor = Real(1) / (sums.den * gate.lesser + sums.den);
  const Real part_of_y = sums.num * factor, part_of_h = g * factor;  // y / (1 + lesser), h / share
  return {part_of_y * gate.lesser + part_of_y, gate.times_share(part_of_h),
          part_of_h * sums.den * (part_of_y * gate.lesser)};
}

// ---- a step ----

// y of the step whose sums before it are `past`, times the gate.
template <class Real, class Gating = NoGate>
WKV_HD Real read(Sums<Real> past, Weights<Real> weights, Real v, Gating gate = {}) {
  return gated_mean(mix(past, weights, v), gate);
}

// The gradients below are those of the true sums, so max is a constant to them: the state's gauge.
template <class Real>
struct StepGradients {
  Real gk, gv, g_log_decay, gu, gr;
};

// Of `read`, whose gradient is gy; adds to `adjoint`, the gradient of the state before the step.
template <class Real, class Gating = NoGate>
WKV_HD void read_adjoint(Sums<Real> past, Weights<Real> weights, Real v, Real gy, Sums<Real>& adjoint,
                         StepGradients<Real>& gradients, Gating gate = {}) {
  const auto [y, h, gr] = gated_mean_adjoint(mix(past, weights, v), gate, gy);
  const Real h_present = weights.present * h;
  gradients.gv = gradients.gv + h_present;
  gradients.gu = h_present * (v - y);
  gradients.gk = gradients.gk + gradients.gu;
  gradients.gr = gr;
  adjoint.num = adjoint.num + weights.past * h;
  adjoint.den = adjoint.den - weights.past * h * y;
}

// On entry `adjoint` is the gradient of the state after the step, on return that of the state before it.
template <class Real>
WKV_HD void advance_adjoint(Sums<Real> past, Weights<Real> weights, Real v, Sums<Real>& adjoint,
                            StepGradients<Real>& gradients) {
  gradients.gv = weights.present * adjoint.num;
  gradients.gk = weights.present * (v * adjoint.num + adjoint.den);
  // Paired step by step: recovering this from sums of gk is exact on paper and noise in float32 (docs/wkv.md).
  gradients.g_log_decay = weights.past * (past.num * adjoint.num + past.den * adjoint.den);
  adjoint = {weights.past * adjoint.num, weights.past * adjoint.den};
}

// The state of a sequence followed by another one, `decay` being the log-decay over the whole second part.
template <class Real>
WKV_HD State<Real> join(State<Real> first, Real decay, State<Real> second) {
  const Weights<Real> weights = weigh(first.max + decay, second.max);
  return {{weights.past * first.sums.num + weights.present * second.sums.num,
           weights.past * first.sums.den + weights.present * second.sums.den},
          larger(second.max, first.max + decay)};
}

// An infinite weight has no finite mean: +inf becomes NaN, as it does in (inf - inf). -inf stays, a weight of zero.
template <class Real>
WKV_HD Real key_logit(Real k) {
  return select(k == Real(INFINITY), Real(NAN), k);
}

}  // namespace wkv
