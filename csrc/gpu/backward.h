// The backward kernel: gk, gv, the gradient of the first state and each chunk's part of those of the log-decay and u. A
// tile lies between two checkpoints; chunks are taken from the last to the first.
//
//   stage     k, v and gy of a tile come to shared memory while the block takes its ticket
//   range     keys go to registers; the warps agree on one reference, or that there is none
//   walk      each thread walks its subchunk from an empty state and keeps the state before every step
//   walk back each thread adds what the checkpoint and the warps before it bring, and walks back from an adjoint of zero,
//             gk and gv in the places of the states
//   look back the chunk publishes the adjoint that it alone gives to the state before it, and is told what comes from
//             behind it
//   correct   what comes from behind, decayed step by step, is added to gk and gv, which take the places of k and v
//
// The adjoint of a state is the gradient of its true sums. Sums are exchanged in rows of k, behind the walk of no use,
// and in rows of gy, behind the walk back.
#pragma once

#include "keys.h"
#include "lookback.h"
#include "plan.h"

namespace wkv {

template <class Element>
struct Backward {
  using Params = BackwardParams;
  static constexpr DType kType = ElementTraits<Element>::dtype;
  static constexpr int kWarps = kBackwardWarps;
  static constexpr int kTileSteps = kWarps * kSubchunkSteps;
  static constexpr int kSubchunk = kSubchunkSteps * kTileChannels;
  static_assert(kTileSteps == checkpoint_interval(kType));

  // The state before a step and the weight of its key; behind the walk back gk and gv without what comes from behind.
  struct Step {
    Sums<Pair> sums;
    Pair weight;  // of RunningScale what it has to know of the step
  };

  // What lives in registers from one phase to the next.
  struct Thread : TileThread {
    Keys<Element> keys;
    Step steps[kSubchunkSteps];
    Scaled own;                  // what the thread's steps give, then of warp 0 what the tile does
    Scaled start, after;         // warp 0: the state before the tile, and the adjoint before it or, at first, behind it
    Sums<Pair> decayed;          // states, each weighted by what is left of what comes from behind at its step
    Pair reference;              // the tile's, in units of log2
    Pair max_after;              // of a subchunk of spread keys, the maximum that its sums end with
    Pair g_log_decay;            // without what comes from behind
    Sums<Pair> partials;         // of the gradients of the log-decay and u, over all tiles
  };

  // The same for all threads of the block.
  struct Block {
    const Params& params;
    int64_t b, c, column;
    int columns;
    Element *k, *v, *gy;
    SharedChannels channels;
    uint32_t* ticket;

    WKV_HD Block(const Params& params, BlockIndex index, char* shared)
        : params(params),
          b(params.chunking.first_batch + index.y),
          c(static_cast<int64_t>(index.x) * kTileChannels),
          column(b * params.chunking.channel_tiles + index.x),
          columns(clamp_count(params.C - c, kTileChannels)) {
      k = reinterpret_cast<Element*>(shared);
      v = k + kWarps * kSubchunk;
      gy = v + kWarps * kSubchunk;
      channels = {reinterpret_cast<Pair*>(gy + kWarps * kSubchunk)};
      ticket = reinterpret_cast<uint32_t*>(channels.rows.first + 3 * kWarpThreads);
    }

    WKV_HD static int steps_of(int warp, int rows) { return clamp_count(rows - warp * kSubchunkSteps, kSubchunkSteps); }
    WKV_HD int channels_of(const Thread& thread) const { return clamp_count(columns - 2 * thread.lane(), 2); }
    WKV_HD int64_t channel_of(const Thread& thread) const { return c + 2 * thread.lane(); }
    WKV_HD static Column<Element> column_of(Element* tile, const Thread& thread) {
      return {tile + thread.warp() * kSubchunk + 2 * thread.lane()};
    }

