// The backward block program: one chunk of one sequence for the channels of a tile, from its end to its beginning, a
// tile being what lies between two checkpoints. With `writes` it starts from the true gradient of the state after the
// chunk and writes gk, gv and its part of gw and gu; without, it finds what the chunk alone gives to the state before
// it.
//
//   stage      k, v, gy and the checkpoint of a tile come to shared memory
//   summarise  each span sums up its own steps, forward
//   replay     each span joins the checkpoint with the spans before it, walks forward keeping its states, and then back
//              from a gradient of zero, for what the span alone gives
//   speak and listen, take   in a single pass: the chunk hands over and is handed what it starts from
//   reverse    each span joins the carried gradient with the spans behind it and walks back from there, gk and gv
//              taking the places of k and v
//   finish     gk and gv go to memory, and the gradient of the tile's first state becomes the carried one
//
// The gradient of a state's (num, den) is relative to that state's max, which therefore goes along: `span_max`.
#pragma once

#include <type_traits>

#include "hand_over.h"
#include "span.h"

namespace wkv {

// The gradient of the state before some steps: what they give, and what comes from behind them, weaker by `decay` and
// the change of max over them.
template <class Lanes>
WKV_HD Sums<Lanes> join_adjoint(Sums<Lanes> behind, Lanes decay, Sums<Lanes> own) {
  const Lanes factor = exponential(decay);
  return {own.num + factor * behind.num, own.den + factor * behind.den};
}

template <class Element, Pass pass>
struct Backward {
  using Arguments = BackwardArguments;
  static constexpr bool writes = pass != Pass::summarise;
  using Geo = Geometry<Element>;
  using Lanes = typename Geo::Lanes;
  using Real = typename Geo::Real;
  static constexpr int kSteps = span_steps(Operation::backward);
  static constexpr int kSpans = backward_spans(Geo::dtype);
  using Walk = SpanWalk<Element, kSteps>;
  using Gathered = typename Walk::Gathered;

  struct Thread {
    int index;
    // What lives in registers from one phase to the next.
    KeyRange<Lanes> keys;
    typename Walk::Replayed replayed;
    Gathered gathered;

    WKV_HD int lane() const { return index % Geo::kLanes; }
    WKV_HD int span() const { return index / Geo::kLanes; }
  };

  // Gradients of (num, den) in shared memory.
  struct SharedAdjoints {
    Lanes* rows;

    WKV_HD Sums<Lanes> get(int i, int lane) const {
      const Lanes* at = rows + 2 * i * Geo::kLanes + lane;
      return {at[0], at[Geo::kLanes]};
    }
    WKV_HD void set(int i, int lane, Sums<Lanes> value) const {
      Lanes* at = rows + 2 * i * Geo::kLanes + lane;
      at[0] = value.num;
      at[Geo::kLanes] = value.den;
    }
  };

  // The same for all threads of the block.
  struct Block {
    BackwardArguments arguments;
    int64_t b, c, chunk;
    int tiles, columns;
    Element *k, *v, *gy;
    SharedStates<Lanes, Geo::kLanes> summaries, start, heard;  // heard: sums and log-decay over the part
    SharedChannels<Lanes, Geo::kLanes> channels;
    Lanes* span_max;
    SharedAdjoints adjoints, carry;

    WKV_HD Block(const BackwardArguments& arguments, int64_t b, int64_t chunk, int64_t tile, char* shared)
        : arguments(arguments),
          b(b),
          c(tile * Geo::kTileChannels),
          chunk(chunk),
          columns(clamp_count(arguments.C - c, Geo::kTileChannels)) {
      constexpr BackwardLayout layout(Geo::dtype);
      k = reinterpret_cast<Element*>(shared + layout.k);
      v = reinterpret_cast<Element*>(shared + layout.v);
      gy = reinterpret_cast<Element*>(shared + layout.gy);
      summaries = {reinterpret_cast<Lanes*>(shared + layout.summaries)};
      start = {reinterpret_cast<Lanes*>(shared + layout.start)};
      span_max = reinterpret_cast<Lanes*>(shared + layout.span_max);
      adjoints = {reinterpret_cast<Lanes*>(shared + layout.adjoints)};
      carry = {reinterpret_cast<Lanes*>(shared + layout.carry)};
      channels = {reinterpret_cast<Lanes*>(shared + layout.channels)};
      heard = {reinterpret_cast<Lanes*>(shared + layout.heard)};
      const int64_t steps = chunk + 1 < arguments.chunks ? arguments.chunk_len : arguments.T - t_begin();
      tiles = static_cast<int>((steps + Geo::kInterval - 1) / Geo::kInterval);
    }

