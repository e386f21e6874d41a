// The CPU walks over time, forward and backward, and the one token of a step. A vector holds neighbouring channels; a
// tile of steps is walked for one vector after the other, so that memory is read row by row and the sums stay in
// registers.
//
// Included once per instruction set, by a file that has defined WKV_ISA, WKV_SIMD_BYTES and WKV_ISA's runs_here.
#pragma once

#include <type_traits>

#include "../common/math.h"
#include "isa.h"
#include "simd.h"

namespace wkv {
namespace WKV_ISA {

// Steps that share one exponent, and one pass over k for their range.
constexpr int kTileSteps = 16;

template <class Element>
struct StateType {
  using type = float;
};
template <>
struct StateType<double> {
  using type = double;
};

// A sequence seen from one time and one channel on.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;

  WKV_INLINE Element* row(int step) const { return data + step * stride; }
  WKV_INLINE Rows from(int64_t t, int64_t c) const { return {data + t * stride + c, stride}; }
};

template <class Element>
Rows<const Element> rows_of(const Sequence& sequence, int64_t b) {
  return {static_cast<const Element*>(sequence.data) + b * sequence.batch_stride, sequence.time_stride};
}

template <class Element>
Rows<Element> rows_of(void* contiguous, int64_t b, int64_t T, int64_t C) {
  return {static_cast<Element*>(contiguous) + b * T * C, C};
}

template <class Element>
struct Walk {
  using Real = typename StateType<Element>::type;
  using Lanes = Vec<Real>;
  static constexpr int kLanes = Lanes::lanes;
  static constexpr int64_t kInterval = 16 * sizeof(Real);
  static_assert(kInterval % kTileSteps == 0, "a tile must not cross a checkpoint");

  struct ChannelVector {
    Channel<Lanes> channel;
    Lanes decay, bonus;
  };

  static WKV_INLINE ChannelVector channels_at(const Parameters& parameters, int64_t c, int count) {
    const auto at = [&](const void* values) { return load_some(static_cast<const Real*>(values) + c, count); };
    return {{at(parameters.log_decay), at(parameters.u)}, at(parameters.decay), at(parameters.bonus)};
  }

  static WKV_INLINE State<Lanes> load_state(const Real* state, int64_t C, int64_t c, int count) {
    return {{load_some(state + c, count), load_some(state + C + c, count)}, load_some(state + 2 * C + c, count)};
  }

  static WKV_INLINE void store_state(Real* state, int64_t C, int64_t c, int count, State<Lanes> value) {
    store_some(state + c, value.sums.num, count);
    store_some(state + C + c, value.sums.den, count);
    store_some(state + 2 * C + c, value.max, count);
  }

  // A column is the channels of one cache line, which is written to memory whole.
  static constexpr int kColumn = kLineBytes / sizeof(Element);

  static WKV_INLINE int at_most(int limit, int64_t left) { return static_cast<int>(left < limit ? left : limit); }

  // Calls out of line: what seldom runs should take no registers from what always does.
  template <class Function>
  [[gnu::noinline]] static auto apart(const Function& function) {
    return function();
  }

  // Asks for a tile's rows of one column, into the second-level cache: rows whose distance is a multiple of a power of
  // two would evict one another from the first.
  static WKV_INLINE void prefetch(Rows<const Element> tile) {
    for (int step = 0; step < kTileSteps; ++step) __builtin_prefetch(tile.row(step), 0, 2);
  }

  // One vector's rows as they are or, where they end within the vector, as a copy filled up with zeros.
  static WKV_INLINE Rows<const Element> whole(Rows<const Element> rows, int steps, int count, Element* copy) {
    if (__builtin_expect(count == kLanes, 1)) return rows;
    std::memset(copy, 0, steps * kLanes * sizeof(Element));
    for (int step = 0; step < steps; ++step) std::memcpy(copy + step * kLanes, rows.row(step), count * sizeof(Element));
    return {copy, kLanes};
  }

  // A tile of a column on its way to memory.
  struct Staged {
    alignas(kLineBytes) Element data[kTileSteps * kColumn];