    WKV_HD static Rows64 rows_of(Element* tile, int warp, int row) {
      return {reinterpret_cast<Pair*>(tile + warp * kSubchunk) + row * kWarpThreads};
    }
    static constexpr int kRowsOfWarp = kSubchunk * static_cast<int>(sizeof(Element)) / (kTileChannels * 4);
    static_assert(kRowsOfWarp >= 8);
    // In k: the largest key, the states that the warps sum up to, and warp 0's adjoint behind the tile, if it is known.
    WKV_HD Rows64 highest_of(int warp) const { return rows_of(k, warp, 0); }
    WKV_HD Rows64 state_of_warp(int warp) const { return rows_of(k, warp, 1); }
    WKV_HD Rows64 parked() const { return rows_of(k, 0, 4); }
    // In k once more, when the states are of no use: messages.
    WKV_HD Rows64 message(int i) const { return rows_of(k, i / 2, i % 2 * 3); }
    // In gy: the warps' adjoints, the one behind the tile, and the gradients of the log-decay and u.
    WKV_HD Rows64 adjoint_of(int warp) const { return rows_of(gy, warp, 0); }
    WKV_HD Rows64 carry() const { return rows_of(gy, 0, 3); }
    WKV_HD Rows64 partials_of(int warp) const { return rows_of(gy, warp, 6); }
    static_assert(kAnchor <= 2 * kWarps);

    template <class Values>
    WKV_HD auto* values_at(Values* values, int64_t row, int values_of_row, const Thread& thread) const {
      using Float = std::conditional_t<std::is_const_v<Values>, const float, float>;
      return static_cast<Float*>(values) + row * values_of_row * params.C + channel_of(thread);
    }
    WKV_HD const float* checkpoint_at(int64_t t, const Thread& thread) const {
      return values_at(params.checkpoints, checkpoint_row(kType, params.T, b, t), 3, thread);
    }
  };

  WKV_HD static State<Pair> first_state(const Block& block, const Thread& thread) {
    if (block.params.state == nullptr) return {{Pair(0), Pair(0)}, Pair(kEmptyMax)};
    const float* given = block.values_at(block.params.state, block.b, 3, thread);
    return or_empty(load_state(given, block.params.C, block.channels_of(thread)));
  }

  // ---- the phases ----

  WKV_HD static void stage_tile(const Block& block, int64_t t, int rows, Thread& thread) {
    const int steps = block.steps_of(thread.warp(), rows);
    const int64_t t_warp = t + thread.warp() * kSubchunkSteps;
    const auto bring = [&](Element* tile, const Sequence& sequence) {
      stage<Element>(tile + thread.warp() * kSubchunk, rows_from<Element>(sequence, block.b, t_warp, block.c), steps,
                     block.columns, thread.lane());
    };
    bring(block.k, block.params.k);
    bring(block.v, block.params.v);
    bring(block.gy, block.params.gy);
  }

  // The adjoint of the final state is relative to its max, which is that of the last checkpoint.
  WKV_HD static Scaled last_adjoint(const Block& block, const Thread& thread) {
    const auto& params = block.params;
    if (params.gstate_out == nullptr) return empty_scaled();
    const int count = block.channels_of(thread);
    const float* given = block.values_at(params.gstate_out, block.b, 3, thread);
    const Sums<Pair> adjoint{load_some(given, count), load_some(given + params.C, count)};
    const Pair max = load_some(block.checkpoint_at(params.T, thread) + 2 * params.C, count);
    const auto is_empty = max <= Pair(kEmptyMax / 2);
    const Scaled value = scaled_by_exp(adjoint, -select(is_empty, Pair(0), max));
    return normalised_adjoint({{select(is_empty, Pair(0), value.sums.num), select(is_empty, Pair(0), value.sums.den)},
                               value.exponent});
  }

  // `is_last`: nothing comes after the tile but the final state's gradient.
  WKV_HD static void range(const Block& block, int64_t t, int rows, bool is_last, Thread& thread) {
    thread.keys.load(block.column_of(block.k, thread), block.steps_of(thread.warp(), rows));
    thread.reference = thread.keys.highest;
    if (thread.warp() == 0) {
      const State<Pair> start = t == 0 ? first_state(block, thread)
                                       : load_state(block.checkpoint_at(t, thread), block.params.C,
                                                    block.channels_of(thread));
      thread.start = normalised_state(scaled(start));
      thread.reference = larger(thread.reference, thread.start.exponent);
      if (is_last) thread.after = last_adjoint(block, thread);
    }
  }

  WKV_HD static bool fits(const Block& block, Thread& thread) {
    const int lane = thread.lane();
    thread.reference = reference_of(block.highest_of(0), Block::kRowsOfWarp, kWarps, lane);
    const Pair least = least_weight(thread.keys.lowest, block.channels.bonus(lane));
    return tile_fits(thread.reference, least);
  }

