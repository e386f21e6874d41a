// The kernels of one thread for each channel: a token's step, the reduction of gradients, and float64, which is for
// exactness: one thread takes a sequence from one end to the other.
#pragma once

#include "backward.h"
#include "forward.h"

namespace wkv {

struct PlainThread {
  int index;
};

// y, gated where there is an r, and the state moved on in place.
template <class Element>
struct Step {
  using Real = RealOf<kTypeOf<Element>>;
  using Params = StepParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    team.last_phase([&](Thread& thread) {
      const int64_t C = params.C, i = static_cast<int64_t>(block.x) * threads + thread.index;
      if (i >= params.B * C) return;
      const int64_t b = i / C, c = i % C;
      // All loads are issued before any is used.
      Real* const num =
          static_cast<Real*>(params.state) + b * params.state_batch_stride + c * params.state_channel_stride;
      Real* const den = num + params.state_row_stride;
      Real* const max = den + params.state_row_stride;
      const State<Real> given = {{*num, *den}, *max};
      const Real k = to_real(static_cast<const Element*>(params.k)[b * params.k_stride + c]);
      const Real v = to_real(static_cast<const Element*>(params.v)[b * params.v_stride + c]);
      // An infinite r is an open gate: it changes no bit.
      const Real r = params.r == nullptr ? Real(INFINITY)
                                         : to_real(static_cast<const Element*>(params.r)[b * params.r_stride + c]);
      const RunningScale<Real> scale{load_channel<Real>(params.parameters, c)};

      const State<Real> state = or_empty(given);
      const Real logit = scale.logit(k);
      const auto weights = scale.weights(scale.at(state.max, logit));
      from_real(sigmoid(r) * read(state.sums, weights.read, v), static_cast<Element*>(params.y)[i]);
      const State<Real> after = advance(scale, state, weights.advance, logit, v);
      *num = after.sums.num;
      *den = after.sums.den;
      *max = after.max;
    });
  }
};

// The gradients of w and u from their parts. Of a block's threads, `kReduceLanes` lie along channels and
// `kReduceGroups` along rows: each sums every kReduceGroups-th row, and then the groups are summed in their order.
template <class Real>
struct Reduce {
  using Params = ReduceParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int, Team& team, char* shared) {
    Sums<double>* parts = reinterpret_cast<Sums<double>*>(shared);
    team.phase([&](Thread& thread) {
      const int64_t C = params.C, c = static_cast<int64_t>(block.x) * kReduceLanes + thread.index % kReduceLanes;
      Sums<double> sum{0, 0};
      if (c < C) {
        const Real* partials = static_cast<const Real*>(params.partials) + c;
#pragma unroll 4
        for (int64_t row = thread.index / kReduceLanes; row < params.rows; row += kReduceGroups) {
          sum.num += partials[row * 2 * C];
          sum.den += partials[row * 2 * C + C];
        }
      }
      parts[thread.index] = sum;
    });
    team.last_phase([&](Thread& thread) {
      const int64_t c = static_cast<int64_t>(block.x) * kReduceLanes + thread.index;
      if (thread.index >= kReduceLanes || c >= params.C) return;
      Sums<double> total = parts[thread.index];
      for (int group = 1; group < kReduceGroups; ++group) {
        const Sums<double> part = parts[group * kReduceLanes + thread.index];
        total = {total.num + part.num, total.den + part.den};
      }
      // The log-decay -exp(w) is its own derivative. One that is given is held beyond its bound.
      const auto& parameters = params.parameters;
      const Real w = load_parameter<Real>(parameters.w, parameters.w_dtype, c);
      const double factor = params.is_raw ? log_decay_of(w) : abs(w) >= Real(kLargestLogDecay) ? Real(0) : Real(1);
      store_parameter(params.gw, parameters.w_dtype, c, static_cast<Real>(total.num * factor));
      store_parameter(params.gu, parameters.u_dtype, c, static_cast<Real>(total.den));
    });
  }
};

