// The recurrence over time: the scales in which the exponentials stay in range, and one step forward and back in a
// scale. The loops over steps and their storage belong to the kernels.
#pragma once

#include "math.h"

namespace wkv {

// The logits of steps that share one exponent spread over at most e^60: below a float32 weight of e^-60 there is still
// room for terms 2^-24 times smaller above the smallest normal number, e^-87.3.
inline constexpr double kSharedSpread = 60.0;

// A moderate channel's constants multiply weights by at most e^30 and at least e^-30: sums have room for that.
inline constexpr double kModerateLogit = 30.0;

template <class Real>
struct Channel {
  Real log_decay, u;

  WKV_HD auto is_moderate() const { return abs(u) - log_decay <= Real(kModerateLogit); }
};

template <class Real>
struct StepWeights {
  Weights<Real> read, advance;
};

// The two scales have the same members, so that a loop over time is written once. `at` is all that weights depend on,
// and all that backward keeps of a step's key.

// The classic form, right for any input: max is the largest decayed logit so far. Two exponentials a step, or one where
// the channel is moderate: y is a ratio, so the weights of a read may have any factor in common, and with a certain one
// they are those of advance, the present lifted.
template <class Real>
struct RunningScale {
  Channel<Real> channel;
  bool lifts = false;  // as is right for a moderate channel
  Real lift{};         // e^{u + log_decay}

  WKV_HD Real logit(Real k) const { return key_logit(k); }
  WKV_HD Real at(Real max, Real k) const { return max - k; }
  WKV_HD StepWeights<Real> weights(Real lead) const {
    const Weights<Real> advance = weigh(lead + channel.log_decay, Real(0));
    if (lifts) [[likely]] {
      return {{advance.past, lift * advance.present}, advance};
    }
    return {weigh(lead, channel.u), advance};
  }
  WKV_HD Real next_max(Real max, Real k) const { return larger(k, max + channel.log_decay); }
};

// One reference for a subchunk: e^{k - reference} serves read and advance alike. One exponential a step.
template <class Real>
struct SharedScale {
  Real reference_log2;  // log2(e) times the reference
  Real decay;           // e^log_decay
  Real bonus;           // e^u

  // Logits that fit contain no +inf.
  WKV_HD Real logit(Real k) const { return k; }
  WKV_HD Real weight(Real logit) const { return exp2_clamped(logit * Real(kLog2E) - reference_log2); }
  WKV_HD Real at(Real, Real k) const { return weight(k); }
  WKV_HD StepWeights<Real> weights(Real key_weight) const {
    return {{Real(1), bonus * key_weight}, {decay, key_weight}};
  }
  WKV_HD Real next_max(Real max, Real) const { return max; }
};

// The same with a power of 2 as its reference, which a state's max need not be near: neither a running maximum is
// needed nor another reference for every subchunk. A whole exponent leaves nothing to round.
template <class Real>
struct WholeScale : SharedScale<Real> {
  Real least;  // logits have at least this weight, 2^-126

  WKV_HD static WholeScale of(Real whole, Real decay, Real bonus) {
    return {{whole, decay, bonus}, (whole - Real(126)) * Real(kLn2)};
  }
  WKV_HD Real weight(Real logit) const { return exp_over_exp2(clamped(logit, least), this->reference_log2); }
  WKV_HD Real at(Real, Real k) const { return weight(k); }
};

// The natural max for a power of 2, and the factor of sums that are relative to that power on their way to it: 2^x,
// where x is what the rounding of that max lost.
template <class Real>
WKV_HD Real max_of_exp2(Real whole) {
  return whole * Real(kLn2);
}
template <class Real>
WKV_HD Real exp2_over_max(Real whole) {
  const Real x = excess_log2(max_of_exp2(whole), whole);
  return x * (x * Real(0.24022651) - Real(0.69314718)) + Real(1);
}

// The keys of at most 16 steps, beside the state before them.
template <class Real>
struct StandingRange {
  // A state so heavy, e^-30, needs no heavy key beside it: a weight that is held at the smallest float and multiplied
  // by e^u, at most e^40, is still 2^24 times smaller.
  static constexpr double kHeavy = 9.36e-14, kLargestU = 40.0;
  static constexpr double kLargestMax = 1 << 17;