  // Leaves the state after the warp's steps; that of warp 0 with what the tile starts from.
  WKV_HD static void walk(const Block& block, int rows, Thread& thread) {
    const int lane = thread.lane();
    const Column<Element> v = block.column_of(block.v, thread);
    const TileScale scale{thread.reference};
    const Pair decay = block.channels.decay(lane);
    Sums<Pair> sums{Pair(0), Pair(0)};
    if (thread.warp() == 0) sums = exp2(thread.start.exponent - thread.reference) * thread.start.sums;
    for_steps(block.steps_of(thread.warp(), rows), [&](int step) {
      const Pair vt = v.get(step), weight = scale.weight(thread.keys.get(step));
      thread.steps[step] = {sums, weight};
      sums = {weight * vt + decay * sums.num, decay * sums.den + weight};
    });
    block.state_of_warp(thread.warp()).set_sums(lane, sums);  // no lane has a use for k in shared memory any more
  }

  // For keys that spread: the state alone. Relative to the running maximum a thread's steps can only be kept when it knows
  // what it starts from.
  WKV_HD static void walk_spread(const Block& block, int rows, Thread& thread) {
    const int lane = thread.lane(), steps = block.steps_of(thread.warp(), rows);
    const Column<Element> v = block.column_of(block.v, thread);
    thread.keys.replace_infinite(steps);
    const auto scale = spread_scale(block, thread);
    State<Pair> state = thread.warp() == 0 ? state_of(thread.start) : State<Pair>{{Pair(0), Pair(0)}, Pair(kEmptyMax)};
    for_steps(steps, [&](int step) {
      const Pair kt = thread.keys.get(step);
      const auto weights = scale.weights(scale.at(state.max, kt));
      state = {mix(state.sums, weights.advance, v.get(step)), scale.next_max(state.max, kt)};
    });
    block.state_of_warp(thread.warp()).set_scaled(lane, scaled(state));
  }

  WKV_HD static RunningScale<Pair> spread_scale(const Block& block, const Thread& thread) {
    const Channel<Pair> channel = wkv::channel_of(block.params.parameters, block.channel_of(thread),
                                                  block.channels_of(thread), block.channels.log_decay(thread.lane()));
    return running_scale(channel, block.channels, thread.lane());
  }

  // Leaves the adjoint that the warp's steps alone give to the state before them.
  WKV_HD static void walk_back(const Block& block, int rows, Thread& thread) {
    const int lane = thread.lane(), steps = block.steps_of(thread.warp(), rows);
    const Column<Element> v = block.column_of(block.v, thread), gy = block.column_of(block.gy, thread);
    const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
    const Pair subchunk_decay = exp2(block.channels.decay_log2(lane, kSubchunkSteps));
    // Warp 0 walked from what the tile starts from.
    Sums<Pair> in{Pair(0), Pair(0)}, decayed{Pair(0), Pair(0)};
#pragma unroll 1
    for (int warp = 0; warp < thread.warp(); ++warp) {
      const Sums<Pair> sums = block.state_of_warp(warp).get_sums(lane);
      in = {subchunk_decay * in.num + sums.num, subchunk_decay * in.den + sums.den};
    }
    for_steps(steps, [&](int step) {
      Sums<Pair>& sums = thread.steps[step].sums;
      sums = sums + in;
      in = decay * in;
      decayed = {decay * decayed.num + sums.num, decay * decayed.den + sums.den};
    });
    thread.decayed = decayed;

    Sums<Pair> adjoint{Pair(0), Pair(0)};
    Pair g_log_decay(0), gu(0);
    for_steps_back(steps, [&](int step) {
      const auto [sums, weight] = thread.steps[step];
      const Pair vt = v.get(step), present = bonus * weight;
      const auto [y, h] = divide(present * vt + sums.num, gy.get(step), sums.den + present);
      const Pair h_present = present * h, gu_step = h_present * (vt - y);
      g_log_decay = g_log_decay + sums.num * adjoint.num + sums.den * adjoint.den;
      gu = gu + gu_step;
      thread.steps[step].sums = {weight * (vt * adjoint.num + adjoint.den) + gu_step,
                                 weight * adjoint.num + h_present};
      adjoint = {decay * adjoint.num + h, decay * adjoint.den - h * y};
    });
    thread.g_log_decay = g_log_decay;
    thread.partials.den = thread.partials.den + gu;
    thread.own.sums = adjoint;
  }

