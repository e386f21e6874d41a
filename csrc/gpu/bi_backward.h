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

template <class Element, int kOfThread>
struct BiBackwardTiles : BiTiles<Element, 3, kOfThread> {
  using Base = BiTiles<Element, 3, kOfThread>;
  using Base::kPart;
  using Base::kParts;
  using Base::kSteps;
  using typename Base::Block;
  using typename Base::Tile;
  static constexpr int kGy = 2;
  static constexpr int kHalf = kPart / 2;

  struct Thread : Base::Thread {
    Sums<Pair> reads[kSteps];  // their adjoints
    BothSides own;             // the sums of these: "before" those of the states after, decayed to the end of the steps
    Sums<Pair> of_second_half;  // the sum of the later ones, decayed to the beginning of these steps
    BothSums decayed;           // states, each weighted by the decay to the last of the thread's steps on its side
    Sums<Pair> partials;        // of the gradients of the log-decay and of u
  };

  WKV_HD static void load_incoming(const BiParams& params, const Block& block, const Tile& tile, Thread& thread) {
    thread.in = Base::load_sides(block, Base::row_at(block, params.checkpoints, tile, thread));
  }
  WKV_HD static BothSides load_adjoints(const BiParams& params, const Block& block, const Tile& tile,
                                        const Thread& thread) {
    return Base::load_sides(block, Base::row_at(block, params.adjoints, tile, thread));
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

  // ---- in one scale ----

  // Adds the product of an adjoint and sums.
  WKV_HD static Pair with_product(Pair known, Sums<Pair> a, Sums<Pair> b) {
    return a.num * b.num + (a.den * b.den + known);
  }

  // The adjoints of a thread's reads, and their sums; with kGradients also gr and partial gradients.
  template <bool kGradients, class AnyGates>
  WKV_HD static void sum_adjoints_together(const Block& block, const Tile& tile, const AnyGates& gates,
                                           Thread& thread) {
    static_assert(!kGradients || kParts == 1);
    const Columns columns(block, tile, thread);
    const int lane = thread.lane();
    const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
    auto [before, after] = Base::states_around(block, thread);
    BothSums decayed{Base::none(), Base::none()};
    Sums<Pair> of_after = Base::none(), of_before = Base::none();
    Pair g_log_decay(0), gu(0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = part * kPart;
      Sums<Pair> later = Base::state_after_part(block, thread, after, part);
      for_steps_back<kPart>(kPart, [&](int i) {
        thread.reads[first + i] = later;
        decayed.after = Base::advanced(decay, decayed.after, later, first + i == kSteps - 1);
        later = decay * later + thread.present[first + i];
      });
      for_steps<kPart>(kPart, [&](int i) {
        const int step = first + i;
        const Sums<Pair> present = thread.present[step], sums = thread.reads[step];
        const Sums<Pair> now = bonus * present + (before + sums);
        const auto [y, h, gr] = gated_mean_adjoint(now, gates.get(step), columns.gy.get(step));
        if constexpr (kGradients) gates.set_gradient(step, gr);
        // The negative product itself: each sum of -(h y) would be a product and a difference.
        const Sums<Pair> adjoint{h, fused(-h, y, Pair(0))};
        g_log_decay = with_product(with_product(g_log_decay, adjoint, decayed.before), sums, of_after);
        gu = with_product(gu, adjoint, present);
        of_after = Base::advanced(decay, of_after, adjoint, step == 0);
        decayed.before = Base::advanced(decay, decayed.before, before, step == 0);
        before = decay * before + present;
        thread.reads[step] = adjoint;
      });
      Sums<Pair> of_part = Base::none();
      for_steps_back<kPart>(kPart, [&](int i) {
        if (i == kHalf - 1) thread.of_second_half = of_part;
        of_part = Base::advanced(decay, of_part, thread.reads[first + i], i == kPart - 1);
      });
      of_before = part == 0 ? of_part : exp2(block.channels.decay_log2(lane, first)) * of_part + of_before;
    }
    thread.decayed = decayed;
    thread.partials = {g_log_decay, bonus * gu};
    thread.own = {{of_after, -thread.reference}, {of_before, -thread.reference}};
  }

  // Leaves the sums of the adjoints of each thread's reads.
  template <bool kGradients, class Team>
  WKV_HD static void sum_up_adjoints_together(const Block& block, const Tile& tile, Team& team) {
    Base::sum_up_together(block, tile, team);
    // Inlined by force, as `correct` is.
    team.phase([&](Thread& thread) __attribute__((always_inline)) {
      Base::with_gates(block, thread, [&](const auto& gates) __attribute__((always_inline)) {
        sum_adjoints_together<kGradients>(block, tile, gates, thread);
      });
    });
    team.phase([&](Thread& thread) {
      if (kGradients && block.is_gated()) block.unstage(0, block.params.gr, tile, thread);
      Base::leave_sums(block, thread, {thread.own.before.sums, thread.own.after.sums});
    });
  }

  // The adjoints of a tile's reads, when the warps have left their sums.
  WKV_HD static BothSides adjoints_of_tile(const Block& block, const Tile&, const Thread& thread) {
    const BothSums sums = Base::sums_around(block, thread.lane(), {Base::none(), Base::none()}, Base::kWarps, 0);
    return {normalised_adjoint({sums.before, -thread.reference}), normalised_adjoint({sums.after, -thread.reference})};
  }

  // gk and gv take the places of gy and v.
  WKV_HD static void differentiate_together(const Block& block, const Tile& tile, BothSides incoming, Thread& thread) {
    const Columns columns(block, tile, thread);
    const Pair decay = block.channels.decay(thread.lane()), bonus = block.channels.bonus(thread.lane());
    const auto entering = [&](Scaled adjoint) { return exp2(adjoint.exponent + thread.reference) * adjoint.sums; };
    auto [of_after, of_before] =
        Base::sums_around(block, thread, {entering(incoming.before), entering(incoming.after)});
    const auto& [before, after] = thread.decayed;
    const Pair g_log_decay = with_product(with_product(thread.partials.num, of_before, before), of_after, after);
    thread.partials.num = decay * g_log_decay;
    const Pair decay_of_half = exp2(block.channels.decay_log2(thread.lane(), kHalf));
#pragma unroll
    for (int first = 0; first < kPart; first += kHalf) {
      Sums<Pair> adjoints[kHalf];
      for_steps<kHalf>(kHalf, [&](int i) {
        adjoints[i] = bonus * thread.reads[first + i] + of_after;
        of_after = decay * of_after + thread.reads[first + i];
      });
      Sums<Pair> later = first > 0 ? of_before : decay_of_half * of_before + thread.of_second_half;
      for_steps_back<kHalf>(kHalf, [&](int i) {
        const Sums<Pair> adjoint = adjoints[i] + later;
        later = decay * later + thread.reads[first + i];
        const auto [num, weight] = thread.present[first + i];
        columns.gy.set(first + i, num * adjoint.num + weight * adjoint.den);
        columns.v.set(first + i, weight * adjoint.num);
      });
    }
  }

  // ---- of keys that spread: adjoints in the scale of states with this maximum, and back ----

  WKV_HD static Sums<Pair> entering(Scaled adjoint, Pair max) {
    // The adjoint times the sums is at most that of y: where the exponent is coarse, all above is its rounding, and so
    // is what differs by it.
    const Pair factor_log2 = sum_log2(max, adjoint.exponent), coarse = abs(adjoint.exponent) * Pair(0x1p-22);
    const Pair rounded = select(abs(factor_log2) <= coarse, Pair(0), smaller(factor_log2, Pair(0)));
    return exp2(select(coarse < Pair(2), factor_log2, rounded)) * adjoint.sums;
  }
  WKV_HD static Scaled leaving(Sums<Pair> adjoint, Pair max) {
    return normalised_adjoint(scaled_by_exp(adjoint, -max));
  }

  template <class Team>
  WKV_HD static void sum_up_adjoints_spread(const Block& block, const Tile& tile, Team& team) {
    team.phase([&](Thread& thread) { Base::leave_own(block, thread, Base::sum_spread(block, tile, thread)); });
    team.phase([&](Thread& thread) {
      thread.own = {empty_scaled(), empty_scaled()};
      thread.partials = Base::none();
      if (tile.steps_of(thread.warp()) > 0) sum_adjoints_spread(block, tile, thread);
    });
    team.phase([&](Thread& thread) { Base::leave_own(block, thread, thread.own); });
  }

  WKV_HD static void sum_adjoints_spread(const Block& block, const Tile& tile, Thread& thread) {
    const Columns columns(block, tile, thread);
    thread.in = Base::around(block, tile, thread, thread.in);
    const typename Base::Gates gates(block, tile, thread);
    const RunningSides<Pair> scale = sides_of(block.running_scale(thread));
    State<Pair> before = state_of(thread.in.before);
    const State<Pair> after = state_of(thread.in.after);
    SavedStep<Pair> saved[kSteps];
    Base::replay_after(scale, columns.k, columns.v, columns.steps, after, saved);
    const Pair max_before = before.max;
    Sums<Pair> of_after{Pair(0), Pair(0)}, of_before{Pair(0), Pair(0)};
    Pair from_first(1);
    for_steps<kSteps, false, true>(columns.steps, [&](int step) {
      const auto& [sums, at_after] = saved[step];
      const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step), at = before.max;
      const Weights<Pair> weights = scale.advance(at, logit);
      StepGradients<Pair> unused{};
      of_after = scale.advance(at_after, logit).past * of_after;
      const Sums<Pair> to_before = read_sides_adjoint(before.sums, sums, scale.read(at, at_after, logit), vt,
                                                      columns.gy.get(step), of_after, unused, gates.get(step));
      of_before = from_first * to_before + of_before;
      from_first = from_first * weights.past;
      before = {mix(before.sums, weights, vt), scale.next_max(before.max, logit)};
    });
    thread.own = {leaving(of_after, after.max), leaving(of_before, max_before)};
  }

