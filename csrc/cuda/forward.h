// The forward block program: one chunk of one sequence for the channels of a tile. With `writes` it starts from the
// chunk's true state and writes y, checkpoints and, at the sequence's end, the final state; without, it sums the chunk
// up for the others.
//
//   stage      k and v of a tile come to shared memory
//   summarise  each span sums up its own steps
//   walk       each span joins the carried state with the spans before it and walks from there, y taking k's place
//   unstage    y goes to memory, and the state after the tile becomes the carried one
#pragma once

#include "span.h"

namespace wkv {

template <class Element, bool writes>
struct Forward {
  using Arguments = ForwardArguments;
  using Geo = Geometry<Element>;
  using Lanes = typename Geo::Lanes;
  using Real = typename Geo::Real;
  static constexpr int kSteps = span_steps(Operation::forward);
  using Walk = SpanWalk<Element, kSteps>;

  struct Thread {
    int index;
    // What lives in registers from one phase to the next.
    ChannelLanes<Lanes> channel;
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
    SharedStates<Lanes> summaries, carry;

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
      summaries = {reinterpret_cast<Lanes*>(shared + layout.summaries), Geo::kLanes};
      carry = {reinterpret_cast<Lanes*>(shared + layout.carry), Geo::kLanes};
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
  };

  // ---- the phases ----

  // Leaves the state that the chunk starts from in `carry`.
  WKV_HD static void begin(const Block& block, Thread& thread) {
    const int count = block.channels_of(thread);
    thread.channel = ChannelLanes<Lanes>::load(block.arguments.parameters, block.channel_of(thread), count);
    if (thread.span() != 0) return;
    State<Lanes> state = empty_state<Lanes>();
    if (block.chunk == 0) {
      const Real* given = static_cast<const Real*>(block.arguments.state);
      if (given != nullptr) given += block.b * 3 * block.arguments.C + block.channel_of(thread);
      state = load_first_state(given, block.arguments.C, count, Lanes());
    } else if (writes) {
      const int64_t row = block.b * (block.arguments.chunks - 1) + block.chunk - 1;
      state = load_state(block.state_at(block.arguments.chunk_states, row, thread), block.arguments.C, count, Lanes());
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
    const Walk walk{thread.channel, block.steps_of(thread.span(), rows)};
    const auto k = block.column(static_cast<const Element*>(block.k), thread);
    const auto v = block.column(static_cast<const Element*>(block.v), thread);
    thread.keys = walk.range_of(k);
    if (walk.steps > 0) block.summaries.set(thread.span(), thread.lane(), walk.summary(k, v, thread.keys));
  }

  // The carried state joined with the spans before `end`, of which all but the last are whole.
  WKV_HD static State<Lanes> joined(const Block& block, int end, int rows, const Thread& thread) {
    State<Lanes> state = block.carry.get(0, thread.lane());
    for (int span = 0; span < end; ++span) {
      const Lanes decay = Lanes(block.steps_of(span, rows)) * thread.channel.channel.log_decay;
      state = join(state, decay, block.summaries.get(span, thread.lane()));
    }
    return state;
  }

  // Needs the tile, `carry` and `summaries`; leaves y where k was.
  WKV_HD static void walk(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    const int span = thread.span();
    const Walk walk{thread.channel, block.steps_of(span, rows)};
    if (walk.steps == 0) return;
    const auto k = block.column(static_cast<const Element*>(block.k), thread);
    const auto v = block.column(static_cast<const Element*>(block.v), thread);
    if (block.spans == 1) thread.keys = walk.range_of(k);
    const State<Lanes> state = joined(block, span, rows, thread);
    const int64_t t_span = t + span * kSteps;
    if (arguments.checkpoints != nullptr && t_span > 0 && t_span % Geo::kInterval == 0) {
      const int64_t row = block.b * checkpoint_count(Geo::dtype, arguments.T) + t_span / Geo::kInterval - 1;
      store_state(block.state_at(arguments.checkpoints, row, thread), arguments.C, block.channels_of(thread), state);
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
    const State<Lanes> after = writes ? thread.after : joined(block, last_span + 1, rows, thread);
    block.carry.set(0, thread.lane(), after);
    if (t + rows < block.t_end) return;
    const int count = block.channels_of(thread);
    if (!writes) {
      const int64_t row = block.b * (arguments.chunks - 1) + block.chunk;
      store_state(block.state_at(arguments.chunk_states, row, thread), arguments.C, count, after);
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
};

}  // namespace wkv
