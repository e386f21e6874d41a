// The CPU kernels: forward, backward, and the step of one token. A vector holds neighbouring channels. A subchunk of
// steps is computed for one vector after the other, so that memory is read row by row and the sums stay in registers.
//
// Included once per instruction set, by a file that has defined WKV_ISA and WKV_SIMD_BYTES.
#pragma once

#include <type_traits>

#include "../common/namespace.h"
#include "../common/recurrence.h"
#include "isa.h"
#include "simd.h"

namespace wkv::cpu {
namespace WKV_ISA {

// Steps that share one exponent, and one pass over k for their range.
constexpr int kSubchunk = 16;

// A sequence from one time and one channel on.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;

  // An int would be extended in every access: it may overflow as -fwrapv has it.
  WKV_INLINE Element* row(int64_t step) const { return data + step * stride; }
  WKV_INLINE Rows from(int64_t t, int64_t c) const { return {data + t * stride + c, stride}; }
};

// One part of a pair, and of what consists of pairs.
template <bool high, class Part>
WKV_INLINE Part part(Pair<Part> x) {
  return high ? x.high : x.low;
}
template <bool high, class Part>
WKV_INLINE Sums<Part> part(Sums<Pair<Part>> x) {
  return {part<high>(x.num), part<high>(x.den)};
}
template <bool high, class Part>
WKV_INLINE SavedStep<Part> part(const SavedStep<Pair<Part>>& x) {
  return {part<high>(x.sums), part<high>(x.at)};
}
template <bool high, class Part>
WKV_INLINE SharedScale<Part> part(const SharedScale<Pair<Part>>& x) {
  return {part<high>(x.reference_log2), part<high>(x.decay), part<high>(x.bonus)};
}
template <bool high, class Part>
WKV_INLINE Gate<Part> part(const Gate<Pair<Part>>& x) {
  return {part<high>(x.share), part<high>(x.lesser)};
}
template <bool high>
WKV_INLINE NoGate part(NoGate) {
  return {};
}

// One part after the other: both at once would need more registers than AVX2 has.
template <class Part, class Gating>
WKV_INLINE StepGradients<Pair<Part>> step_adjoint(const SharedScale<Pair<Part>>& scale,
                                                  const SavedStep<Pair<Part>>& before, Pair<Part> v, Pair<Part> gy,
                                                  Sums<Pair<Part>>& adjoint, Gating gate) {
  Sums<Part> low = part<false>(adjoint), high = part<true>(adjoint);
  const auto a =
      step_adjoint(part<false>(scale), part<false>(before), part<false>(v), part<false>(gy), low, part<false>(gate));
  const auto b =
      step_adjoint(part<true>(scale), part<true>(before), part<true>(v), part<true>(gy), high, part<true>(gate));
  adjoint = {{low.num, high.num}, {low.den, high.den}};
  return {{a.gk, b.gk}, {a.gv, b.gv}, {a.g_log_decay, b.g_log_decay}, {a.gu, b.gu}, {a.gr, b.gr}};
}

template <DType dtype>
struct Kernel {
  using Element = ElementOf<dtype, Half, Bfloat16>;
  using Real = RealOf<dtype>;
  // A line of 16-bit elements has four vectors of AVX2, which are taken by two.
  static constexpr bool kPairs = WKV_SIMD_BYTES == 32 && sizeof(Element) == 2;
  using Vec = std::conditional_t<kPairs, Pair<WKV_ISA::Vec<Real>>, WKV_ISA::Vec<Real>>;
  static constexpr int kLanes = Vec::lanes;
  static constexpr int64_t kInterval = checkpoint_interval(dtype);
  static_assert(kInterval % kSubchunk == 0, "a subchunk must not cross a checkpoint");
  // The channels of one cache line, which is written to memory whole.
  static constexpr int kLine = kLineBytes / sizeof(Element);

  static WKV_INLINE int at_most(int limit, int64_t left) { return static_cast<int>(left < limit ? left : limit); }

  // ---- memory ----

  template <class Number>
  static WKV_INLINE Vec load(const Number* source) {
    return load_as<Vec>(source);
  }
  template <class Number>
  static WKV_INLINE Vec load_some(const Number* source, int count) {
    return WKV_ISA::load_some<Vec>(source, count);
  }

  static WKV_INLINE Rows<const Element> rows_of(const Sequence& sequence, const SequenceView<int64_t>& view) {
    const int64_t first = view.b * sequence.batch_stride + view.begin * sequence.time_stride;
    return {static_cast<const Element*>(sequence.data) + first, sequence.time_stride};
  }
  static WKV_INLINE Rows<Element> rows_of(void* contiguous, const SequenceView<int64_t>& view, const Params& params) {
    return {static_cast<Element*>(contiguous) + (view.b * params.T + view.begin) * params.C, params.C};
  }
  // Row n of states, or null where there are none.
  static WKV_INLINE const Real* row_of(const void* states, int64_t n, int64_t C) {
    return states == nullptr ? nullptr : static_cast<const Real*>(states) + n * 3 * C;
  }

  struct VectorChannels {
    Channel<Vec> channel;
    Vec decay, bonus;
  };
  static WKV_INLINE VectorChannels channels_at(const Channels& channels, int64_t c, int count) {
    const auto at = [&](const void* row) { return load_some(static_cast<const Real*>(row) + c, count); };
    return {{at(channels.log_decay), at(channels.u)}, at(channels.decay), at(channels.bonus)};
  }

