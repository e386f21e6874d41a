// The scan over time that forward and backward share: forward from the first step to the last, backward the other way
// round. A block takes the tiles of its chunk in the order of the scan:
//
//   stage      the tile comes to shared memory while the block takes its ticket
//   range      keys go to registers; the warps agree on one reference, or that there is none
//   recur      each thread runs the recurrence over its subchunk, from nothing                         (the pass's own)
//   look back  each warp sums up the warps before it; the last one publishes the tile's sum, the partial, joins the
//              predecessors' messages to the state before the tile, and publishes the inclusive state
//   correct    the state before the tile, decayed step by step, is added to the outputs                (the pass's own)
//   unstage    outputs, in the places of inputs, go to memory
//
// "Before" and "last" are in the order of the scan.
#pragma once

#include "keys.h"
#include "lookback.h"
#include "place.h"

namespace wkv {

// A tile of a chunk, the same for all threads.
template <int kSteps>
struct Tile {
  int t, rows;
  bool ends_scan, ends_chunk;

  WKV_HD int steps_of(int warp) const { return clamp_count(rows - warp * kSteps, kSteps); }
  WKV_HD int last_warp() const { return static_cast<unsigned>(rows - 1) / kSteps; }
};

// The channels, the place and the shared memory of a block of `kWarps` warps; 0 stands for as many as it is launched
// with.
template <class Element, int kInputs, int kSteps, int kWarps, bool kReverse, bool kMixing>
struct ScanBlock {
  using Value = Element;
  static constexpr DType kType = kTypeOf<Element>;
  using Place = wkv::Place<kReverse, kType, kMixing>;
  static constexpr int kSubchunk = kSteps * kTileChannels;
  // Rows of 64 floats that a warp's part of a tile has room for.
  static constexpr int kWarpRows = kSubchunk * static_cast<int>(sizeof(Element)) / kRowBytes;

  const SequenceParams& params;
  Place* shared_place;  // mixing
  Place own_place;      // otherwise
  uint32_t c, column;
  int columns, warps;
  Element* tiles;
  Rows64 messages;  // mixing, forward
  SharedChannels channels;
  Rows64 kept;
  uint32_t* ticket;

  WKV_HD ScanBlock(const SequenceParams& params, BlockIndex index, int threads, char* shared)
      : params(params),
        c(index.x * kTileChannels),
        column(Place::column(params, index)),
        columns(kFullTilesOnly ? kTileChannels : clamp_count(int64_t{params.C} - c, kTileChannels)),
        warps(kWarps > 0 ? kWarps : static_cast<unsigned>(threads) / kWarpThreads),
        tiles(reinterpret_cast<Element*>(shared)) {
    channels = {{reinterpret_cast<Pair*>(tiles + kInputs * warps * kSubchunk)}};
    ticket = reinterpret_cast<uint32_t*>(channels.rows.first + kChannelRows * kWarpThreads);
    shared_place = reinterpret_cast<Place*>(ticket + kTicketBytes / 4);
    messages = {reinterpret_cast<Pair*>(ticket + (kTicketBytes + (kMixing ? kPlaceBytes : 0)) / 4)};
    kept = messages.from(kMixing && !kReverse ? forward_message_rows(warps) : 0);
    static_assert(!kMixing || sizeof(Place) <= kPlaceBytes);
  }

  WKV_HD const Place& place() const {
    if constexpr (kMixing) {
      return *shared_place;
    } else {
      return own_place;
    }
  }

  WKV_HD int channels_of(TileThread thread) const { return clamp_count(columns - 2 * thread.lane(), 2); }
  WKV_HD uint32_t channel_of(TileThread thread) const { return c + 2 * thread.lane(); }

  // The i-th input: a warp's part, and a lane's column in it.
  WKV_HD Element* subchunk(int i, int warp) const { return tiles + (i * warps + warp) * kSubchunk; }
  WKV_HD Column<Element> column_of(int i, TileThread thread) const {
    return {subchunk(i, thread.warp()) + 2 * thread.lane()};
  }
  // The same for all threads. Packed sequences may come without r: one branch around the loop over the steps leaves out
  // all of the gate.
  WKV_HD bool is_gated() const { return kMixing && (kFullTilesOnly || params.r.data != nullptr); }

