// The common part of the bidirectional operator's kernels, and those of its forward. Nothing waits for another block: a
// launch sums up every interval from both ends, one joins these sums along the sequences, and one reads.
//
//   bi_sums     a block for each interval: the sums of its steps, decayed to its end and to its beginning
//   bi_join     a thread for each pair of channels and side: what stands on that side of each interval
//   bi_forward  a block for each interval: y, from what stands on either side
//
// and backward, bi_backward.h, likewise: bi_adjoint_sums, bi_join, bi_backward.
//
// A block's tile is an interval, a warp for each subchunk. Where its logits allow it a block takes one exponent for
// both sides and its steps, in which a sum is a product and an addition, and else RunningSides.
#pragma once

#include "../common/bidirectional.h"
#include "scan.h"

namespace wkv {

// Of the steps before and of those after.
struct BothSides {
  Scaled before, after;
};
// The same in the scale of a tile.
struct BothSums {
  Sums<Pair> before, after;
};

// Log2 of the growth over a tile that leaves room for sums in one scale.
inline constexpr double kLargestGrowth = 16.0;
// From there on the product of a key and log2(e) is too coarse for a common exponent.
inline constexpr double kLargestReference = 1048576.0;

template <class Element_, int kInputs_, int kSteps_>
struct BiTiles {
  using Element = Element_;
  static constexpr int kInputs = kInputs_, kSteps = kSteps_, kWarps = bi_warps(kSteps);
  static constexpr bool kReads = true;  // and has a use for u and r
  using Block = ScanBlock<Element, kInputs, kSteps, kWarps, false, true>;
  using Place = typename Block::Place;
  using Tile = wkv::Tile<kSteps>;
  using Gates = DistantGates<Block, kSteps>;
  static constexpr int kTileSteps = kSteps * kWarps;
  // Steps for which a thread keeps what stands after each.
  static constexpr int kPart = 16, kParts = kSteps / kPart;
  static_assert(kTileSteps == checkpoint_interval(Block::kType));

  struct Thread : TileThread {
    BothSides in;  // comes in to the tile, and of keys that spread then to the thread's steps
    Keys<Element, kSteps> keys;
    Pair reference;                 // of the tile's scale, in which these are
    Sums<Pair> present[kSteps];     // what each step adds: its weight, and that times v
    Sums<Pair> after_part[kParts];  // of the thread's steps after each part but the last
  };

  // ---- where a block is, and its tile ----

  // Rows of the table lie along two dimensions of the grid.
  WKV_HD static Place place_of(const BiParams& params, BlockIndex index) {
    const uint32_t row = index.z * kPackedRows + index.y, chunks = params.chunking.chunks;
    if (params.boundaries.data != nullptr) return Place(params, {index.x, 0, 0}, row);
    return Place(params, {index.x, row / chunks, 0}, row % chunks);
  }
  WKV_HD static bool is_there(const BiParams& params, BlockIndex index) {
    return kFullTilesOnly || index.z * kPackedRows + index.y < params.rows;
  }

  WKV_HD static Tile tile_of(const Block& block) {
    const Place& place = block.place();
    const int t = static_cast<int>(place.position) * kTileSteps;
    if (kFullTilesOnly) return {t, kTileSteps, false, true};
    return {t, clamp_count(static_cast<int>(place.steps(block.params)) - t, kTileSteps), false, true};
  }

  WKV_HD static uint32_t table_row(const Block& block, const Tile& tile) {
    return block.place().checkpoint_row(block.params, tile.t + tile.rows);
  }
  WKV_HD static ChannelRow row_at(const Block& block, const void* table, const Tile& tile, const Thread& thread) {
    return block.row_of(table, table_row(block, tile), 6, thread);
  }
  // One branch for all values.
  WKV_HD static BothSides load_sides(const Block& block, ChannelRow row) {
    const int64_t C = block.params.C;
    const auto sides = [=](const auto& load) -> BothSides {
      return {{{load(0), load(C)}, load(2 * C)}, {{load(3 * C), load(4 * C)}, load(5 * C)}};
    };
    if (kFullTilesOnly || (row.is_aligned && row.count > 1)) {
      return sides([=](int64_t offset) { return Pair(*reinterpret_cast<const FloatPair*>(row.first + offset)); });
    }
    return sides([=](int64_t offset) { return row.load(offset); });
  }
  WKV_HD static void store_sides(const Block& block, ChannelRow row, BothSides sides) {
    const int64_t C = block.params.C;
    row.store(0, sides.before.sums.num);
    row.store(C, sides.before.sums.den);
    row.store(2 * C, sides.before.exponent);
    row.store(3 * C, sides.after.sums.num);
    row.store(4 * C, sides.after.sums.den);
    row.store(5 * C, sides.after.exponent);
  }

