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

  // What lives in registers from one phase to the next.
  struct Thread : SpanThread<Element> {
    KeyRange<Lanes> keys;
    typename Walk::Replayed replayed;
    Gathered gathered;
    Sums<Lanes> own;
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
  struct Block : ChannelTile<Element, kSteps> {
    using Base = ChannelTile<Element, kSteps>;
    using Base::b, Base::channel_of;
    BackwardArguments arguments;
    int64_t chunk;
    int tiles;
    Element *k, *v, *gy;
    SharedStates<Lanes, Geo::kLanes> summaries, start, heard;  // heard: sums and log-decay over the part
    SharedChannels<Lanes, Geo::kLanes> channels;
    Lanes* span_max;
    SharedAdjoints adjoints, carry;

    WKV_HD Block(const BackwardArguments& arguments, int64_t b, int64_t chunk, int64_t tile, char* shared)
        : Base(b, tile, arguments.C), arguments(arguments), chunk(chunk) {
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

    // Rows of several values in memory, for the channels of a thread.
    template <class Values>
    WKV_HD auto* values_at(Values* values, int64_t row, int values_of_row, const Thread& thread) const {
      using Typed = std::conditional_t<std::is_const_v<Values>, const Real, Real>;
      return static_cast<Typed*>(values) + row * values_of_row * arguments.C + channel_of(thread);
    }
    WKV_HD const Real* checkpoint_at(int64_t t, const Thread& thread) const {
      return values_at(arguments.checkpoints, checkpoint_row(Geo::dtype, arguments.T, b, t), 3, thread);
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
    block.channels.template load<Real>(arguments.parameters, block.c, block.columns, thread.index, block.threads());
    if (thread.span() != 0) return;
    Sums<Lanes> adjoint{Lanes(0), Lanes(0)};
    if (block.chunk == arguments.chunks - 1) {
      if (arguments.gstate_out != nullptr) {
        adjoint = load_adjoint(block.values_at(arguments.gstate_out, block.b, 3, thread), arguments.C,
                               block.channels_of(thread));
      }
    } else if (pass == Pass::replay) {
      adjoint = load_chunk_adjoint(block, block.chunk + 1, thread);
    }
    block.carry.set(0, thread.lane(), adjoint);
  }

  // Leaves k, v and gy of the tile, the state that it starts from, and the max of the one after it.
  WKV_HD static void stage_tile(const Block& block, int64_t t, int rows, Thread& thread) {
    const auto& arguments = block.arguments;
    const int64_t t_span = t + thread.span() * kSteps;
    const auto bring = [&](Element* tile, const Sequence& sequence) {
      stage<kSteps>(block.span(tile, thread), rows_from<Element>(sequence, block.b, t_span, block.c),
                    block.steps_of(thread.span(), rows), block.columns, thread.lane());
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
    thread.keys = walk.range_of(block.column(block.k, thread));
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
#pragma unroll 1
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

  // The gradient of the state before the span `begin`: `carry` joined with the spans from there on.
  WKV_HD static Sums<Lanes> carried_to(const Block& block, int begin, int rows, int lane) {
    Sums<Lanes> adjoint = block.carry.get(0, lane);
#pragma unroll 1
    for (int span = block.spans_of(rows) - 1; span >= begin; --span) {
      const Lanes decay = Lanes(block.steps_of(span, rows)) * block.channels.log_decay(lane) +
                          block.span_max[span * Geo::kLanes + lane] - block.span_max[(span + 1) * Geo::kLanes + lane];
      adjoint = join_adjoint(adjoint, decay, block.adjoints.get(span, lane));
    }
    return adjoint;
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
    const Place& place = neighbours.place;
    if (thread.span() == 0 && place.is_heard) {
      // `carry` is zero but for the last chunk.
      thread.own = carried_to(block, 0, rows, lane);
      if (neighbours.gives_own()) {
        store_chunk_adjoint(block, thread, thread.own);
        neighbours.speak(lane);
      }
    }
    const auto part = neighbours.heard_by(thread.span());
    if (part.empty()) return;
    neighbours.listen(part, lane);
    Sums<Lanes> heard{Lanes(0), Lanes(0)};
    Lanes decay_of_part(0);
#pragma unroll 1
    for (uint32_t i = part.begin; i < part.end; ++i) {
      const int64_t chunk = block.arguments.chunks - 1 - i;
      const Sums<Lanes> given = load_chunk_adjoint(block, chunk, thread);
      Lanes decay(0);  // which does not matter where nothing has been heard yet
      if (i != place.first_heard) {
        decay = Lanes(Geo::kInterval) * block.channels.log_decay(lane) + max_before_chunk(block, chunk, thread) -
                max_before_chunk(block, chunk + 1, thread);
      }
      heard = join_adjoint(heard, decay, given);
      decay_of_part = decay_of_part + decay;
    }
    block.heard.set(thread.span(), lane, State<Lanes>{heard, decay_of_part});
  }

  // Needs `heard`; leaves `carry`.
  WKV_HD static void take(const Block& block, const Neighbours& neighbours, int rows, Thread& thread) {
    if (thread.span() != 0 || neighbours.place.position == 0) return;
    const int lane = thread.lane();
    Sums<Lanes> carried{Lanes(0), Lanes(0)};
#pragma unroll 1
    for (int span = 0; span < kSpans && !neighbours.heard_by(span).empty(); ++span) {
      const State<Lanes> heard = block.heard.get(span, lane);
      carried = join_adjoint(carried, heard.max, heard.sums);
    }
    block.carry.set(0, lane, carried);
    if (neighbours.gives_all()) {
      const Lanes decay = Lanes(rows) * block.channels.log_decay(lane) + block.span_max[lane] -
                          block.span_max[kSpans * Geo::kLanes + lane];
      store_chunk_adjoint(block, thread, join_adjoint(carried, decay, thread.own));
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
      const int64_t t_span = t + thread.span() * kSteps;
      const auto bring = [&](void* target, const Element* tile) {
        unstage<kSteps>(rows_from<Element>(target, arguments.T, arguments.C, block.b, t_span, block.c),
                        block.span(tile, thread), block.steps_of(thread.span(), rows), block.columns, thread.lane());
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
  WKV_HD static void run(const Arguments& arguments, BlockIndex index, int, Team& team, char* shared) {
    if constexpr (pass == Pass::single) {
      run_single_pass(arguments, index, team, shared);
    } else {
      // What the first chunk alone gives to the state before it, nobody asks.
      const Block block(arguments, index.z, writes ? index.y : index.y + 1, index.x, shared);
      for (int tile = block.tiles - 1; tile >= 0; --tile) {
        const int64_t t = block.t_begin() + static_cast<int64_t>(tile) * Geo::kInterval;
        const int rows = clamp_count(arguments.T - t, Geo::kInterval);
        team.phase([=](Thread& thread) {
          stage_tile(block, t, rows, thread);
          if (tile == block.tiles - 1) begin(block, thread);
          commit_copies();
          wait_for_copies<0>();
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
  WKV_HD static void run_single_pass(const Arguments& arguments, BlockIndex index, Team& team, char* shared) {
    const Signals signals(arguments.hand_over, arguments.B);
    Place* place = reinterpret_cast<Place*>(shared + BackwardLayout(Geo::dtype).place);
    team.phase([=](Thread& thread) {
      if (thread.index == 0) *place = signals.take_place(index, arguments.chunks, kSpans);
    });
    const Neighbours neighbours{signals, *place};
    const Block block(arguments, index.y, arguments.chunks - 1 - place->position, index.x, shared);
    const int64_t t = block.t_begin();
    const int rows = clamp_count(arguments.T - t, Geo::kInterval);
    team.phase([=](Thread& thread) {
      stage_tile(block, t, rows, thread);
      begin(block, thread);
      commit_copies();
      wait_for_copies<0>();
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
