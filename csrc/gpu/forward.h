// The forward kernel: y, the final state and checkpoints, in one walk over each tile that is in shared memory.
//
//   stage     k and v of a tile come to shared memory while the block takes its ticket
//   range     keys go to registers; the warps agree on one reference, or that there is none
//   walk      each thread walks its subchunk from an empty state and keeps what every step reads
//   look back the chunk publishes what it sums up to and is told what it starts from
//   correct   what comes in, decayed step by step, is added to what was kept: y, in k's place
//
// In shared memory sums are exchanged in rows of v, which are of no use behind the walk.
#pragma once

#include "keys.h"
#include "lookback.h"
#include "plan.h"

namespace wkv {

template <class Element>
struct Forward {
  using Params = ForwardParams;
  static constexpr DType kType = ElementTraits<Element>::dtype;
  static constexpr int kInterval = static_cast<int>(checkpoint_interval(kType));
  static constexpr int kSubchunk = kSubchunkSteps * kTileChannels;

  // What lives in registers from one phase to the next.
  struct Thread : TileThread {
    Keys<Element> keys;
    Pair reference;
    Sums<Pair> read[kSubchunkSteps];  // the sums of what the thread's own steps contribute to each y
    Scaled own;                       // what the thread's steps sum up to, then of warp 0 what the tile does
  };

  // The same for all threads of the block.
  struct Block {
    const Params& params;
    int64_t b, c, column;
    int columns, warps, tile_steps;
    Element *k, *v;
    SharedChannels channels;
    uint32_t* ticket;
    Rows64 carry, highest;  // `carry` twice, for this tile and the next

    WKV_HD Block(const Params& params, BlockIndex index, int threads, char* shared)
        : params(params),
          b(params.chunking.first_batch + index.y),
          c(static_cast<int64_t>(index.x) * kTileChannels),
          column(b * params.chunking.channel_tiles + index.x),
          columns(clamp_count(params.C - c, kTileChannels)),
          warps(threads / kWarpThreads),
          tile_steps(warps * kSubchunkSteps) {
      k = reinterpret_cast<Element*>(shared);
      v = k + warps * kSubchunk;
      channels = {reinterpret_cast<Pair*>(v + warps * kSubchunk)};
      carry = {channels.rows.first + 3 * kWarpThreads};
      highest = {carry.first + 6 * kWarpThreads};
      ticket = reinterpret_cast<uint32_t*>(highest.first + warps * kWarpThreads);
    }

    WKV_HD int steps_of(int warp, int rows) const { return clamp_count(rows - warp * kSubchunkSteps, kSubchunkSteps); }
    WKV_HD int channels_of(const Thread& thread) const { return clamp_count(columns - 2 * thread.lane(), 2); }
    WKV_HD int64_t channel_of(const Thread& thread) const { return c + 2 * thread.lane(); }
    WKV_HD Column<Element> column_of(Element* tile, const Thread& thread) const {
      return {tile + thread.warp() * kSubchunk + 2 * thread.lane()};
    }
    WKV_HD Rows64 carry_of(int tile) const { return {carry.first + tile % 2 * 3 * kWarpThreads}; }
    // What a warp's steps sum up to, and the message that it awaited.
    WKV_HD Rows64 sums_of(int warp) const { return {reinterpret_cast<Pair*>(v + warp * kSubchunk)}; }
    WKV_HD Rows64 message_of(int warp) const { return {sums_of(warp).first + 3 * kWarpThreads}; }

    WKV_HD void store(void* states, int64_t row, const Thread& thread, Scaled state) const {
      float* const target = static_cast<float*>(states) + row * 3 * params.C + channel_of(thread);
      store_state(target, params.C, channels_of(thread), state_of(state));
    }
    WKV_HD void store_checkpoint(int64_t t, const Thread& thread, Scaled state) const {
      store(params.checkpoints, checkpoint_row(kType, params.T, b, t), thread, state);
    }
  };
  static_assert(2 * kStateBytes <= kSubchunk * static_cast<int>(sizeof(Element)));

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
  }