  // A warp's part of a sequence in the place of the i-th input.
  WKV_HD void stage(int i, const Sequence& sequence, const Tile<kSteps>& tile, TileThread thread) const {
    wkv::stage<kSteps, Element>(subchunk(i, thread.warp()), rows_from<Element>(sequence, place().b, c),
                                place().begin() + tile.t + thread.warp() * kSteps, tile.steps_of(thread.warp()),
                                columns, thread.lane());
  }
  // A warp's part of an output in the place of the i-th input.
  WKV_HD void unstage(int i, void* output, const Tile<kSteps>& tile, TileThread thread) const {
    wkv::unstage<kSteps, Element>(rows_from<Element>(output, params.T, params.C, place().b, c),
                                  place().begin() + tile.t + thread.warp() * kSteps, subchunk(i, thread.warp()),
                                  tile.steps_of(thread.warp()), columns, thread.lane());
  }
  // Rows of 64 floats in the place of an input that is no longer needed.
  WKV_HD Rows64 rows_of(int i, int warp, int row) const {
    return {reinterpret_cast<Pair*>(subchunk(i, warp)) + row * kWarpThreads};
  }
  // Of values [rows, values_of_row, C], of the channels of a thread.
  WKV_HD ChannelRow row_of(const void* values, uint32_t row, int values_of_row, TileThread thread) const {
    const uint64_t offset = static_cast<uint64_t>(row) * params.C * values_of_row + channel_of(thread);
    const bool is_aligned = params.C % 2 == 0 && reinterpret_cast<uintptr_t>(values) % sizeof(FloatPair) == 0;
    return {const_cast<float*>(static_cast<const float*>(values)) + offset, channels_of(thread), is_aligned};
  }
  WKV_HD ChannelRow checkpoint_at(uint32_t t, TileThread thread) const {
    return row_of(params.checkpoints, place().checkpoint_row(params, t), 3, thread);
  }
  // That of the sequence, of values [N, 3, C].
  WKV_HD ChannelRow state_row(const void* values, TileThread thread) const {
    return row_of(values, place().state_row(), 3, thread);
  }
  WKV_HD State<Pair> load_state(ChannelRow row) const {
    return {{row.load(0), row.load(params.C)}, row.load(2 * int64_t{params.C})};
  }
  WKV_HD void store_state(ChannelRow row, State<Pair> value) const {
    row.store(0, value.sums.num);
    row.store(params.C, value.sums.den);
    row.store(2 * int64_t{params.C}, value.max);
  }
  // Checkpoints are for the backward kernel alone, and have the exponent where a state has max.
  WKV_HD Scaled load_checkpoint(uint32_t t, TileThread thread) const {
    const State<Pair> stored = load_state(checkpoint_at(t, thread));
    return {stored.sums, stored.max};
  }
  WKV_HD void store_checkpoint(uint32_t t, TileThread thread, Scaled state) const {
    store_state(checkpoint_at(t, thread), {state.sums, state.exponent});
  }
  WKV_HD State<Pair> first_state(TileThread thread) const {
    if (params.state == nullptr) return empty_state<Pair>();
    return or_empty(load_state(state_row(params.state, thread)));
  }
  WKV_HD RunningScale<Pair> running_scale(TileThread thread) const {
    return wkv::running_scale(params.parameters, channel_of(thread), channels_of(thread), channels, thread.lane());
  }
};

// A thread's steps of r in memory, and of its gradient; a prefetch takes most of the latency.
template <class Block, int kSteps>
struct DistantGates {
  using Element = typename Block::Value;

  Rows<const Element> r;  // from the thread's first step on
  Rows<Element> gr;
  int channels;  // 0 without r

