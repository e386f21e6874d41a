// The forward kernel: y, the final state and checkpoints. Weights are computed once, for the sum of a thread's steps; y
// comes from a second loop over the steps, with the same weights, when the thread knows the state before them.
#pragma once

#include "scan.h"

namespace wkv {

template <class Element_, bool kMixing>
struct ForwardPass {
  using Element = Element_;
  static constexpr bool kReverse = false, kFinishes = false, kMixes = kMixing;
  static constexpr int kInputs = 2, kOutputs = 1, kFirstOutput = 1, kSteps = kForwardSteps;
  using Block = ScanBlock<Element, kInputs, kSteps, 0, kReverse, kMixing>;
  using Tile = wkv::Tile<kSteps>;
  struct Thread : ScanThread<Element, kSteps> {
    Pair weights[kSteps];  // of the keys, in the tile's scale; of keys that spread, the keys
  };

  WKV_HD static void begin(Thread&) {}
  WKV_HD static void stage_gate(const Block&, const Tile&, const Thread&) {}
  WKV_HD static void unstage_gate(const Block&, const Tile&, const Thread&) {}
  WKV_HD static void range(const Block&, const Tile&, Thread&) {}
  WKV_HD static Scaled normalised(Scaled state) { return normalised_state(state); }
  // In k, when keys are in registers, or where r takes its place in rows of their own: messages, and each warp's sum,
  // the last one where the tile's own message may be; once the messages have been joined, the state before the tile, in
  // the place of the first.
  WKV_HD static Rows64 message(const Block& block, int i) {
    return kMixing ? block.messages.from(3 * i) : block.rows_of(0, 0, 3 * i);
  }
  WKV_HD static Rows64 own_of(const Block& block, int warp) { return message(block, kAnchor + block.warps - 1 - warp); }
  WKV_HD static Rows64 carry(const Block& block) { return message(block, 0); }
  // In the same place, until the tile's reference is known: each warp's largest keys.
  static constexpr int kHighestRows = kMixing ? 1 : Block::kWarpRows;
  WKV_HD static Rows64 highest_of(const Block& block, int warp) {
    return kMixing ? block.messages.from(warp) : block.rows_of(0, warp, 0);
  }
  static constexpr int kLeastWarps = forward_least_warps(Block::kType);
  static_assert(kLeastWarps * Block::kWarpRows >= forward_message_rows(kLeastWarps) && Block::kWarpRows >= 3);
  WKV_HD static Scaled first(const Block& block, const Thread& thread) {
    return normalised_state(scaled(block.first_state(thread)));
  }

  template <class Team, class Leave>
  WKV_HD static void recur(const Block& block, const Tile& tile, bool fit, Team& team, const Leave& leave_sums) {
    team.phase([&](Thread& thread) {
      if (kFullTilesOnly || fit) {
        sum_together(block, tile, thread);
      } else {
        sum_spread(block, tile, thread);
      }
      leave_sums(thread);
    });
  }

  WKV_HD static void sum_together(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(thread.lane());
    Sums<Pair> sums{Pair(0), Pair(0)};
    clear_unless_full(steps, thread.weights);
    for_steps<kSteps>(steps, [&](int step) {
      const Pair weight = thread.weights[step] = weight_of(thread.keys.get(step), thread.reference);
      sums = {decay * sums.num + weight * v.get(step), decay * sums.den + weight};
    });
    thread.own.sums = sums;
  }

  WKV_HD static void sum_spread(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    thread.keys.replace_infinite(steps);
    clear_unless_full(steps, thread.weights);
    for_steps<kSteps>(steps, [&](int step) { thread.weights[step] = thread.keys.get(step); });
    const Pair log_decay = block.channels.log_decay(thread.lane());
    const auto left = [&](int step) { return logit_at_end<kSteps>(thread.weights[step], log_decay, step, steps); };
    thread.own = sum_of_spread<kSteps>(left, block.column_of(1, thread), steps);
  }