    WKV_INLINE Element* row(int step) { return data + step * kColumn; }
    WKV_INLINE Rows<Element> rows(int first) { return {data + first, kColumn}; }
    WKV_INLINE void write(Rows<Element> target, int steps, int count, bool streams) {
      if (streams && count == kColumn) {
        for (int step = 0; step < steps; ++step) stream_line(target.row(step), row(step));
      } else if (count == kColumn) {
        for (int step = 0; step < steps; ++step) std::memcpy(target.row(step), row(step), kLineBytes);
      } else {
        for (int step = 0; step < steps; ++step) std::memcpy(target.row(step), row(step), count * sizeof(Element));
      }
    }
  };

  // Streaming pays once the result would not stay in the caches anyway, whose last level holds some megabytes a core.
  static bool worth_streaming(const void* target, int64_t B, int64_t T, int64_t C) {
    constexpr int64_t kLeastBytes = 8 << 20;
    return B * T * C * int64_t(sizeof(Element)) >= kLeastBytes && C % kColumn == 0 &&
           reinterpret_cast<uintptr_t>(target) % kLineBytes == 0;
  }

  // A tile's keys in the type of the sums: where they are, or converted once for the passes over them.
  struct Keys {
    alignas(kLineBytes) Real data[kTileSteps * kLanes];

    WKV_INLINE Rows<const Real> widen(Rows<const Element> k, int steps) {
      if constexpr (std::is_same_v<Element, Real>) {
        return k;
      } else {
        for (int step = 0; step < steps; ++step) store(data + step * kLanes, load(k.row(step)));
        return {data, kLanes};
      }
    }
  };

  static WKV_INLINE TileRange<Lanes> range_of(Rows<const Real> k, int steps, Channel<Lanes> channel, Lanes max) {
    auto range = TileRange<Lanes>::from(max);
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) range.add(channel, load(k.row(step)));
    return range;
  }

  // A single step has nothing to share, and its exponentials are fewer and closer without.
  static WKV_INLINE bool shares(const TileRange<Lanes>& range, const ChannelVector& channels, int steps) {
    return steps > 1 && all(range.fits(channels.channel));
  }

  static WKV_INLINE SharedScale<Lanes> shared_scale(const ChannelVector& channels, const TileRange<Lanes>& range) {
    return {range.reference(channels.channel) * Lanes(Real(kLog2E)), channels.decay, channels.bonus};
  }

  static WKV_INLINE RunningScale<Lanes> running_scale(const ChannelVector& channels) {
    return {channels.channel, all(channels.channel.is_moderate()), channels.bonus * channels.decay};
  }

  // ---- forward ----

  enum class Output { none, stored, streamed };