  WKV_HD DistantGates(const Block& block, const Tile<kSteps>& tile, const TileThread& thread)
      : r(rows_from<Element>(block.params.r, block.place().b, block.channel_of(thread))),
        gr(rows_from<Element>(block.params.gr, block.params.T, block.params.C, block.place().b,
                              block.channel_of(thread))),
        channels(block.is_gated() ? block.channels_of(thread) : 0) {
    const int first = block.place().begin() + tile.t + thread.warp() * kSteps;
    r.data = r.at(first);
    gr.data = gr.at(first);
  }
  WKV_HD Gate<Pair> get(int step) const {
    const Element* const at = r.at(step);
    return gate_of(Pair(kFullTilesOnly || channels > 0 ? to_real(load_constant(at)) : float(INFINITY),
                        kFullTilesOnly || channels > 1 ? to_real(load_constant(at + 1)) : float(INFINITY)));
  }
  WKV_HD void set_gradient(int step, Pair value) const {
    Element* const at = gr.at(step);
    if (kFullTilesOnly || channels > 0) from_real(value.x, at[0]);
    if (kFullTilesOnly || channels > 1) from_real(value.y, at[1]);
  }
};

struct NoGates {
  template <class... Any>
  WKV_HD explicit NoGates(const Any&...) {}
  WKV_HD NoGate get(int) const { return {}; }
  WKV_HD void set_gradient(int, Pair) const {}
};

// A thread's registers from one phase to the next.
template <class Element, int kSteps>
struct ScanThread : TileThread {
  Keys<Element, kSteps> keys;
  Pair reference;  // the tile's
  Scaled own;      // the sum of the thread's steps
  Scaled before;   // the sum of the warps before it
};

template <class Pass>
struct Scan {
  using Params = SequenceParams;
  using Thread = typename Pass::Thread;
  using Block = typename Pass::Block;
  using Element = typename Pass::Element;
  static constexpr int kSteps = Pass::kSteps;
  using Tile = wkv::Tile<kSteps>;
  using Place = typename Block::Place;

  WKV_HD static Tile tile_at(const Params& params, const Place& place, int tile_steps, int i) {
    const int T = static_cast<int>(place.steps(params)), chunk_steps = params.chunking.chunk_tiles * tile_steps;
    const int chunk = static_cast<int>(Pass::kReverse ? place.chunks(params) - 1 - place.position : place.position);
    const int first = chunk * chunk_steps;
    if (kFullTilesOnly) return {first, tile_steps, false, true};
    const int end = T - first > chunk_steps ? first + chunk_steps : T;
    // Tiles begin at multiples of their steps, which in the reverse scan are a constant.
    constexpr unsigned kReverseSteps = kBackwardWarps * kBackwardSteps;
    const int last = Pass::kReverse ? (end - 1u) / kReverseSteps * kReverseSteps : first;
    const int t = Pass::kReverse ? last - i * tile_steps : first + i * tile_steps;
    const int rows = end - t < tile_steps ? end - t : tile_steps;
    return {t, rows, Pass::kReverse ? t == 0 : t + rows == T, Pass::kReverse ? t == first : t + rows == end};
  }

  WKV_HD static void stage_tile(const Block& block, const Tile& tile, const Thread& thread) {
#pragma unroll
    for (int i = 0; i < Pass::kInputs; ++i) block.stage(i, block.params.inputs[i], tile, thread);
    Pass::stage_gate(block, tile, thread);
  }

  WKV_HD static void unstage_tile(const Block& block, const Tile& tile, const Thread& thread) {
#pragma unroll
    for (int i = 0; i < Pass::kOutputs; ++i) {
      block.unstage(Pass::kFirstOutput + i, block.params.outputs[i], tile, thread);
    }
    Pass::unstage_gate(block, tile, thread);
  }

  // The last warp in the order of the scan.
  WKV_HD static int last_warp(const Tile& tile) { return Pass::kReverse ? 0 : tile.last_warp(); }

