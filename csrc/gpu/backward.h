// The backward kernel: gk, gv, the gradient of the first state and each chunk's part of those of the log-decay and u. A
// tile lies between two checkpoints. It is replayed once, from the checkpoint, for the state before every step, and
// reversed once, from an adjoint of zero, gk and gv taking the places of the states in registers.
//
// The adjoint of a state is the gradient of its true sums.
#pragma once

#include "scan.h"

namespace wkv {

template <class Element_, bool kMixing, bool kWrites = true>
struct BackwardPass {
  using Element = Element_;
  static constexpr bool kReverse = true, kFinishes = true, kMixes = kMixing;
  // Where shared memory has room for r as well.
  static constexpr bool kStagesGate = kMixing && backward_stages_gate(kTypeOf<Element>, kCudaArch);
  static constexpr int kInputs = 3, kOutputs = 2, kFirstOutput = 0, kSteps = kBackwardSteps, kGy = 2;
  using Block = ScanBlock<Element, kInputs + kStagesGate, kSteps, kBackwardWarps, kReverse, kMixing>;
  using Tile = wkv::Tile<kSteps>;
  static_assert(kBackwardWarps * kSteps == checkpoint_interval(Block::kType));

  struct Thread : ScanThread<Element, kSteps> {
    SavedStep<Pair> steps[kSteps];  // the sums are replaced by gk and gv without the carry's part
    Scaled start;                   // warp 0: the state before the tile
    Scaled after;                   // warp 0: the adjoint before the tile, for the next one
    Sums<Pair> decayed;             // states, each weighted by the decay from its step to the end of the subchunk
    Pair max_after;                 // of keys that spread: the maximum that sums after the subchunk are relative to
    Pair g_log_decay;               // without the carry's part
    Sums<Pair> partials;            // of the gradients of the log-decay and u, over all tiles
  };

  WKV_HD static void begin(Thread& thread) {
    thread.partials = {Pair(0), Pair(0)};
    thread.after = empty_scaled();
  }
  WKV_HD static Scaled normalised(Scaled adjoint) { return normalised_adjoint(adjoint); }
  // In gy, after the reverse loop: each warp's sum, and the adjoint that enters the tile.
  WKV_HD static Rows64 own_of(const Block& block, int warp) { return block.rows_of(kGy, warp, 0); }
  WKV_HD static Rows64 carry(const Block& block) { return block.rows_of(kGy, 0, 3); }
  // In k: each warp's largest keys, then its states, when keys are in registers; messages, when states are of no use
  // any more.
  static constexpr int kHighestRows = Block::kWarpRows;
  WKV_HD static Rows64 highest_of(const Block& block, int warp) { return block.rows_of(0, warp, 0); }
  WKV_HD static Rows64 state_after(const Block& block, int warp) { return block.rows_of(0, warp, 1); }
  WKV_HD static Rows64 message(const Block& block, int i) { return block.rows_of(0, 0, 3 * i); }
  // In gy as well, the parts of a chunk's gradients.
  WKV_HD static Rows64 partials_of(const Block& block, int warp) { return block.rows_of(kGy, warp, 6); }
  static_assert(Block::kWarpRows >= 8 && kBackwardWarps * Block::kWarpRows >= 3 * (kAnchor + 1));

  WKV_HD static Scaled load_start(const Block& block, const Tile& tile, const Thread& thread) {
    if (kFullTilesOnly || tile.t > 0) return block.load_checkpoint(tile.t, thread);
    return normalised_state(scaled(block.first_state(thread)));
  }

  // The state before the tile takes part in its reference.
  WKV_HD static void range(const Block& block, const Tile& tile, Thread& thread) {
    thread.start = empty_scaled();
    if (thread.warp() != 0) return;
    thread.start = load_start(block, tile, thread);
    thread.keys.highest = larger(thread.keys.highest, thread.start.exponent);
  }

