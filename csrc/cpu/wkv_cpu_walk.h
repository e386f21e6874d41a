// The CPU walks over time, forward and backward. A vector holds neighbouring channels; a tile of steps is walked for
// one vector after the other, so that memory is read row by row and the sums stay in registers.
//
// Included once per instruction set, by a file that has defined WKV_ISA and WKV_SIMD_BYTES.
#pragma once

#include "../wkv_math.h"
#include "simd.h"
#include "wkv_cpu_kernels.h"

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

  static WKV_INLINE Lanes load_key(const Element* k, int count) { return key_logit(load_some(k, count)); }

  // Asks for the rows a tile ahead, into the second-level cache: rows whose distance is a power of two would evict one
  // another from the first.
  static WKV_INLINE void prefetch(const Element* row) { __builtin_prefetch(row, 0, 2); }

  static WKV_INLINE TileRange<Lanes> range_of(Rows<const Element> k, int steps, int count, Channel<Lanes> channel,
                                              Lanes max) {
    auto range = TileRange<Lanes>::from(max);
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) range.add(channel, load_key(k.row(step), count));
    return range;
  }

  static WKV_INLINE SharedScale<Lanes> shared_scale(const ChannelVector& channels, const TileRange<Lanes>& range) {
    return {range.reference(channels.channel) * Lanes(Real(kLog2E)), channels.decay, channels.bonus};
  }

  // ---- forward ----

  template <bool writes_y, class Scale>
  static WKV_INLINE State<Lanes> forward_steps(const Scale& scale, Rows<const Element> k, Rows<const Element> v,
                                               Rows<Element> y, int steps, int count, State<Lanes> state) {
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const Lanes kt = load_key(k.row(step), count);
      const Lanes vt = load_some(v.row(step), count);
      const Lanes at = scale.at(state.max, kt);
      if constexpr (writes_y) {
        const Sums<Lanes> now = mix(state.sums, scale.read_weights(at, kt), vt);
        store_some(y.row(step), now.num / now.den, count);
      }
      state = {mix(state.sums, scale.advance_weights(at, kt), vt), scale.next_max(state.max, kt)};
    }
    return state;
  }

  template <bool writes_y>
  static WKV_INLINE State<Lanes> forward_tile(const ChannelVector& channels, Rows<const Element> k,
                                              Rows<const Element> v, Rows<Element> y, int steps, int count,
                                              State<Lanes> state) {
    const auto range = range_of(k, steps, count, channels.channel, state.max);
    if (__builtin_expect(!all(range.fits(channels.channel)), 0)) {
      return forward_steps<writes_y>(RunningScale<Lanes>{channels.channel}, k, v, y, steps, count, state);
    }
    const auto scale = shared_scale(channels, range);
    const Lanes enter = scale.weight(state.max);
    const Lanes leave = Lanes(Real(1)) / scale.weight(range.running);
    state.sums = {state.sums.num * enter, state.sums.den * enter};
    state = forward_steps<writes_y>(scale, k, v, y, steps, count, state);
    return {{state.sums.num * leave, state.sums.den * leave}, range.running};
  }

  template <bool writes_y>
  static void forward_span(const ForwardProblem& problem, const Parameters& parameters, const Span& span, Real* state) {
    const int64_t C = problem.C;
    const auto k = rows_of<Element>(problem.k, span.b);
    const auto v = rows_of<Element>(problem.v, span.b);
    const auto y = rows_of<Element>(problem.y, span.b, problem.T, C);
    Real* checkpoints = static_cast<Real*>(problem.checkpoints);
    for (int64_t t = span.t_begin; t < span.t_end; t += kTileSteps) {
      const int steps = static_cast<int>(span.t_end - t < kTileSteps ? span.t_end - t : kTileSteps);
      const bool saves = writes_y && checkpoints != nullptr && t > 0 && t % kInterval == 0;
      Real* checkpoint =
          saves ? checkpoints + (span.b * checkpoint_count(problem.dtype, problem.T) + t / kInterval - 1) * 3 * C
                : nullptr;
      for (int64_t c = span.c_begin; c < span.c_end; c += kLanes) {
        const int count = static_cast<int>(span.c_end - c < kLanes ? span.c_end - c : kLanes);
        const auto k_tile = k.from(t, c);
        const auto v_tile = v.from(t, c);
        for (int step = 0; step < kTileSteps; ++step) {
          prefetch(k_tile.row(kTileSteps + step));
          prefetch(v_tile.row(kTileSteps + step));
        }
        State<Lanes> carried = load_state(state, C, c, count);
        if (saves) store_state(checkpoint, C, c, count, carried);
        const auto channels = channels_at(parameters, c, count);
        const auto y_tile = writes_y ? y.from(t, c) : y;
        // The usual tile with its sizes as constants; the rest by the same code.
        carried = steps == kTileSteps && count == kLanes
                      ? forward_tile<writes_y>(channels, k_tile, v_tile, y_tile, kTileSteps, kLanes, carried)
                      : forward_tile<writes_y>(channels, k_tile, v_tile, y_tile, steps, count, carried);
        store_state(state, C, c, count, carried);
      }
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
  static WKV_INLINE State<Lanes> replay_steps(const Scale& scale, Rows<const Element> k, Rows<const Element> v,
                                              int steps, int count, State<Lanes> state, SavedStep* saved) {
#pragma GCC unroll 4
    for (int step = 0; step < steps; ++step) {
      const Lanes kt = load_key(k.row(step), count);
      const Lanes vt = load_some(v.row(step), count);
      const Lanes at = scale.at(state.max, kt);
      saved[step] = {state.sums, at};
      state = {mix(state.sums, scale.advance_weights(at, kt), vt), scale.next_max(state.max, kt)};
    }
    return state;
  }

  static WKV_INLINE State<Lanes> replay_tile(const ChannelVector& channels, Rows<const Element> k,
                                             Rows<const Element> v, int steps, int count, State<Lanes> state,
                                             SavedStep* saved, SavedTile& tile) {
    const auto range = range_of(k, steps, count, channels.channel, state.max);
    tile.shared = all(range.fits(channels.channel));
    if (__builtin_expect(!tile.shared, 0)) {
      return replay_steps(RunningScale<Lanes>{channels.channel}, k, v, steps, count, state, saved);
    }
    const auto scale = shared_scale(channels, range);
    tile.reference_log2 = scale.reference_log2;
    tile.enter = scale.weight(state.max);
    tile.leave = Lanes(Real(1)) / scale.weight(range.running);
    state.sums = {state.sums.num * tile.enter, state.sums.den * tile.enter};
    state = replay_steps(scale, k, v, steps, count, state, saved);
    return {{state.sums.num * tile.leave, state.sums.den * tile.leave}, range.running};
  }

  struct Gradients {
    Rows<Element> gk, gv;
    Lanes g_log_decay, gu;
  };

  template <bool writes, class Scale>
  static WKV_INLINE void reverse_steps(const Scale& scale, Rows<const Element> k, Rows<const Element> v,
                                       Rows<const Element> gy, int steps, int count, const SavedStep* saved,
                                       Sums<Lanes>& adjoint, Gradients& gradients) {
#pragma GCC unroll 2
    for (int step = steps - 1; step >= 0; --step) {
      const Lanes kt = load_key(k.row(step), count);
      const Lanes vt = load_some(v.row(step), count);
      const Lanes gyt = load_some(gy.row(step), count);
      const SavedStep& before = saved[step];
      StepGradients<Lanes> at_step;
      advance_adjoint(before.sums, scale.advance_weights(before.at, kt), vt, adjoint, at_step);
      read_adjoint(before.sums, scale.read_weights(before.at, kt), vt, gyt, adjoint, at_step);
      if constexpr (writes) {
        store_some(gradients.gk.row(step), at_step.gk, count);
        store_some(gradients.gv.row(step), at_step.gv, count);
        gradients.g_log_decay = gradients.g_log_decay + at_step.g_log_decay;
        gradients.gu = gradients.gu + at_step.gu;
      }
    }
  }

  template <bool writes>
  static WKV_INLINE void backward_chunk(const ChannelVector& channels, Rows<const Element> k, Rows<const Element> v,
                                        Rows<const Element> gy, int steps, int count, State<Lanes> state,
                                        Sums<Lanes>& adjoint, Gradients& gradients) {
    SavedStep saved[kInterval];
    SavedTile tiles[kInterval / kTileSteps];
    const auto steps_from = [&](int begin) { return steps - begin < kTileSteps ? steps - begin : kTileSteps; };
    for (int begin = 0; begin < steps; begin += kTileSteps) {
      state = replay_tile(channels, k.from(begin, 0), v.from(begin, 0), steps_from(begin), count, state, saved + begin,
                          tiles[begin / kTileSteps]);
    }
    for (int begin = (steps - 1) / kTileSteps * kTileSteps; begin >= 0; begin -= kTileSteps) {
      const SavedTile& tile = tiles[begin / kTileSteps];
      const Gradients at_tile = {gradients.gk.from(begin, 0), gradients.gv.from(begin, 0), gradients.g_log_decay,
                                 gradients.gu};
      Gradients tile_gradients = at_tile;
      const auto reverse = [&](const auto& scale) WKV_INLINE_LAMBDA {
        reverse_steps<writes>(scale, k.from(begin, 0), v.from(begin, 0), gy.from(begin, 0), steps_from(begin), count,
                              saved + begin, adjoint, tile_gradients);
      };
      if (__builtin_expect(tile.shared, 1)) {
        adjoint = {adjoint.num * tile.leave, adjoint.den * tile.leave};
        reverse(SharedScale<Lanes>{tile.reference_log2, channels.decay, channels.bonus});
        adjoint = {adjoint.num * tile.enter, adjoint.den * tile.enter};
      } else {
        reverse(RunningScale<Lanes>{channels.channel});
      }
      gradients.g_log_decay = tile_gradients.g_log_decay;
      gradients.gu = tile_gradients.gu;
    }
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
    const Real* first_state = static_cast<const Real*>(problem.state) + span.b * 3 * C;
    const Real* checkpoints =
        static_cast<const Real*>(problem.checkpoints) + span.b * checkpoint_count(problem.dtype, problem.T) * 3 * C;
    const int64_t last_chunk = (span.t_end - 1) / kInterval;
    for (int64_t chunk = last_chunk; chunk >= span.t_begin / kInterval; --chunk) {
      const int64_t t = chunk * kInterval;
      const int steps = static_cast<int>(span.t_end - t < kInterval ? span.t_end - t : kInterval);
      const Real* chunk_state = chunk == 0 ? first_state : checkpoints + (chunk - 1) * 3 * C;
      for (int64_t c = span.c_begin; c < span.c_end; c += kLanes) {
        const int count = static_cast<int>(span.c_end - c < kLanes ? span.c_end - c : kLanes);
        Sums<Lanes> carried = {load_some(adjoint + c, count), load_some(adjoint + C + c, count)};
        Gradients gradients = {gk.from(t, c), gv.from(t, c), Lanes(Real(0)), Lanes(Real(0))};
        const auto channels = channels_at(parameters, c, count);
        const auto state = load_state(chunk_state, C, c, count);
        const auto walk = [&](int chunk_steps, int lanes) WKV_INLINE_LAMBDA {
          backward_chunk<writes>(channels, k.from(t, c), v.from(t, c), gy.from(t, c), chunk_steps, lanes, state,
                                 carried, gradients);
        };
        if (steps == kInterval && count == kLanes) {
          walk(kInterval, kLanes);
        } else {
          walk(steps, count);
        }
        store_some(adjoint + c, carried.num, count);
        store_some(adjoint + C + c, carried.den, count);
        if constexpr (writes) {
          add_to(gw_gu + c, gradients.g_log_decay, count);
          add_to(gw_gu + C + c, gradients.gu, count);
        }
      }
    }
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

inline void backward(const BackwardProblem& problem, const Parameters& parameters, const Span& span, void* adjoint,
                     double* gw_gu) {
  with_element(problem.dtype, [&](auto element) {
    using W = Walk<decltype(element)>;
    const auto walk = gw_gu != nullptr ? W::template backward_span<true> : W::template backward_span<false>;
    walk(problem, parameters, span, static_cast<typename W::Real*>(adjoint), gw_gu);
  });
}

inline constexpr CpuKernels kKernels = {WKV_ISA_NAME, exponentiate, forward, backward};

}  // namespace WKV_ISA
}  // namespace wkv