    WKV_HD int64_t t_begin() const { return chunk * arguments.chunk_len; }

    static constexpr int threads() { return kSpans * Geo::kLanes; }
    WKV_HD int channels_of(const Thread& thread) const {
      return clamp_count(columns - thread.lane() * Geo::kLaneChannels, Geo::kLaneChannels);
    }
    WKV_HD int64_t channel_of(const Thread& thread) const { return c + thread.lane() * Geo::kLaneChannels; }
    template <class E>
    WKV_HD Column<E> column(E* tile, const Thread& thread) const {
      return {tile + thread.span() * kSteps * Geo::kTileChannels + thread.lane() * Geo::kLaneChannels};
    }
    WKV_HD static int steps_of(int span, int rows) { return clamp_count(rows - span * kSteps, kSteps); }
    WKV_HD static int spans_of(int rows) { return (rows - 1) / kSteps + 1; }

    // Rows of several values in memory, for the channels of a thread.
    template <class Values>
    WKV_HD auto* values_at(Values* values, int64_t row, int values_of_row, const Thread& thread) const {
      using Typed = std::conditional_t<std::is_const_v<Values>, const Real, Real>;
      return static_cast<Typed*>(values) + row * values_of_row * arguments.C + channel_of(thread);
    }
    // The state after t steps, of which there are a multiple of the interval, or all.
    WKV_HD const Real* checkpoint_at(int64_t t, const Thread& thread) const {
      const int64_t row = b * checkpoint_count(Geo::dtype, arguments.T) + (t + Geo::kInterval - 1) / Geo::kInterval - 1;
      return values_at(arguments.checkpoints, row, 3, thread);
    }
  };

  WKV_HD static State<Lanes> first_state(const Block& block, const Thread& thread) {
    const Real* given = static_cast<const Real*>(block.arguments.state);
    if (given != nullptr) given += block.b * 3 * block.arguments.C + block.channel_of(thread);
    return load_first_state(given, block.arguments.C, block.channels_of(thread), Lanes());
  }

  WKV_HD static Sums<Lanes> load_adjoint(const Real* values, int64_t C, int count) {
    return {load_some(values, count), load_some(values + C, count)};
  }

  WKV_HD static void store_adjoint(Real* values, int64_t C, int count, Sums<Lanes> adjoint) {
    store_some(values, adjoint.num, count);
    store_some(values + C, adjoint.den, count);
  }

  // What chunk i gave to those before it.
  WKV_HD static Sums<Lanes> load_chunk_adjoint(const Block& block, int64_t i, const Thread& thread) {
    const auto& arguments = block.arguments;
    const int64_t row = block.b * (arguments.chunks - 1) + i - 1;
    return load_adjoint(block.values_at(arguments.chunk_adjoints, row, 2, thread), arguments.C,
                        block.channels_of(thread));
  }
  WKV_HD static void store_chunk_adjoint(const Block& block, const Thread& thread, Sums<Lanes> adjoint) {
    const auto& arguments = block.arguments;
    const int64_t row = block.b * (arguments.chunks - 1) + block.chunk - 1;
    store_adjoint(block.values_at(arguments.chunk_adjoints, row, 2, thread), arguments.C, block.channels_of(thread),
                  adjoint);
  }

  // ---- the phases ----

  // Leaves `channels`, and in `carry` the gradient of the state after the chunk, as far as it is known.
  WKV_HD static void begin(const Block& block, Thread& thread) {
    const auto& arguments = block.arguments;
    thread.gathered = {{Lanes(0), Lanes(0)}, Lanes(0), Lanes(0)};
    if (thread.span() != 0) return;
    const int count = block.channels_of(thread);
    const auto& parameters = arguments.parameters;
    block.channels.set(thread.lane(), ChannelLanes<Lanes>::load(parameters, block.channel_of(thread), count));
    Sums<Lanes> adjoint{Lanes(0), Lanes(0)};
    if (block.chunk == arguments.chunks - 1) {
      if (arguments.gstate_out != nullptr) {
        adjoint = load_adjoint(block.values_at(arguments.gstate_out, block.b, 3, thread), arguments.C, count);
      }
    } else if (pass == Pass::replay) {
      adjoint = load_chunk_adjoint(block, block.chunk + 1, thread);
    }
    block.carry.set(0, thread.lane(), adjoint);
  }