  WKV_HD static void differentiate_spread(const Block& block, const Tile& tile, BothSides incoming, Thread& thread) {
    const Columns columns(block, tile, thread);
    const BothSides adjoints = Base::around(block, tile, thread, incoming);
    const typename Base::Gates gates(block, tile, thread);
    const RunningSides<Pair> scale = sides_of(block.running_scale(thread));
    State<Pair> before = state_of(thread.in.before);
    SavedStep<Pair> saved[kSteps];
    Sums<Pair> known[kSteps];  // gk and gv without the part of the adjoint of the states before
    const Pair max_first =
        Base::replay_after(scale, columns.k, columns.v, columns.steps, state_of(thread.in.after), saved).max;
    Sums<Pair> adjoint = entering(adjoints.before, max_first);
    // The states before, each weighted by the decay from its step on: their derivatives by the log-decay.
    Sums<Pair> decayed{Pair(0), Pair(0)};
    Pair g_log_decay(0), gu(0);
    for_steps<kSteps, false, true>(columns.steps, [&](int step) {
      const auto [sums, at_after] = saved[step];
      const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step), at = before.max;
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
    adjoint = entering(adjoints.after, before.max);
    g_log_decay = g_log_decay + (adjoint.num * decayed.num + adjoint.den * decayed.den);
    thread.partials = {g_log_decay, gu};
    for_steps<kSteps, true, true>(columns.steps, [&](int step) {
      const auto& [to_before, at] = saved[step];
      const Pair logit = scale.logit(columns.k.get(step)), vt = columns.v.get(step);
      StepGradients<Pair> gradients;
      advance_adjoint(to_before, scale.advance(at, logit), vt, adjoint, gradients);
      adjoint = adjoint + to_before;
      columns.gy.set(step, known[step].num + gradients.gk);
      columns.v.set(step, known[step].den + gradients.gv);
    });
  }
};

template <class Element>
struct BiAdjointSumsPass : BiBackwardTiles<Element, bi_steps(kTypeOf<Element>)> {
  using Base = BiBackwardTiles<Element, bi_steps(kTypeOf<Element>)>;
  using typename Base::Block;
  using typename Base::Thread;
  using typename Base::Tile;