  WKV_HD static void stage_tile(const Block& block, const Tile& tile, const Thread& thread) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) block.stage(i, block.params.inputs[i], tile, thread);
  }
  WKV_HD static void prefetch_gate(const Block& block, const Tile& tile, const Thread& thread) {
    if (!block.is_gated()) return;
    const int warp = thread.warp();
    prefetch_rows(rows_from<Element>(block.params.r, block.place().b, block.c),
                  block.place().begin() + tile.t + warp * kSteps, tile.steps_of(warp), block.columns, thread.lane());
  }

  // A thread's steps of r in the place of k, and of its gradient.
  struct StagedGates {
    Column<Element> r;

    WKV_HD Gate<Pair> get(int step) const { return gate_of(r.get(step)); }
    WKV_HD void set_gradient(int step, Pair value) const { r.set(step, value); }
  };
  // Calls function(gates), with none where there is no r.
  template <class Function>
  WKV_HD static void with_gates(const Block& block, const Thread& thread, const Function& function) {
    if (block.is_gated()) {
      function(StagedGates{block.column_of(0, thread)});
    } else {
      function(NoGates());
    }
  }

  // ---- the sums of a tile's warps ----

  // Of a warp's steps, decayed to their end and to their beginning.
  WKV_HD static Rows64 own_before(const Block& block, int warp) { return block.messages.from(kBiRowsOfWarp * warp); }
  WKV_HD static Rows64 own_after(const Block& block, int warp) { return block.messages.from(kBiRowsOfWarp * warp + 3); }

  WKV_HD static void leave_own(const Block& block, const Thread& thread, BothSides own) {
    own_before(block, thread.warp()).set_scaled(thread.lane(), own.before);
    own_after(block, thread.warp()).set_scaled(thread.lane(), own.after);
  }

  // `in` stands before the warps from `first` to `end`, or after them: joined with them.
  WKV_HD static Scaled with_warps_before(const Block& block, const Tile& tile, int lane, Scaled in, int first,
                                         int end) {
#pragma unroll 1
    for (int warp = first; warp < end; ++warp) {
      in = join(in, block.channels.decay_log2(lane, tile.steps_of(warp)), own_before(block, warp).get_scaled(lane));
    }
    return in;
  }
  WKV_HD static Scaled with_warps_after(const Block& block, const Tile& tile, int lane, Scaled in, int first, int end) {
#pragma unroll 1
    for (int warp = end - 1; warp >= first; --warp) {
      in = join(in, block.channels.decay_log2(lane, tile.steps_of(warp)), own_after(block, warp).get_scaled(lane));
    }
    return in;
  }
  // On either side of a thread's steps.
  WKV_HD static BothSides around(const Block& block, const Tile& tile, const Thread& thread, BothSides in) {
    return {with_warps_before(block, tile, thread.lane(), in.before, 0, thread.warp()),
            with_warps_after(block, tile, thread.lane(), in.after, thread.warp() + 1, kWarps)};
  }
  // Of the whole tile.
  WKV_HD static BothSides sum_of_tile(const Block& block, const Tile& tile, const Thread& thread) {
    const int lane = thread.lane(), last = kWarps - 1;
    return {with_warps_before(block, tile, lane, own_before(block, 0).get_scaled(lane), 1, kWarps),
            with_warps_after(block, tile, lane, own_after(block, last).get_scaled(lane), 0, last)};
  }

  // ---- in one scale ----

  WKV_HD static Sums<Pair> none() { return {Pair(0), Pair(0)}; }
  // The sums a step farther on, with what that step adds; `is_first`: there are none yet.
  WKV_HD static Sums<Pair> advanced(Pair decay, Sums<Pair> sums, Sums<Pair> added, bool is_first) {
    return is_first ? added : decay * sums + added;
  }

  // NaN does not fit.
  WKV_HD static bool is_moderate(Pair reference, Pair decay_log2) {
    return all(abs(reference) <= Pair(kLargestReference)) && all(decay_log2 <= Pair(kLargestGrowth));
  }
  WKV_HD static bool fits(const Block& block, const Thread& thread, Pair bonus) {
    return tile_fits(thread.reference, thread.keys.lowest, bonus) &&
           is_moderate(thread.reference, block.channels.decay_log2(thread.lane(), kTileSteps));
  }

  // Whether the tile and what comes in to it have one scale. Only whole tiles do, so that this code is for whole ones:
  // a sequence has no more than one that is not, at its end.
  template <class Team>
  WKV_HD static bool agree(const Block& block, const Tile& tile, Team& team) {
    team.phase([&](Thread& thread) {
      thread.keys.load(block.column_of(0, thread), tile.steps_of(thread.warp()));
      const Pair incoming = larger(thread.in.before.exponent, thread.in.after.exponent);
      own_before(block, thread.warp()).set(0, thread.lane(), larger(thread.keys.highest, incoming));
    });
    return team.agree([&](Thread& thread) {
      Pair highest = own_before(block, 0).get(0, thread.lane());
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp)
        highest = larger(highest, own_before(block, warp).get(0, thread.lane()));
      thread.reference = ceil(highest);
      return tile.rows == kTileSteps && fits(block, thread, block.channels.bonus(thread.lane()));
    });
  }

  WKV_HD static Sums<Pair> weighed(const Thread& thread, Column<Element> v, int step) {
    const Pair weight = weight_of(thread.keys.get(step), thread.reference);
    return {weight * v.get(step), weight};
  }
  // The sum of a thread's steps, decayed to their end.
  WKV_HD static Sums<Pair> sum_before(const Thread& thread, Pair decay) {
    Sums<Pair> sums = thread.present[0];
    for_steps<kSteps - 1>(kSteps - 1, [&](int i) { sums = decay * sums + thread.present[i + 1]; });
    return sums;
  }
  // The sum of a part of them and of `sums`, of the steps after it, decayed to the beginning of the part.
  WKV_HD static Sums<Pair> sum_after(const Thread& thread, Pair decay, int part, Sums<Pair> sums) {
    for_steps_back<kPart>(kPart, [&](int i) {
      const int step = part * kPart + i;
      sums = advanced(decay, sums, thread.present[step], step == kSteps - 1);
    });
    return sums;
  }
  // Keeps the sums of the steps after each part but the last, and returns those after the first one.
  WKV_HD static Sums<Pair> sum_after_parts(Thread& thread, Pair decay) {
    Sums<Pair> sums = none();
#pragma unroll
    for (int part = kParts - 1; part > 0; --part) {
      thread.after_part[part - 1] = sums = sum_after(thread, decay, part, sums);
    }
    return sums;
  }

  WKV_HD static void leave_sums(const Block& block, const Thread& thread, BothSums own) {
    own_before(block, thread.warp()).set_sums(thread.lane(), own.before);
    own_after(block, thread.warp()).set_sums(thread.lane(), own.after);
  }
  // Leaves the sums of each warp's steps for those on that side of it, while r comes to the place of the keys, which
  // are in registers by now.
  template <class Team>
  WKV_HD static void sum_up_together(const Block& block, const Tile& tile, Team& team) {
    team.phase([&](Thread& thread) {
      const int lane = thread.lane(), warp = thread.warp();
      if (block.is_gated()) block.stage(0, block.params.r, tile, thread);
      const Column<Element> v = block.column_of(1, thread);
      for_steps<kSteps>(kSteps, [&](int step) { thread.present[step] = weighed(thread, v, step); });
      const Pair decay = block.channels.decay(lane);
      if (warp + 1 < kWarps) own_before(block, warp).set_sums(lane, sum_before(thread, decay));
      const Sums<Pair> after = sum_after_parts(thread, decay);
      if (warp > 0) own_after(block, warp).set_sums(lane, sum_after(thread, decay, 0, after));
      wait_for_copies();
    });
  }
  // As `with_warps_before` and `with_warps_after`.
  WKV_HD static BothSums sums_around(const Block& block, int lane, BothSums in, int end, int first) {
    const Pair decay = exp2(block.channels.decay_log2(lane, kSteps));
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < end) in.before = decay * in.before + own_before(block, warp).get_sums(lane);
    }
