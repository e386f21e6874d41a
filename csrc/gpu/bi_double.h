// The bidirectional operator in float64, for exactness: a thread for each channel takes a sequence from one end to the
// other, by RunningSides, and back. All that the way back needs of a step is kept in memory, and nothing is joined.
#pragma once

#include "bi_backward.h"
#include "small.h"

namespace wkv {

// A channel's steps.
struct BiDoubleChannel {
  const BiParams& params;
  const DoubleChannel& channel;
  RunningSides<double> sides;

  WKV_HD BiDoubleChannel(const BiParams& params, const DoubleChannel& channel)
      : params(params), channel(channel), sides(sides_of(channel.scale)) {}

  // That which is kept of a step: the state after it and, backward, that before it.
  WKV_HD double* kept(int64_t t) const {
    const auto& [view, n, c, C, scale] = channel;
    return static_cast<double*>(params.steps) + (view.b * params.T + view.begin + t) * params.step_height * C + c;
  }
  WKV_HD State<double> load(const double* at) const { return {{at[0], at[channel.C]}, at[2 * channel.C]}; }
  WKV_HD void store(double* at, State<double> state) const {
    at[0] = state.sums.num;
    at[channel.C] = state.sums.den;
    at[2 * channel.C] = state.max;
  }

  // Of the gradients of the log-decay and of u.
  WKV_HD double* partials() const {
    return static_cast<double*>(params.partials) + channel.n * 2 * channel.C + channel.c;
  }

  WKV_HD double logit(int64_t t) const { return sides.logit(channel.at(params.inputs[0], t)); }
  WKV_HD double value(int64_t t) const { return channel.at(params.inputs[1], t); }
  WKV_HD auto gate(int64_t t) const { return channel.template gate_at<true>(params, t); }

  WKV_HD State<double> moved(State<double> state, int64_t t) const {
    const double k = logit(t);
    return {mix(state.sums, sides.advance(sides.at(state.max, k), k), value(t)), sides.next_max(state.max, k)};
  }
  // At the same boundaries from either end.
  WKV_HD static bool settles(int64_t boundary) { return boundary % checkpoint_interval(DType::float64) == 0; }
  WKV_HD State<double> next_before(State<double> state, int64_t t) const {
    const State<double> next = moved(state, t);
    return settles(t + 1) ? settled(next).state : next;
  }
  WKV_HD State<double> next_after(State<double> state, int64_t t) const {
    const State<double> next = moved(state, t);
    return settles(t) ? settled(next).state : next;
  }

  WKV_HD SideWeights<double> read_weights(State<double> before, State<double> after, int64_t t) const {
    return sides.read(before.max, after.max, logit(t));
  }
};

template <class Team, class Function>
WKV_HD void for_bi_channels(const BiParams& params, BlockIndex block, int threads, Team& team,
                            const Function& function) {
  for_double_channels<true, false>(params, block, threads, team, [&](const DoubleChannel& channel, int) {
    function(BiDoubleChannel(params, channel), channel.view.steps);
  });
}

// The state after each step.
template <>
struct BiSums<double> {
  using Params = BiParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_bi_channels(params, block, threads, team, [](const BiDoubleChannel& channel, int64_t T) {
      State<double> state = empty_state<double>();
#pragma unroll 1
      for (int64_t t = T - 1; t >= 0; --t) {
        channel.store(channel.kept(t), state);
        state = channel.next_after(state, t);
      }
    });
  }
};

template <>
struct BiForward<double> {
  using Params = BiParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_bi_channels(params, block, threads, team, [&](const BiDoubleChannel& channel, int64_t T) {
      double* const y = channel.channel.first(params.outputs[0], params);
      State<double> before = empty_state<double>();
#pragma unroll 1
      for (int64_t t = 0; t < T; ++t) {
        const State<double> after = channel.load(channel.kept(t));
        y[t * params.C] = read_sides(before.sums, after.sums, channel.read_weights(before, after, t), channel.value(t),
                                     channel.gate(t));
        before = channel.next_before(before, t);
      }
    });
  }
};

// From the first step to the last: the adjoint of the states after, and all gradients but for the part that comes from
// the states before, which the way back adds. What the read adds to their adjoint takes the place of the state after.
template <>
struct BiAdjointSums<double> {
  using Params = BiParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_bi_channels(params, block, threads, team, [&](const BiDoubleChannel& channel, int64_t T) {
      const auto& sides = channel.sides;
      const int64_t C = params.C;
      double* const gk = channel.channel.first(params.outputs[0], params);
      double* const gv = channel.channel.first(params.outputs[1], params);
      double* const gr = params.gr != nullptr ? channel.channel.first(params.gr, params) : nullptr;
      State<double> before = empty_state<double>();
      Sums<double> adjoint{0, 0}, partials{0, 0};
#pragma unroll 1
      for (int64_t t = 0; t < T; ++t) {
        double* const kept = channel.kept(t);
        const State<double> after = channel.load(kept);
        const double k = channel.logit(t), v = channel.value(t);
        if (channel.settles(t)) {
          const double factor = settled(channel.moved(after, t)).factor;
          adjoint = {factor * adjoint.num, factor * adjoint.den};
        }
        StepGradients<double> gradients;
        advance_adjoint(after.sums, sides.advance(sides.at(after.max, k), k), v, adjoint, gradients);
        const Sums<double> to_before =
            read_sides_adjoint(before.sums, after.sums, channel.read_weights(before, after, t), v,
                               channel.channel.at(params.inputs[2], t), adjoint, gradients, channel.gate(t));
        gk[t * C] = gradients.gk;
        gv[t * C] = gradients.gv;
        if (gr != nullptr) gr[t * C] = gradients.gr;
        partials = {partials.num + gradients.g_log_decay, partials.den + gradients.gu};
        channel.store(kept, {to_before, 0});
        channel.store(kept + 3 * C, before);
        before = channel.next_before(before, t);
      }
      store_sums(channel.partials(), C, partials);
    });
  }

  WKV_HD static void store_sums(double* at, int64_t C, Sums<double> sums) {
    at[0] = sums.num;
    at[C] = sums.den;
  }
};

// Back from the last step: the adjoint of the states before.
template <>
struct BiBackward<double> {
  using Params = BiParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_bi_channels(params, block, threads, team, [&](const BiDoubleChannel& channel, int64_t T) {
      const auto& sides = channel.sides;
      const int64_t C = params.C;
      double* const gk = channel.channel.first(params.outputs[0], params);
      double* const gv = channel.channel.first(params.outputs[1], params);
      Sums<double> adjoint{0, 0};
      double g_log_decay = 0;
#pragma unroll 1
      for (int64_t t = T - 1; t >= 0; --t) {
        const double* const kept = channel.kept(t);
        const State<double> before = channel.load(kept + 3 * C);
        const double k = channel.logit(t);
        if (channel.settles(t + 1)) {
          const double factor = settled(channel.moved(before, t)).factor;
          adjoint = {factor * adjoint.num, factor * adjoint.den};
        }
        StepGradients<double> gradients;
        advance_adjoint(before.sums, sides.advance(sides.at(before.max, k), k), channel.value(t), adjoint, gradients);
        adjoint = {adjoint.num + kept[0], adjoint.den + kept[C]};
        gk[t * C] += gradients.gk;
        gv[t * C] += gradients.gv;
        g_log_decay += gradients.g_log_decay;
      }
      channel.partials()[0] += g_log_decay;
    });
  }
};

}  // namespace wkv