  WKV_HD static void leave_nothing(const BiParams&, const Block&, const Thread&) {}

  template <class Team>
  WKV_HD static void finish(const BiParams& params, const Block& block, const Tile& tile, Team& team) {
    if (Base::agree(block, tile, team) || kFullTilesOnly) {
      Base::template sum_up_adjoints_together<false>(block, tile, team);
      team.last_phase([&](Thread& thread) { store(params, block, tile, thread, Base::adjoints_of_tile); });
    } else {
      Base::sum_up_adjoints_spread(block, tile, team);
      team.last_phase([&](Thread& thread) { store(params, block, tile, thread, Base::sum_of_tile); });
    }
  }

  // Stores what sum(block, tile, thread) returns, by the first warp.
  template <class Sum>
  WKV_HD static void store(const BiParams& params, const Block& block, const Tile& tile, const Thread& thread,
                           const Sum& sum) {
    if (thread.warp() != 0) return;
    Base::store_sides(block, Base::row_at(block, params.adjoints, tile, thread), sum(block, tile, thread));
  }
};

template <class Element>
struct BiBackwardPass : BiBackwardTiles<Element, kBiBackwardSteps> {
  using Base = BiBackwardTiles<Element, kBiBackwardSteps>;
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
    if (Base::agree(block, tile, team) || kFullTilesOnly) {
      Base::template sum_up_adjoints_together<true>(block, tile, team);
      team.phase([&](Thread& thread) {
        Base::differentiate_together(block, tile, Base::load_adjoints(params, block, tile, thread), thread);
      });
    } else {
      Base::sum_up_adjoints_spread(block, tile, team);
      team.phase([&](Thread& thread) {
        if (tile.steps_of(thread.warp()) == 0) return;
        Base::differentiate_spread(block, tile, Base::load_adjoints(params, block, tile, thread), thread);
      });
    }
    team.phase([&](Thread& thread) {
      partials_of(block, thread.warp()).set_sums(thread.lane(), thread.partials);
      block.unstage(Base::kGy, params.outputs[0], tile, thread);
      block.unstage(1, params.outputs[1], tile, thread);
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