  // The adjoint of the final state: its gradient is relative to its max, which is that of the last checkpoint.
  WKV_HD static Scaled first(const Block& block, const Thread& thread) {
    const auto& params = block.params;
    if (params.gstate_out == nullptr) return empty_scaled();
    const Sums<Pair> given = block.load_state(block.state_row(params.gstate_out, thread)).sums;
    const Pair max = state_of(block.load_checkpoint(block.place().steps(params), thread)).max;
    // The gradient of an empty state reaches nothing.
    const auto has_no_max = max == Pair(kEmptyMax);
    const Sums<Pair> adjoint{select(has_no_max, Pair(0), given.num), select(has_no_max, Pair(0), given.den)};
    return normalised_adjoint(scaled_by_exp(adjoint, -select(has_no_max, Pair(0), max)));
  }
  // In k as well, from the time keys are in registers to the end of the reverse loop; while a tile is staged, in
  // registers.
  WKV_HD static Rows64 parked(const Block& block) { return block.rows_of(0, 0, 4); }
  WKV_HD static void keep(const Block&, const Tile&, Scaled after, Thread& thread) { thread.after = after; }
  static constexpr bool kStagesLate = false;
  WKV_HD static void park(const Block& block, const Tile&, Thread& thread) {
    if (thread.warp() == 0) parked(block).set_scaled(thread.lane(), thread.after);
    thread.after = empty_scaled();
  }
  WKV_HD static Scaled kept(const Block& block, const Thread& thread) {
    return parked(block).get_scaled(thread.lane());
  }

  // A thread's steps of r, and of its gradient, which takes its place. Without r the gate is open.
  struct StagedGates {
    Column<Element> r;
    bool is_gated;

    WKV_HD StagedGates(const Block& block, const Tile&, const Thread& thread)
        : r(block.column_of(kGy + 1, thread)), is_gated(block.is_gated()) {}
    WKV_HD Gate<Pair> get(int step) const { return gate_of(is_gated ? r.get(step) : Pair(INFINITY)); }
    WKV_HD void set_gradient(int step, Pair value) const { r.set(step, value); }
  };
  using Gates =
      std::conditional_t<kStagesGate, StagedGates, std::conditional_t<kMixing, DistantGates<Block, kSteps>, NoGates>>;
  // Calls function(gates), with none where there is no r. Keys that spread take an open gate: for a loop without one
  // they lack registers.
  template <class Function>
  WKV_HD static void with_gates(const Block& block, const Tile& tile, const Thread& thread, const Function& function) {
    if (block.is_gated()) {
      function(Gates(block, tile, thread));
    } else {
      function(NoGates());
    }
  }

  WKV_HD static void stage_gate(const Block& block, const Tile& tile, const Thread& thread) {
    if (!block.is_gated()) return;
    if constexpr (kStagesGate) {
      block.stage(kGy + 1, block.params.r, tile, thread);
    } else {
      const int warp = thread.warp();
      prefetch_rows(rows_from<Element>(block.params.r, block.place().b, block.c),
                    block.place().begin() + tile.t + warp * kSteps, tile.steps_of(warp), block.columns, thread.lane());
    }
  }
  WKV_HD static void unstage_gate(const Block& block, const Tile& tile, const Thread& thread) {
    if constexpr (kStagesGate) {
      if (kFullTilesOnly || block.params.gr != nullptr) block.unstage(kGy + 1, block.params.gr, tile, thread);
    }
  }

  template <class Team, class Leave>
  WKV_HD static void recur(const Block& block, const Tile& tile, bool fit, Team& team, const Leave& leave_sums) {
    team.phase([&](Thread& thread) {
      if (kFullTilesOnly || fit) {
        replay_together(block, tile, thread);
      } else {
        replay_spread(block, tile, thread);
      }
    });
    // Inlined by force, as `correct` is.
    team.warp_phase([&](Thread& thread) __attribute__((always_inline)) {
      if (kFullTilesOnly || fit) {
        reverse_together(block, tile, thread);
      } else {
        reverse_spread(block, tile, thread);
      }
    });
    team.phase(leave_sums);
  }

  WKV_HD static void replay_together(const Block& block, const Tile& tile, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(lane);
    Sums<Pair> sums{Pair(0), Pair(0)};
    if (thread.warp() == 0) sums = power_of_two(thread.start.exponent - thread.reference) * thread.start.sums;
    clear_unless_full(steps, thread.steps);
    for_steps<kSteps>(steps, [&](int step) {
      const Pair weight = weight_of(thread.keys.get(step), thread.reference);
      thread.steps[step] = {sums, weight};
      sums = {decay * sums.num + weight * v.get(step), decay * sums.den + weight};
    });
    state_after(block, thread.warp()).set_sums(lane, sums);
  }