  // Leaves k, v and gy of the tile, the state that it starts from, and the max of the one after it.
  WKV_HD static void stage_tile(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    const auto bring = [&](Element* tile, const Sequence& sequence) {
      stage(tile, rows_from<Element>(sequence, block.b, t, block.c), rows, block.columns, thread.index,
            block.threads());
    };
    bring(block.k, arguments.k);
    bring(block.v, arguments.v);
    bring(block.gy, arguments.gy);
    if (thread.span() == 0) {
      const int count = block.channels_of(thread);
      const State<Lanes> state =
          t == 0 ? first_state(block, thread) : load_state(block.checkpoint_at(t, thread), arguments.C, count, Lanes());
      block.start.set(0, thread.lane(), state);
      block.span_max[block.spans_of(rows) * Geo::kLanes + thread.lane()] =
          load_some(block.checkpoint_at(t + rows, thread) + 2 * arguments.C, count);
    }
  }

  // Needs k and v; leaves `summaries`.
  WKV_HD static void summarise(const Block& block, int rows, Thread& thread) {
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(thread.span(), rows)};
    const Element *k = block.k, *v = block.v;
    thread.keys = walk.range_of(block.column(k, thread));
    if (thread.span() + 1 >= block.spans_of(rows)) return;
    const auto summary = walk.summary(block.column(k, thread), block.column(v, thread), thread.keys);
    block.summaries.set(thread.span(), thread.lane(), summary);
  }

