// A step of the bidirectional operator: what stands before it and what stands after it are causal states, each by the
// recurrence of recurrence.h from its own end, and a read joins them with the step.
//
//   y_t = (before.num + after.num + e^{u+k_t} v_t) / (before.den + after.den + e^{u+k_t})
//
// The log-decay may have either sign. docs/wkv.md derives all of this.
#pragma once

#include "recurrence.h"

namespace wkv {

// Beyond, every weight but the largest is zero for any keys; up to it, multiples over any number of steps are finite.
inline constexpr double kLargestLogDecay = 6.235149080811617e27;  // e^64

// Within the bounds; NaN stays.
template <class Real>
WKV_HD Real bounded_log_decay(Real log_decay) {
  const Real bound = Real(kLargestLogDecay);
  return select(log_decay > bound, bound, select(log_decay < -bound, -bound, log_decay));
}

// A step's loss of the maximum by rounding at most, so that 64 steps move a denominator by a factor of e^8.
inline constexpr double kLargestLoss = 0.125;

// The same state with a denominator from 1 to 2, and the factor from the given sums to these. A maximum that has grown
// by rounded steps, or sums of many steps without decay, would leave the range of sums in the end.
template <class Real>
struct Settled {
  State<Real> state;
  Real factor;
};
template <class Real>
WKV_HD Settled<Real> settled(State<Real> given) {
  const Real max = given.max + exponent_of(given.sums.den) * Real(1 / kLog2E);  // an empty one's rounds to itself
  const Real change = given.max - max;
  const Real lesser = exp_nonpositive(-abs(change));
  const Real factor = select(Real(0) < change, Real(1) / lesser, lesser);
  return {{{given.sums.num * factor, given.sums.den * factor}, max}, factor};
}

// Of a read: the weights of the sums on either side, and of the step.
template <class Real>
struct SideWeights {
  Real before, after, present;
};

// The two scales of a subchunk have the same members. `at` is what is kept of a step and a side beside the sums there.

// Both sides and the step's own weight in one scale: one exponential a step.
template <class Real>
struct SharedSides {
  SharedScale<Real> scale;

  WKV_HD Real logit(Real k) const { return scale.logit(k); }
  WKV_HD Real at(Real, Real logit) const { return scale.weight(logit); }
  // The other side's, for one that is known: the key has the same weight in both.
  WKV_HD Real other_at(Real at, Real) const { return at; }
  WKV_HD Weights<Real> advance(Real at, Real) const { return scale.weights(at).advance; }
  WKV_HD SideWeights<Real> read(Real at, Real, Real) const {
    return {Real(1), Real(1), scale.weights(at).read.present};
  }
  WKV_HD Real next_max(Real max, Real logit) const { return scale.next_max(max, logit); }
};

// Every side relative to its own maximum, a read to the largest of all: right for any input.
template <class Real>
struct RunningSides {
  RunningScale<Real> scale;

  WKV_HD Real logit(Real k) const { return scale.logit(k); }
  WKV_HD Real at(Real max, Real) const { return max; }
  WKV_HD Real other_at(Real, Real max) const { return max; }
  // Relative to the maximum as it is rounded: where weights grow with the distance it grows with every step, and what
  // is lost each time would add up. One more exponential than `weigh` takes. The sums follow what is lost until
  // `settled` moves it back to the maximum, which a maximum whose roundings are large cannot take: there it is ignored.
  WKV_HD Weights<Real> advance(Real at, Real logit) const {
    const Real next = next_max(at, logit), past = at - next + scale.channel.log_decay;
    const Real held = select(logit < next, Real(0), smaller(past, Real(0)));
    const auto is_fine = abs(next) < abs(next) + Real(kLargestLoss);
    return {exp_nonpositive(select(is_fine, past, held)), exp_nonpositive(logit - next)};
  }
  WKV_HD SideWeights<Real> read(Real at_before, Real at_after, Real logit) const {
    const Weights<Real> sides = weigh(at_before, at_after);
    const Weights<Real> step = weigh(larger(at_before, at_after), logit + scale.channel.u);
    return {sides.past * step.past, sides.present * step.past, step.present};
  }
  WKV_HD Real next_max(Real max, Real logit) const { return scale.next_max(max, logit); }
};

template <class Real>
WKV_HD SharedSides<Real> sides_of(SharedScale<Real> scale) {
  return {scale};
}
template <class Real>
WKV_HD RunningSides<Real> sides_of(RunningScale<Real> scale) {
  return {scale};
}

// The keys of a subchunk: bounds, and those at its ends.
template <class Real>
struct KeyRange {
  Real lowest, highest, first, last;

  WKV_HD static KeyRange from(Real first, Real last) { return {Real(-kEmptyMax), Real(kEmptyMax), first, last}; }
  WKV_HD void add(Real k) {
    lowest = smaller(k, lowest);
    highest = larger(k, highest);
  }
};

// Bounds of the logarithm of a side's denominator. Its sums are relative to the upper one.
template <class Real>
struct SideBounds {
  Real lower, upper;

  // After a subchunk whose last step has the key `last`, over which the log-decay is `total`. The range is that of its
  // logits, or wider: the running maximum itself takes a chain of operations that are longer than the sums of the
  // steps.
  WKV_HD SideBounds after(const KeyRange<Real>& keys, Real last, Real log_decay, Real total) const {
    return {larger(last, lower + total), larger(keys.highest + larger(total - log_decay, Real(0)), upper + total)};
  }
  WKV_HD LogitRange<Real> range(const KeyRange<Real>& keys, SideBounds after, Real total) const {
    return {larger(upper, after.upper), after.upper, larger(keys.lowest, smaller(lower, lower + total))};
  }
};

// The logits of a subchunk of both sides. It has two steps at least, so that every read has a side whose state is one
// after a step of it, and in the range.
template <class Real>
WKV_HD LogitRange<Real> join_ranges(LogitRange<Real> before, LogitRange<Real> after) {
  return {larger(before.top(), after.top()), before.running, smaller(before.lowest, after.lowest)};
}

// ---- a read ----

template <class Real>
WKV_HD Sums<Real> both_sides(Sums<Real> before, Sums<Real> after, SideWeights<Real> weights) {
  return {weights.before * before.num + weights.after * after.num,
          weights.before * before.den + weights.after * after.den};
}

template <class Real, class Gating>
WKV_HD Real read_sides(Sums<Real> before, Sums<Real> after, SideWeights<Real> weights, Real v, Gating gate) {
  return read(both_sides(before, after, weights), Weights<Real>{Real(1), weights.present}, v, gate);
}

// Adds to the adjoint of the sums after the step, and returns what the read adds to that of the sums before it.
template <class Real, class Gating>
WKV_HD Sums<Real> read_sides_adjoint(Sums<Real> before, Sums<Real> after, SideWeights<Real> weights, Real v, Real gy,
                                     Sums<Real>& adjoint_after, StepGradients<Real>& gradients, Gating gate) {
  Sums<Real> adjoint = {Real(0), Real(0)};
  read_adjoint(both_sides(before, after, weights), Weights<Real>{Real(1), weights.present}, v, gy, adjoint, gradients,
               gate);
  adjoint_after = {adjoint_after.num + weights.after * adjoint.num, adjoint_after.den + weights.after * adjoint.den};
  return {weights.before * adjoint.num, weights.before * adjoint.den};
}

}  // namespace wkv