  static WKV_INLINE State<Vec> load_state(const Real* state, int64_t C, int64_t c, int count) {
    return {{load_some(state + c, count), load_some(state + C + c, count)}, load_some(state + 2 * C + c, count)};
  }
  static WKV_INLINE void store_state(Real* state, int64_t C, int64_t c, int count, State<Vec> value) {
    store_some(state + c, value.sums.num, count);
    store_some(state + C + c, value.sums.den, count);
    store_some(state + 2 * C + c, value.max, count);
  }

  // A line of the next sequence's state, which a short sequence would have to wait for.
  static WKV_INLINE void prefetch_state(const Real* state, int64_t C) {
    for (int64_t row = 0; row < 3 * C; row += C) {
      for (int i = 0; i < kLine; i += kLineBytes / sizeof(Real)) __builtin_prefetch(state + row + i, 0, 2);
    }
  }

  // The state before all steps.
  static WKV_INLINE State<Vec> first_state(const Real* given, int64_t C, int64_t c, int count) {
    return given == nullptr ? empty_state<Vec>() : normal_form(load_state(given, C, c, count));
  }

  // One vector's rows as they are or, where they end within the vector, as a copy filled up with zeros.
  static WKV_INLINE Rows<const Element> whole(Rows<const Element> rows, int steps, int count, Element* copy) {
    if (__builtin_expect(count == kLanes, 1)) return rows;
    std::memset(copy, 0, steps * kLanes * sizeof(Element));
    for (int64_t step = 0; step < steps; ++step)
      std::memcpy(copy + step * kLanes, rows.row(step), count * sizeof(Element));
    return {copy, kLanes};
  }

  // The gates of steps: r from one time and one channel on, or nothing.
  struct Gated {
    static constexpr int kInputs = 1;
    Rows<const Element> r;

    explicit WKV_INLINE Gated(Rows<const Element> r) : r(r) {}
    WKV_INLINE Gated(const Params& params, const SequenceView<int64_t>& view) : r(rows_of(params.r, view)) {}
    WKV_INLINE Gated from(int64_t t, int64_t c) const { return Gated(r.from(t, c)); }
    WKV_INLINE Rows<const Element> rows_or(Rows<const Element>) const { return r; }
    WKV_INLINE Gated whole(int steps, int count, Element* copy) const {
      return Gated(Kernel::whole(r, steps, count, copy));
    }

    WKV_INLINE Gate<Vec> at(int64_t step) const { return gate_of(load(r.row(step))); }

    // A subchunk's gates, all computed before they are used: their exponentials are independent of everything else, and
    // among the steps they would only lengthen what the processor has to look ahead over.
    struct Computed {
      alignas(kLineBytes) Real shares[kSubchunk * kLanes], lessers[kSubchunk * kLanes];

      WKV_INLINE Computed(const Gated& gates, int steps) {
#pragma GCC unroll 4
        for (int64_t step = 0; step < steps; ++step) {
          const Gate<Vec> gate = gates.at(step);
          store(shares + step * kLanes, gate.share);
          store(lessers + step * kLanes, gate.lesser);
        }
      }
      WKV_INLINE Gate<Vec> at(int64_t step) const {
        return {load(shares + step * kLanes), load(lessers + step * kLanes)};
      }
    };
  };
  struct Ungated {
    static constexpr int kInputs = 0;

    Ungated() = default;
    WKV_INLINE Ungated(const Params&, const SequenceView<int64_t>&) {}
    WKV_INLINE Ungated from(int64_t, int64_t) const { return *this; }
    WKV_INLINE Rows<const Element> rows_or(Rows<const Element> others) const { return others; }
    WKV_INLINE Ungated whole(int, int, Element*) const { return *this; }

    WKV_INLINE NoGate at(int64_t) const { return {}; }
    struct Computed {
      WKV_INLINE Computed(const Ungated&, int) {}
      WKV_INLINE NoGate at(int64_t) const { return {}; }
    };
  };

  // A subchunk's keys in the type of the sums: where they are, or converted once for the passes over them.
  struct Keys {
    alignas(kLineBytes) Real data[kSubchunk * kLanes];

    WKV_INLINE Rows<const Real> widen(Rows<const Element> k, int steps) {
      if constexpr (std::is_same_v<Element, Real>) {
        return k;
      } else {
        for (int64_t step = 0; step < steps; ++step) store(data + step * kLanes, load(k.row(step)));
        return {data, kLanes};
      }
    }

    // The same along with their range. Rows whose distance is a multiple of a page, as those of 1024 channels in
    // float32, are copied as well: they would evict one another from the first-level cache before the next pass.
    WKV_INLINE Rows<const Real> widen(Rows<const Element> k, int steps, StandingRange<Vec>& range) {
      constexpr bool kWidens = !std::is_same_v<Element, Real>;
      constexpr int64_t kPage = 4096 / sizeof(Element);
      const bool copies = kWidens || k.stride % kPage == 0;
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; ++step) {
        const Vec kt = load(k.row(step));
        range.add(kt);
        if (copies) store(data + step * kLanes, kt);
      }
      if constexpr (!kWidens) {
        if (!copies) return k;
      }
      return {data, kLanes};
    }
  };

  // Steps of a line that are staged before they are written to memory.
  template <int64_t kSteps>
  struct StagedSteps {
    alignas(kLineBytes) Element data[kSteps * kLine];

    WKV_INLINE Rows<Element> rows(int first) { return {data + first, kLine}; }
    WKV_INLINE void write(Rows<Element> target, int steps, int count, bool streams) {
      const Rows<Element> lines = rows(0);
      if (streams && count == kLine) {
        for (int64_t step = 0; step < steps; ++step) stream_line(target.row(step), lines.row(step));
      } else if (count == kLine) {
        for (int64_t step = 0; step < steps; ++step) std::memcpy(target.row(step), lines.row(step), kLineBytes);
      } else {
        for (int64_t step = 0; step < steps; ++step) {
          std::memcpy(target.row(step), lines.row(step), count * sizeof(Element));
        }
      }
    }
  };