#pragma unroll
    for (int warp = kWarps - 1; warp >= 0; --warp) {
      if (warp >= first) in.after = decay * in.after + own_after(block, warp).get_sums(lane);
    }
    return in;
  }
  WKV_HD static BothSums sums_around(const Block& block, const Thread& thread, BothSums in) {
    return sums_around(block, thread.lane(), in, thread.warp(), thread.warp() + 1);
  }
  // The states on either side of a thread's steps.
  WKV_HD static BothSums states_around(const Block& block, const Thread& thread) {
    const auto& [before, after] = thread.in;
    return sums_around(block, thread,
                       {power_of_two(before.exponent - thread.reference) * before.sums,
                        power_of_two(after.exponent - thread.reference) * after.sums});
  }

  // The state after a part, from that after all of the thread's steps.
  WKV_HD static Sums<Pair> state_after_part(const Block& block, const Thread& thread, Sums<Pair> after, int part) {
    const int steps = (kParts - 1 - part) * kPart;
    if (steps == 0) return after;
    return exp2(block.channels.decay_log2(thread.lane(), steps)) * after + thread.after_part[part];
  }

  // ---- of keys that spread ----

  template <class Left>
  WKV_HD static Scaled sum_of_spread(const Left& left, Column<Element> v, int steps) {
    State<Pair> state = empty_state<Pair>();
    for_steps<kSteps, false, true>(steps, [&](int step) { state.max = larger(left(step), state.max); });
    for_steps<kSteps, false, true>(steps, [&](int step) {
      // The difference first: log2(e) times a logit that has grown is too coarse.
      const Pair weight = exp_nonpositive(left(step) - state.max);
      state.sums = {weight * v.get(step) + state.sums.num, state.sums.den + weight};
    });
    return scaled(state);
  }
  WKV_HD static BothSides sum_spread(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    const Column<Element> v = block.column_of(1, thread);
    const auto& keys = thread.keys;
    thread.keys.replace_infinite(steps);
    const Pair log_decay = block.channels.log_decay(thread.lane());
    return {
        sum_of_spread([&](int step) { return logit_at_end<kSteps>(keys.get(step), log_decay, step, steps); }, v, steps),
        sum_of_spread([&](int step) { return Pair(step) * log_decay + keys.get(step); }, v, steps)};
  }

  // The sums after each step, from the state after all of them; returns the one before them.
  WKV_HD static State<Pair> replay_after(const RunningSides<Pair>& scale, Column<Element> k, Column<Element> v,
                                         int steps, State<Pair> after, SavedStep<Pair> (&saved)[kSteps]) {
    for_steps<kSteps, true, true>(steps, [&](int step) {
      const Pair logit = scale.logit(k.get(step)), at = scale.at(after.max, logit);
      saved[step] = {after.sums, at};
      after = {mix(after.sums, scale.advance(at, logit), v.get(step)), scale.next_max(after.max, logit)};
    });
    return after;
  }
};