  Real highest, lowest;

  WKV_HD static StandingRange none() { return {Real(kEmptyMax), Real(-kEmptyMax)}; }
  WKV_HD void add(Real k) {
    highest = larger(k, highest);
    lowest = smaller(k, lowest);
  }
  // No weight is above 1 and no denominator below e^-60. False for an empty state, and where the reference would not be
  // exact. NaN may pass.
  WKV_HD auto fits(State<Real> before, Channel<Real> channel, Real decay) const {
    const Real decay2 = decay * decay, decay4 = decay2 * decay2, decay8 = decay4 * decay4;
    const auto is_heavy = before.sums.den * decay8 * decay8 >= Real(kHeavy);
    const Real rise = highest - before.max + Real(kSharedSpread);
    const Real fall = select(is_heavy, Real(kSharedSpread - kLargestU), before.max - lowest);
    const Real spread = larger(rise, fall) + abs(channel.u);
    return larger(spread, abs(before.max) * Real(kSharedSpread / kLargestMax)) <= Real(kSharedSpread);
  }
};

// The logits of a subchunk: the largest, the running maximum after it, and the smallest value of the running maximum.
template <class Real>
struct LogitRange {
  Real highest, running, lowest;

  WKV_HD static LogitRange from(Real max) { return {max, max, Real(-kEmptyMax)}; }
  WKV_HD void add(Channel<Real> channel, Real k) {
    running = larger(k, running + channel.log_decay);
    highest = larger(k, highest);
    lowest = smaller(running, lowest);
  }
  // Where the log-decay is positive, the maximum grows beyond all keys, and is largest at the end.
  WKV_HD Real top() const { return larger(running, highest); }
  // Infinite without any weight.
  WKV_HD Real spread() const { return top() - select(lowest >= Real(kEmptyMax / 2), lowest, Real(-INFINITY)); }
  // Whether the weights of advance stay in range, those of reads apart.
  WKV_HD auto is_narrow() const { return spread() <= Real(kSharedSpread); }
  // Above every logit of the subchunk, u + k included.
  WKV_HD Real reference(Channel<Real> channel) const { return top() + larger(channel.u, Real(0)); }
  // A max for the state after the subchunk that is likely to stand: above keys that are a little larger than those of
  // the subchunk, unless they have lost all weight.
  WKV_HD Real standing_max(Channel<Real> channel) const {
    return smaller(reference(channel), running + Real(20)) + Real(8);
  }
  // |u|, because the bonus may lift the reference or lower the only weight; u once more where it is positive,
  // because it also lifts weights that are held at the smallest float. False without any weight and for a key of +inf,
  // which belong to RunningScale. NaN may pass: it stays NaN in either scale.
  WKV_HD auto fits(Channel<Real> channel) const {
    return spread() + abs(channel.u) + larger(channel.u, Real(0)) <= Real(kSharedSpread);
  }
};

// The state after a step whose weights are known.
template <class Scale, class Real>
WKV_HD State<Real> advance(const Scale& scale, State<Real> state, Weights<Real> weights, Real k, Real v) {
  return {mix(state.sums, weights, v), scale.next_max(state.max, k)};
}

// A step as backward keeps it: the sums before it, and `at`, on which its weights depend.
template <class Real>
struct SavedStep {
  Sums<Real> sums;
  Real at;
};

// On entry `adjoint` is the gradient of the sums after the step, on return that of the sums before it; gy is that of y
// times the gate.
template <class Scale, class Real, class Gating = NoGate>
WKV_HD StepGradients<Real> step_adjoint(const Scale& scale, const SavedStep<Real>& before, Real v, Real gy,
                                        Sums<Real>& adjoint, Gating gate = {}) {
  const StepWeights<Real> weights = scale.weights(before.at);
  StepGradients<Real> gradients;
  advance_adjoint(before.sums, weights.advance, v, adjoint, gradients);
  read_adjoint(before.sums, weights.read, v, gy, adjoint, gradients, gate);
  return gradients;
}

}  // namespace wkv
