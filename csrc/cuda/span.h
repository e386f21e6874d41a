// What one thread does with the steps of its span: sum them up, walk them forward, walk them back. The formulas are
// those of wkv_math.h; this file chooses between the exponent that a whole span shares and the maximum that follows
// every step, and unrolls.
#pragma once

#include <type_traits>

#include "block.h"

namespace wkv {

// What a launch does with its chunks.
enum class Pass { summarise, replay, single };

// A lane's column of a staged tile.
template <class Element>
struct Column {
  Element* first;

  WKV_HD Element* at(int step) const { return first + step * Geometry<std::remove_const_t<Element>>::kTileChannels; }
};

// A thread of a block whose spans lie one after the other.
template <class Element>
struct SpanThread {
  int index;

  WKV_HD int lane() const { return index % Geometry<Element>::kLanes; }
  WKV_HD int span() const { return index / Geometry<Element>::kLanes; }
};

// The channels that a block has of a sequence, and its tiles of spans of `kSteps` steps.
template <class Element, int kSteps>
struct ChannelTile {
  using Geo = Geometry<Element>;
  using Thread = SpanThread<Element>;
  int64_t b, c;  // the sequence, and the first channel
  int columns;

  WKV_HD ChannelTile(int64_t b, int64_t tile, int64_t C)
      : b(b), c(tile * Geo::kTileChannels), columns(clamp_count(C - c, Geo::kTileChannels)) {}

  WKV_HD int channels_of(const Thread& thread) const {
    return clamp_count(columns - thread.lane() * Geo::kLaneChannels, Geo::kLaneChannels);
  }
  WKV_HD int64_t channel_of(const Thread& thread) const { return c + thread.lane() * Geo::kLaneChannels; }

  template <class E>
  WKV_HD static E* span(E* tile, const Thread& thread) {
    return tile + thread.span() * kSteps * Geo::kTileChannels;
  }
  template <class E>
  WKV_HD static Column<E> column(E* tile, const Thread& thread) {
    return {span(tile, thread) + thread.lane() * Geo::kLaneChannels};
  }
  WKV_HD static int steps_of(int span, int rows) { return clamp_count(rows - span * kSteps, kSteps); }
  WKV_HD static int spans_of(int rows) { return (rows - 1) / kSteps + 1; }
};

// Calls function(step) for the first `count` steps.
template <int kSteps, class Function>
WKV_HD void for_steps(int count, const Function& function) {
#pragma unroll(kFullTilesOnly ? kSteps : 8)
  for (int step = 0; step < (kFullTilesOnly ? kSteps : count); ++step) function(step);
}

// The same for at most `kSteps`, all unrolled, so that arrays over them can be registers; a whole span, which is the
// rule, asks nothing at each step.
template <int kSteps, class Function>
WKV_HD void for_unrolled_steps(int count, const Function& function) {
  if (kFullTilesOnly || count == kSteps) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) function(step);
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < count) function(step);
    }
  }
}
template <int kSteps, class Function>
WKV_HD void for_unrolled_steps_back(int count, const Function& function) {
  if (kFullTilesOnly || count == kSteps) {
#pragma unroll
    for (int step = kSteps - 1; step >= 0; --step) function(step);
  } else {
#pragma unroll
    for (int step = kSteps - 1; step >= 0; --step) {
      if (step < count) function(step);
    }
  }
}

// Whether all threads of the warp, which is the span, say so.
WKV_HD bool warp_agrees(bool value) {
#if defined(__CUDA_ARCH__)
  return __all_sync(0xffffffff, value);
#else
  return value;
#endif
}

// One answer for the warp, which would otherwise walk both ways. In float64, which is there to be exact, both ways to
// scale need more registers than a thread can have.
template <class Lanes>
WKV_HD bool shares_exponent(const TileRange<Lanes>& range, const Channel<Lanes>& channel) {
  if constexpr (std::is_same_v<Lanes, double>) return false;
  return kFullTilesOnly || warp_agrees(all(range.fits(channel)));
}