  template <Output output, class Scale>
  static WKV_INLINE State<Lanes> forward_steps(const Scale& scale, Rows<const Real> k, Rows<const Element> v,
                                               Rows<Element> y, int steps, State<Lanes> state) {
    // The exponentials first: they do not wait for one another as the sums do.
    alignas(kLineBytes) Real ats[kTileSteps * kLanes];
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const Lanes kt = scale.logit(load(k.row(step)));
      store(ats + step * kLanes, scale.at(state.max, kt));
      state.max = scale.next_max(state.max, kt);
    }
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const Lanes vt = load(v.row(step));
      const auto weights = scale.weights(load(ats + step * kLanes));
      if constexpr (output != Output::none) {
        const Sums<Lanes> now = mix(state.sums, weights.read, vt);
        const Lanes yt = now.num / now.den;
        if constexpr (output == Output::streamed) {
          stream_line(y.row(step), &yt);
        } else {
          store(y.row(step), yt);
        }
      }
      state.sums = mix(state.sums, weights.advance, vt);
    }
    return state;
  }

  template <Output output>
  static WKV_INLINE State<Lanes> forward_tile(const ChannelVector& channels, Rows<const Element> k,
                                              Rows<const Element> v, Rows<Element> y, int steps, State<Lanes> state) {
    Keys widened;
    const auto keys = widened.widen(k, steps);
    const auto range = range_of(keys, steps, channels.channel, state.max);
    if (__builtin_expect(!shares(range, channels, steps), 0)) {
      const auto scale = running_scale(channels);
      return apart([=] { return forward_steps<output>(scale, keys, v, y, steps, state); });
    }
    const auto scale = shared_scale(channels, range);
    const Lanes enter = scale.weight(state.max);
    const Lanes leave = Lanes(Real(1)) / scale.weight(range.running);
    state.sums = {state.sums.num * enter, state.sums.den * enter};
    state = forward_steps<output>(scale, keys, v, y, steps, state);
    return {{state.sums.num * leave, state.sums.den * leave}, range.running};
  }

  template <bool writes_y>
  static void forward_span(const ForwardProblem& problem, const Parameters& parameters, const Span& span, Real* state) {
    const int64_t C = problem.C;
    const auto k = rows_of<Element>(problem.k, span.b);
    const auto v = rows_of<Element>(problem.v, span.b);
    const auto y = rows_of<Element>(problem.y, span.b, problem.T, C);
    const bool streams = writes_y && worth_streaming(problem.y, problem.B, problem.T, C);
    // Where a vector is a whole line, it need not be staged.
    const bool streams_vectors = streams && sizeof(Lanes) == kLineBytes && kLanes == kColumn;
    Real* checkpoints = static_cast<Real*>(problem.checkpoints);
    alignas(kLineBytes) Element k_copy[kTileSteps * kLanes], v_copy[kTileSteps * kLanes];
    Staged y_staged;
    for (int64_t t = span.t_begin; t < span.t_end; t += kTileSteps) {
      const int steps = at_most(kTileSteps, span.t_end - t);
      const bool saves = writes_y && checkpoints != nullptr && t > 0 && t % kInterval == 0;
      Real* checkpoint =
          saves ? checkpoints + (span.b * checkpoint_count(problem.dtype, problem.T) + t / kInterval - 1) * 3 * C
                : nullptr;
      for (int64_t column = span.c_begin; column < span.c_end; column += kColumn) {
        const int width = at_most(kColumn, span.c_end - column);
        prefetch(k.from(t + kTileSteps, column));
        prefetch(v.from(t + kTileSteps, column));
        for (int first = 0; first < width; first += kLanes) {
          const int64_t c = column + first;
          const int count = at_most(kLanes, span.c_end - c);
          State<Lanes> carried = load_state(state, C, c, count);
          if (saves) store_state(checkpoint, C, c, count, carried);
          const auto channels = channels_at(parameters, c, count);
          const auto k_tile = whole(k.from(t, c), steps, count, k_copy);
          const auto v_tile = whole(v.from(t, c), steps, count, v_copy);
          if constexpr (!writes_y) {
            carried = forward_tile<Output::none>(channels, k_tile, v_tile, y, steps, carried);
          } else if (streams_vectors) {
            carried = forward_tile<Output::streamed>(channels, k_tile, v_tile, y.from(t, c), steps, carried);
          } else {
            carried = forward_tile<Output::stored>(channels, k_tile, v_tile, y_staged.rows(first), steps, carried);
          }
          store_state(state, C, c, count, carried);
        }
        if (writes_y && !streams_vectors) y_staged.write(y.from(t, column), steps, width, streams);
      }
    }
    if (streams) finish_streaming();
  }

  // ---- one token ----

  static void step_span(const StepProblem& problem, const Parameters& parameters, const Span& span) {
    const int64_t C = problem.C;
    const Element* k = rows_of<Element>(problem.k, span.b).data;
    const Element* v = rows_of<Element>(problem.v, span.b).data;
    const Element* r = problem.r.data != nullptr ? rows_of<Element>(problem.r, span.b).data : nullptr;
    Element* y = static_cast<Element*>(problem.y) + span.b * C;
    Real* state = static_cast<Real*>(problem.state) + span.b * 3 * C;
    for (int64_t c = span.c_begin; c < span.c_end; c += kLanes) {
      const int count = at_most(kLanes, span.c_end - c);
      const State<Lanes> before = load_state(state, C, c, count);
      const RunningScale<Lanes> scale{channels_at(parameters, c, count).channel};
      const Lanes kt = scale.logit(load_some(k + c, count));
      const Lanes vt = load_some(v + c, count);
      const auto weights = scale.weights(scale.at(before.max, kt));
      const Sums<Lanes> now = mix(before.sums, weights.read, vt);
      const Lanes yt = now.num / now.den;
      store_some(y + c, r != nullptr ? sigmoid(load_some(r + c, count)) * yt : yt, count);
      const Sums<Lanes> after = mix(before.sums, weights.advance, vt);
      store_state(state, C, c, count, {after, scale.next_max(before.max, kt)});
    }
  }

  // ---- backward ----

  // The state before a step, in its tile's scale.
  struct SavedStep {
    Sums<Lanes> sums;
    Lanes at;
  };

  // Sums in the state's scale times `enter` are in the tile's; times `leave` they are back.
  struct SavedTile {
    bool shared;
    Lanes reference_log2, enter, leave;
  };

  template <class Scale>
  static WKV_INLINE State<Lanes> replay_steps(const Scale& scale, Rows<const Real> k, Rows<const Element> v, int steps,
                                              State<Lanes> state, SavedStep* saved) {
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const Lanes kt = scale.logit(load(k.row(step)));
      const Lanes at = scale.at(state.max, kt);
      saved[step] = {state.sums, at};
      state = {mix(state.sums, scale.weights(at).advance, load(v.row(step))), scale.next_max(state.max, kt)};
    }
    return state;
  }

  static WKV_INLINE State<Lanes> replay_tile(const ChannelVector& channels, Rows<const Element> k,
                                             Rows<const Element> v, int steps, State<Lanes> state, SavedStep* saved,
                                             SavedTile& tile) {
    Keys widened;
    const auto keys = widened.widen(k, steps);
    const auto range = range_of(keys, steps, channels.channel, state.max);
    tile.shared = shares(range, channels, steps);
    if (__builtin_expect(!tile.shared, 0)) {
      const auto scale = running_scale(channels);
      return apart([=] { return replay_steps(scale, keys, v, steps, state, saved); });
    }
    const auto scale = shared_scale(channels, range);
    tile.reference_log2 = scale.reference_log2;
    tile.enter = scale.weight(state.max);
    tile.leave = Lanes(Real(1)) / scale.weight(range.running);
    state.sums = {state.sums.num * tile.enter, state.sums.den * tile.enter};
    state = replay_steps(scale, keys, v, steps, state, saved);
    return {{state.sums.num * tile.leave, state.sums.den * tile.leave}, range.running};
  }

  // What the reverse walk carries: the state's adjoint and the sums of the parameters' gradients.
  struct Carried {
    Sums<Lanes> adjoint;
    Lanes g_log_decay, gu;
  };

  template <bool writes, class Scale>
  static WKV_INLINE Carried reverse_steps(const Scale& scale, Rows<const Element> v, Rows<const Element> gy, int steps,
                                          const SavedStep* saved, Carried carried, Element* gk, Element* gv) {
#pragma GCC unroll 2
    for (int step = steps - 1; step >= 0; --step) {
      const Lanes vt = load(v.row(step));
      const SavedStep& before = saved[step];
      const auto weights = scale.weights(before.at);
      StepGradients<Lanes> at_step;
      advance_adjoint(before.sums, weights.advance, vt, carried.adjoint, at_step);
      read_adjoint(before.sums, weights.read, vt, load(gy.row(step)), carried.adjoint, at_step);
      if constexpr (writes) {
        store(gk + step * kColumn, at_step.gk);
        store(gv + step * kColumn, at_step.gv);
        carried.g_log_decay = carried.g_log_decay + at_step.g_log_decay;
        carried.gu = carried.gu + at_step.gu;
      }
    }
    return carried;
  }

  template <bool writes>
  static WKV_INLINE Carried reverse_tile(const ChannelVector& channels, const SavedTile& tile, Rows<const Element> v,
                                         Rows<const Element> gy, int steps, const SavedStep* saved, Carried carried,
                                         Element* gk, Element* gv) {
    if (__builtin_expect(!tile.shared, 0)) {
      const auto scale = running_scale(channels);
      return apart([=] { return reverse_steps<writes>(scale, v, gy, steps, saved, carried, gk, gv); });
    }
    const SharedScale<Lanes> scale{tile.reference_log2, channels.decay, channels.bonus};
    carried.adjoint = {carried.adjoint.num * tile.leave, carried.adjoint.den * tile.leave};
    carried = reverse_steps<writes>(scale, v, gy, steps, saved, carried, gk, gv);
    carried.adjoint = {carried.adjoint.num * tile.enter, carried.adjoint.den * tile.enter};
    return carried;
  }

  static WKV_INLINE void add_to(double* totals, Lanes values, int count) {
    Real lanes[kLanes];
    store(lanes, values);
    for (int lane = 0; lane < count; ++lane) totals[lane] += lanes[lane];
  }

  template <bool writes>
  static void backward_span(const BackwardProblem& problem, const Parameters& parameters, const Span& span,
                            Real* adjoint, double* gw_gu) {
    const int64_t C = problem.C;
    const auto k = rows_of<Element>(problem.k, span.b);
    const auto v = rows_of<Element>(problem.v, span.b);
    const auto gy = rows_of<Element>(problem.gy, span.b);
    const auto gk = rows_of<Element>(problem.gk, span.b, problem.T, C);
    const auto gv = rows_of<Element>(problem.gv, span.b, problem.T, C);
    const bool streams = writes && worth_streaming(problem.gk, problem.B, problem.T, C) &&
                         worth_streaming(problem.gv, problem.B, problem.T, C);
    const Real* first_state = static_cast<const Real*>(problem.state) + span.b * 3 * C;
    const Real* checkpoints =
        static_cast<const Real*>(problem.checkpoints) + span.b * checkpoint_count(problem.dtype, problem.T) * 3 * C;
    Staged gk_staged, gv_staged;
    alignas(kLineBytes) Element k_copy[kTileSteps * kLanes], v_copy[kTileSteps * kLanes], gy_copy[kTileSteps * kLanes];
    SavedStep saved[kColumn / kLanes][kInterval];
    SavedTile tiles[kColumn / kLanes][kInterval / kTileSteps];
    Carried carried[kColumn / kLanes];
    const int64_t last_chunk = (span.t_end - 1) / kInterval;
    for (int64_t chunk = last_chunk; chunk >= span.t_begin / kInterval; --chunk) {
      const int64_t t = chunk * kInterval;
      const int steps = at_most(kInterval, span.t_end - t);
      const Real* chunk_state = chunk == 0 ? first_state : checkpoints + (chunk - 1) * 3 * C;
      for (int64_t column = span.c_begin; column < span.c_end; column += kColumn) {
        const int width = at_most(kColumn, span.c_end - column);
        // What comes next is asked for a tile at a time: all at once, it would hold up what is needed now.
        const bool last = column + kColumn >= span.c_end;
        const int64_t next_t = last ? t - kInterval : t;
        const int64_t next_column = last ? span.c_begin : column + kColumn;
        for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
          const int64_t c = column + first;
          const int count = at_most(kLanes, span.c_end - c);
          const auto channels = channels_at(parameters, c, count);
          State<Lanes> state = load_state(chunk_state, C, c, count);
          for (int begin = 0; begin < steps; begin += kTileSteps) {
            if (first == 0) {
              prefetch(k.from(next_t + begin, next_column));
              prefetch(v.from(next_t + begin, next_column));
            }
            const int tile_steps = at_most(kTileSteps, steps - begin);
            state = replay_tile(channels, whole(k.from(t + begin, c), tile_steps, count, k_copy),
                                whole(v.from(t + begin, c), tile_steps, count, v_copy), tile_steps, state,
                                saved[i] + begin, tiles[i][begin / kTileSteps]);
          }
          carried[i] = {
              {load_some(adjoint + c, count), load_some(adjoint + C + c, count)}, Lanes(Real(0)), Lanes(Real(0))};
        }
        for (int begin = (steps - 1) / kTileSteps * kTileSteps; begin >= 0; begin -= kTileSteps) {
          prefetch(gy.from(next_t + begin, next_column));
          const int tile_steps = at_most(kTileSteps, steps - begin);
          for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
            const int64_t c = column + first;
            const int count = at_most(kLanes, span.c_end - c);
            carried[i] =
                reverse_tile<writes>(channels_at(parameters, c, count), tiles[i][begin / kTileSteps],
                                     whole(v.from(t + begin, c), tile_steps, count, v_copy),
                                     whole(gy.from(t + begin, c), tile_steps, count, gy_copy), tile_steps,
                                     saved[i] + begin, carried[i], gk_staged.row(0) + first, gv_staged.row(0) + first);
          }
          if constexpr (writes) {
            gk_staged.write(gk.from(t + begin, column), tile_steps, width, streams);
            gv_staged.write(gv.from(t + begin, column), tile_steps, width, streams);
          }
        }
        for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
          const int64_t c = column + first;
          const int count = at_most(kLanes, span.c_end - c);
          store_some(adjoint + c, carried[i].adjoint.num, count);
          store_some(adjoint + C + c, carried[i].adjoint.den, count);
          if constexpr (writes) {
            add_to(gw_gu + c, carried[i].g_log_decay, count);
            add_to(gw_gu + C + c, carried[i].gu, count);
          }
        }
      }
    }
    if (streams) finish_streaming();
  }

  static void exponentiate(int64_t C, const Real* log_decay, const Real* u, Real* decay, Real* bonus) {
    for (int64_t c = 0; c < C; c += kLanes) {
      const int count = static_cast<int>(C - c < kLanes ? C - c : kLanes);
      const Lanes u_c = load_some(u + c, count);
      const Lanes smaller = exp_nonpositive(-abs(u_c));
      store_some(decay + c, exp_nonpositive(load_some(log_decay + c, count)), count);
      store_some(bonus + c, select(u_c >= Lanes(Real(0)), Lanes(Real(1)) / smaller, smaller), count);
    }
  }
};