// A kernel of a block for each interval: the pass goes on from the sums of the warps.
template <class Pass>
struct BiTileKernel {
  using Params = BiParams;
  using Thread = typename Pass::Thread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex index, int threads, Team& team, char* shared) {
    using Block = typename Pass::Block;
    const Block block(params, index, threads, shared);
    if (!Pass::is_there(params, index)) return;
    team.phase([&](Thread& thread) {
      if (thread.index == 0) *block.shared_place = Pass::place_of(params, index);
    });
    if (!kFullTilesOnly && !block.place().has_steps) {
      team.last_phase([&](Thread& thread) { Pass::leave_nothing(params, block, thread); });
      return;
    }
    const typename Pass::Tile tile = Pass::tile_of(block);
    team.phase([&](Thread& thread) {
      Pass::stage_tile(block, tile, thread);
      if (Pass::kReads) Pass::prefetch_gate(block, tile, thread);
      Pass::load_incoming(params, block, tile, thread);
      block.channels.template load<false, Pass::kReads>(params.parameters, block.c, block.columns, thread.index,
                                                        threads);
      wait_for_copies();
    });
    Pass::finish(params, block, tile, team);
  }
};

template <class Element>
struct BiSumsPass : BiTiles<Element, 2, bi_sums_steps(kTypeOf<Element>)> {
  using Base = BiTiles<Element, 2, bi_sums_steps(kTypeOf<Element>)>;
  using Base::kPart;
  using typename Base::Block;
  using typename Base::Thread;
  using typename Base::Tile;
  static constexpr bool kReads = false;

  WKV_HD static void load_incoming(const BiParams&, const Block&, const Tile&, const Thread&) {}
  WKV_HD static void leave_nothing(const BiParams&, const Block&, const Thread&) {}