  // Only the sum of the steps: step by step, a running maximum needs the state before the subchunk, which is not known
  // yet.
  WKV_HD static void replay_spread(const Block& block, const Tile& tile, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp());
    thread.keys.replace_infinite(steps);
    const Pair log_decay = block.channels.log_decay(lane);
    const auto left = [&](int step) { return logit_at_end<kSteps>(thread.keys.get(step), log_decay, step, steps); };
    state_after(block, thread.warp()).set_scaled(lane, sum_of_spread<kSteps>(left, block.column_of(1, thread), steps));
  }

  WKV_HD static void reverse_together(const Block& block, const Tile& tile, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread), gy = block.column_of(kGy, thread);
    const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
    const Pair subchunk_decay = exp2(block.channels.decay_log2(lane, kSteps));
    Sums<Pair> in{Pair(0), Pair(0)}, decayed{Pair(0), Pair(0)};
#pragma unroll 1
    for (int warp = 0; warp < thread.warp(); ++warp) {
      const Sums<Pair> sums = state_after(block, warp).get_sums(lane);
      in = {subchunk_decay * in.num + sums.num, subchunk_decay * in.den + sums.den};
    }
    // The carried-in state keeps its mean while it decays.
    const Pair mean = select(in.den == Pair(0), in.num, in.num / in.den);
    for_steps<kSteps>(steps, [&](int step) {
      Sums<Pair>& sums = thread.steps[step].sums;
      sums = {mean * in.den + sums.num, in.den + sums.den};
      in.den = decay * in.den;
      decayed = {decay * decayed.num + sums.num, decay * decayed.den + sums.den};
    });
    thread.decayed = decayed;
    thread.max_after = Pair(0);

    Sums<Pair> adjoint{Pair(0), Pair(0)};
    Pair g_log_decay(0), gu(0);
    with_gates(block, tile, thread, [&](const auto& gates) {
      for_steps_back<kSteps>(steps, [&](int step) {
        const auto [sums, weight] = thread.steps[step];
        const Pair vt = v.get(step), present = bonus * weight;
        const Sums<Pair> now{present * vt + sums.num, sums.den + present};
        const auto [y, h, gr] = gated_mean_adjoint(now, gates.get(step), gy.get(step));
        if constexpr (kWrites) gates.set_gradient(step, gr);
        const Pair h_present = present * h, gu_step = h_present * (vt - y);
        g_log_decay = g_log_decay + sums.num * adjoint.num + sums.den * adjoint.den;
        gu = gu + gu_step;
        const Pair gk = weight * (vt * adjoint.num + adjoint.den) + gu_step;
        thread.steps[step].sums = {gk, weight * adjoint.num + h_present};
        adjoint = {decay * adjoint.num + h, decay * adjoint.den - h * y};
      });
    });
    thread.g_log_decay = g_log_decay;
    thread.partials.den = thread.partials.den + gu;
    thread.own.sums = adjoint;
  }

  WKV_HD static void reverse_spread(const Block& block, const Tile& tile, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread), gy = block.column_of(kGy, thread);
    const auto scale = block.running_scale(thread);
    Scaled before = load_start(block, tile, thread);
