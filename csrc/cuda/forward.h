// The forward block program: one chunk of one sequence for the channels of a tile. A pass that replays starts from the
// chunk's true state and writes y, checkpoints and, at the sequence's end, the final state; one that summarises sums
// the chunk up for the others; a single pass does both, with the chunk in shared memory all the time.
//
//   stage      k and v of a tile come to shared memory; of a ring, those of the tile after the one that is walked
//   summarise  each span sums up its own steps
//   speak and listen, take   in a single pass: the chunk hands over and is handed what it starts from
//   walk       each span joins the carried state with the spans before it and walks from there, y taking k's place
//   finish     y goes to memory, and the state after the tile becomes the carried one
#pragma once

#include "hand_over.h"
#include "span.h"

namespace wkv {

template <class Element, Pass pass>
struct Forward {
  using Arguments = ForwardArguments;
  static constexpr bool writes = pass != Pass::summarise;
  using Geo = Geometry<Element>;
  using Lanes = typename Geo::Lanes;
  using Real = typename Geo::Real;
  static constexpr int kSteps = span_steps(Operation::forward);
  using Walk = SpanWalk<Element, kSteps>;

  // What lives in registers from one phase to the next.
  struct Thread : SpanThread<Element> {
    KeyRange<Lanes> keys;
    State<Lanes> own, after;
  };

  struct Tile {
    Element *k, *v;
  };

  // The same for all threads of the block.
  struct Block : ChannelTile<Element, kSteps> {
    using Base = ChannelTile<Element, kSteps>;
    using Base::b, Base::channel_of, Base::channels_of;
    ForwardArguments arguments;
    int64_t chunk, t_begin, t_end;
    int spans;
    char* shared;
    int tile_bytes;
    SharedStates<Lanes, Geo::kLanes> summaries, carry, heard;
    SharedChannels<Lanes, Geo::kLanes> channels;

    WKV_HD Block(const ForwardArguments& arguments, int64_t b, int64_t chunk, int64_t tile, int threads, char* shared)
        : Base(b, tile, arguments.C),
          arguments(arguments),
          chunk(chunk),
          t_begin(chunk * arguments.chunk_len),
          t_end(chunk + 1 < arguments.chunks ? t_begin + arguments.chunk_len : arguments.T),
          spans(threads / Geo::kLanes),
          shared(shared) {
      const ForwardLayout layout(Geo::dtype, spans, arguments.buffers);
      tile_bytes = layout.tile;
      summaries = {reinterpret_cast<Lanes*>(shared + layout.summaries)};
      carry = {reinterpret_cast<Lanes*>(shared + layout.carry)};
      channels = {reinterpret_cast<Lanes*>(shared + layout.channels)};
      heard = {reinterpret_cast<Lanes*>(shared + layout.heard)};
    }

    WKV_HD int threads() const { return spans * Geo::kLanes; }
    WKV_HD bool has_ring() const { return arguments.buffers > 1; }
    // By offset: the compiler loses sight of shared memory when it has to choose between pointers.
    WKV_HD Tile tile_at(int offset) const {
      char* const tile = shared + offset;
      return {reinterpret_cast<Element*>(tile), reinterpret_cast<Element*>(tile + tile_bytes / 2)};
    }

    // States in memory, for the channels of a thread.
    WKV_HD Real* state_at(void* states, int64_t row, const Thread& thread) const {
      return static_cast<Real*>(states) + row * 3 * arguments.C + channel_of(thread);
    }
    WKV_HD Lanes decay_of_chunks(int count, int lane) const {
      return Lanes(count * static_cast<int>(arguments.chunk_len)) * channels.log_decay(lane);
    }

    // What chunk i gives to those behind it. Of a single pass, what the last one of a group gives is the state after
    // it, which may have to be stored anyway, as a checkpoint.
    WKV_HD Real* chunk_state_at(int64_t i, bool ends_group, const Thread& thread) const {
      if (pass == Pass::single && ends_group && is_checkpoint((i + 1) * arguments.chunk_len)) {
        return checkpoint_at((i + 1) * arguments.chunk_len, thread);
      }
      return state_at(arguments.chunk_states, b * (arguments.chunks - 1) + i, thread);
    }
    WKV_HD bool is_checkpoint(int64_t t) const {
      return arguments.checkpoints != nullptr && t > 0 && static_cast<uint64_t>(t) % Geo::kInterval == 0;
    }
    WKV_HD Real* checkpoint_at(int64_t t, const Thread& thread) const {
      return state_at(arguments.checkpoints, checkpoint_row(Geo::dtype, arguments.T, b, t), thread);
    }
    WKV_HD State<Lanes> load(const Real* state, const Thread& thread) const {
      return load_state(state, arguments.C, channels_of(thread), Lanes());
    }
    WKV_HD void store(Real* at, const Thread& thread, State<Lanes> state) const {
      store_state(at, arguments.C, channels_of(thread), state);
    }
  };