// ---- float64 ----

// A thread's channel of a sequence; `r` is a gate where there is one.
struct DoubleChannel {
  SequenceView<int64_t> view;
  int64_t n, c, C;
  RunningScale<double> scale;

  WKV_HD State<double> load(const void* states, int64_t row) const {
    const double* at = static_cast<const double*>(states) + row * 3 * C + c;
    return {{at[0], at[C]}, at[2 * C]};
  }
  WKV_HD void store(void* states, int64_t row, State<double> state) const {
    double* at = static_cast<double*>(states) + row * 3 * C + c;
    at[0] = state.sums.num;
    at[C] = state.sums.den;
    at[2 * C] = state.max;
  }
  WKV_HD State<double> first_state(const SequenceParams& params) const {
    return params.state == nullptr ? empty_state<double>() : or_empty(load(params.state, n));
  }
  WKV_HD int64_t checkpoint_row(int64_t t) const { return view.checkpoint_row(DType::float64, t); }
  WKV_HD double at(const Sequence& sequence, int64_t t) const {
    const int64_t offset = view.b * sequence.batch_stride + (view.begin + t) * sequence.time_stride;
    return static_cast<const double*>(sequence.data)[offset + c];
  }
  template <bool kMixing>
  WKV_HD auto gate_at(const SequenceParams& params, int64_t t) const {
    if constexpr (kMixing) {
      return gate_of(params.r.data == nullptr ? double(INFINITY) : at(params.r, t));
    } else {
      return NoGate{};
    }
  }
  // Of a contiguous output.
  WKV_HD double* first(void* output, const SequenceParams& params) const {
    return static_cast<double*>(output) + (view.b * params.T + view.begin) * C + c;
  }
};

// Calls function(channel, thread) for each thread that has one.
template <bool kMixing, bool is_raw = true, class Team, class Function>
WKV_HD void for_double_channels(const SequenceParams& params, BlockIndex block, int threads, Team& team,
                                const Function& function) {
  team.last_phase([&](PlainThread& thread) {
    const int64_t n = int64_t{params.chunking.first_batch} + block.y, T = params.T,
                  c = static_cast<int64_t>(block.x) * threads + thread.index;
    if (c >= params.C) return;
    SequenceView<int64_t> view = view_of_batch<int64_t>(DType::float64, T, n);
    if (kMixing && params.boundaries.data != nullptr) {
      view = view_of_packed<int64_t>(DType::float64, params.boundaries, T, n);
    }
    function(DoubleChannel{view, n, c, params.C, {load_channel<double, is_raw>(params.parameters, c)}}, thread.index);
  });
}

template <bool kMixing>
struct DoubleForward {
  using Params = SequenceParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_double_channels<kMixing>(params, block, threads, team, [&](const DoubleChannel& channel, int) {
      const auto& [view, n, c, C, scale] = channel;
      State<double> state = channel.first_state(params);
      double* const y = channel.first(params.outputs[0], params);
#pragma unroll 1
      for (int64_t t = 0; t < view.steps; ++t) {
        if (params.checkpoints != nullptr && t > 0 && t % checkpoint_interval(DType::float64) == 0) {
          channel.store(params.checkpoints, channel.checkpoint_row(t), state);
        }
        const double k = key_logit(channel.at(params.inputs[0], t)), v = channel.at(params.inputs[1], t);
        const auto weights = scale.weights(scale.at(state.max, k));
        y[t * C] = read(state.sums, weights.read, v, channel.template gate_at<kMixing>(params, t));
        state = advance(scale, state, weights.advance, k, v);
      }
      channel.store(params.state_out, n, state);
      if (params.checkpoints != nullptr && view.steps > 0) {
        channel.store(params.checkpoints, channel.checkpoint_row(view.steps), state);
      }
    });
  }
};