#pragma unroll 1
    for (int warp = 0; warp < thread.warp(); ++warp) {
      before = join(before, block.channels.decay_log2(lane, kSteps), state_after(block, warp).get_scaled(lane));
    }
    State<Pair> state = state_of(before);
    clear_unless_full(steps, thread.steps);
    const Pair max_before = state.max;
    Sums<Pair> decayed{Pair(0), Pair(0)};
    for_steps<kSteps>(steps, [&](int step) {
      const Pair kt = thread.keys.get(step), at = scale.at(state.max, kt);
      const Weights<Pair> weights = scale.weights(at).advance;
      thread.steps[step] = {state.sums, at};
      decayed = weights.past * (decayed + state.sums);
      state = advance(scale, state, weights, kt, v.get(step));
    });
    thread.decayed = decayed;
    thread.max_after = state.max;
    const Gates gates(block, tile, thread);

    Sums<Pair> adjoint{Pair(0), Pair(0)};
    Pair g_log_decay(0), gu(0);
    for_steps_back<kSteps>(steps, [&](int step) {
      const auto of_step = step_adjoint(scale, thread.steps[step], v.get(step), gy.get(step), adjoint, gates.get(step));
      if constexpr (kWrites) gates.set_gradient(step, of_step.gr);
      thread.steps[step].sums = {of_step.gk, of_step.gv};
      g_log_decay = g_log_decay + of_step.g_log_decay;
      gu = gu + of_step.gu;
    });
    thread.g_log_decay = g_log_decay;
    thread.partials.den = thread.partials.den + gu;
    thread.own = normalised_adjoint(scaled_by_exp(adjoint, -max_before));
  }

  WKV_HD static void correct(const Block& block, const Tile& tile, bool fit, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp());
    const Column<Element> gk = block.column_of(0, thread), v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(lane);
    const Scaled carry_in = carry(block).get_scaled(lane);
    const int behind = tile.rows - thread.warp() * kSteps - steps;
    const Pair decay_log2 = block.channels.decay_log2(lane, behind);
    const auto add = [&](int step, Pair weight, Sums<Pair> adjoint) {
      const Pair vt = v.get(step);
      const auto [own_gk, own_gv] = thread.steps[step].sums;
      gk.set(step, weight * (vt * adjoint.num + adjoint.den) + own_gk);
      v.set(step, weight * adjoint.num + own_gv);
    };
    Sums<Pair> adjoint;
    Pair factor(1);
    if (kFullTilesOnly || fit) {
      adjoint = exp2(carry_in.exponent + thread.reference + decay_log2) * carry_in.sums + thread.before.sums;
      factor = decay;
    } else {
      const Scaled in = behind == 0 ? carry_in : join(carry_in, decay_log2, thread.before);
      adjoint = exp2(sum_log2(thread.max_after, in.exponent)) * in.sums;
    }
    const Pair g_log_decay = thread.g_log_decay + thread.decayed.num * adjoint.num + thread.decayed.den * adjoint.den;
    thread.partials.num = thread.partials.num + factor * g_log_decay;
    if (kFullTilesOnly || fit) {
      for_steps_back<kSteps>(steps, [&](int step) {
        add(step, thread.steps[step].at, adjoint);
        adjoint = decay * adjoint;
      });
    } else {
      const auto scale = block.running_scale(thread);
      for_steps_back<kSteps>(steps, [&](int step) {
        const Weights<Pair> weights = scale.weights(thread.steps[step].at).advance;
        add(step, weights.present, adjoint);
        adjoint = weights.past * adjoint;
      });
    }
  }

  WKV_HD static void leave(const Block& block, const Thread& thread) {
    partials_of(block, thread.warp()).set_sums(thread.lane(), thread.partials);
  }

  WKV_HD static void finish(const Block& block, const Thread& thread) {
    if (thread.warp() != 0) return;
    const auto& params = block.params;
    const int lane = thread.lane();
    Sums<Pair> total = partials_of(block, 0).get_sums(lane);
#pragma unroll 1
    for (int warp = 1; warp < block.warps; ++warp) total = total + partials_of(block, warp).get_sums(lane);
    store_partials(block, thread, total);
    if (kFullTilesOnly || block.place().position + 1 < block.place().chunks(params)) return;
    const auto [sums, max] = block.first_state(thread);
    const Sums<Pair> adjoint = exp2(sum_log2(max, thread.after.exponent)) * thread.after.sums;
    // The gradient of max follows from the others for consumers that respect the state's gauge.
    block.store_state(block.state_row(params.state_out, thread),
                      {adjoint, sums.num * adjoint.num + sums.den * adjoint.den});
  }

  // The row is the block's alone.
  WKV_HD static void store_partials(const Block& block, const Thread& thread, Sums<Pair> total) {
    const auto& params = block.params;
    const auto& place = block.place();
    const ChannelRow row = block.row_of(params.partials, place.b * params.chunking.chunks + place.ticket(), 2, thread);
    row.store(0, total.num);
    row.store(params.C, total.den);
  }
  WKV_HD static void leave_nothing(const Block& block, const Thread& thread) {
    store_partials(block, thread, {Pair(0), Pair(0)});
  }
  WKV_HD static void hand_on(const Block& block, const Thread& thread) {
    const auto& params = block.params;
    const State<Pair> none{{Pair(0), Pair(0)}, Pair(0)};
    block.store_state(
        block.state_row(params.state_out, thread),
        params.gstate_out == nullptr ? none : block.load_state(block.state_row(params.gstate_out, thread)));
  }
};

template <class Element>
struct Backward : Scan<BackwardPass<Element, false>> {};

// With a gate, packed sequences, or both.
template <class Element>
struct MixingBackward : Scan<BackwardPass<Element, true>> {};

}  // namespace wkv