  // ---- the phases ----

  // Leaves `channels`, and in `carry` the state that the chunk starts from, as far as it is known.
  WKV_HD static void begin(const Block& block, Thread& thread) {
    block.channels.template load<Real>(block.arguments.parameters, block.c, block.columns, thread.index,
                                       block.threads());
    if (thread.span() != 0) return;
    State<Lanes> state = empty_state<Lanes>();
    if (block.chunk == 0) {
      const Real* given = static_cast<const Real*>(block.arguments.state);
      if (given != nullptr) given += block.b * 3 * block.arguments.C + block.channel_of(thread);
      state = load_first_state(given, block.arguments.C, block.channels_of(thread), Lanes());
    } else if (pass == Pass::replay) {
      state = block.load(block.chunk_state_at(block.chunk - 1, false, thread), thread);
    }
    block.carry.set(0, thread.lane(), state);
  }

  // Leaves k and v of the tile in shared memory.
  WKV_HD static void stage_tile(const Block& block, Tile tile, int64_t t, int rows, Thread& thread) {
    const int steps = block.steps_of(thread.span(), rows);
    const int64_t t_span = t + thread.span() * kSteps;
    const auto bring = [&](Element* tile, const Sequence& sequence) {
      stage<kSteps>(block.span(tile, thread), rows_from<Element>(sequence, block.b, t_span, block.c), steps,
                    block.columns, thread.lane());
    };
    bring(tile.k, block.arguments.k);
    bring(tile.v, block.arguments.v);
  }

  // Needs the tile; leaves `summaries`.
  WKV_HD static void summarise(const Block& block, Tile tile, int rows, Thread& thread) {
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(thread.span(), rows)};
    const Column<const Element> k{block.column(tile.k, thread).first}, v{block.column(tile.v, thread).first};
    thread.keys = walk.range_of(block.column(tile.k, thread));
    if (walk.steps > 0) block.summaries.set(thread.span(), thread.lane(), walk.summary(k, v, thread.keys));
  }

  // `carry` joined with the spans before `end`, of which all but the last are whole.
  WKV_HD static State<Lanes> carried_to(const Block& block, int end, int rows, int lane) {
    State<Lanes> state = block.carry.get(0, lane);
#pragma unroll 1
    for (int span = 0; span < end; ++span) {
      const Lanes decay = Lanes(block.steps_of(span, rows)) * block.channels.log_decay(lane);
      state = join(state, decay, block.summaries.get(span, lane));
    }
    return state;
  }

  // Needs `summaries`; leaves what each span heard in `heard`.
  WKV_HD static void speak_and_listen(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    const int lane = thread.lane();
    const Place& place = neighbours.place;
    if (thread.span() == 0 && place.is_heard) {
      // `carry` is empty but for the first chunk.
      thread.own = carried_to(block, block.spans_of(rows), rows, lane);
      if (neighbours.gives_own()) {
        block.store(block.chunk_state_at(block.chunk, place.ends_group, thread), thread, thread.own);
        neighbours.speak(lane);
      }
    }
    const auto part = neighbours.heard_by(thread.span());
    if (part.empty()) return;
    neighbours.listen(part, lane);
    State<Lanes> heard = empty_state<Lanes>();
#pragma unroll 1
    for (uint32_t i = part.begin; i < part.end; ++i) {
      const State<Lanes> given = block.load(block.chunk_state_at(i, neighbours.ended_group(i), thread), thread);
      heard = join(heard, block.decay_of_chunks(1, lane), given);
    }
    block.heard.set(thread.span(), lane, heard);
  }

  // Needs `heard`; leaves `carry`.
  WKV_HD static void take(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    if (thread.span() != 0 || block.chunk == 0) return;
    const int lane = thread.lane();
    State<Lanes> carried = empty_state<Lanes>();
#pragma unroll 1
    for (int span = 0; span < block.spans; ++span) {
      const auto part = neighbours.heard_by(span);
      if (part.empty()) break;
      carried = join(carried, block.decay_of_chunks(part.count(), lane), block.heard.get(span, lane));
    }
    block.carry.set(0, lane, carried);
    if (neighbours.gives_all()) {
      const State<Lanes> all = join(carried, Lanes(rows) * block.channels.log_decay(lane), thread.own);
      block.store(block.chunk_state_at(block.chunk, true, thread), thread, all);
      neighbours.speak(lane);
    }
  }

