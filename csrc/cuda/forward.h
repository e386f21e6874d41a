// The forward block program: one chunk of one sequence for the channels of a tile. A pass that replays starts from the
// chunk's true state and writes y, checkpoints and, at the sequence's end, the final state; one that summarises sums
// the chunk up for the others; a single pass does both, with the chunk in shared memory all the time.
//
//   stage      k and v of a tile come to shared memory
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

  struct Thread {
    int index;
    // What lives in registers from one phase to the next.
    KeyRange<Lanes> keys;
    State<Lanes> after;

    WKV_HD int lane() const { return index % Geo::kLanes; }
    WKV_HD int span() const { return index / Geo::kLanes; }
  };

  // The same for all threads of the block.
  struct Block {
    ForwardArguments arguments;
    int64_t b, c, chunk, t_begin, t_end;
    int spans, columns;
    Element *k, *v;
    SharedStates<Lanes, Geo::kLanes> summaries, carry, heard;
    SharedChannels<Lanes, Geo::kLanes> channels;

    WKV_HD Block(const ForwardArguments& arguments, BlockIndex block, int threads, char* shared)
        : arguments(arguments),
          b(block.z),
          c(static_cast<int64_t>(block.x) * Geo::kTileChannels),
          chunk(block.y),
          t_begin(chunk * arguments.chunk_len),
          t_end(chunk + 1 < arguments.chunks ? t_begin + arguments.chunk_len : arguments.T),
          spans(threads / Geo::kLanes),
          columns(clamp_count(arguments.C - c, Geo::kTileChannels)) {
      const ForwardLayout layout(Geo::dtype, spans);
      k = reinterpret_cast<Element*>(shared + layout.k);
      v = reinterpret_cast<Element*>(shared + layout.v);
      summaries = {reinterpret_cast<Lanes*>(shared + layout.summaries)};
      carry = {reinterpret_cast<Lanes*>(shared + layout.carry)};
      channels = {reinterpret_cast<Lanes*>(shared + layout.channels)};
      heard = {reinterpret_cast<Lanes*>(shared + layout.heard)};
    }

    WKV_HD int threads() const { return spans * Geo::kLanes; }
    WKV_HD int channels_of(const Thread& thread) const {
      return clamp_count(columns - thread.lane() * Geo::kLaneChannels, Geo::kLaneChannels);
    }
    WKV_HD int64_t channel_of(const Thread& thread) const { return c + thread.lane() * Geo::kLaneChannels; }
    WKV_HD Column<Element> column(Element* tile, const Thread& thread) const {
      return {tile + thread.span() * kSteps * Geo::kTileChannels + thread.lane() * Geo::kLaneChannels};
    }
    WKV_HD Column<const Element> column(const Element* tile, const Thread& thread) const {
      return {tile + thread.span() * kSteps * Geo::kTileChannels + thread.lane() * Geo::kLaneChannels};
    }
    WKV_HD int steps_of(int span, int rows) const { return clamp_count(rows - span * kSteps, kSteps); }

    // States in memory, for the channels of a thread.
    WKV_HD Real* state_at(void* states, int64_t row, const Thread& thread) const {
      return static_cast<Real*>(states) + row * 3 * arguments.C + channel_of(thread);
    }
    WKV_HD Lanes decay_of_chunks(int64_t count, int lane) const {
      return Lanes(static_cast<double>(count * arguments.chunk_len)) * channels.log_decay(lane);
    }

    WKV_HD Real* checkpoint_at(int64_t t, const Thread& thread) const {
      const int64_t row = b * checkpoint_count(Geo::dtype, arguments.T) + t / Geo::kInterval - 1;
      return state_at(arguments.checkpoints, row, thread);
    }
    // Of a single pass: what chunk i, the last one of its group, gives is the state after it, which is stored anyway.
    WKV_HD bool gives_checkpoint(int64_t i) const {
      return pass == Pass::single && arguments.checkpoints != nullptr && arguments.chunk_len % Geo::kInterval == 0 &&
             static_cast<uint32_t>(i + 1) % arguments.hand_over.group == 0;
    }
    // What chunk i gives to those behind it.
    WKV_HD Real* chunk_state_at(int64_t i, const Thread& thread) const {
      return gives_checkpoint(i) ? checkpoint_at((i + 1) * arguments.chunk_len, thread)
                                 : state_at(arguments.chunk_states, b * (arguments.chunks - 1) + i, thread);
    }
    WKV_HD State<Lanes> load_chunk_state(int64_t i, const Thread& thread) const {
      return load_state(chunk_state_at(i, thread), arguments.C, channels_of(thread), Lanes());
    }
    WKV_HD void store_chunk_state(const Thread& thread, State<Lanes> state) const {
      store_state(chunk_state_at(chunk, thread), arguments.C, channels_of(thread), state);
    }
  };

  // ---- the phases ----

  // Leaves `channels`, and in `carry` the state that the chunk starts from, as far as it is known.
  WKV_HD static void begin(const Block& block, Thread& thread) {
    if (thread.span() != 0) return;
    const int count = block.channels_of(thread);
    const auto& parameters = block.arguments.parameters;
    block.channels.set(thread.lane(), ChannelLanes<Lanes>::load(parameters, block.channel_of(thread), count));
    State<Lanes> state = empty_state<Lanes>();
    if (block.chunk == 0) {
      const Real* given = static_cast<const Real*>(block.arguments.state);
      if (given != nullptr) given += block.b * 3 * block.arguments.C + block.channel_of(thread);
      state = load_first_state(given, block.arguments.C, count, Lanes());
    } else if (pass == Pass::replay) {
      state = block.load_chunk_state(block.chunk - 1, thread);
    }
    block.carry.set(0, thread.lane(), state);
  }

  // Leaves k and v of the tile in shared memory.
  WKV_HD static void stage_tile(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    stage(block.k, rows_from<Element>(arguments.k, block.b, t, block.c), rows, block.columns, thread.index,
          block.threads());
    stage(block.v, rows_from<Element>(arguments.v, block.b, t, block.c), rows, block.columns, thread.index,
          block.threads());
  }

  // Needs the tile; leaves `summaries`.
  WKV_HD static void summarise(const Block& block, int rows, Thread& thread) {
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(thread.span(), rows)};
    const auto k = block.column(static_cast<const Element*>(block.k), thread);
    const auto v = block.column(static_cast<const Element*>(block.v), thread);
    thread.keys = walk.range_of(k);
    if (walk.steps > 0) block.summaries.set(thread.span(), thread.lane(), walk.summary(k, v, thread.keys));
  }

  // The state joined with the spans from `begin` to `end`, of which all but the last are whole.
  WKV_HD static State<Lanes> joined(const Block& block, State<Lanes> state, int begin, int end, int rows, int lane) {
    for (int span = begin; span < end; ++span) {
      const Lanes decay = Lanes(block.steps_of(span, rows)) * block.channels.log_decay(lane);
      state = join(state, decay, block.summaries.get(span, lane));
    }
    return state;
  }
  WKV_HD static State<Lanes> carried_to(const Block& block, int end, int rows, int lane) {
    return joined(block, block.carry.get(0, lane), 0, end, rows, lane);
  }

  // What the chunk alone sums up to; the first one knows what it starts from.
  WKV_HD static State<Lanes> own(const Block& block, int rows, int lane) {
    const int spans = (rows - 1) / kSteps + 1;
    return block.chunk == 0 ? carried_to(block, spans, rows, lane)
                            : joined(block, block.summaries.get(0, lane), 1, spans, rows, lane);
  }

  // Needs `summaries`; leaves what each span heard in `heard`.
  WKV_HD static void speak_and_listen(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    const int lane = thread.lane();
    if (thread.span() == 0 && neighbours.gives_own()) {
      block.store_chunk_state(thread, own(block, rows, lane));
      neighbours.speak(lane);
    }
    const auto part = neighbours.heard_by(thread.span(), block.spans);
    if (part.begin == part.end) return;
    neighbours.listen(part, lane);
    const State<Lanes> heard = fold<kHandOverBatch>(
        part.begin + 1, part.end, block.load_chunk_state(part.begin, thread),
        [&](int64_t i) { return block.load_chunk_state(i, thread); },
        [&](int64_t, State<Lanes> state, State<Lanes> next) {
          return join(state, block.decay_of_chunks(1, lane), next);
        });
    block.heard.set(thread.span(), lane, heard);
  }

  // Needs `heard`; leaves `carry`.
  WKV_HD static void take(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    if (thread.span() != 0 || block.chunk == 0) return;
    const int lane = thread.lane();
    State<Lanes> carried = empty_state<Lanes>();
    for (int span = 0; span < block.spans; ++span) {
      const auto part = neighbours.heard_by(span, block.spans);
      if (part.begin == part.end) continue;
      carried = join(carried, block.decay_of_chunks(part.end - part.begin, lane), block.heard.get(span, lane));
    }
    block.carry.set(0, lane, carried);
    if (neighbours.gives_all()) {
      block.store_chunk_state(thread,
                              join(carried, Lanes(rows) * block.channels.log_decay(lane), own(block, rows, lane)));
      neighbours.speak(lane);
    }
  }

  // Needs the tile, `carry` and `summaries`; leaves y where k was.
  WKV_HD static void walk(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    const int span = thread.span();
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(span, rows)};
    if (walk.steps == 0) return;
    const auto k = block.column(static_cast<const Element*>(block.k), thread);
    const auto v = block.column(static_cast<const Element*>(block.v), thread);
    if (block.spans == 1) thread.keys = walk.range_of(k);
    const State<Lanes> state = carried_to(block, span, rows, thread.lane());
    const int64_t t_span = t + span * kSteps;
    const bool was_given = span == 0 && block.gives_checkpoint(block.chunk - 1);
    if (arguments.checkpoints != nullptr && t_span > 0 && t_span % Geo::kInterval == 0 && !was_given) {
      store_state(block.checkpoint_at(t_span, thread), arguments.C, block.channels_of(thread), state);
    }
    thread.after = walk.forward(k, v, block.column(block.k, thread), thread.keys, state);
  }

  // Needs y; leaves the next `carry`, or the chunk's last state in memory.
  WKV_HD static void finish_tile(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    if constexpr (writes) {
      unstage(rows_from<Element>(arguments.y, arguments.T, arguments.C, block.b, t, block.c), block.k, rows,
              block.columns, thread.index, block.threads());
    }
    const int last_span = (rows - 1) / kSteps;
    if (thread.span() != (writes ? last_span : 0)) return;
    const State<Lanes> after = writes ? thread.after : carried_to(block, last_span + 1, rows, thread.lane());
    block.carry.set(0, thread.lane(), after);
    if (t + rows < block.t_end) return;
    const int count = block.channels_of(thread);
    if (!writes) {
      block.store_chunk_state(thread, after);
    } else if (block.t_end == arguments.T) {
      store_state(block.state_at(arguments.state_out, block.b, thread), arguments.C, count, after);
      if (arguments.checkpoints != nullptr) {
        const int64_t row = (block.b + 1) * checkpoint_count(Geo::dtype, arguments.T) - 1;
        store_state(block.state_at(arguments.checkpoints, row, thread), arguments.C, count, after);
      }
    }
  }

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex index, int threads, Team& team, char* shared) {
    if constexpr (pass == Pass::single) {
      run_single_pass(arguments, threads, team, shared);
    } else {
      const Block block(arguments, index, threads, shared);
      const int tile_steps = block.spans * kSteps;
      for (int64_t t = block.t_begin; t < block.t_end; t += tile_steps) {
        const int rows = clamp_count(block.t_end - t, tile_steps);
        team.phase([=](Thread& thread) {
          stage_tile(block, t, rows, thread);
          if (t == block.t_begin) begin(block, thread);
          wait_for_copies();
        });
        if (!writes || block.spans > 1) team.phase([=](Thread& thread) { summarise(block, rows, thread); });
        if (writes) team.phase([=](Thread& thread) { walk(block, t, rows, thread); });
        team.phase([=](Thread& thread) { finish_tile(block, t, rows, thread); });
      }
    }
  }

  template <class Team>
  WKV_HD static void run_single_pass(const Arguments& arguments, int threads, Team& team, char* shared) {
    const Signals signals{arguments.hand_over.signals};
    const int64_t tiles = (arguments.C + Geo::kTileChannels - 1) / Geo::kTileChannels;
    Place* place = reinterpret_cast<Place*>(shared + ForwardLayout(Geo::dtype, threads / Geo::kLanes).place);
    team.phase([=](Thread& thread) {
      if (thread.index == 0) *place = Place::of(signals.take_number(), arguments.B, tiles);
    });
    const Block block(arguments, {place->tile, place->position, place->b}, threads, shared);
    const Neighbours neighbours{signals, *place, arguments.B * tiles, arguments.hand_over.group, arguments.chunks};
    const int64_t t = block.t_begin;
    const int rows = static_cast<int>(block.t_end - t);
    team.phase([=](Thread& thread) {
      stage_tile(block, t, rows, thread);
      begin(block, thread);
      wait_for_copies();
    });
    team.phase([=](Thread& thread) { summarise(block, rows, thread); });
    team.phase([=](Thread& thread) { speak_and_listen(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { take(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { walk(block, t, rows, thread); });
    team.phase([=](Thread& thread) { finish_tile(block, t, rows, thread); });
  }
};

}  // namespace wkv