  WKV_HD static void range(const Block& block, int rows, Thread& thread) {
    thread.keys.load(block.column_of(block.k, thread), block.steps_of(thread.warp(), rows));
    block.highest.set(thread.warp(), thread.lane(), thread.keys.highest);
  }

  WKV_HD static bool fits(const Block& block, Thread& thread) {
    thread.reference = reference_of(block.highest, 1, block.warps, thread.lane());
    thread.keys.lowest = least_weight(thread.keys.lowest, block.channels.bonus(thread.lane()));
    return tile_fits(thread.reference, thread.keys.lowest);
  }

  // One exponential a step. The sums of the thread's steps are in the tile's scale.
  WKV_HD static void walk(const Block& block, int rows, Thread& thread) {
    const int lane = thread.lane();
    const Column<Element> v = block.column_of(block.v, thread);
    const TileScale scale{thread.reference};
    const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
    Sums<Pair> sums{Pair(0), Pair(0)};
    for_steps(block.steps_of(thread.warp(), rows), [&](int step) {
      const Pair vt = v.get(step), weight = scale.weight(thread.keys.get(step)), present = bonus * weight;
      thread.read[step] = {present * vt + sums.num, sums.den + present};
      sums = {weight * vt + decay * sums.num, decay * sums.den + weight};
    });
    thread.own.sums = sums;
  }

  // The same for keys that spread: relative to the running maximum of the subchunk.
  WKV_HD static void walk_spread(const Block& block, int rows, Thread& thread) {
    const int steps = block.steps_of(thread.warp(), rows);
    const Column<Element> v = block.column_of(block.v, thread);
    if (thread.keys.replace_infinite(steps)) {
      for_steps(steps, [&](int step) { block.column_of(block.k, thread).at(step) = thread.keys.raw[step]; });
    }
    const auto scale = spread_scale(block, thread);
    State<Pair> state{{Pair(0), Pair(0)}, Pair(kEmptyMax)};
    for_steps(steps, [&](int step) {
      const Pair kt = thread.keys.get(step), vt = v.get(step);
      const auto weights = scale.weights(scale.at(state.max, kt));
      thread.read[step] = mix(state.sums, weights.read, vt);
      state = {mix(state.sums, weights.advance, vt), scale.next_max(state.max, kt)};
    });
    thread.own = scaled(state);
  }

  WKV_HD static RunningScale<Pair> spread_scale(const Block& block, const Thread& thread) {
    const Channel<Pair> channel = wkv::channel_of(block.params.parameters, block.channel_of(thread),
                                                  block.channels_of(thread), block.channels.log_decay(thread.lane()));
    return running_scale(channel, block.channels, thread.lane());
  }

  // What the first `warps` warps of the tile sum up to.
  WKV_HD static Scaled sum_of(const Block& block, bool fit, int warps, int rows, const Thread& thread) {
    const int lane = thread.lane();
    if (kFullTilesOnly || fit) {
      const Pair decay = exp2(block.channels.decay_log2(lane, kSubchunkSteps));
      Sums<Pair> sums{Pair(0), Pair(0)};
#pragma unroll 1
      for (int warp = 0; warp < warps; ++warp) {
        const int steps = block.steps_of(warp, rows);
        const Pair past = steps == kSubchunkSteps ? decay : exp2(block.channels.decay_log2(lane, steps));
        const Sums<Pair> own = block.sums_of(warp).get_sums(lane);
        sums = {past * sums.num + own.num, past * sums.den + own.den};
      }
      return {sums, thread.reference};
    }
    Scaled sums = empty_scaled();
#pragma unroll 1
    for (int warp = 0; warp < warps; ++warp) {
      const Pair past = block.channels.decay_log2(lane, block.steps_of(warp, rows));
      sums = join(sums, past, block.sums_of(warp).get_scaled(lane));
    }
    return sums;
  }