  // Sums up the warps before the thread's own and, in the last warp, the tile.
  WKV_HD static void sum_up(const Block& block, const Tile& tile, bool fit, Thread& thread) {
    const int lane = thread.lane(), warp = thread.warp(), last = last_warp(tile);
    const int first = Pass::kReverse ? block.warps - 1 : 0, direction = Pass::kReverse ? -1 : 1;
    const Pair decay_log2 = block.channels.decay_log2(lane, kSteps);
    const Pair own_decay_log2 = block.channels.decay_log2(lane, tile.steps_of(warp));
    Scaled& before = thread.before;
    if (kFullTilesOnly || fit) {
      const Pair decay = exp2(decay_log2);
      before = {{Pair(0), Pair(0)}, Pass::kReverse ? -thread.reference : thread.reference};
#pragma unroll 1
      for (int i = first; i != warp; i += direction) {
        const Sums<Pair> own = Pass::own_of(block, i).get_sums(lane);
        before.sums = {decay * before.sums.num + own.num, decay * before.sums.den + own.den};
      }
      if (warp != last) return;
      const Pair past = kFullTilesOnly ? decay : exp2(own_decay_log2);
      thread.own = {{past * before.sums.num + thread.own.sums.num, past * before.sums.den + thread.own.sums.den},
                    before.exponent};
    } else {
      before = empty_scaled();
#pragma unroll 1
      for (int i = first; i != warp; i += direction)
        before = join(before, decay_log2, Pass::own_of(block, i).get_scaled(lane));
      if (warp != last) return;
      thread.own = join(before, own_decay_log2, thread.own);
    }
    if (Pass::kReverse) thread.own = Pass::normalised(thread.own);
  }

  // By the last warp: joins the predecessors' messages, or the one state that is known, with the tile's own sum, which
  // is the message after them.
  WKV_HD static void join_predecessors(const Block& block, const LookBack& look_back, const Tile& tile, bool waits,
                                       Thread& thread) {
    const int lane = thread.lane(), own = waits ? look_back.predecessors : 1;
    const Pair chunk_decay = block.channels.decay_log2(lane, block.params.chunking.chunk_tiles * block.warps * kSteps);
    const Pair own_decay = block.channels.decay_log2(lane, tile.rows);
    Scaled sum = (waits ? Pass::message(block, 0) : Pass::carry(block)).get_scaled(lane);
#pragma unroll 1
    for (int i = 1; i <= own; ++i) {
      if (i == own) Pass::carry(block).set_scaled(lane, sum);
      sum = join(sum, i == own ? own_decay : chunk_decay, Pass::message(block, i).get_scaled(lane));
    }
    sum = Pass::normalised(sum);
    if (tile.ends_chunk && look_back.has_successor && (look_back.is_anchor || block.place().position == 0)) {
      look_back.publish(lane, sum);
    }
    Pass::keep(block, tile, sum, thread);
  }

  // The rest of a block without steps.
  WKV_HD static void pass_by(const Block& block, const Thread& thread) {
    wait_for_copies();
    const Place& place = block.place();
    if (thread.warp() != 0 || !place.is_listed) return;
    const LookBack look_back(block.params.chunking, block.column, 0, place.ticket());
    if (look_back.has_successor) look_back.publish(thread.lane(), empty_scaled());
    Pass::leave_nothing(block, thread);
    if (place.hands_on) Pass::hand_on(block, thread);
  }