  // Warp by warp in one scale: nothing comes in.
  WKV_HD static BothSides sum_up(const Block& block, const Tile& tile, Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    thread.keys.load(block.column_of(0, thread), steps);
    thread.reference = ceil(thread.keys.highest);
    if (kFullTilesOnly || warp_agrees(steps == Base::kSteps && Base::fits(block, thread, Pair(1)))) {
      const auto [before, after] = sum_together(block, thread);
      return {{before, thread.reference}, {after, thread.reference}};
    }
    return Base::sum_spread(block, tile, thread);
  }

  WKV_HD static BothSums sum_together(const Block& block, const Thread& thread) {
    const int lane = thread.lane();
    const Column<Element> v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(lane);
    BothSums own{Base::none(), Base::none()};
#pragma unroll
    for (int part = 0; part < Base::kParts; ++part) {
      const int first = part * kPart;
      Sums<Pair> present[kPart], of_part = Base::none();
      for_steps<kPart>(kPart, [&](int i) {
        present[i] = Base::weighed(thread, v, first + i);
        own.before = Base::advanced(decay, own.before, present[i], first + i == 0);
      });
      for_steps_back<kPart>(kPart,
                            [&](int i) { of_part = Base::advanced(decay, of_part, present[i], i == kPart - 1); });
      own.after = part == 0 ? of_part : exp2(block.channels.decay_log2(lane, first)) * of_part + own.after;
    }
    return own;
  }

  template <class Team>
  WKV_HD static void finish(const BiParams& params, const Block& block, const Tile& tile, Team& team) {
    const auto store = [&](const Thread& thread, BothSides sides) {
      Base::store_sides(block, Base::row_at(block, params.checkpoints, tile, thread), sides);
    };
    if constexpr (Base::kWarps == 1) {
      team.last_phase([&](Thread& thread) { store(thread, sum_up(block, tile, thread)); });
    } else {
      team.phase([&](Thread& thread) { Base::leave_own(block, thread, sum_up(block, tile, thread)); });
      team.last_phase([&](Thread& thread) {
        if (thread.warp() == 0) store(thread, Base::sum_of_tile(block, tile, thread));
      });
    }
  }
};

template <class Element>
struct BiForwardPass : BiTiles<Element, 2, bi_steps(kTypeOf<Element>)> {
  using Base = BiTiles<Element, 2, bi_steps(kTypeOf<Element>)>;
  using Base::kPart;
  using Base::kSteps;
  using typename Base::Block;
  using typename Base::Gates;
  using typename Base::Thread;
  using typename Base::Tile;

  WKV_HD static void load_incoming(const BiParams& params, const Block& block, const Tile& tile, Thread& thread) {
    thread.in = Base::load_sides(block, Base::row_at(block, params.checkpoints, tile, thread));
  }
  WKV_HD static void leave_nothing(const BiParams&, const Block&, const Thread&) {}

  // The two scales have phases of their own, so that neither keeps registers for the other.
  template <class Team>
  WKV_HD static void finish(const BiParams& params, const Block& block, const Tile& tile, Team& team) {
    if (Base::agree(block, tile, team) || kFullTilesOnly) {
      Base::sum_up_together(block, tile, team);
      team.warp_phase([&](Thread& thread) { read_together(block, thread); });
    } else {
      team.phase([&](Thread& thread) { Base::leave_own(block, thread, Base::sum_spread(block, tile, thread)); });
      team.warp_phase([&](Thread& thread) {
        if (tile.steps_of(thread.warp()) > 0) read_spread(block, tile, thread);
      });
    }
    team.last_phase([&](Thread& thread) { block.unstage(1, params.outputs[0], tile, thread); });
  }

  // y takes the place of v.
  WKV_HD static void read_together(const Block& block, const Thread& thread) {
    const int lane = thread.lane();
    const Column<Element> v = block.column_of(1, thread);
    const Pair decay = block.channels.decay(lane), bonus = block.channels.bonus(lane);
    const auto [before, after] = Base::states_around(block, thread);
    Base::with_gates(block, thread, [&](const auto& gates) {
      Sums<Pair> past = before;
#pragma unroll
      for (int part = 0; part < Base::kParts; ++part) {
        Sums<Pair> others[kPart];  // all that a step reads but what stands before it
        Sums<Pair> later = Base::state_after_part(block, thread, after, part);
        for_steps_back<kPart>(kPart, [&](int step) {
          const Sums<Pair> present = thread.present[part * kPart + step];
          others[step] = bonus * present + later;
          later = decay * later + present;
        });
        for_steps<kPart>(kPart, [&](int step) {
          v.set(part * kPart + step, gated_mean(past + others[step], gates.get(part * kPart + step)));
          past = decay * past + thread.present[part * kPart + step];
        });
      }
    });
  }