  // Warp 0, when it knows what the tile starts from: hands on what comes after it.
  WKV_HD static void hand_on(const Block& block, const LookBack& look_back, int tile, int64_t t, int rows,
                             bool ends_chunk, Scaled carry, Thread& thread) {
    const int lane = thread.lane();
    const auto& params = block.params;
    const Scaled after = normalised_state(join(carry, block.channels.decay_log2(lane, rows), thread.own));
    if (ends_chunk && look_back.has_successor && (look_back.is_anchor || look_back.position == 0)) {
      look_back.publish(lane, after);
    }
    if (!ends_chunk) block.carry_of(tile + 1).set_scaled(lane, after);
    if (t + rows < params.T) return;
    block.store(params.state_out, block.b, thread, after);
    if (params.checkpoints != nullptr) block.store_checkpoint(params.T, thread, after);
  }

  WKV_HD static Scaled first_state(const Block& block, const Thread& thread) {
    const float* given = static_cast<const float*>(block.params.state);
    if (given == nullptr) return empty_scaled();
    given += block.b * 3 * block.params.C + block.channel_of(thread);
    const Scaled state = scaled(or_empty(load_state(given, block.params.C, block.channels_of(thread))));
    return normalised_state(state);
  }

  WKV_HD static void correct(const Block& block, bool fit, int tile, int64_t t, int rows, Thread& thread) {
    const int lane = thread.lane(), steps = block.steps_of(thread.warp(), rows);
    if (!kFullTilesOnly && steps == 0) return;
    const int before = thread.warp() * kSubchunkSteps;
    const Scaled carry = block.carry_of(tile).get_scaled(lane);
    const Scaled own = sum_of(block, fit, thread.warp(), rows, thread);
    Scaled state = carry;
    if (thread.warp() > 0) state = join(carry, block.channels.decay_log2(lane, before), own);
    if (block.params.checkpoints != nullptr && t + before > 0 && (t + before) % kInterval == 0) {
      block.store_checkpoint(t + before, thread, state);
    }
    const Column<Element> y = block.column_of(block.k, thread);
    const Pair scale = larger(thread.reference, state.exponent);
    if (kFullTilesOnly || (fit && warp_agrees(all(thread.keys.lowest - scale >= Pair(kLeastSum))))) {
      const Pair decay = block.channels.decay(lane), own_scale = exp2(thread.reference - scale);
      Sums<Pair> in = exp2(state.exponent - scale) * state.sums;
      for_steps(steps, [&](int step) {
        const Pair den = own_scale * thread.read[step].den + in.den;
        y.set(step, (own_scale * thread.read[step].num + in.num) / den);
        in = decay * in;
      });
      return;
    }
    correct_spread(block, fit, state, steps, y, thread);
  }