// The recurrence runs over an interval twice: once for the states every `kDoubleSteps`, which go to shared memory, and
// from each of these once more, before the steps after it are taken backward.
template <bool kMixing>
struct DoubleBackward {
  using Params = SequenceParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char* shared) {
    for_double_channels<kMixing>(params, block, threads, team, [&](const DoubleChannel& channel, int thread) {
      const auto& [view, n, c, C, scale] = channel;
      const int64_t T = view.steps;
      constexpr int64_t kInterval = checkpoint_interval(DType::float64);
      State<double>* const saved = reinterpret_cast<State<double>*>(shared) + thread * kDoubleSegments;
      double* const gk = channel.first(params.outputs[0], params);
      double* const gv = channel.first(params.outputs[1], params);
      double* const gr = kMixing && params.gr != nullptr ? channel.first(params.gr, params) : nullptr;
      Sums<double> adjoint{0, 0}, partials{0, 0};
      double g_max = 0;
      if (params.gstate_out != nullptr) {
        const State<double> given = channel.load(params.gstate_out, n);
        adjoint = given.sums;
        g_max = given.max;
      }
#pragma unroll 1
      for (int64_t begin = (T + kInterval - 1) / kInterval * kInterval - kInterval; begin >= 0; begin -= kInterval) {
        const int64_t end = begin + kInterval < T ? begin + kInterval : T;
        State<double> state =
            begin == 0 ? channel.first_state(params) : channel.load(params.checkpoints, channel.checkpoint_row(begin));
#pragma unroll 1
        for (int64_t t = begin; t < end; ++t) {
          if ((t - begin) % kDoubleSteps == 0) saved[(t - begin) / kDoubleSteps] = state;
          const double k = key_logit(channel.at(params.inputs[0], t));
          const auto weights = scale.weights(scale.at(state.max, k));
          state = advance(scale, state, weights.advance, k, channel.at(params.inputs[1], t));
        }
#pragma unroll 1
        for (int64_t first = begin + (end - 1 - begin) / kDoubleSteps * kDoubleSteps; first >= begin;
             first -= kDoubleSteps) {
          const int count = clamp_count(end - first, kDoubleSteps);
          SavedStep<double> before[kDoubleSteps];
          state = saved[(first - begin) / kDoubleSteps];
#pragma unroll
          for (int step = 0; step < kDoubleSteps; ++step) {
            if (step >= count) continue;
            const double k = key_logit(channel.at(params.inputs[0], first + step));
            before[step] = {state.sums, scale.at(state.max, k)};
            const auto weights = scale.weights(before[step].at);
            state = advance(scale, state, weights.advance, k, channel.at(params.inputs[1], first + step));
          }
#pragma unroll
          for (int step = kDoubleSteps - 1; step >= 0; --step) {
            if (step >= count) continue;
            const int64_t t = first + step;
            const auto of_step =
                step_adjoint(scale, before[step], channel.at(params.inputs[1], t), channel.at(params.inputs[2], t),
                             adjoint, channel.template gate_at<kMixing>(params, t));
            gk[t * C] = of_step.gk;
            gv[t * C] = of_step.gv;
            if (kMixing && gr != nullptr) gr[t * C] = of_step.gr;
            partials = {partials.num + of_step.g_log_decay, partials.den + of_step.gu};
          }
        }
      }
      double* const parts = static_cast<double*>(params.partials) + n * 2 * C + c;
      parts[0] = partials.num;
      parts[C] = partials.den;
      // The gradient of max follows from the others for consumers that respect the state's gauge. Without steps all of
      // it is handed on.
      const Sums<double> first = channel.first_state(params).sums;
      if (!kMixing || T > 0) g_max = first.num * adjoint.num + first.den * adjoint.den;
      channel.store(params.state_out, n, {adjoint, g_max});
    });
  }
};

template <>
struct Forward<double> : DoubleForward<false> {};
template <>
struct MixingForward<double> : DoubleForward<true> {};
template <>
struct Backward<double> : DoubleBackward<false> {};
template <>
struct MixingBackward<double> : DoubleBackward<true> {};

}  // namespace wkv