// ---- one entry per operation, the element type chosen here ----

template <class Function>
void with_element(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::float16:
      return function(Half{});
    case DType::bfloat16:
      return function(Bfloat16{});
    case DType::float64:
      return function(double{});
  }
}

inline void exponentiate(DType dtype, int64_t C, const void* log_decay, const void* u, void* decay, void* bonus) {
  with_element(dtype, [&](auto element) {
    using W = Walk<decltype(element)>;
    using Real = typename W::Real;
    W::exponentiate(C, static_cast<const Real*>(log_decay), static_cast<const Real*>(u), static_cast<Real*>(decay),
                    static_cast<Real*>(bonus));
  });
}

inline void forward(const ForwardProblem& problem, const Parameters& parameters, const Span& span, void* state) {
  with_element(problem.dtype, [&](auto element) {
    using W = Walk<decltype(element)>;
    const auto walk = problem.y != nullptr ? W::template forward_span<true> : W::template forward_span<false>;
    walk(problem, parameters, span, static_cast<typename W::Real*>(state));
  });
}

inline void step(const StepProblem& problem, const Parameters& parameters, const Span& span) {
  with_element(problem.dtype, [&](auto element) { Walk<decltype(element)>::step_span(problem, parameters, span); });
}

inline void backward(const BackwardProblem& problem, const Parameters& parameters, const Span& span, void* adjoint,
                     double* gw_gu) {
  with_element(problem.dtype, [&](auto element) {
    using W = Walk<decltype(element)>;
    const auto walk = gw_gu != nullptr ? W::template backward_span<true> : W::template backward_span<false>;
    walk(problem, parameters, span, static_cast<typename W::Real*>(adjoint), gw_gu);
  });
}

inline constexpr CpuKernels kKernels = {WKV_ISA_NAME, runs_here, exponentiate, forward, step, backward};

}  // namespace WKV_ISA
}  // namespace wkv