  WKV_HD static void walk_back_spread(const Block& block, int rows, Thread& thread) {
    const int lane = thread.lane(), steps = block.steps_of(thread.warp(), rows);
    const Column<Element> v = block.column_of(block.v, thread), gy = block.column_of(block.gy, thread);
    const auto scale = spread_scale(block, thread);
    Scaled before = thread.start;
    if (thread.warp() > 0) before = block.state_of_warp(0).get_scaled(lane);
#pragma unroll 1
    for (int warp = 1; warp < thread.warp(); ++warp) {
      before = join(before, block.channels.decay_log2(lane, kSubchunkSteps), block.state_of_warp(warp).get_scaled(lane));
    }
    State<Pair> state = state_of(before);
    Sums<Pair> decayed{Pair(0), Pair(0)};
    for_steps(steps, [&](int step) {
      const Pair kt = thread.keys.get(step), at = scale.at(state.max, kt);
      const Weights<Pair> weights = scale.weights(at).advance;
      thread.steps[step] = {state.sums, at};
      decayed = {weights.past * (decayed.num + state.sums.num), weights.past * (decayed.den + state.sums.den)};
      state = {mix(state.sums, weights, v.get(step)), scale.next_max(state.max, kt)};
    });
    thread.decayed = decayed;
    thread.max_after = state.max;

    Sums<Pair> adjoint{Pair(0), Pair(0)};
    Pair g_log_decay(0), gu(0);
    for_steps_back(steps, [&](int step) {
      const auto [sums, at] = thread.steps[step];
      const Pair vt = v.get(step);
      const auto weights = scale.weights(at);
      StepGradients<Pair> of_step;
      advance_adjoint(sums, weights.advance, vt, adjoint, of_step);
      read_adjoint(sums, weights.read, vt, gy.get(step), adjoint, of_step);
      thread.steps[step].sums = {of_step.gk, of_step.gv};
      g_log_decay = g_log_decay + of_step.g_log_decay;
      gu = gu + of_step.gu;
    });
    thread.g_log_decay = g_log_decay;
    thread.partials.den = thread.partials.den + gu;
    thread.own = normalised_adjoint(scaled_by_exp(adjoint, -state_of(before).max));
  }

  // The adjoint that the warps from `begin` on give to the state before them.
  WKV_HD static Scaled adjoint_from(const Block& block, bool fit, int begin, int rows, const Thread& thread) {
    const int lane = thread.lane();
    if (kFullTilesOnly || fit) {
      const Pair decay = exp2(block.channels.decay_log2(lane, kSubchunkSteps));
      Sums<Pair> adjoint{Pair(0), Pair(0)};
#pragma unroll 1
      for (int warp = kWarps - 1; warp >= begin; --warp) {
        const Sums<Pair> own = block.adjoint_of(warp).get_sums(lane);
        adjoint = {decay * adjoint.num + own.num, decay * adjoint.den + own.den};
      }
      return {adjoint, -thread.reference};
    }
    Scaled adjoint = empty_scaled();
#pragma unroll 1
    for (int warp = kWarps - 1; warp >= begin; --warp) {
      if (block.steps_of(warp, rows) == 0) continue;
      const Pair decay = block.channels.decay_log2(lane, block.steps_of(warp, rows));
      adjoint = join(adjoint, decay, block.adjoint_of(warp).get_scaled(lane));
    }
    return adjoint;
  }

  // Warp 0, when it knows what comes from behind the tile: the adjoint before it, which is handed on.
  WKV_HD static void hand_on(const Block& block, const LookBack& look_back, int rows, bool ends_chunk, Scaled carry,
                             Thread& thread) {
    const int lane = thread.lane();
    thread.after = normalised_adjoint(join(carry, block.channels.decay_log2(lane, rows), thread.own));
    if (ends_chunk && look_back.has_successor && (look_back.is_anchor || look_back.position == 0)) {
      look_back.publish(lane, thread.after);
    }
  }