  WKV_HD static void read_spread(const Block& block, const Tile& tile, const Thread& thread) {
    const int steps = tile.steps_of(thread.warp());
    const Column<Element> k = block.column_of(0, thread), v = block.column_of(1, thread);
    const BothSides in = Base::around(block, tile, thread, thread.in);
    const Gates gates(block, tile, thread);
    const RunningSides<Pair> scale = sides_of(block.running_scale(thread));
    State<Pair> before = state_of(in.before);
    SavedStep<Pair> saved[kSteps];
    Base::replay_after(scale, k, v, steps, state_of(in.after), saved);
    for_steps<kSteps, false, true>(steps, [&](int step) {
      const auto& [sums, at_after] = saved[step];
      const Pair logit = scale.logit(k.get(step)), vt = v.get(step), at = before.max;
      v.set(step, read_sides(before.sums, sums, scale.read(at, at_after, logit), vt, gates.get(step)));
      before = {mix(before.sums, scale.advance(at, logit), vt), scale.next_max(before.max, logit)};
    });
  }
};

// Turns the sums of each interval of a table into what comes in to the interval from either side.
template <class Real>
struct BiJoin {
  using Params = BiParams;
  using Thread = TileThread;

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex block, int threads, Team& team, char*) {
    team.last_phase([&](Thread& thread) {
      const uint32_t pairs = (params.C + 1) / 2;
      const uint64_t i = uint64_t{block.x} * threads + thread.index, of_side = i / pairs;
      const uint32_t c = 2 * static_cast<uint32_t>(i % pairs), n = static_cast<uint32_t>(of_side / 2);
      if (n < params.N) join_rows(params, n, c, of_side % 2 == 1);
    });
  }

  WKV_HD static void join_rows(const Params& params, uint32_t n, uint32_t c, bool is_after) {
    constexpr int64_t kInterval = checkpoint_interval(DType::float32);
    const int64_t C = params.C, T = params.T;
    const SequenceView<int64_t> view = params.boundaries.data == nullptr
                                           ? view_of_batch<int64_t>(DType::float32, T, n)
                                           : view_of_packed<int64_t>(DType::float32, params.boundaries, T, n);
    const int64_t rows = checkpoint_count(DType::float32, view.steps);
    void* const table = params.joins_adjoints ? params.adjoints : params.checkpoints;
    const int channels = clamp_count(C - c, 2);
    const bool is_aligned = C % 2 == 0 && reinterpret_cast<uintptr_t>(table) % sizeof(FloatPair) == 0;
    const int64_t first = (view.checkpoints + (is_after ? rows - 1 : 0)) * 6 + (is_after ? 3 : 0);
    const int64_t to_next = (is_after ? -6 : 6) * C;
    ChannelRow row{static_cast<float*>(table) + first * C + c, channels, is_aligned};
    const auto load = [&](int64_t offset) {
      return Scaled{{row.load(offset), row.load(offset + C)}, row.load(offset + 2 * C)};
    };
    const auto log_decay = [&](int i) {
      return i < channels
                 ? bounded_log_decay(load_parameter<Real>(params.parameters.w, params.parameters.w_dtype, c + i))
                 : Real(0);
    };
    const Pair step_decay = Pair(log_decay(0), log_decay(1)) * Pair(kLog2E);
    const auto decay_over = [&](int64_t steps) { return Pair(static_cast<int>(steps)) * step_decay; };
    Pair decay = decay_over(is_after ? view.steps - (rows - 1) * kInterval : kInterval);
    Scaled in = empty_scaled(), next = in;
    if (rows > 0) next = load(0);
#pragma unroll 1
    for (int64_t left = rows; left > 0; --left) {
      const Scaled own = next;
      if (left > 1) next = load(to_next);
      row.store(0, in.sums.num);
      row.store(C, in.sums.den);
      row.store(2 * C, in.exponent);
      row.first += to_next;
      const Scaled sum = join(in, decay, own);
      in = params.joins_adjoints ? normalised_adjoint(sum) : normalised_state(sum);
      decay = decay_over(kInterval);
    }
  }
};

template <class Element>
struct BiSums : BiTileKernel<BiSumsPass<Element>> {};

template <class Element>
struct BiForward : BiTileKernel<BiForwardPass<Element>> {};

}  // namespace wkv