// The state after a walk in a shared scale: den is brought to [1, 2) by a power of two, which is exact.
template <class Lanes>
WKV_HD State<Lanes> leave_shared_scale(Sums<Lanes> sums, Lanes reference_log2) {
  const auto of_den = exponent_of(sums.den);
  return {{sums.num * of_den.inverse_power, sums.den * of_den.inverse_power},
          (reference_log2 + of_den.exponent) * Lanes(1 / kLog2E)};
}

template <class Element, int kSteps>
struct SpanWalk {
  using Lanes = typename Geometry<Element>::Lanes;

  ChannelLanes<Lanes> channel;
  int steps;

  WKV_HD Lanes decay_of_steps() const { return Lanes(steps) * channel.channel.log_decay; }

  // Replaces keys by their logits, which differ where there is a +inf: the range says so, and no walk has to ask.
  WKV_HD KeyRange<Lanes> range_of(Column<Element> k) const {
    auto range = KeyRange<Lanes>::none();
    for_steps<kSteps>(steps, [&](int step) { range.add(load_lanes(k.at(step))); });
    if (!kFullTilesOnly && !all(range.highest < Lanes(INFINITY))) {
      for (int step = 0; step < steps; ++step) store_lanes(k.at(step), key_logit(load_lanes(k.at(step))));
    }
    return range;
  }

  WKV_HD SharedScale<Lanes> shared_scale(Lanes reference) const {
    return {reference * Lanes(kLog2E), channel.decay, channel.bonus};
  }

  WKV_HD RunningScale<Lanes> running_scale() const {
    const bool lifts = !std::is_same_v<Lanes, double> && warp_agrees(all(channel.channel.is_moderate()));
    return {channel.channel, lifts, channel.bonus * channel.decay};
  }

  template <class Scale>
  WKV_HD State<Lanes> advance(const Scale& scale, Column<const Element> k, Column<const Element> v,
                              State<Lanes> state) const {
    for_steps<kSteps>(steps, [&](int step) {
      const Lanes kt = load_lanes(k.at(step));
      const auto weights = scale.weights(scale.at(state.max, kt));
      state = {mix(state.sums, weights.advance, load_lanes(v.at(step))), scale.next_max(state.max, kt)};
    });
    return state;
  }

  // What the span alone sums up to.
  WKV_HD State<Lanes> summary(Column<const Element> k, Column<const Element> v, const KeyRange<Lanes>& keys) const {
    // Nothing is read on the way, so the bonus has no say.
    const SpanWalk without_bonus{{{channel.channel.log_decay, Lanes(0)}, channel.decay, Lanes(1)}, steps};
    const auto range = keys.summed(decay_of_steps());
    if (shares_exponent(range, without_bonus.channel.channel)) {
      const auto scale = without_bonus.shared_scale(range.reference(without_bonus.channel.channel));
      const auto sums = advance(scale, k, v, empty_state<Lanes>()).sums;
      return leave_shared_scale(sums, scale.reference_log2);
    }
    return advance(running_scale(), k, v, empty_state<Lanes>());
  }

  // ---- forward ----

  template <class Scale>
  WKV_HD State<Lanes> outputs(const Scale& scale, Column<const Element> k, Column<const Element> v, Column<Element> y,
                              State<Lanes> state) const {
    for_steps<kSteps>(steps, [&](int step) {
      const Lanes kt = load_lanes(k.at(step));
      const Lanes vt = load_lanes(v.at(step));
      const Lanes at = scale.at(state.max, kt);
      state.max = scale.next_max(state.max, kt);
      const auto weights = scale.weights(at);
      const Sums<Lanes> now = mix(state.sums, weights.read, vt);
      store_lanes(y.at(step), now.num / now.den);
      state.sums = mix(state.sums, weights.advance, vt);
    });
    return state;
  }

  // Writes y, which may lie where k does, and returns the state after the span.
  WKV_HD State<Lanes> forward(Column<const Element> k, Column<const Element> v, Column<Element> y,
                              const KeyRange<Lanes>& keys, State<Lanes> state) const {
    const auto range = keys.entered(state.max, decay_of_steps());
    if (shares_exponent(range, channel.channel)) {
      const auto scale = shared_scale(range.reference(channel.channel));
      const Lanes enter = scale.weight(state.max);
      state.sums = {state.sums.num * enter, state.sums.den * enter};
      return leave_shared_scale(outputs(scale, k, v, y, state).sums, scale.reference_log2);
    }
    return outputs(running_scale(), k, v, y, state);
  }