  // Needs the tile, `carry` and `summaries`; leaves y where k was. `is_stored`: the state before the tile is in memory
  // already.
  WKV_HD static void walk(const Block& block, Tile tile, int64_t t, int rows, bool is_stored, Thread& thread) {
    const int span = thread.span();
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(span, rows)};
    if (walk.steps == 0) return;
    const auto y = block.column(tile.k, thread);
    const Column<const Element> k{y.first}, v{block.column(tile.v, thread).first};
    if (pass != Pass::single && block.spans == 1) thread.keys = walk.range_of(y);
    const State<Lanes> state = carried_to(block, span, rows, thread.lane());
    const int64_t t_span = t + span * kSteps;
    if (block.is_checkpoint(t_span) && !(span == 0 && is_stored)) {
      block.store(block.checkpoint_at(t_span, thread), thread, state);
    }
    thread.after = walk.forward(k, v, y, thread.keys, state);
  }

  // Needs y; leaves the next `carry`, or the chunk's last state in memory.
  WKV_HD static void finish_tile(const Block& block, Tile tile, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    if constexpr (writes) {
      const int64_t t_span = t + thread.span() * kSteps;
      unstage<kSteps>(rows_from<Element>(arguments.y, arguments.T, arguments.C, block.b, t_span, block.c),
                      block.span(tile.k, thread), block.steps_of(thread.span(), rows), block.columns, thread.lane());
    }
    const int spans = block.spans_of(rows);
    if (thread.span() != (writes ? spans - 1 : 0)) return;
    const State<Lanes> after = writes ? thread.after : carried_to(block, spans, rows, thread.lane());
    block.carry.set(0, thread.lane(), after);
    if (t + rows < block.t_end) return;
    if (!writes) {
      block.store(block.chunk_state_at(block.chunk, false, thread), thread, after);
    } else if (block.t_end == arguments.T) {
      block.store(block.state_at(arguments.state_out, block.b, thread), thread, after);
      if (arguments.checkpoints != nullptr) block.store(block.checkpoint_at(arguments.T, thread), thread, after);
    }
  }

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex index, int threads, Team& team, char* shared) {
    if constexpr (pass == Pass::single) {
      run_single_pass(arguments, index, threads, team, shared);
    } else {
      run_tiles(arguments, index, threads, team, shared);
    }
  }

  template <class Team>
  WKV_HD static void run_tiles(const Arguments& arguments, BlockIndex index, int threads, Team& team, char* shared) {
    const Block block(arguments, index.z, index.y, index.x, threads, shared);
    const int tile_steps = block.spans * kSteps;
    // In a ring, a tile is staged one turn before it is walked.
    const int ahead = block.has_ring() ? tile_steps : 0;
    int walked = 0, staged = 0;
    for (int64_t t = block.t_begin - ahead; t < block.t_end; t += tile_steps) {
      const int64_t t_staged = t + ahead;
      team.phase([=](Thread& thread) {
        if (t_staged < block.t_end) {
          stage_tile(block, block.tile_at(staged), t_staged, clamp_count(block.t_end - t_staged, tile_steps), thread);
        }
        commit_copies();
        if (t_staged == block.t_begin) begin(block, thread);
        if (ahead != 0) {
          wait_for_copies<1>();
        } else {
          wait_for_copies<0>();
        }
      });
      if (t >= block.t_begin) {
        const int rows = clamp_count(block.t_end - t, tile_steps);
        const Tile tile = block.tile_at(walked);
        if (!writes || block.spans > 1) {
          team.phase([=](Thread& thread) { summarise(block, tile, rows, thread); });
        }
        if (writes) team.phase([=](Thread& thread) { walk(block, tile, t, rows, false, thread); });
        team.phase([=](Thread& thread) { finish_tile(block, tile, t, rows, thread); });
      }
      walked = staged;
      if (ahead != 0) staged = block.tile_bytes - staged;
    }
  }

  template <class Team>
  WKV_HD static void run_single_pass(const Arguments& arguments, BlockIndex index, int threads, Team& team,
                                     char* shared) {
    const Signals signals(arguments.hand_over, arguments.B);
    const int spans = threads / Geo::kLanes;
    Place* place = reinterpret_cast<Place*>(shared + ForwardLayout(Geo::dtype, spans, arguments.buffers).place);
    team.phase([=](Thread& thread) {
      if (thread.index == 0) *place = signals.take_place(index, arguments.chunks, spans);
    });
    const Neighbours neighbours{signals, *place};
    const Block block(arguments, index.y, place->position, index.x, threads, shared);
    const Tile tile = block.tile_at(0);
    const int64_t t = block.t_begin;
    const int rows = static_cast<int>(block.t_end - t);
    // Where it is a checkpoint: what ended the group before gave it.
    const bool is_stored = neighbours.place.starts_group;
    team.phase([=](Thread& thread) {
      stage_tile(block, tile, t, rows, thread);
      commit_copies();
      begin(block, thread);
      wait_for_copies<0>();
    });
    team.phase([=](Thread& thread) { summarise(block, tile, rows, thread); });
    team.phase([=](Thread& thread) { speak_and_listen(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { take(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { walk(block, tile, t, rows, is_stored, thread); });
    team.phase([=](Thread& thread) { finish_tile(block, tile, t, rows, thread); });
  }
};

}  // namespace wkv