  // Needs the tile, `start` and `summaries`; leaves `span_max` and `adjoints`.
  WKV_HD static void replay(const Block& block, int rows, Thread& thread) {
    const int span = thread.span(), lane = thread.lane();
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(span, rows)};
    if (walk.steps == 0) return;
    State<Lanes> state = block.start.get(0, lane);
    for (int before = 0; before < span; ++before) {
      state = join(state, Lanes(kSteps) * block.channels.log_decay(lane), block.summaries.get(before, lane));
    }
    block.span_max[span * Geo::kLanes + lane] = state.max;
    const Element *k = block.k, *v = block.v, *gy = block.gy;
    auto& replayed = thread.replayed;
    walk.replay(block.column(k, thread), block.column(v, thread), thread.keys, state, replayed);
    Gathered own{{Lanes(0), Lanes(0)}, Lanes(0), Lanes(0)};
    walk.template reverse<false>(block.column(v, thread), block.column(gy, thread), {}, {}, replayed, state.max,
                                 replayed.max_after, own);
    block.adjoints.set(span, lane, own.adjoint);
  }

  // The gradient of the state after the tile, joined with the spans behind `begin`: that of the state before `begin`.
  WKV_HD static Sums<Lanes> joined(const Block& block, Sums<Lanes> adjoint, int begin, int rows, int lane) {
    for (int span = block.spans_of(rows) - 1; span >= begin; --span) {
      const Lanes decay = Lanes(block.steps_of(span, rows)) * block.channels.log_decay(lane) +
                          block.span_max[span * Geo::kLanes + lane] - block.span_max[(span + 1) * Geo::kLanes + lane];
      adjoint = join_adjoint(adjoint, decay, block.adjoints.get(span, lane));
    }
    return adjoint;
  }
  WKV_HD static Sums<Lanes> carried_to(const Block& block, int begin, int rows, int lane) {
    return joined(block, block.carry.get(0, lane), begin, rows, lane);
  }

  // What the chunk alone gives to the state before it; the last one knows what is behind it.
  WKV_HD static Sums<Lanes> own(const Block& block, int rows, int lane) {
    const bool last = block.chunk == block.arguments.chunks - 1;
    return last ? carried_to(block, 0, rows, lane) : joined(block, {Lanes(0), Lanes(0)}, 0, rows, lane);
  }

  // Max of the state before chunk i, of which each is a tile.
  WKV_HD static Lanes max_before_chunk(const Block& block, int64_t i, const Thread& thread) {
    return load_some(block.checkpoint_at(i * Geo::kInterval, thread) + 2 * block.arguments.C,
                     block.channels_of(thread));
  }

  // Needs `span_max` and `adjoints`; leaves what each span heard in `heard`. Positions go from the last chunk to the
  // first.
  WKV_HD static void speak_and_listen(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    const int lane = thread.lane();
    if (thread.span() == 0 && neighbours.gives_own()) {
      store_chunk_adjoint(block, thread, own(block, rows, lane));
      neighbours.speak(lane);
    }
    const auto part = neighbours.heard_by(thread.span(), kSpans);
    if (part.begin == part.end) return;
    neighbours.listen(part, lane);
    const int64_t last = block.arguments.chunks - 1;
    if (neighbours.hears_one()) {
      block.heard.set(thread.span(), lane, {load_chunk_adjoint(block, last - part.begin, thread), Lanes(0)});
      return;
    }
    struct Given {
      Sums<Lanes> adjoint;
      Lanes max;  // that the adjoint is relative to
    };
    const auto given_by = [&](int64_t position) {
      const int64_t chunk = last - position;
      return Given{load_chunk_adjoint(block, chunk, thread), max_before_chunk(block, chunk, thread)};
    };
    const Lanes decay_of_chunk = Lanes(Geo::kInterval) * block.channels.log_decay(lane);
    const Given heard = fold<kHandOverBatch>(part.begin + 1, part.end, given_by(part.begin), given_by,
                                             [&](int64_t, const Given& behind, const Given& own) {
                                               const Lanes decay = decay_of_chunk + own.max - behind.max;
                                               return Given{join_adjoint(behind.adjoint, decay, own.adjoint), own.max};
                                             });
    Lanes decay = Lanes(0);
    if (part.begin != neighbours.first_heard()) {
      decay = Lanes(static_cast<int>(part.end - part.begin)) * decay_of_chunk + heard.max -
              max_before_chunk(block, last - part.begin + 1, thread);
    }
    block.heard.set(thread.span(), lane, State<Lanes>{heard.adjoint, decay});
  }

  // Needs `heard`; leaves `carry`.
  WKV_HD static void take(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    if (thread.span() != 0 || neighbours.place.position == 0) return;
    const int lane = thread.lane();
    Sums<Lanes> carried{Lanes(0), Lanes(0)};
    for (int span = 0; span < kSpans; ++span) {
      const auto part = neighbours.heard_by(span, kSpans);
      if (part.begin == part.end) continue;
      const State<Lanes> heard = block.heard.get(span, lane);
      carried = join_adjoint(carried, heard.max, heard.sums);
    }
    block.carry.set(0, lane, carried);
    if (neighbours.gives_all()) {
      store_chunk_adjoint(block, thread, carried_to(block, 0, rows, lane));
      neighbours.speak(lane);
    }
  }

  // Needs the tile, `carry`, `span_max` and `adjoints`; leaves gk and gv where k and v were.
  WKV_HD static void reverse(const Block& block, int rows, Thread& thread) {
    const Walk walk{block.channels.get(thread.lane()), block.steps_of(thread.span(), rows)};
    if (walk.steps == 0) return;
    const Element *v = block.v, *gy = block.gy;
    thread.gathered.adjoint = carried_to(block, thread.span() + 1, rows, thread.lane());
    const auto max_at = [&](int boundary) { return block.span_max[boundary * Geo::kLanes + thread.lane()]; };
    walk.template reverse<true>(block.column(v, thread), block.column(gy, thread), block.column(block.k, thread),
                                block.column(block.v, thread), thread.replayed, max_at(thread.span()),
                                max_at(thread.span() + 1), thread.gathered);
  }

  // Needs gk and gv; leaves the next `carry`, and behind the last tile each span's part of the gradients of log_decay
  // and u in `adjoints`.
  WKV_HD static void finish_tile(const Block& block, int tile, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    if constexpr (writes) {
      const auto bring = [&](void* target, const Element* tile) {
        unstage(rows_from<Element>(target, arguments.T, arguments.C, block.b, t, block.c), tile, rows, block.columns,
                thread.index, block.threads());
      };
      bring(arguments.gk, block.k);
      bring(arguments.gv, block.v);
    }
    if (writes && tile == 0) {
      block.adjoints.set(thread.span(), thread.lane(), {thread.gathered.g_log_decay, thread.gathered.gu});
    }
    if (thread.span() != 0) return;
    if (!writes) thread.gathered.adjoint = carried_to(block, 0, rows, thread.lane());
    block.carry.set(0, thread.lane(), thread.gathered.adjoint);
  }

  WKV_HD static void finish_chunk(const Block& block, Thread& thread) {
    if (thread.span() != 0) return;
    const auto& arguments = block.arguments;
    const int count = block.channels_of(thread);
    const Sums<Lanes> adjoint = thread.gathered.adjoint;
    if constexpr (writes) {
      Sums<Lanes> total = block.adjoints.get(0, thread.lane());
      for (int span = 1; span < kSpans; ++span) {
        const Sums<Lanes> part = block.adjoints.get(span, thread.lane());
        total = {total.num + part.num, total.den + part.den};
      }
      const int64_t row = block.b * arguments.chunks + block.chunk;
      store_adjoint(block.values_at(arguments.partials, row, 2, thread), arguments.C, count, total);
      if (block.chunk == 0) {
        // The gradient of max follows from the others for consumers that respect the state's gauge.
        const State<Lanes> state = first_state(block, thread);
        const Lanes of_max = state.sums.num * adjoint.num + state.sums.den * adjoint.den;
        store_state(block.values_at(arguments.gstate, block.b, 3, thread), arguments.C, count,
                    State<Lanes>{adjoint, of_max});
      }
    } else {
      store_chunk_adjoint(block, thread, adjoint);
    }
  }

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex index, int threads, Team& team, char* shared) {
    if constexpr (pass == Pass::single) {
      run_single_pass(arguments, team, shared);
    } else {
      // What the first chunk alone gives to the state before it, nobody asks.
      const Block block(arguments, index.z, writes ? index.y : index.y + 1, index.x, shared);
      for (int tile = block.tiles - 1; tile >= 0; --tile) {
        const int64_t t = block.t_begin() + static_cast<int64_t>(tile) * Geo::kInterval;
        const int rows = clamp_count(arguments.T - t, Geo::kInterval);
        team.phase([=](Thread& thread) {
          stage_tile(block, t, rows, thread);
          if (tile == block.tiles - 1) begin(block, thread);
          wait_for_copies();
        });
        team.phase([=](Thread& thread) { summarise(block, rows, thread); });
        team.phase([=](Thread& thread) { replay(block, rows, thread); });
        if (writes) team.phase([=](Thread& thread) { reverse(block, rows, thread); });
        team.phase([=](Thread& thread) { finish_tile(block, tile, t, rows, thread); });
      }
      team.phase([=](Thread& thread) { finish_chunk(block, thread); });
    }
  }

  template <class Team>
  WKV_HD static void run_single_pass(const Arguments& arguments, Team& team, char* shared) {
    const Signals signals{arguments.hand_over.signals};
    const int64_t tiles = (arguments.C + Geo::kTileChannels - 1) / Geo::kTileChannels;
    Place* place = reinterpret_cast<Place*>(shared + BackwardLayout(Geo::dtype).place);
    team.phase([=](Thread& thread) {
      if (thread.index == 0) *place = Place::of(signals.take_number(), arguments.B, tiles);
    });
    const Block block(arguments, place->b, arguments.chunks - 1 - place->position, place->tile, shared);
    const Neighbours neighbours{signals, *place, arguments.B * tiles, arguments.hand_over.group, arguments.chunks};
    const int64_t t = block.t_begin();
    const int rows = clamp_count(arguments.T - t, Geo::kInterval);
    team.phase([=](Thread& thread) {
      stage_tile(block, t, rows, thread);
      begin(block, thread);
      wait_for_copies();
    });
    team.phase([=](Thread& thread) { summarise(block, rows, thread); });
    team.phase([=](Thread& thread) { replay(block, rows, thread); });
    team.phase([=](Thread& thread) { speak_and_listen(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { take(block, neighbours, rows, thread); });
    team.phase([=](Thread& thread) { reverse(block, rows, thread); });
    team.phase([=](Thread& thread) { finish_tile(block, 0, t, rows, thread); });
    team.phase([=](Thread& thread) { finish_chunk(block, thread); });
  }
};

}  // namespace wkv