  // The state after the tile.
  WKV_HD static void keep(const Block& block, const Tile& tile, Scaled after, Thread& thread) {
    if (!tile.ends_chunk) block.kept.set_scaled(thread.lane(), after);
    if (kFullTilesOnly || !tile.ends_scan) return;
    const auto& params = block.params;
    block.store_state(block.state_row(params.state_out, thread), state_of(after));
    if (params.checkpoints != nullptr) block.store_checkpoint(block.place().steps(params), thread, after);
  }
  // r comes in the place of k, when keys are in registers.
  static constexpr bool kStagesLate = kMixing;
  WKV_HD static void park(const Block& block, const Tile& tile, const Thread& thread) {
    if (block.is_gated()) block.stage(0, block.params.r, tile, thread);
  }
  // Calls function(gate at a step), with none where there is no r.
  template <class Function>
  WKV_HD static void with_gates(const Block& block, const Thread& thread, const Function& function) {
    if (block.is_gated()) {
      if constexpr (kMixing) function([r = block.column_of(0, thread)](int step) { return gate_of(r.get(step)); });
    } else {
      function([](int) { return NoGate{}; });
    }
  }
  WKV_HD static Scaled kept(const Block& block, const Thread& thread) { return block.kept.get_scaled(thread.lane()); }

  WKV_HD static void correct(const Block& block, const Tile& tile, bool fit, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp()), begin = thread.warp() * kSteps;
    const Scaled carry_in = carry(block).get_scaled(lane);
    const Pair decay_log2 = block.channels.decay_log2(lane, begin);
    const Pair excess = (carry_in.exponent - thread.reference) + decay_log2;
    const bool shares = kFullTilesOnly || (fit && warp_agrees(all(excess <= Pair(kLargestIncoming))));
    Scaled in;
    if (shares) {
      in = {exp2(excess) * carry_in.sums + thread.before.sums, thread.reference};
    } else {
      in = begin == 0 ? carry_in : join(carry_in, decay_log2, thread.before);
    }
    const int t = tile.t + begin;
    if (block.params.checkpoints != nullptr && t > 0 && (t & (checkpoint_interval(Block::kType) - 1)) == 0) {
      block.store_checkpoint(t, thread, in);
    }
    const Column<Element> v = block.column_of(1, thread);  // where y takes the place of v
    if (shares) {
      const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
      with_gates(block, thread, [&](const auto& gate_at) {
        Sums<Pair> sums = in.sums;
        for_steps<kSteps>(steps, [&](int step) {
          const Pair weight = thread.weights[step], num = weight * v.get(step);
          const Sums<Pair> now{bonus * num + sums.num, bonus * weight + sums.den};
          v.set(step, gated_mean(now, gate_at(step)));
          sums = {decay * sums.num + num, decay * sums.den + weight};
        });
      });
      return;
    }
    auto scale = block.running_scale(thread);
    const auto read_steps = [&](const auto& key) {
      with_gates(block, thread, [&](const auto& gate_at) {
        State<Pair> state = state_of(in);
        for_steps<kSteps>(steps, [&](int step) {
          const Pair logit = key(thread.weights[step]), vt = v.get(step);
          const auto weights = scale.weights(scale.at(state.max, logit));
          v.set(step, read(state.sums, weights.read, vt, gate_at(step)));
          state = advance(scale, state, weights.advance, logit, vt);
        });
      });
    };
    if (!fit && scale.lifts) {
      scale.lifts = true;  // a constant from here on, so that no step has a branch
      read_steps([](Pair key) { return key; });
    } else {
      // The carried-in state may be too large for the scale that the keys share: the keys are then recovered from
      // their weights.
      read_steps([&](Pair weight) { return fit ? (log2(weight) + thread.reference) * Pair(1 / kLog2E) : weight; });
    }
  }

  WKV_HD static void leave(const Block&, const Thread&) {}
  WKV_HD static void finish(const Block&, const Thread&) {}
  WKV_HD static void leave_nothing(const Block&, const Thread&) {}
  WKV_HD static void hand_on(const Block& block, const Thread& thread) {
    block.store_state(block.state_row(block.params.state_out, thread), block.first_state(thread));
  }
};

template <class Element>
struct Forward : Scan<ForwardPass<Element, false>> {};

// With a gate, packed sequences, or both.
template <class Element>
struct MixingForward : Scan<ForwardPass<Element, true>> {};

}  // namespace wkv
