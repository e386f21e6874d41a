// The summaries of a sequence: the state that the steps leave behind an empty one, and the adjoint before the steps
// where that after them is zero. They are the scans of forward and backward, operation by operation, without outputs.
#pragma once

#include "backward.h"
#include "forward.h"
#include "small.h"

namespace wkv {

template <class Element>
struct SummaryPass : ForwardPass<Element, false> {
  using Block = typename ForwardPass<Element, false>::Block;
  using Tile = typename ForwardPass<Element, false>::Tile;
  using Thread = typename ForwardPass<Element, false>::Thread;
  static constexpr int kOutputs = 0;

  WKV_HD static void correct(const Block&, const Tile&, bool, Thread&) {}
};

// With a gate or without one; sequences are not packed.
template <class Element>
struct AdjointSummaryPass : BackwardPass<Element, true, false> {
  using Block = typename BackwardPass<Element, true, false>::Block;
  using Tile = typename BackwardPass<Element, true, false>::Tile;
  using Thread = typename BackwardPass<Element, true, false>::Thread;
  static constexpr int kOutputs = 0;

  WKV_HD static void unstage_gate(const Block&, const Tile&, const Thread&) {}
  WKV_HD static void correct(const Block&, const Tile&, bool, Thread&) {}
  WKV_HD static void leave(const Block&, const Thread&) {}
  WKV_HD static void leave_nothing(const Block&, const Thread&) {}
  WKV_HD static void hand_on(const Block&, const Thread&) {}

  WKV_HD static void finish(const Block& block, const Thread& thread) {
    const auto& params = block.params;
    const auto& place = block.place();
    if (thread.warp() != 0 || kFullTilesOnly || place.position + 1 < place.chunks(params)) return;
    const Sums<Pair> adjoint = exp2(sum_log2(block.first_state(thread).max, thread.after.exponent)) * thread.after.sums;
    const ChannelRow row = block.row_of(params.state_out, place.state_row(), 2, thread);
    row.store(0, adjoint.num);
    row.store(params.C, adjoint.den);
  }
};

template <class Element>
struct Summary : Scan<SummaryPass<Element>> {};
template <class Element>
struct AdjointSummary : Scan<AdjointSummaryPass<Element>> {};

// ---- float64: either goes through the steps forward ----

template <>
struct Summary<double> {
  using Params = SequenceParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_double_channels<false>(params, block, threads, team, [&](const DoubleChannel& channel, int) {
      const auto& scale = channel.scale;
      State<double> state = empty_state<double>();
#pragma unroll 1
      for (int64_t t = 0; t < channel.view.steps; ++t) {
        const double k = key_logit(channel.at(params.inputs[0], t));
        const auto weights = scale.weights(scale.at(state.max, k));
        state = advance(scale, state, weights.advance, k, channel.at(params.inputs[1], t));
      }
      channel.store(params.state_out, channel.n, state);
    });
  }
};

// The adjoint's recurrence runs backward, but as a sum it can be taken forward: the share of a step in the adjoint
// before all steps is its share in that before itself times all weights of the past up to there, `passed`.
template <>
struct AdjointSummary<double> {
  using Params = SequenceParams;
  using Thread = PlainThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    for_double_channels<true>(params, block, threads, team, [&](const DoubleChannel& channel, int) {
      const auto& scale = channel.scale;
      State<double> state = channel.first_state(params);
      Sums<double> adjoint{0, 0};
      double passed = 1;
#pragma unroll 1
      for (int64_t t = 0; t < channel.view.steps; ++t) {
        const double k = key_logit(channel.at(params.inputs[0], t)), v = channel.at(params.inputs[1], t);
        const auto weights = scale.weights(scale.at(state.max, k));
        const auto [y, h, gr] =
            gated_mean_adjoint(mix(state.sums, weights.read, v), channel.template gate_at<true>(params, t),
                               channel.at(params.inputs[2], t));
        const double share = passed * weights.read.past * h;
        adjoint = {adjoint.num + share, adjoint.den - share * y};
        passed = passed * weights.advance.past;
        state = advance(scale, state, weights.advance, k, v);
      }
      double* const out = static_cast<double*>(params.state_out) + channel.n * 2 * channel.C + channel.c;
      out[0] = adjoint.num;
      out[channel.C] = adjoint.den;
    });
  }
};

}  // namespace wkv