  using Staged = StagedSteps<kSubchunk>;

  // A line of final states, likewise.
  struct StagedState {
    alignas(kLineBytes) Real data[3 * kLine];

    WKV_INLINE void set(int first, State<Vec> state) {
      store(data + first, state.sums.num);
      store(data + kLine + first, state.sums.den);
      store(data + 2 * kLine + first, state.max);
    }
    WKV_INLINE void write(Real* target, int64_t C, int count, bool streams) const {
      constexpr int kReals = kLineBytes / sizeof(Real);
      for (int row = 0; row < 3; ++row) {
        Real* const to = target + row * C;
        const Real* const from = data + row * kLine;
        if (count < kLine) {
          std::memcpy(to, from, count * sizeof(Real));
        } else if (streams) {
          for (int i = 0; i < kLine; i += kReals) stream_line(to + i, from + i);
        } else {
          std::memcpy(to, from, kLine * sizeof(Real));
        }
      }
    }
  };

  // Of rows of C values, `count` in all. Streaming pays once they would not stay in the caches anyway, whose last level
  // holds some megabytes a core.
  template <class Value>
  static bool worth_streaming(const Value* target, int64_t count, int64_t C) {
    constexpr int64_t kLeastBytes = 8 << 20;
    return count * int64_t(sizeof(Value)) >= kLeastBytes && C % (kLineBytes / sizeof(Value)) == 0 &&
           reinterpret_cast<uintptr_t>(target) % kLineBytes == 0;
  }
  static bool streams_sequence(void* target, const Params& params) {
    return worth_streaming(static_cast<Element*>(target), params.B * params.T * params.C, params.C);
  }
  static bool streams_states(void* target, const Params& params) {
    return worth_streaming(static_cast<Real*>(target), params.N * 3 * params.C, params.C);
  }

  // ---- the scale of a subchunk ----

  // Calls out of line: the rare path should take no registers from the common one.
  template <class Function>
  [[gnu::noinline]] static auto cold(const Function& function) {
    return function();
  }

  static WKV_INLINE RunningScale<Vec> running_scale(const VectorChannels& channels) {
    return {channels.channel, all(channels.channel.is_moderate()), channels.bonus * channels.decay};
  }

  // `enter` converts sums from the scale of the state before the subchunk to that of its steps, `leave` from there to
  // that of the state after it, where the scale is shared.
  struct SubchunkScale {
    bool is_shared;
    Vec reference_log2, enter, leave;

    WKV_INLINE SharedScale<Vec> shared(const VectorChannels& channels) const {
      return {reference_log2, channels.decay, channels.bonus};
    }
  };

  template <class Scale, class Steps>
  static WKV_INLINE State<Vec> in_kept(const Scale& scale, const SubchunkScale& kept, Vec max, State<Vec> state,
                                       const Steps& steps_in) {
    state.sums = {state.sums.num * kept.enter, state.sums.den * kept.enter};
    state = steps_in(scale, state);
    return {{state.sums.num * kept.leave, state.sums.den * kept.leave}, max};
  }

  // An empty state has no weight at all, so that its adjoint is exactly zero.
  static WKV_INLINE Vec entering(State<Vec> state, Vec weight) { return select(is_empty(state), Vec(Real(0)), weight); }

  // Advances the state over a subchunk by `steps_in(scale, state)`, in the scale that the keys allow, which it stores
  // in `kept`.
  template <class Steps>
  static WKV_INLINE State<Vec> in_scale(const VectorChannels& channels, Rows<const Real> k, int steps, State<Vec> state,
                                        SubchunkScale& kept, const Steps& steps_in) {
    const auto range = logit_range(channels, k, steps, state.max);
    // A single step has nothing to share: RunningScale takes fewer exponentials and rounds less.
    kept.is_shared = steps > 1 && all(range.fits(channels.channel));
    if (__builtin_expect(!kept.is_shared, 0)) {
      const auto scale = running_scale(channels);
      return cold([=] { return steps_in(scale, state); });
    }
    kept.reference_log2 = range.reference(channels.channel) * Vec(Real(kLog2E));
    const auto scale = kept.shared(channels);
    kept.enter = entering(state, scale.weight(state.max));
    kept.leave = Vec(Real(1)) / scale.weight(range.running);
    return in_kept(scale, kept, range.running, state, steps_in);
  }
  static WKV_INLINE LogitRange<Vec> logit_range(const VectorChannels& channels, Rows<const Real> k, int steps,
                                                Vec largest) {
    auto range = LogitRange<Vec>::from(largest);
#pragma GCC unroll 4
    for (int64_t step = 0; step < steps; ++step) range.add(channels.channel, load(k.row(step)));
    return range;
  }

  // e^x / 2^whole for any x, to the last bits: whole numbers and what is left are treated apart.
  static WKV_INLINE Vec exact_weight(Vec x, Vec whole) {
    const Vec bound{Real(120)}, nearest = nearest_whole(x * Vec(Real(kLog2E)));
    const Vec difference = larger(-bound, smaller(bound, nearest - whole));
    return exp2_small(excess_log2(x, nearest)) * exp2_in_range(difference);
  }
  // Below every max but those of empty states.
  static WKV_INLINE Vec bounded(Vec max) { return larger(Vec(Real(-(1 << 20))), max); }

