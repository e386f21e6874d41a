// Backward of the bidirectional operator, with the table of states that forward leaves. Each side is an adjoint of its
// own, against the direction of its states, and both are joined along a sequence as the states are: in a table of
// adjoints "before" is what comes from the steps before, the adjoint of the states after, and the other way round.
//
//   bi_adjoint_sums  a block for each interval: the adjoints of its reads, decayed to its end and to its beginning
//   bi_join          as in forward
//   bi_backward      a block for each interval: the gradients, from states and adjoints on either side
//
// The adjoint of a state is the gradient of its true sums.
#pragma once

#include "bidirectional.h"

namespace wkv {

template <class Element>
struct BiBackwardTiles : BiTiles<Element, 3, kBiBackwardSteps> {
  using Base = BiTiles<Element, 3, kBiBackwardSteps>;
  using Base::kSteps;
  using typename Base::Block;
  using typename Base::Gates;
  using typename Base::Tile;
  static constexpr int kGy = 2;

  struct Thread : Base::Thread {
    BothSides in, own;    // states around the thread's steps, and the adjoints of their reads
    Sums<Pair> partials;  // of the gradients of the log-decay and of u
  };

  // ---- adjoints in the scale of a warp, of states with this maximum, and back ----

  WKV_HD static Sums<Pair> entering(const SharedSides<Pair>& scale, Scaled adjoint, Pair) {
    return exp2(adjoint.exponent + scale.scale.reference_log2) * adjoint.sums;
  }
  WKV_HD static Sums<Pair> entering(const RunningSides<Pair>&, Scaled adjoint, Pair max) {
    // The adjoint times the sums is at most that of y: where the exponent is coarse, all above is its rounding, and so
    // is what differs by it.
    const Pair factor_log2 = sum_log2(max, adjoint.exponent), coarse = abs(adjoint.exponent) * Pair(0x1p-22);
    const Pair rounded = select(abs(factor_log2) <= coarse, Pair(0), smaller(factor_log2, Pair(0)));
    return exp2(select(coarse < Pair(2), factor_log2, rounded)) * adjoint.sums;
  }
  WKV_HD static Scaled leaving(const SharedSides<Pair>& scale, Sums<Pair> adjoint, Pair) {
    return normalised_adjoint({adjoint, -scale.scale.reference_log2});
  }
  WKV_HD static Scaled leaving(const RunningSides<Pair>&, Sums<Pair> adjoint, Pair max) {
    return normalised_adjoint(scaled_by_exp(adjoint, -max));
  }

  // A thread's columns.
  struct Columns {
    Column<Element> k, v, gy;
    int steps;

    WKV_HD Columns(const Block& block, const Tile& tile, const Thread& thread)
        : k(block.column_of(0, thread)),
          v(block.column_of(1, thread)),
          gy(block.column_of(kGy, thread)),
          steps(tile.steps_of(thread.warp())) {}
  };

  // The adjoints of a thread's reads.
  WKV_HD static void sum_up_adjoints(const BiParams& params, const Block& block, const Tile& tile, Thread& thread) {
    thread.own = {empty_scaled(), empty_scaled()};
    const Columns columns(block, tile, thread);
    if (!kFullTilesOnly && columns.steps == 0) return;
    thread.in = Base::around(block, tile, thread,
                             Base::load_sides(block, Base::row_at(block, params.checkpoints, tile, thread)));
    const Gates gates(block, tile, thread);
    Base::with_sides(block, thread, thread.in, [&](const auto& scale, State<Pair> before, State<Pair> after) {
      SavedStep<Pair> saved[kSteps];
      Base::replay_after(scale, columns.k, columns.v, columns.steps, after, saved);
      const Pair max_before = before.max;
      Sums<Pair> of_after{Pair(0), Pair(0)}, of_before{Pair(0), Pair(0)};
      Pair decayed(1);
      for_steps<kSteps>(columns.steps, [&](int step) {
        const auto& [sums, at_after] = saved[step];
        const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step),
                   at = scale.other_at(at_after, before.max);
        const Weights<Pair> weights = scale.advance(at, logit);
        StepGradients<Pair> unused{};
        of_after = scale.advance(at_after, logit).past * of_after;
        const Sums<Pair> to_before = read_sides_adjoint(before.sums, sums, scale.read(at, at_after, logit), vt,
                                                        columns.gy.get(step), of_after, unused, gates.get(step));
        of_before = decayed * to_before + of_before;
        decayed = decayed * weights.past;
        before = {mix(before.sums, weights, vt), scale.next_max(before.max, logit)};
      });
      thread.own = {leaving(scale, of_after, after.max), leaving(scale, of_before, max_before)};
    });
  }

