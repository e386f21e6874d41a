// The forward kernel: y, the final state and checkpoints, in one walk over the keys.
#pragma once

#include "scan.h"

namespace wkv {

template <class Element_>
struct ForwardPass {
  using Element = Element_;
  static constexpr bool kReverse = false, kFinishes = false;
  static constexpr int kInputs = 2, kOutputs = 1;
  using Block = ScanBlock<Element, kInputs>;
  struct Thread : ScanThread<Element> {
    Sums<Pair> read[kSubchunkSteps];  // what each step reads of the thread's own steps, in the scale of the walk
  };

  WKV_HD static void begin(Thread&) {}
  WKV_HD static void range(const Block&, const Tile&, Thread&) {}
  WKV_HD static Scaled normalised(Scaled state) { return normalised_state(state); }
  WKV_HD static Rows64 message(const Block& block, int i) { return block.rows_of(1, i, 3); }
  WKV_HD static Scaled first(const Block& block, const Thread& thread) {
    return normalised_state(scaled(block.first_state(thread)));
  }

  template <class Team>
  WKV_HD static void walk(const Block& block, const Tile& tile, bool fit, Team& team) {
    team.warp_phase([&](Thread& thread) {
      if (kFullTilesOnly || fit) {
        walk_together(block, tile, thread);
      } else {
        walk_spread(block, tile, thread);
      }
    });
  }

  WKV_HD static void walk_together(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(thread.lane()), bonus = block.channels.bonus(thread.lane());
    Sums<Pair> sums{Pair(0), Pair(0)};
    clear_unless_full(steps, thread.read);
    for_steps(steps, [&](int step) {
      const Pair weight = weight_of(thread.keys.get(step), thread.reference), num = weight * v.get(step);
      thread.read[step] = {bonus * num + sums.num, bonus * weight + sums.den};
      sums = {decay * sums.num + num, decay * sums.den + weight};
    });
    thread.own.sums = sums;
  }

  WKV_HD static void walk_spread(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    const Column<Element> k = block.column_of(0, thread), v = block.column_of(1, thread);
    const auto scale = block.running_scale(thread);
    thread.keys.replace_infinite(steps);
    clear_unless_full(steps, thread.read);
    State<Pair> state{{Pair(0), Pair(0)}, Pair(kEmptyMax)};
    for_steps(steps, [&](int step) {
      const Pair kt = thread.keys.get(step), vt = v.get(step);
      k.set(step, kt);  // for the correction; the warps' largest keys have been read
      const auto weights = scale.weights(scale.at(state.max, kt));
      thread.read[step] = mix(state.sums, weights.read, vt);
      state = {mix(state.sums, weights.advance, vt), scale.next_max(state.max, kt)};
    });
    thread.own = scaled(state);
  }

  // The state after the tile.
  WKV_HD static void keep(const Block& block, const Tile& tile, Scaled after, Thread& thread) {
    if (!tile.ends_chunk) block.kept.set_scaled(thread.lane(), after);
    if (kFullTilesOnly || !tile.ends_scan) return;
    const auto& params = block.params;
    block.store_state(block.row_of(params.state_out, block.b, 3, thread), state_of(after));
    if (params.checkpoints != nullptr) block.store_checkpoint(params.T, thread, after);
  }
  WKV_HD static void park(const Block&, const Thread&) {}
  WKV_HD static Scaled kept(const Block& block, const Thread& thread) { return block.kept.get_scaled(thread.lane()); }

  WKV_HD static void correct(const Block& block, const Tile& tile, bool fit, Thread& thread) {
    const int lane = thread.lane(), steps = tile.steps_of(thread.warp()), begin = thread.warp() * kSubchunkSteps;
    const Scaled carry = block.carry().get_scaled(lane);
    const Pair decay_log2 = block.channels.decay_log2(lane, begin);
    const Pair excess = (carry.exponent - thread.reference) + decay_log2;
    const bool adds = kFullTilesOnly || (fit && warp_agrees(all(excess <= Pair(kLargestIncoming))));
    Scaled in;
    if (adds) {
      in = {exp2(excess) * carry.sums + thread.before.sums, thread.reference};
    } else {
      in = begin == 0 ? carry : join(carry, decay_log2, thread.before);
    }
    const int t = tile.t + begin;
    if (block.params.checkpoints != nullptr && t > 0 && (t & (checkpoint_interval(Block::kType) - 1)) == 0) {
      block.store_checkpoint(t, thread, in);
    }
    const Column<Element> y = block.column_of(0, thread);
    if (!adds) {
      correct_spread(block, fit, in, steps, y, thread);
      return;
    }
    // What comes in has one mean all the time.
    const Pair decay = block.channels.decay(lane);
    const Pair mean = select(in.sums.den == Pair(0), in.sums.num, in.sums.num / in.sums.den);
    Pair den = in.sums.den;
    for_steps(steps, [&](int step) {
      const Sums<Pair> read = thread.read[step];
      y.set(step, (mean * den + read.num) / (den + read.den));
      den = decay * den;
    });
  }

  // The scale of what was read follows the keys, or what comes in is so large that it must be compared with at each
  // step.
  WKV_HD static void correct_spread(const Block& block, bool fit, Scaled in, int steps, Column<Element> y,
                                    const Thread& thread) {
    const auto scale = block.running_scale(thread);
    const auto& [log_decay, u] = scale.channel;
    const auto [incoming, log_incoming] = state_of(in);
    const Pair own_log = thread.reference * Pair(1 / kLog2E);
    Pair past = log_incoming, max(kEmptyMax);
    for_steps(steps, [&](int step) {
      Pair present = own_log;
      if (!fit) {
        const Pair kt = y.get(step), next = scale.next_max(max, kt);
        present = scale.lifts ? next - log_decay : larger(max, u + kt);
        max = next;
      }
      const Weights<Pair> weights = weigh(past, present);
      const Sums<Pair> sums = weights.past * incoming + weights.present * thread.read[step];
      y.set(step, sums.num / sums.den);
      past = past + log_decay;
    });
  }

  WKV_HD static void leave(const Block&, const Thread&) {}
  WKV_HD static void finish(const Block&, uint32_t, const Thread&) {}
};

template <class Element>
struct Forward : Scan<ForwardPass<Element>> {};

}  // namespace wkv