  // The state with den from 1 to 2, where a max that stood left it below 1.
  static WKV_INLINE State<Vec> normalized(State<Vec> state) {
    if constexpr (!kFuses) return state;
    constexpr double kRoundedUp = 1.00001;
    const Vec den = state.sums.den, none{Real(0)};
    const Vec below = larger(smaller(exponent_of(den * Vec(Real(kRoundedUp))), none), Vec(Real(-100)));
    const Vec moves = select(none < den, below, none);
    const Vec whole = nearest_whole(bounded(state.max) * Vec(Real(kLog2E))) + moves;
    const Vec factor = exact_weight(bounded(state.max), whole) * exp2_over_max(whole);
    return {{select(moves < none, state.sums.num * factor, state.sums.num), select(moves < none, den * factor, den)},
            select(moves < none, max_of_exp2(whole), state.max)};
  }
  // The adjoint of the same state with another max.
  static WKV_INLINE Sums<Vec> with_max(Sums<Vec> adjoint, Vec max, Vec new_max) {
    if (all(max == new_max)) return adjoint;
    const Vec whole = nearest_whole(bounded(max) * Vec(Real(kLog2E)));
    const Vec factor = exact_weight(bounded(new_max), whole) * exp2_small(-excess_log2(bounded(max), whole));
    return {select(max == new_max, adjoint.num, adjoint.num * factor),
            select(max == new_max, adjoint.den, adjoint.den * factor)};
  }

  // Like in_scale, for keys whose range is known: with the scale that the state's max stands for, if they allow it.
  template <class Steps>
  static WKV_INLINE State<Vec> in_standing_scale(const VectorChannels& channels, Rows<const Real> k,
                                                 StandingRange<Vec> keys, int steps, State<Vec> state,
                                                 SubchunkScale& kept, const Steps& steps_in) {
    // A whole reference is worth nothing where the product with log2(e) is rounded before it is subtracted.
    if constexpr (!kFuses) return in_scale(channels, k, steps, state, kept, steps_in);
    kept.is_shared = true;
    if (__builtin_expect(!all(keys.fits(state, channels.channel, channels.decay)), 0)) {
      // The largest logit so far may be below a max that has stood.
      const Vec largest = state.max + exponent_of(state.sums.den) * Vec(Real(kLn2));
      const auto range = logit_range(channels, k, steps, largest);
      kept.is_shared = steps > 1 && all(range.fits(channels.channel));
      if (__builtin_expect(!kept.is_shared, 0)) {
        const auto scale = running_scale(channels);
        return cold([=] { return steps_in(scale, state); });
      }
      const Vec log2e{Real(kLog2E)};
      const auto scale = WholeScale<Vec>::of(nearest_whole(range.reference(channels.channel) * log2e + Vec(Real(0.5))),
                                             channels.decay, channels.bonus);
      kept.reference_log2 = scale.reference_log2;
      const Vec whole = nearest_whole(range.standing_max(channels.channel) * log2e);
      kept.enter = entering(state, exact_weight(clamped(state.max, scale.least), scale.reference_log2));
      kept.leave = exp2_in_range(scale.reference_log2 - whole) * exp2_over_max(whole);
      return in_kept(scale, kept, max_of_exp2(whole), state, steps_in);
    }
    const Vec whole = nearest_whole(state.max * Vec(Real(kLog2E)));
    kept.reference_log2 = whole;
    kept.enter = exp2_small(excess_log2(state.max, whole));
    kept.leave = exp2_over_max(whole);
    return in_kept(WholeScale<Vec>::of(whole, channels.decay, channels.bonus), kept, max_of_exp2(whole), state,
                   steps_in);
  }

  // The prefetches of a vector's steps: its share of a line's inputs, where a line has several vectors. It comes a row
  // at a time, because a processor waits for more than a few dozen rows at once, and into the second-level cache,
  // because rows whose distance is a multiple of a power of two would evict one another from the first. Pairs read a
  // line so seldom that this costs less than the way from the second level.
  template <int inputs>
  struct Next {
    static constexpr int kVectors = kLine / kLanes, kStreams = (inputs + kVectors - 1) / kVectors;
    Rows<const Element> streams[kStreams];

    WKV_INLINE void prefetch(int64_t step) const {
      for (const auto& stream : streams) __builtin_prefetch(stream.row(step), 0, kPairs ? 3 : 2);
    }
  };

  // Of the i-th vector.
  template <class Gates, class... Others>
  static WKV_INLINE auto next_of(int i, Gates gates, Rows<const Element> first, Others... others) {
    constexpr int kInputs = 1 + sizeof...(Others) + Gates::kInputs;
    const Rows<const Element> inputs[] = {first, others..., gates.rows_or(first)};
    Next<kInputs> next;
    for (int j = 0; j < next.kStreams; ++j) {
      Rows<const Element>& stream = next.streams[j] = inputs[0];
      for (int input = 1; input < kInputs; ++input) {
        // No array is indexed by a variable, which would have to be in memory.
        if (input <= j * next.kVectors + (next.kVectors > 1 ? i : 0)) stream = inputs[input];
      }
    }
    return next;
  }

  // ---- forward ----

  enum class Output { none, stored, streamed };