  template <class Team>
  WKV_HD static void run(const Params& params, BlockIndex index, int threads, Team& team, char* shared) {
    Block block(params, index, threads, shared);
    const int tile_steps = block.warps * kSteps;
    // The most likely place of the block. Where tickets are taken in another order than blocks start, the tile is
    // staged again.
    const uint32_t likely_ticket = Place::likely_ticket(params, index);
    if constexpr (Pass::kMixes) {
      team.phase([&](Thread& thread) {
        if (thread.index == 0) *block.shared_place = Place(params, index, likely_ticket);
      });
    } else {
      block.own_place = Place(params, index, likely_ticket);
    }
    const bool has_channels = block.place().has_steps;
    team.phase([&](Thread& thread) {
      if (thread.index == 0) *block.ticket = take_turn(params.chunking, block.column);
      if (has_channels) {
        stage_tile(block, tile_at(params, block.place(), tile_steps, 0), thread);
        block.channels.load(params.parameters, block.c, block.columns, thread.index, threads);
      }
      Pass::begin(thread);
    });
    bool is_staged = kFullTilesOnly || *block.ticket == likely_ticket;
    if constexpr (!Pass::kMixes) {
      block.own_place = Place(params, index, *block.ticket);
    } else if (!is_staged) {
      team.phase([&](Thread& thread) {
        if (thread.index == 0) *block.shared_place = Place(params, index, *block.ticket);
        if (!has_channels) block.channels.load(params.parameters, block.c, block.columns, thread.index, threads);
      });
    }
    const Place& place = block.place();
    if (!kFullTilesOnly && !place.has_steps) {
      team.last_phase([&](Thread& thread) { pass_by(block, thread); });
      return;
    }
    const LookBack look_back(params.chunking, block.column, place.position, place.ticket());
    for (int i = 0;; ++i) {
      const Tile tile = tile_at(params, place, tile_steps, i);
      // A lane stages the same rows and columns of each tile: no other lane writes to them.
      team.warp_phase([&](Thread& thread) {
        wait_for_copies();
        if (is_staged) return;
        stage_tile(block, tile, thread);
        wait_for_copies();
      });
      is_staged = false;
      const bool waits = kFullTilesOnly || (i == 0 && place.position > 0);
      team.warp_phase([&](Thread& thread) {
        thread.keys.load(block.column_of(0, thread), tile.steps_of(thread.warp()));
        Pass::range(block, tile, thread);
      });
      team.phase([&](Thread& thread) {
        Pass::highest_of(block, thread.warp()).set(0, thread.lane(), thread.keys.highest);
        Pass::park(block, tile, thread);
      });
      const bool fit = team.agree([&](Thread& thread) {
        const int lane = thread.lane();
        thread.reference = reference_of(Pass::highest_of(block, 0), Pass::kHighestRows, block.warps, lane);
        return tile_fits(thread.reference, thread.keys.lowest, block.channels.bonus(lane));
      });
      Pass::recur(block, tile, fit, team, [&](Thread& thread) {
        Pass::own_of(block, thread.warp()).set_scaled(thread.lane(), thread.own);
        if (thread.warp() == 0 && !waits) {
          const Scaled carry = i == 0 ? Pass::first(block, thread) : Pass::kept(block, thread);
          Pass::carry(block).set_scaled(thread.lane(), carry);
        }
      });
      team.phase([&](Thread& thread) {
        const int lane = thread.lane();
        sum_up(block, tile, fit, thread);
        if (thread.warp() == last_warp(tile)) {
          Pass::message(block, waits ? look_back.predecessors : 1).set_scaled(lane, thread.own);
          if (waits && look_back.has_successor && !look_back.is_anchor) look_back.publish(lane, thread.own);
        }
        if (!waits) return;
#pragma unroll 1
        for (int i = thread.warp(); i < look_back.predecessors; i += block.warps) {
          Pass::message(block, i).set_scaled(lane, look_back.wait(i, lane));
        }
      });
      team.phase([&](Thread& thread) {
        if (Pass::kStagesLate) wait_for_copies();
        if (thread.warp() == last_warp(tile)) join_predecessors(block, look_back, tile, waits, thread);
      });
      // Inlined by force: with a loop for a gate and one without, the compiler finds it too large.
      team.warp_phase([&](Thread& thread) __attribute__((always_inline)) {
        if (kFullTilesOnly || tile.steps_of(thread.warp()) > 0) Pass::correct(block, tile, fit, thread);
        if (tile.ends_chunk) Pass::leave(block, thread);
      });
      if (!Pass::kFinishes && tile.ends_chunk) {
        team.last_phase([&](Thread& thread) { unstage_tile(block, tile, thread); });
        return;
      }
      team.phase([&](Thread& thread) { unstage_tile(block, tile, thread); });
      if (kFullTilesOnly || tile.ends_chunk) break;
    }
    team.last_phase([&](Thread& thread) { Pass::finish(block, thread); });
  }
};

}  // namespace wkv