  // gk and gv take the places of k and v.
  WKV_HD static void differentiate(const BiParams& params, const Block& block, const Tile& tile, Thread& thread) {
    thread.partials = {Pair(0), Pair(0)};
    const Columns columns(block, tile, thread);
    if (!kFullTilesOnly && columns.steps == 0) return;
    const BothSides adjoints =
        Base::around(block, tile, thread, Base::load_sides(block, Base::row_at(block, params.adjoints, tile, thread)));
    const Gates gates(block, tile, thread);
    Base::with_sides(block, thread, thread.in, [&](const auto& scale, State<Pair> before, State<Pair> after) {
      SavedStep<Pair> saved[kSteps];
      Sums<Pair> known[kSteps];  // gk and gv without the part of the adjoint of the states before
      const Pair max_first = Base::replay_after(scale, columns.k, columns.v, columns.steps, after, saved).max;
      Sums<Pair> adjoint = entering(scale, adjoints.before, max_first);
      // The states before, each weighted by the decay from its step on: their derivatives by the log-decay.
      Sums<Pair> decayed{Pair(0), Pair(0)};
      Pair g_log_decay(0), gu(0);
      for_steps<kSteps>(columns.steps, [&](int step) {
        const auto [sums, at_after] = saved[step];
        const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step),
                   at = scale.other_at(at_after, before.max);
        const Weights<Pair> weights = scale.advance(at, logit);
        StepGradients<Pair> gradients;
        advance_adjoint(sums, scale.advance(at_after, logit), vt, adjoint, gradients);
        const Sums<Pair> to_before = read_sides_adjoint(before.sums, sums, scale.read(at, at_after, logit), vt,
                                                        columns.gy.get(step), adjoint, gradients, gates.get(step));
        gates.set_gradient(step, gradients.gr);
        saved[step] = {to_before, at};
        known[step] = {gradients.gk, gradients.gv};
        g_log_decay = g_log_decay + gradients.g_log_decay + (to_before.num * decayed.num + to_before.den * decayed.den);
        gu = gu + gradients.gu;
        decayed = weights.past * (decayed + before.sums);
        before = {mix(before.sums, weights, vt), scale.next_max(before.max, logit)};
      });
      adjoint = entering(scale, adjoints.after, before.max);
      g_log_decay = g_log_decay + (adjoint.num * decayed.num + adjoint.den * decayed.den);
      thread.partials = {g_log_decay, gu};
      for_steps_back<kSteps>(columns.steps, [&](int step) {
        const auto& [to_before, at] = saved[step];
        const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step);
        StepGradients<Pair> gradients;
        advance_adjoint(to_before, scale.advance(at, logit), vt, adjoint, gradients);
        adjoint = adjoint + to_before;
        columns.k.set(step, known[step].num + gradients.gk);
        columns.v.set(step, known[step].den + gradients.gv);
      });
    });
  }
};

template <class Element>
struct BiAdjointSumsPass : BiBackwardTiles<Element> {
  using Base = BiBackwardTiles<Element>;
  using typename Base::Block;
  using typename Base::Thread;
  using typename Base::Tile;

  WKV_HD static void leave_nothing(const BiParams&, const Block&, const Thread&) {}

  template <class Team>
  WKV_HD static void finish(const BiParams& params, const Block& block, const Tile& tile, Team& team) {
    team.phase([&](Thread& thread) { Base::sum_up_adjoints(params, block, tile, thread); });
    team.phase([&](Thread& thread) { Base::leave_own(block, thread, thread.own); });
    team.last_phase([&](Thread& thread) {
      if (thread.warp() != 0) return;
      Base::store_sides(block, Base::row_at(block, params.adjoints, tile, thread),
                        Base::sum_of_tile(block, tile, thread));
    });
  }
};

template <class Element>
struct BiBackwardPass : BiBackwardTiles<Element> {
  using Base = BiBackwardTiles<Element>;
  using typename Base::Block;
  using typename Base::Thread;
  using typename Base::Tile;

  // The row is the block's alone.
  WKV_HD static void store_partials(const BiParams& params, const Block& block, const Thread& thread,
                                    Sums<Pair> total) {
    const auto& place = block.place();
    const ChannelRow row = block.row_of(params.partials, place.b * params.chunking.chunks + place.ticket(), 2, thread);
    row.store(0, total.num);
    row.store(params.C, total.den);
  }
  WKV_HD static void leave_nothing(const BiParams& params, const Block& block, const Thread& thread) {
    if (thread.warp() == 0) store_partials(params, block, thread, {Pair(0), Pair(0)});
  }

  WKV_HD static Rows64 partials_of(const Block& block, int warp) { return block.messages.from(2 * warp); }

  template <class Team>
  WKV_HD static void finish(const BiParams& params, const Block& block, const Tile& tile, Team& team) {
    team.phase([&](Thread& thread) { Base::sum_up_adjoints(params, block, tile, thread); });
    team.phase([&](Thread& thread) { Base::leave_own(block, thread, thread.own); });
    team.phase([&](Thread& thread) { Base::differentiate(params, block, tile, thread); });
    team.phase([&](Thread& thread) {
      partials_of(block, thread.warp()).set_sums(thread.lane(), thread.partials);
#pragma unroll
      for (int i = 0; i < 2; ++i) block.unstage(i, params.outputs[i], tile, thread);
    });
    team.last_phase([&](Thread& thread) {
      if (thread.warp() != 0) return;
      Sums<Pair> total = partials_of(block, 0).get_sums(thread.lane());
#pragma unroll 1
      for (int warp = 1; warp < Base::kWarps; ++warp) {
        total = total + partials_of(block, warp).get_sums(thread.lane());
      }
      store_partials(params, block, thread, total);
    });
  }
};

template <class Element>
struct BiAdjointSums : BiTileKernel<BiAdjointSumsPass<Element>> {};

template <class Element>
struct BiBackward : BiTileKernel<BiBackwardPass<Element>> {};

}  // namespace wkv