  template <Output output, class Gates, class Next>
  static WKV_INLINE State<Vec> forward_subchunk(const VectorChannels& channels, Rows<const Element> k,
                                                Rows<const Element> v, Gates gates, Next next, Rows<Element> y,
                                                int steps, State<Vec> state) {
    Keys widened;
    auto range = StandingRange<Vec>::none();
    const auto keys = widened.widen(k, steps, range);
    const typename Gates::Computed computed(gates, steps);
    const auto* const gate = &computed;
    const auto steps_in = [=](const auto& scale, State<Vec> state) WKV_INLINE_LAMBDA {
      // The exponentials come first: they are independent, the sums are not.
      alignas(kLineBytes) Real ats[kSubchunk * kLanes];
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; ++step) {
        const Vec kt = scale.logit(load(keys.row(step)));
        store(ats + step * kLanes, scale.at(state.max, kt));
        state.max = scale.next_max(state.max, kt);
      }
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; ++step) {
        next.prefetch(step);
        const Vec vt = load(v.row(step));
        const auto weights = scale.weights(load(ats + step * kLanes));
        if constexpr (output != Output::none) {
          const Vec yt = read(state.sums, weights.read, vt, gate->at(step));
          if constexpr (output == Output::streamed) {
            stream_line(y.row(step), &yt);
          } else {
            store(y.row(step), yt);
          }
        }
        state.sums = mix(state.sums, weights.advance, vt);
      }
      return state;
    };
    SubchunkScale unused;
    return in_standing_scale(channels, keys, range, steps, state, unused, steps_in);
  }

  // A step that has nothing to share an exponent with.
  template <bool writes, class Gates>
  static WKV_INLINE State<Vec> forward_step(const VectorChannels& channels, const Element* k, const Element* v,
                                            Gates gates, Element* y, State<Vec> state) {
    const auto scale = running_scale(channels);
    const Vec kt = scale.logit(load(k)), vt = load(v);
    const auto weights = scale.weights(scale.at(state.max, kt));
    if constexpr (writes) store(y, read(state.sums, weights.read, vt, gates.at(0)));
    return advance(scale, state, weights.advance, kt, vt);
  }

  template <bool writes, class Gates>
  static void forward(const ForwardParams& params, const WorkItem& item) {
    const int64_t T = item.sequence.steps, C = params.C;
    const auto k = rows_of(params.k, item.sequence), v = rows_of(params.v, item.sequence);
    const Gates gates(params, item.sequence);
    const auto y = rows_of(params.y, item.sequence, params);
    const bool streams = writes && streams_sequence(params.y, params);
    const bool streams_state = streams_states(params.state_out, params);
    const bool streams_checkpoint = streams_states(params.checkpoints, params);
    const Real* const given = row_of(params.state, item.n, C);
    Real* const state_out = static_cast<Real*>(params.state_out) + item.n * 3 * C;
    Real* const state = item.is_cut() ? static_cast<Real*>(params.states) + item.row * 3 * C : state_out;
    Real* const checkpoints = writes ? static_cast<Real*>(params.checkpoints) : nullptr;
    alignas(kLineBytes) Element k_copy[kSubchunk * kLanes], v_copy[kSubchunk * kLanes], r_copy[kSubchunk * kLanes];
    Staged y_staged;
    StagedState state_staged;
    for (int64_t t = item.t_begin; t < item.t_end; t += kSubchunk) {
      const int steps = at_most(kSubchunk, item.t_end - t);
      const bool starts = t == 0 && !item.is_cut(), ends = writes && t + steps == T;
      const auto checkpoint_after = [&](int64_t t) {
        return checkpoints + item.sequence.checkpoint_row(dtype, t) * 3 * C;
      };
      Real* const checkpoint = checkpoints != nullptr && t > 0 && t % kInterval == 0 ? checkpoint_after(t) : nullptr;
      Real* const last_checkpoint = checkpoints != nullptr && ends ? checkpoint_after(T) : nullptr;
      const Real* const next_given = starts && given != nullptr ? given + 3 * C : nullptr;
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const int width = at_most(kLine, item.c_end - line);
        // A vector that is a whole line goes to memory without being staged.
        const bool stages = kLanes < kLine || width < kLine || steps == 1;
        const int64_t next_t = t + kSubchunk;
        if (next_given != nullptr) prefetch_state(next_given + line, C);
        for (int first = 0; first < width; first += kLanes) {
          const int64_t c = line + first;
          const int count = at_most(kLanes, item.c_end - c);
          const auto next =
              next_of(first / kLanes, gates.from(next_t, line), k.from(next_t, line), v.from(next_t, line));
          State<Vec> carried = starts ? first_state(given, C, c, count) : load_state(state, C, c, count);
          if (checkpoint != nullptr) store_state(checkpoint, C, c, count, carried);
          const auto channels = channels_at(params.channels, c, count);
          const auto k_rows = whole(k.from(t, c), steps, count, k_copy);
          const auto v_rows = whole(v.from(t, c), steps, count, v_copy);
          const auto own_gates = gates.from(t, c).whole(steps, count, r_copy);
          if (steps == 1) {
            next.prefetch(0);
            carried = forward_step<writes>(channels, k_rows.row(0), v_rows.row(0), own_gates,
                                           y_staged.rows(first).row(0), carried);
          } else if constexpr (!writes) {
            carried = forward_subchunk<Output::none>(channels, k_rows, v_rows, own_gates, next, y, steps, carried);
          } else if (streams && !stages) {
            carried = forward_subchunk<Output::streamed>(channels, k_rows, v_rows, own_gates, next, y.from(t, c), steps,
                                                         carried);
          } else {
            const auto y_rows = stages ? y_staged.rows(first) : y.from(t, c);
            carried =
                forward_subchunk<Output::stored>(channels, k_rows, v_rows, own_gates, next, y_rows, steps, carried);
          }
          if (t + steps == item.t_end) carried = normalized(carried);
          if (ends) {
            state_staged.set(first, carried);
          } else {
            store_state(state, C, c, count, carried);
          }
        }
        if (ends) {
          state_staged.write(state_out + line, C, width, streams_state);
          if (checkpoints != nullptr) state_staged.write(last_checkpoint + line, C, width, streams_checkpoint);
        }
        if (writes && stages) y_staged.write(y.from(t, line), steps, width, streams);
      }
    }
    const auto fill = [&](Real* target, const Real* given) {
      for (int64_t c = item.c_begin; c < item.c_end; c += kLanes) {
        const int count = at_most(kLanes, item.c_end - c);
        store_state(target, C, c, count, first_state(given, C, c, count));
      }
    };
    if (T == 0) fill(state_out, given);
    if (checkpoints != nullptr && item.spare_checkpoint >= 0)
      fill(checkpoints + item.spare_checkpoint * 3 * C, nullptr);
  }

  // ---- one token ----

  static void step(const StepParams& params, const WorkItem& item) {
    const int64_t C = params.C;
    const Element* k = rows_of(params.k, item.sequence).data;
    const Element* v = rows_of(params.v, item.sequence).data;
    const Element* r = params.r.data != nullptr ? rows_of(params.r, item.sequence).data : nullptr;
    Element* y = static_cast<Element*>(params.y) + item.n * C;
    Real* state = static_cast<Real*>(params.state) + item.n * 3 * C;
    for (int64_t c = item.c_begin; c < item.c_end; c += kLanes) {
      const int count = at_most(kLanes, item.c_end - c);
      const State<Vec> before = load_state(state, C, c, count);
      const RunningScale<Vec> scale{channels_at(params.channels, c, count).channel};
      const Vec kt = scale.logit(load_some(k + c, count));
      const Vec vt = load_some(v + c, count);
      const auto weights = scale.weights(scale.at(before.max, kt));
      const Vec yt = read(before.sums, weights.read, vt);
      store_some(y + c, r != nullptr ? sigmoid(load_some(r + c, count)) * yt : yt, count);
      const Sums<Vec> after = mix(before.sums, weights.advance, vt);
      store_state(state, C, c, count, {after, scale.next_max(before.max, kt)});
    }
  }

  // ---- backward ----

  template <class Next>
  static WKV_INLINE State<Vec> replay_subchunk(const VectorChannels& channels, Rows<const Element> k,
                                               Rows<const Element> v, Next next, int steps, State<Vec> state,
                                               SavedStep<Vec>* saved, SubchunkScale& kept) {
    Keys widened;
    auto range = StandingRange<Vec>::none();
    const auto keys = widened.widen(k, steps, range);
    const auto steps_in = [=](const auto& scale, State<Vec> state) WKV_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int64_t step = 0; step < steps; ++step) {
        next.prefetch(step);
        const Vec kt = scale.logit(load(keys.row(step)));
        const Vec at = scale.at(state.max, kt);
        saved[step] = {state.sums, at};
        state = advance(scale, state, scale.weights(at).advance, kt, load(v.row(step)));
      }
      return state;
    };
    return in_standing_scale(channels, keys, range, steps, state, kept, steps_in);
  }

  // The adjoint of (num, den) and the sums of the gradients of log_decay and u.
  struct Reversed {
    Sums<Vec> adjoint;
    Vec g_log_decay, gu;
  };

  template <bool writes, class Gates, class Next>
  static WKV_INLINE Reversed reverse_subchunk(const VectorChannels& channels, const SubchunkScale& kept,
                                              Rows<const Element> v, Gates gates, Rows<const Element> gy, Next next,
                                              int steps, const SavedStep<Vec>* saved, Reversed carried, Element* gk,
                                              Element* gv, Element* gr) {
    const typename Gates::Computed computed(gates, steps);
    const auto* const gate = &computed;
    const auto reversed = [=](const auto& scale, Reversed carried) WKV_INLINE_LAMBDA {
      const auto take = [&](int64_t step) WKV_INLINE_LAMBDA {
        next.prefetch(step);
        const auto gradients =
            step_adjoint(scale, saved[step], load(v.row(step)), load(gy.row(step)), carried.adjoint, gate->at(step));
        if constexpr (writes) {
          store(gk + step * kLine, gradients.gk);
          store(gv + step * kLine, gradients.gv);
          if constexpr (Gates::kInputs > 0) store(gr + step * kLine, gradients.gr);
          carried.g_log_decay = carried.g_log_decay + gradients.g_log_decay;
          carried.gu = carried.gu + gradients.gu;
        }
      };
      if constexpr (kPairs) {
        for (int64_t step = steps - 1; step >= 0; --step) take(step);
      } else {
#pragma GCC unroll 2
        for (int64_t step = steps - 1; step >= 0; --step) take(step);
      }
      return carried;
    };
    if (__builtin_expect(!kept.is_shared, 0)) {
      const auto scale = running_scale(channels);
      return cold([=] { return reversed(scale, carried); });
    }
    carried.adjoint = {carried.adjoint.num * kept.leave, carried.adjoint.den * kept.leave};
    carried = reversed(kept.shared(channels), carried);
    carried.adjoint = {carried.adjoint.num * kept.enter, carried.adjoint.den * kept.enter};
    return carried;
  }

  // The adjoint after an interval: after all steps what is given, canonical, or zero.
  static WKV_INLINE Sums<Vec> first_adjoint(bool ends, const Real* gstate_out, const Real* adjoint, int64_t C,
                                            int64_t c, int count) {
    if (!ends) return {load_some(adjoint + c, count), load_some(adjoint + C + c, count)};
    if (gstate_out == nullptr) return {Vec(Real(0)), Vec(Real(0))};
    return {canonical_nan(load_some(gstate_out + c, count)), canonical_nan(load_some(gstate_out + C + c, count))};
  }

  static WKV_INLINE void add_to(double* totals, Vec values, int count) {
    Real lanes[kLanes];
    store(lanes, values);
    if (__builtin_expect(count == kLanes, 1)) {
      for (int lane = 0; lane < kLanes; ++lane) totals[lane] += lanes[lane];
    } else {
      for (int lane = 0; lane < count; ++lane) totals[lane] += lanes[lane];
    }
  }

  // The gradient of the first state: for consumers that respect the gauge, that of max follows from the others.
  static WKV_INLINE State<Vec> state_gradient(State<Vec> state, Sums<Vec> adjoint) {
    return {adjoint, rounded(state.sums.num * adjoint.num) + rounded(state.sums.den * adjoint.den)};
  }

  // A step that has nothing to share an exponent with.
  template <bool writes, class Gates>
  static WKV_INLINE Reversed backward_step(const VectorChannels& channels, State<Vec> state, const Element* k,
                                           const Element* v, Gates gates, const Element* gy, Sums<Vec> adjoint,
                                           Vec max_after, Element* gk, Element* gv, Element* gr) {
    const auto scale = running_scale(channels);
    const Vec kt = scale.logit(load(k));
    const SavedStep<Vec> before{state.sums, scale.at(state.max, kt)};
    adjoint = with_max(adjoint, max_after, scale.next_max(state.max, kt));
    const auto gradients = step_adjoint(scale, before, load(v), load(gy), adjoint, gates.at(0));
    if constexpr (writes) {
      store(gk, gradients.gk);
      store(gv, gradients.gv);
      if constexpr (Gates::kInputs > 0) store(gr, gradients.gr);
    }
    return {adjoint, gradients.g_log_decay, gradients.gu};
  }

  template <bool writes, class Gates>
  static void backward(const BackwardParams& params, const WorkItem& item) {
    const int64_t T = item.sequence.steps, C = params.C;
    const auto k = rows_of(params.k, item.sequence), v = rows_of(params.v, item.sequence);
    const Gates gates(params, item.sequence);
    const auto gy = rows_of(params.gy, item.sequence);
    const auto gk = rows_of(params.gk, item.sequence, params), gv = rows_of(params.gv, item.sequence, params);
    const auto gr = Gates::kInputs > 0 ? rows_of(params.gr, item.sequence, params) : gk;
    const auto is_streamed = [&](void* target) { return streams_sequence(target, params); };
    const bool streams =
        writes && is_streamed(params.gk) && is_streamed(params.gv) && (Gates::kInputs == 0 || is_streamed(params.gr));
    const bool streams_state = streams_states(params.gstate, params);
    const Real* const given = row_of(params.state, item.n, C);
    const Real* const gstate_out = row_of(params.gstate_out, item.n, C);
    const Real* const checkpoints = static_cast<const Real*>(params.checkpoints);
    Real* const gstate = static_cast<Real*>(params.gstate) + item.n * 3 * C;
    Real* const adjoint = item.is_cut() ? static_cast<Real*>(params.adjoints) + item.row * 2 * C : gstate;
    double* const partials = writes ? params.partials + item.partials * 2 * C : nullptr;
    if (writes && item.opens_partials) {
      for (int64_t c = item.c_begin; c < item.c_end; ++c) partials[c] = partials[C + c] = 0;
    }
    if (T == 0) {
      for (int64_t row = 0; row < 3 * C; row += C) {
        for (int64_t c = row + item.c_begin; c < row + item.c_end; ++c) {
          gstate[c] = gstate_out == nullptr ? Real(0) : gstate_out[c];
        }
      }
      return;
    }
    // Whole lines too: written step by step among the reads, they are slower where rows evict one another.
    Staged gk_staged, gv_staged, gr_staged;
    StagedState gstate_staged;
    alignas(kLineBytes) Element k_copy[kSubchunk * kLanes], v_copy[kSubchunk * kLanes], r_copy[kSubchunk * kLanes],
        gy_copy[kSubchunk * kLanes];
    SavedStep<Vec> saved[kLine / kLanes][kInterval];
    SubchunkScale scales[kLine / kLanes][kInterval / kSubchunk];
    Reversed carried[kLine / kLanes];
    for (int64_t t = (item.t_end - 1) / kInterval * kInterval; t >= item.t_begin; t -= kInterval) {
      const int steps = at_most(kInterval, item.t_end - t);
      const bool starts = t == 0, ends = t + steps == T && !item.is_cut();
      const auto checkpoint_at = [&](int64_t t) {
        return checkpoints + item.sequence.checkpoint_row(dtype, t) * 3 * C;
      };
      const Real* const state_before = starts ? nullptr : checkpoint_at(t);
      // The adjoint of the state after the steps is relative to this.
      const Real* const max_after = checkpoint_at(t + steps) + 2 * C;
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const int width = at_most(kLine, item.c_end - line);
        // The next line is prefetched; after the last one the first of as many rows before these, also those of another
        // sequence.
        const bool last = line + kLine >= item.c_end;
        const int64_t next_t = last ? t - steps : t;
        const int64_t next_line = last ? item.c_begin : line + kLine;
        const auto write = [&](int64_t t, int steps) {
          gk_staged.write(gk.from(t, line), steps, width, streams);
          gv_staged.write(gv.from(t, line), steps, width, streams);
          if constexpr (Gates::kInputs > 0) gr_staged.write(gr.from(t, line), steps, width, streams);
        };
        if (starts && given != nullptr) prefetch_state(given - 3 * C + line, C);
        if (starts && gstate_out != nullptr) prefetch_state(gstate_out - 3 * C + line, C);
        for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
          const int64_t c = line + first;
          const int count = at_most(kLanes, item.c_end - c);
          const auto channels = channels_at(params.channels, c, count);
          State<Vec> state = starts ? first_state(given, C, c, count) : load_state(state_before, C, c, count);
          carried[i] = {first_adjoint(ends, gstate_out, adjoint, C, c, count), Vec(Real(0)), Vec(Real(0))};
          if (steps == 1) {
            next_of(i, gates.from(next_t, next_line), k.from(next_t, next_line), v.from(next_t, next_line),
                    gy.from(next_t, next_line))
                .prefetch(0);
            carried[i] = backward_step<writes>(
                channels, state, whole(k.from(t, c), 1, count, k_copy).row(0),
                whole(v.from(t, c), 1, count, v_copy).row(0), gates.from(t, c).whole(1, count, r_copy),
                whole(gy.from(t, c), 1, count, gy_copy).row(0), carried[i].adjoint, load_some(max_after + c, count),
                gk_staged.data + first, gv_staged.data + first, gr_staged.data + first);
            continue;
          }
          for (int begin = 0; begin < steps; begin += kSubchunk) {
            const int own_steps = at_most(kSubchunk, steps - begin);
            state = replay_subchunk(
                channels, whole(k.from(t + begin, c), own_steps, count, k_copy),
                whole(v.from(t + begin, c), own_steps, count, v_copy),
                next_of(i, Ungated(), k.from(next_t + begin, next_line), v.from(next_t + begin, next_line)), own_steps,
                state, saved[i] + begin, scales[i][begin / kSubchunk]);
          }
          carried[i].adjoint = with_max(carried[i].adjoint, load_some(max_after + c, count), state.max);
        }
        if (writes && steps == 1) write(t, 1);
        const int last_begin = steps == 1 ? -1 : (steps - 1) / kSubchunk * kSubchunk;
        for (int begin = last_begin; begin >= 0; begin -= kSubchunk) {
          const int own_steps = at_most(kSubchunk, steps - begin);
          for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
            const int64_t c = line + first;
            const int count = at_most(kLanes, item.c_end - c);
            const auto v_rows = whole(v.from(t + begin, c), own_steps, count, v_copy);
            const auto own_gates = gates.from(t + begin, c).whole(own_steps, count, r_copy);
            carried[i] = reverse_subchunk<writes>(
                channels_at(params.channels, c, count), scales[i][begin / kSubchunk], v_rows, own_gates,
                whole(gy.from(t + begin, c), own_steps, count, gy_copy),
                next_of(i, gates.from(next_t + begin, next_line), gy.from(next_t + begin, next_line)), own_steps,
                saved[i] + begin, carried[i], gk_staged.data + first, gv_staged.data + first, gr_staged.data + first);
          }
          if constexpr (writes) write(t + begin, own_steps);
        }
        for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
          const int64_t c = line + first;
          const int count = at_most(kLanes, item.c_end - c);
          if (starts) {
            gstate_staged.set(first, state_gradient(first_state(given, C, c, count), carried[i].adjoint));
          } else {
            store_some(adjoint + c, carried[i].adjoint.num, count);
            store_some(adjoint + C + c, carried[i].adjoint.den, count);
          }
          if constexpr (writes) {
            add_to(partials + c, carried[i].g_log_decay, count);
            add_to(partials + C + c, carried[i].gu, count);
          }
        }
        if (starts) gstate_staged.write(gstate + line, C, width, streams_state);
      }
    }
  }

  static void exponentiate(int64_t C, Real* rows) {
    for (int64_t c = 0; c < 2 * C; c += kLanes) {
      const int count = at_most(kLanes, 2 * C - c);
      const Vec x = load_some(rows + c, count);
      const Vec smaller = exp_nonpositive(-abs(x));
      store_some(rows + 2 * C + c, select(x >= Vec(Real(0)), Vec(Real(1)) / smaller, smaller), count);
    }
  }
};