  // Leaves gk and gv where k and v were.
  WKV_HD static void correct(const Block& block, bool fit, int rows, Thread& thread) {
    const int lane = thread.lane(), steps = block.steps_of(thread.warp(), rows);
    if (!kFullTilesOnly && steps == 0) return;
    const int end = (thread.warp() + 1) * kSubchunkSteps;
    Scaled behind = block.carry().get_scaled(lane);
    if (end < rows) {
      const Scaled own = adjoint_from(block, fit, thread.warp() + 1, rows, thread);
      behind = join(behind, block.channels.decay_log2(lane, rows - end), own);
    }
    const Column<Element> v = block.column_of(block.v, thread), gk = block.column_of(block.k, thread);
    const Pair decay = block.channels.decay(lane);
    const auto add = [&](int step, Pair weight, Sums<Pair> adjoint) {
      const Pair vt = v.get(step);
      const auto [gk_own, gv_own] = thread.steps[step].sums;
      gk.set(step, weight * (vt * adjoint.num + adjoint.den) + gk_own);
      v.set(step, weight * adjoint.num + gv_own);
    };
    if (kFullTilesOnly || fit) {
      Sums<Pair> adjoint = exp2(behind.exponent + thread.reference) * behind.sums;
      const Pair g_log_decay = thread.g_log_decay + thread.decayed.num * adjoint.num + thread.decayed.den * adjoint.den;
      thread.partials.num = thread.partials.num + decay * g_log_decay;
      for_steps_back(steps, [&](int step) {
        add(step, thread.steps[step].weight, adjoint);
        adjoint = decay * adjoint;
      });
      return;
    }
    const auto scale = spread_scale(block, thread);
    Sums<Pair> adjoint = exp2(thread.max_after * Pair(kLog2E) + behind.exponent) * behind.sums;
    const Pair g_log_decay = thread.g_log_decay + thread.decayed.num * adjoint.num + thread.decayed.den * adjoint.den;
    thread.partials.num = thread.partials.num + g_log_decay;
    for_steps_back(steps, [&](int step) {
      const Weights<Pair> weights = scale.weights(thread.steps[step].weight).advance;
      add(step, weights.present, adjoint);
      adjoint = weights.past * adjoint;
    });
  }