  // The scale of what was read follows the keys, or what comes in is so much larger that it must be compared with at each
  // step.
  WKV_HD static void correct_spread(const Block& block, bool fit, Scaled state, int steps, Column<Element> y,
                                    const Thread& thread) {
    const auto scale = spread_scale(block, thread);
    const Channel<Pair> channel = scale.channel;
    Pair past = natural(state.exponent), max(kEmptyMax);
    for_steps(steps, [&](int step) {
      Pair present = natural(thread.reference);
      if (!fit) {
        const Pair kt = y.get(step), next = scale.next_max(max, kt);
        present = scale.lifts ? next - channel.log_decay : larger(max, channel.u + kt);
        max = next;
      }
      const Weights<Pair> weights = weigh(past, present);
      const Sums<Pair> sums = weights.past * state.sums + weights.present * thread.read[step];
      y.set(step, sums.num / sums.den);
      past = past + channel.log_decay;
    });
  }

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex index, int threads, Team& team, char* shared) {
    const Block block(params, index, threads, shared);
    const Chunking& chunking = params.chunking;
    const int64_t chunk_steps = static_cast<int64_t>(chunking.chunk_tiles) * block.tile_steps;
    const auto rows_at = [&](int64_t t) { return clamp_count(params.T - t, block.tile_steps); };
    team.phase([&](Thread& thread) {
      if (thread.index == 0) *block.ticket = take_position(chunking, block.column);
      // The chunk that is most likely the block's; others take its place where tickets were taken in another order.
      stage_tile(block, index.z * chunk_steps, rows_at(index.z * chunk_steps), thread);
      block.channels.load(params.parameters, block.c, block.columns, thread.index, threads);
    });
    const LookBack look_back(chunking, block.column, *block.ticket);
    const int64_t t_begin = look_back.position * chunk_steps;
    bool is_staged = look_back.position == index.z;
    for (int tile = 0; tile < chunking.chunk_tiles; ++tile) {
      const int64_t t = t_begin + static_cast<int64_t>(tile) * block.tile_steps;
      if (t >= params.T) break;
      const int rows = rows_at(t);
      const bool ends_chunk = tile + 1 == chunking.chunk_tiles || t + rows == params.T;
      const bool waits = tile == 0 && look_back.position > 0;
      if (!is_staged) {
        team.phase([&](Thread&) { wait_for_copies(); });
        team.warp_phase([&](Thread& thread) { stage_tile(block, t, rows, thread); });
      }
      is_staged = false;
      team.warp_phase([&](Thread&) { wait_for_copies(); });
      team.phase([&](Thread& thread) { range(block, rows, thread); });
      const bool fit = team.agree([&](Thread& thread) { return fits(block, thread); });
      team.warp_phase([&](Thread& thread) {
        if (kFullTilesOnly || fit) {
          walk(block, rows, thread);
        } else {
          walk_spread(block, rows, thread);
        }
      });
      team.phase([&](Thread& thread) {
        block.sums_of(thread.warp()).set_scaled(thread.lane(), thread.own);
        if (tile == 0 && look_back.position == 0 && thread.warp() == 0) {
          block.carry_of(0).set_scaled(thread.lane(), first_state(block, thread));
        }
      });
      if (waits) {
        team.phase([&](Thread& thread) {
          if (thread.warp() == 0) {
            thread.own = normalised_state(sum_of(block, fit, block.warps, rows, thread));
            if (look_back.has_successor && !look_back.is_anchor) look_back.publish(thread.lane(), thread.own);
          }
          if (thread.warp() < look_back.predecessors()) {
            const Scaled message = look_back.await(thread.warp(), thread.lane());
            block.message_of(thread.warp()).set_scaled(thread.lane(), message);
          }
        });
        team.phase([&](Thread& thread) {
          if (thread.warp() != 0) return;
          const int lane = thread.lane();
          Scaled carry = block.message_of(0).get_scaled(lane);
#pragma unroll 1
          for (int i = 1; i < look_back.predecessors(); ++i) {
            carry = join(carry, block.channels.decay_log2(lane, chunk_steps), block.message_of(i).get_scaled(lane));
          }
          block.carry_of(0).set_scaled(lane, carry);
          hand_on(block, look_back, tile, t, rows, ends_chunk, carry, thread);
        });
      }
      team.warp_phase([&](Thread& thread) {
        if (!waits && thread.warp() == 0) {
          thread.own = sum_of(block, fit, block.warps, rows, thread);
          hand_on(block, look_back, tile, t, rows, ends_chunk, block.carry_of(tile).get_scaled(thread.lane()), thread);
        }
        correct(block, fit, tile, t, rows, thread);
      });
      const auto bring_back = [&](Thread& thread) {
        const int64_t t_warp = t + thread.warp() * kSubchunkSteps;
        unstage<Element>(rows_from<Element>(params.y, params.T, params.C, block.b, t_warp, block.c),
                         block.k + thread.warp() * kSubchunk, block.steps_of(thread.warp(), rows), block.columns,
                         thread.lane());
      };
      if (ends_chunk) {
        team.last_phase(bring_back);
      } else {
        team.phase(bring_back);
      }
    }
  }
};

}  // namespace wkv