// ---- one entry per operation ----

inline void exponentiate(DType dtype, int64_t C, void* rows) {
  with_dtype(dtype, [&](auto type) {
    using K = Kernel<type.value>;
    K::exponentiate(C, static_cast<typename K::Real*>(rows));
  });
}

inline void forward(const ForwardParams& params, const WorkItem& item) {
  with_dtype(params.dtype, [&](auto type) {
    using K = Kernel<type.value>;
    if (params.y == nullptr) {
      K::template forward<false, typename K::Ungated>(params, item);
    } else if (params.r.data == nullptr) {
      K::template forward<true, typename K::Ungated>(params, item);
    } else {
      K::template forward<true, typename K::Gated>(params, item);
    }
  });
}

inline void step(const StepParams& params, const WorkItem& item) {
  with_dtype(params.dtype, [&](auto type) { Kernel<type.value>::step(params, item); });
}

inline void backward(const BackwardParams& params, const WorkItem& item) {
  with_dtype(params.dtype, [&](auto type) {
    using K = Kernel<type.value>;
    const bool writes = params.partials != nullptr;
    if (params.r.data == nullptr) {
      writes ? K::template backward<true, typename K::Ungated>(params, item)
             : K::template backward<false, typename K::Ungated>(params, item);
    } else {
      writes ? K::template backward<true, typename K::Gated>(params, item)
             : K::template backward<false, typename K::Gated>(params, item);
    }
  });
}

}  // namespace WKV_ISA
}  // namespace wkv::cpu