  // ---- backward ----

  // The state before a step, in the scale of its span.
  struct SavedStep {
    Sums<Lanes> sums;
    Lanes at;
  };

  // What the way back needs of the way forward. Sums after it are relative to `max_after`: where the span shares a
  // scale, its reference.
  struct Replayed {
    SavedStep saved[kSteps];
    bool shared;
    Lanes max_after;
  };

  template <class Scale>
  WKV_HD State<Lanes> replay_steps(const Scale& scale, Column<const Element> k, Column<const Element> v,
                                   State<Lanes> state, SavedStep (&saved)[kSteps]) const {
    for_unrolled_steps<kSteps>(steps, [&](int step) {
      const Lanes kt = load_lanes(k.at(step));
      const Lanes at = scale.at(state.max, kt);
      saved[step] = {state.sums, at};
      state = {mix(state.sums, scale.weights(at).advance, load_lanes(v.at(step))), scale.next_max(state.max, kt)};
    });
    return state;
  }

  WKV_HD void replay(Column<const Element> k, Column<const Element> v, const KeyRange<Lanes>& keys, State<Lanes> state,
                     Replayed& replayed) const {
    const auto range = keys.entered(state.max, decay_of_steps());
    replayed.shared = shares_exponent(range, channel.channel);
    if (replayed.shared) {
      replayed.max_after = range.reference(channel.channel);
      const auto scale = shared_scale(replayed.max_after);
      const Lanes enter = scale.weight(state.max);
      state.sums = {state.sums.num * enter, state.sums.den * enter};
      replay_steps(scale, k, v, state, replayed.saved);
    } else {
      replayed.max_after = replay_steps(running_scale(), k, v, state, replayed.saved).max;
    }
  }

  // The gradients that the way back gathers.
  struct Gathered {
    Sums<Lanes> adjoint;
    Lanes g_log_decay, gu;
  };

  template <bool writes, class Scale>
  WKV_HD void reverse_steps(const Scale& scale, Column<const Element> v, Column<const Element> gy, Column<Element> gk,
                            Column<Element> gv, const SavedStep (&saved)[kSteps], Gathered& gathered) const {
    for_unrolled_steps_back<kSteps>(steps, [&](int step) {
      const Lanes vt = load_lanes(v.at(step));
      const SavedStep before = saved[step];
      const auto weights = scale.weights(before.at);
      StepGradients<Lanes> at_step;
      advance_adjoint(before.sums, weights.advance, vt, gathered.adjoint, at_step);
      read_adjoint(before.sums, weights.read, vt, load_lanes(gy.at(step)), gathered.adjoint, at_step);
      if constexpr (writes) {
        store_lanes(gk.at(step), at_step.gk);
        store_lanes(gv.at(step), at_step.gv);
        gathered.g_log_decay = gathered.g_log_decay + at_step.g_log_decay;
        gathered.gu = gathered.gu + at_step.gu;
      }
    });
  }

  // Takes the gradient of the state after the span, relative to `max_after`, to that of the state before it, relative
  // to `max_before`, that state's own. Writes gk and gv, which may lie where k and v do, and adds to the others.
  template <bool writes>
  WKV_HD void reverse(Column<const Element> v, Column<const Element> gy, Column<Element> gk, Column<Element> gv,
                      const Replayed& replayed, Lanes max_before, Lanes max_after, Gathered& gathered) const {
    const auto rescale = [&](Lanes factor) {
      gathered.adjoint = {gathered.adjoint.num * factor, gathered.adjoint.den * factor};
    };
    rescale(exponential(replayed.max_after - max_after));
    if (replayed.shared) {
      const auto scale = shared_scale(replayed.max_after);
      reverse_steps<writes>(scale, v, gy, gk, gv, replayed.saved, gathered);
      rescale(scale.weight(max_before));
    } else {
      reverse_steps<writes>(running_scale(), v, gy, gk, gv, replayed.saved, gathered);
    }
  }
};

}  // namespace wkv