  // The parts of the gradients of the log-decay and u, and the first state's.
  WKV_HD static void finish_chunk(const Block& block, const LookBack& look_back, Thread& thread) {
    if (thread.warp() != 0) return;
    const auto& params = block.params;
    const int lane = thread.lane(), count = block.channels_of(thread);
    Sums<Pair> total = block.partials_of(0).get_sums(lane);
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) total = total + block.partials_of(warp).get_sums(lane);
    float* const partials = block.values_at(params.partials, block.b * params.chunking.chunks + look_back.position, 2, thread);
    store_some(partials, total.num, count);
    store_some(partials + params.C, total.den, count);
    if (look_back.has_successor) return;
    const auto [sums, max] = first_state(block, thread);
    const Sums<Pair> adjoint = exp2(max * Pair(kLog2E) + thread.after.exponent) * thread.after.sums;
    // The gradient of max follows from the others for consumers that respect the state's gauge.
    store_state(block.values_at(params.gstate, block.b, 3, thread), params.C, count,
                {adjoint, sums.num * adjoint.num + sums.den * adjoint.den});
  }

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex index, int threads, Team& team, char* shared) {
    const Block block(params, index, shared);
    const Chunking& chunking = params.chunking;
    const int64_t chunk_steps = static_cast<int64_t>(chunking.chunk_tiles) * kTileSteps;
    const auto tiles_of = [&](int64_t chunk) {
      const int64_t steps = chunk + 1 < chunking.chunks ? chunk_steps : params.T - chunk * chunk_steps;
      return static_cast<int>((steps + kTileSteps - 1) / kTileSteps);
    };
    const auto stage_at = [&](int64_t t, Thread& thread) {
      stage_tile(block, t, clamp_count(params.T - t, kTileSteps), thread);
    };
    team.phase([&](Thread& thread) {
      if (thread.index == 0) *block.ticket = take_position(chunking, block.column);
      // The chunk that is most likely the block's; others take its place where tickets were taken in another order.
      const int64_t chunk = chunking.chunks - 1 - index.z;
      stage_at(chunk * chunk_steps + static_cast<int64_t>(tiles_of(chunk) - 1) * kTileSteps, thread);
      block.channels.load(params.parameters, block.c, block.columns, thread.index, threads);
      thread.partials = {Pair(0), Pair(0)};
    });
    const LookBack look_back(chunking, block.column, *block.ticket);
    const int64_t chunk = chunking.chunks - 1 - look_back.position;
    const int tiles = tiles_of(chunk);
    bool is_staged = look_back.position == index.z;
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int64_t t = chunk * chunk_steps + static_cast<int64_t>(tile) * kTileSteps;
      const int rows = clamp_count(params.T - t, kTileSteps);
      const bool ends_chunk = tile == 0, begins_chunk = tile == tiles - 1;
      const bool waits = begins_chunk && look_back.position > 0;
      if (!is_staged) {
        team.phase([&](Thread&) { wait_for_copies(); });
        team.warp_phase([&](Thread& thread) { stage_at(t, thread); });
      }
      is_staged = false;
      team.warp_phase([&](Thread&) { wait_for_copies(); });
      team.warp_phase([&](Thread& thread) { range(block, t, rows, begins_chunk && look_back.position == 0, thread); });
      team.phase([&](Thread& thread) {
        block.highest_of(thread.warp()).set(0, thread.lane(), thread.reference);
      });
      const bool fit = team.agree([&](Thread& thread) { return fits(block, thread); });
      team.phase([&](Thread& thread) {
        if (thread.warp() == 0) block.parked().set_scaled(thread.lane(), thread.after);
        if (kFullTilesOnly || fit) {
          walk(block, rows, thread);
        } else {
          walk_spread(block, rows, thread);
        }
      });
      team.warp_phase([&](Thread& thread) {
        if (kFullTilesOnly || fit) {
          walk_back(block, rows, thread);
        } else {
          walk_back_spread(block, rows, thread);
        }
      });
      team.phase([&](Thread& thread) {
        block.adjoint_of(thread.warp()).set_scaled(thread.lane(), thread.own);
        if (thread.warp() == 0) block.carry().set_scaled(thread.lane(), block.parked().get_scaled(thread.lane()));
      });
      if (waits) {
        team.phase([&](Thread& thread) {
          if (thread.warp() == 0) {
            thread.own = normalised_adjoint(adjoint_from(block, fit, 0, rows, thread));
            if (look_back.has_successor && !look_back.is_anchor) look_back.publish(thread.lane(), thread.own);
          }
#pragma unroll 1
          for (int i = thread.warp(); i < look_back.predecessors(); i += kWarps) {
            block.message(i).set_scaled(thread.lane(), look_back.await(i, thread.lane()));
          }
        });
        team.phase([&](Thread& thread) {
          if (thread.warp() != 0) return;
          const int lane = thread.lane();
          Scaled carry = block.message(0).get_scaled(lane);
#pragma unroll 1
          for (int i = 1; i < look_back.predecessors(); ++i) {
            carry = join(carry, block.channels.decay_log2(lane, chunk_steps), block.message(i).get_scaled(lane));
          }
          block.carry().set_scaled(lane, carry);
          hand_on(block, look_back, rows, ends_chunk, carry, thread);
        });
      }
      team.warp_phase([&](Thread& thread) {
        if (!waits && thread.warp() == 0) {
          thread.own = normalised_adjoint(adjoint_from(block, fit, 0, rows, thread));
          hand_on(block, look_back, rows, ends_chunk, block.carry().get_scaled(thread.lane()), thread);
        }
        correct(block, fit, rows, thread);
        if (ends_chunk) block.partials_of(thread.warp()).set_sums(thread.lane(), thread.partials);
      });
      team.phase([&](Thread& thread) {
        const int64_t t_warp = t + thread.warp() * kSubchunkSteps;
        const auto bring_back = [&](void* target, Element* tile) {
          unstage<Element>(rows_from<Element>(target, params.T, params.C, block.b, t_warp, block.c),
                           tile + thread.warp() * kSubchunk, block.steps_of(thread.warp(), rows), block.columns,
                           thread.lane());
        };
        bring_back(params.gk, block.k);
        bring_back(params.gv, block.v);
      });
    }
    team.last_phase([&](Thread& thread) { finish_chunk(block, look_back, thread); });
  }
};

}  // namespace wkv
