// The CPU kernels of the bidirectional operator. A pass over the intervals from the last to the first leaves the state
// after each of them; then each is computed with the states on either side of it: the steps after are replayed within
// it, from its end, and kept, and those before it are taken in the usual direction and read together with them.
//
// Included once per instruction set, by a file that has defined WKV_ISA and WKV_SIMD_BYTES.
#pragma once

#include "../common/bidirectional.h"
#include "kernel.h"

namespace wkv::cpu {
namespace WKV_ISA {

template <DType dtype>
struct BiKernel : Kernel<dtype> {
  using Base = Kernel<dtype>;
  using Base::kInterval;
  using Base::kLanes;
  using Base::kLine;
  using Base::load;
  using Base::load_some;
  using typename Base::Element;
  using typename Base::Gated;
  using typename Base::Real;
  using typename Base::Ungated;
  using typename Base::Vec;
  using typename Base::VectorChannels;
  static constexpr int kSubchunks = kInterval / kSubchunk;

  // ---- memory ----

  // The states on either side of the intervals of a sequence, from one row of the table on.
  struct Sides {
    Real* data;
    int64_t C;

    WKV_INLINE Real* before(int64_t t) const { return data + t / kInterval * 6 * C; }
    WKV_INLINE Real* after(int64_t t) const { return before(t) + 3 * C; }
  };
  static WKV_INLINE Sides table_of(const void* table, const WorkItem& item, int64_t C) {
    // Backward has the table from forward, and does not write to it.
    Real* const data = const_cast<Real*>(static_cast<const Real*>(table));
    return {data + item.sequence.checkpoints * 6 * C, C};
  }

  static WKV_INLINE void store_empty(Real* state, int64_t C, const WorkItem& item) {
    for (int64_t c = item.c_begin; c < item.c_end; c += kLanes) {
      Base::store_state(state, C, c, Base::at_most(kLanes, item.c_end - c), empty_state<Vec>());
    }
  }

  // Two lines later in a pass over intervals, the next of which has the distance `interval`: prefetched there, since
  // memory takes longer than the sums of one line.
  struct Ahead {
    int64_t t, line;
  };
  static WKV_INLINE Ahead ahead_of(const WorkItem& item, int64_t t, int64_t line, int64_t interval) {
    const int64_t lines = (item.c_end - item.c_begin + kLine - 1) / kLine;
    const int64_t position = (line - item.c_begin) / kLine + 2;
    return {t + position / lines * interval, item.c_begin + position % lines * kLine};
  }

  // An interval's keys in the type of the sums.
  struct IntervalKeys {
    alignas(kLineBytes) Real data[std::is_same_v<Element, Real> ? 1 : kInterval * kLanes];

    WKV_INLINE Rows<const Real> widen(Rows<const Element> k, int steps) {
      if constexpr (std::is_same_v<Element, Real>) {
        return k;
      } else {
        for (int step = 0; step < steps; ++step) store(data + step * kLanes, load(k.row(step)));
        return {data, kLanes};
      }
    }
  };

  // The rows from the last to the first.
  template <class Row>
  static WKV_INLINE Rows<Row> reversed(Rows<Row> rows, int steps) {
    return {rows.row(steps - 1), -rows.stride};
  }

  // The rows of an interval of one vector, whole vectors.
  template <class Gates>
  struct Interval {
    Rows<const Real> keys;
    Rows<const Element> v;
    Gates gates;
    int steps;

    WKV_INLINE int steps_from(int begin) const { return Base::at_most(kSubchunk, steps - begin); }
    WKV_INLINE int last_begin() const { return (steps - 1) / kSubchunk * kSubchunk; }
  };

  template <class Gates>
  struct Buffers {
    alignas(kLineBytes) Element k[kInterval * kLanes], v[kInterval * kLanes], r[kInterval * kLanes],
        gy[kInterval * kLanes];
    IntervalKeys widened;

    WKV_INLINE Interval<Gates> interval(Rows<const Element> k_rows, Rows<const Element> v_rows, Gates gates, int steps,
                                        int count) {
      return {widened.widen(Base::whole(k_rows, steps, count, k), steps), Base::whole(v_rows, steps, count, v),
              gates.whole(steps, count, r), steps};
    }
  };

  // An output's rows of an interval of one vector. A vector that is a whole line goes to memory at once, step by step;
  // others are staged until their line is whole.
  struct Target {
    Rows<Element> rows;
    bool streams;

    WKV_INLINE void set(int64_t step, Vec x) const {
      if constexpr (kLanes == kLine && std::is_same_v<Element, Real>) {
        if (streams) return stream_line(rows.row(step), &x);
      }
      store(rows.row(step), x);
    }
  };
  struct Output {
    Rows<Element> rows;  // of the sequence
    bool streams;
    typename Base::template StagedSteps<kInterval> staged;

    static WKV_INLINE bool stages(int width) { return kLanes < kLine || width < kLine; }
    WKV_INLINE Target target(int64_t t, int64_t line, int first, int width) {
      return stages(width) ? Target{staged.rows(first), false} : Target{rows.from(t, line), streams};
    }
    WKV_INLINE void write(int64_t t, int64_t line, int steps, int width) {
      if (stages(width)) staged.write(rows.from(t, line), steps, width, streams);
    }
  };

  // ---- the scale of a subchunk ----

  struct SubchunkSides {
    KeyRange<Vec> keys;
    SideBounds<Vec> bounds_before;  // before the subchunk
    LogitRange<Vec> before;         // of the steps before alone
    bool is_shared;
    // From the scale of the sums that enter to that of the subchunk, and from there to that of the sums that leave.
    Vec reference_log2, enter_before, leave_before, enter_after, leave_after;

    WKV_INLINE SharedScale<Vec> shared(const VectorChannels& channels) const {
      return {reference_log2, channels.decay, channels.bonus};
    }
  };

  static WKV_INLINE Sums<Vec> scaled(Sums<Vec> sums, Vec factor) { return {sums.num * factor, sums.den * factor}; }

  static WKV_INLINE State<Vec> settled_state(const Real* state, int64_t C, int64_t c, int count) {
    return settled(Base::load_state(state, C, c, count)).state;
  }
  static WKV_INLINE SideBounds<Vec> bounds_of(State<Vec> settled) { return {settled.max, settled.max}; }

  static WKV_INLINE KeyRange<Vec> range_of(Rows<const Real> keys, int begin, int end) {
    auto range = KeyRange<Vec>::from(load(keys.row(begin)), load(keys.row(end - 1)));
#pragma GCC unroll 4
    for (int step = begin; step < end; ++step) range.add(load(keys.row(step)));
    return range;
  }

  // The maximum after steps of any keys, as RunningSides has it.
  static Vec running_max(const VectorChannels& channels, Rows<const Real> keys, int steps, Vec max) {
    const auto scale = Base::running_scale(channels);
    return Base::cold([=] {
      Vec running = max;
      for (int step = 0; step < steps; ++step) running = scale.next_max(running, scale.logit(load(keys.row(step))));
      return running;
    });
  }

  // One side of a subchunk: the range of its logits, and the bounds after it, from those before it. Steps that spread
  // further have a single bound, the running maximum.
  struct Course {
    LogitRange<Vec> range;
    SideBounds<Vec> after;
    bool is_narrow;
  };
  static WKV_INLINE Course course_of(const VectorChannels& channels, const KeyRange<Vec>& range, Rows<const Real> keys,
                                     int steps, Vec last, SideBounds<Vec> before) {
    const Vec log_decay = channels.channel.log_decay, total = log_decay * Vec(Real(steps));
    Course course;
    course.after = before.after(range, last, log_decay, total);
    course.range = before.range(range, course.after, total);
    course.is_narrow = all(course.range.is_narrow());
    if (__builtin_expect(!course.is_narrow, 0)) {
      const Vec max = running_max(channels, keys, steps, before.upper);
      course.after = {max, max};
      course.range.running = max;
    }
    return course;
  }

  // Calls function(scale) in the scale of the subchunk.
  template <class Function>
  static WKV_INLINE auto in_scale_of(const SubchunkSides& sides, const VectorChannels& channels,
                                     const Function& function) {
    if (__builtin_expect(!sides.is_shared, 0)) {
      const auto scale = sides_of(Base::running_scale(channels));
      return Base::cold([=] { return function(scale); });
    }
    return function(sides_of(sides.shared(channels)));
  }

  // Of the steps before, whose sums are not needed for it.
  template <class Gates>
  static WKV_INLINE void find_ranges_before(const VectorChannels& channels, const Interval<Gates>& interval,
                                            SideBounds<Vec> bounds, SubchunkSides* sides) {
    for (int begin = 0; begin < interval.steps; begin += kSubchunk, ++sides) {
      const int steps = interval.steps_from(begin);
      sides->keys = range_of(interval.keys, begin, begin + steps);
      sides->bounds_before = bounds;
      const Course course =
          course_of(channels, sides->keys, interval.keys.from(begin, 0), steps, sides->keys.last, bounds);
      sides->before = course.range;
      bounds = course.after;
    }
  }

  // Decides on the scale, and takes the bounds of the state after the subchunk over it.
  template <class Gates>
  static WKV_INLINE SideBounds<Vec> find_scale(const VectorChannels& channels, const Interval<Gates>& interval,
                                               int begin, SideBounds<Vec> bounds, SubchunkSides& sides) {
    const int steps = interval.steps_from(begin);
    const auto reverse_keys = reversed(interval.keys.from(begin, 0), steps);
    const Course after = course_of(channels, sides.keys, reverse_keys, steps, sides.keys.first, bounds);
    const auto range = join_ranges(sides.before, after.range);
    sides.is_shared = steps > 1 && all(range.fits(channels.channel));
    if (__builtin_expect(!sides.is_shared, 0)) {
      const Vec max_before = running_max(channels, interval.keys.from(begin, 0), steps, sides.bounds_before.upper);
      const Vec max_after = running_max(channels, reverse_keys, steps, bounds.upper);
      sides.enter_before = sides.enter_after = Vec(Real(1));
      sides.leave_before = exp_nonpositive(max_before - sides.before.running);
      sides.leave_after = exp_nonpositive(max_after - after.after.upper);
      return after.after;
    }
    sides.reference_log2 = range.reference(channels.channel) * Vec(Real(kLog2E));
    const SharedScale<Vec> scale = sides.shared(channels);
    sides.enter_before = scale.weight(sides.bounds_before.upper);
    sides.leave_before = Vec(Real(1)) / scale.weight(sides.before.running);
    sides.enter_after = scale.weight(bounds.upper);
    sides.leave_after = Vec(Real(1)) / scale.weight(after.after.upper);
    return after.after;
  }

  // Finds the scales of all subchunks, and keeps the sums after each step, from the state after the interval.
  template <class Gates, class Next>
  static WKV_INLINE void replay_after(const VectorChannels& channels, const Interval<Gates>& interval,
                                      State<Vec> before, State<Vec> after, Next next, SubchunkSides* sides,
                                      SavedStep<Vec>* saved) {
    find_ranges_before(channels, interval, bounds_of(before), sides);
    SideBounds<Vec> bounds = bounds_of(after);
    for (int begin = interval.last_begin(); begin >= 0; begin -= kSubchunk) {
      SubchunkSides& own = sides[begin / kSubchunk];
      bounds = find_scale(channels, interval, begin, bounds, own);
      after.sums = scaled(after.sums, own.enter_after);
      const int steps = interval.steps_from(begin);
      const auto keys = reversed(interval.keys.from(begin, 0), steps);
      const auto values = reversed(interval.v.from(begin, 0), steps);
      SavedStep<Vec>* const last = saved + begin + steps - 1;
      const auto steps_in = [=](const auto& scale) WKV_INLINE_LAMBDA {
        Vec max = after.max;
        Sums<Vec> sums = after.sums;
#pragma GCC unroll 4
        for (int i = 0; i < steps; ++i) {
          next.prefetch(begin + i);
          const Vec logit = scale.logit(load(keys.row(i)));
          const Vec at = scale.at(max, logit);
          last[-i] = {sums, at};
          sums = mix(sums, scale.advance(at, logit), load(values.row(i)));
          max = scale.next_max(max, logit);
        }
        return sums;
      };
      after = {scaled(in_scale_of(own, channels, steps_in), own.leave_after), bounds.upper};
    }
  }

  // ---- forward ----

  // Takes the steps before along over the interval, and reads at each step.
  template <class Gates>
  static WKV_INLINE State<Vec> read_interval(const VectorChannels& channels, const Interval<Gates>& interval,
                                             State<Vec> before, const SubchunkSides* sides, const SavedStep<Vec>* saved,
                                             Target y) {
    for (int begin = 0; begin < interval.steps; begin += kSubchunk) {
      const SubchunkSides& own = sides[begin / kSubchunk];
      before.sums = scaled(before.sums, own.enter_before);
      const int end = begin + interval.steps_from(begin);
      const auto steps_in = [=](const auto& scale) WKV_INLINE_LAMBDA {
        State<Vec> state = before;
#pragma GCC unroll 4
        for (int step = begin; step < end; ++step) {
          const SavedStep<Vec> after = saved[step];
          const Vec logit = scale.logit(load(interval.keys.row(step))), vt = load(interval.v.row(step));
          const Vec at = scale.other_at(after.at, state.max);
          const Vec yt =
              read_sides(state.sums, after.sums, scale.read(at, after.at, logit), vt, interval.gates.at(step));
          y.set(step, yt);
          state = {mix(state.sums, scale.advance(at, logit), vt), scale.next_max(state.max, logit)};
        }
        return state.sums;
      };
      before = {scaled(in_scale_of(own, channels, steps_in), own.leave_before), own.before.running};
    }
    return before;
  }

  // Takes the state after a subchunk's steps to the one before them, in place.
  template <class Next>
  static WKV_INLINE void sum_up_subchunk(const VectorChannels& channels, Rows<const Element> k, Rows<const Element> v,
                                         Next next, int steps, State<Vec>& state, SideBounds<Vec>& bounds) {
    typename Base::Keys widened;
    const auto rows = widened.widen(k, steps);
    const auto range = range_of(rows, 0, steps);
    const auto keys = reversed(rows, steps);
    const auto values = reversed(v, steps);
    const Course course = course_of(channels, range, keys, steps, range.first, bounds);
    bounds = course.after;
    const auto steps_in = [=](const auto& sides, State<Vec> state) WKV_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int step = 0; step < steps; ++step) {
        next.prefetch(step);
        const Vec logit = sides.logit(load(keys.row(step)));
        state.sums = mix(state.sums, sides.advance(sides.at(state.max, logit), logit), load(values.row(step)));
        state.max = sides.next_max(state.max, logit);
      }
      return state;
    };
    if (__builtin_expect(!course.is_narrow, 0)) {
      const auto sides = sides_of(Base::running_scale(channels));
      state = Base::cold([=] { return steps_in(sides, state); });
      return;
    }
    const SharedScale<Vec> scale = {course.range.top() * Vec(Real(kLog2E)), channels.decay, channels.bonus};
    state.sums = scaled(state.sums, scale.weight(state.max));
    state.sums = scaled(steps_in(sides_of(scale), state).sums, Vec(Real(1)) / scale.weight(bounds.upper));
    state.max = bounds.upper;
  }

  // Sums up the intervals from the last to the first, into the state after each.
  static WKV_INLINE void sum_up(const BiForwardParams& params, const WorkItem& item, const Sides& table) {
    const int64_t C = params.C;
    const auto k = Base::rows_of(params.k, item.sequence), v = Base::rows_of(params.v, item.sequence);
    alignas(kLineBytes) Element k_copy[kSubchunk * kLanes], v_copy[kSubchunk * kLanes];
    for (int64_t t = (item.sequence.steps - 1) / kInterval * kInterval; t > 0; t -= kInterval) {
      const int steps = Base::at_most(kInterval, item.sequence.steps - t);
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const auto [next_t, next_line] = ahead_of(item, t, line, -kInterval);
        for (int64_t c = line, i = 0; c < std::min(line + kLine, item.c_end); c += kLanes, ++i) {
          const int count = Base::at_most(kLanes, item.c_end - c);
          const auto channels = Base::channels_at(params.channels, c, count);
          State<Vec> state = settled_state(table.after(t), C, c, count);
          SideBounds<Vec> bounds = bounds_of(state);
          for (int begin = (steps - 1) / kSubchunk * kSubchunk; begin >= 0; begin -= kSubchunk) {
            const int own_steps = Base::at_most(kSubchunk, steps - begin);
            sum_up_subchunk(
                channels, Base::whole(k.from(t + begin, c), own_steps, count, k_copy),
                Base::whole(v.from(t + begin, c), own_steps, count, v_copy),
                Base::next_of(i, Ungated(), k.from(next_t + begin, next_line), v.from(next_t + begin, next_line)),
                own_steps, state, bounds);
          }
          Base::store_state(table.after(t - kInterval), C, c, count, state);
        }
      }
    }
  }

  template <class Gates>
  static void forward(const BiForwardParams& params, const WorkItem& item) {
    const int64_t T = item.sequence.steps, C = params.C;
    const Sides table = table_of(params.sides, item, C);
    if (item.spare_checkpoint >= 0) {
      Real* const spare = static_cast<Real*>(params.sides) + item.spare_checkpoint * 6 * C;
      store_empty(spare, C, item);
      store_empty(spare + 3 * C, C, item);
    }
    if (T == 0) return;
    store_empty(table.before(0), C, item);
    store_empty(table.after(T - 1), C, item);
    sum_up(params, item, table);
    const auto k = Base::rows_of(params.k, item.sequence), v = Base::rows_of(params.v, item.sequence);
    const Gates gates(params, item.sequence);
    Output y = {Base::rows_of(params.y, item.sequence, params), Base::streams_sequence(params.y, params)};
    Buffers<Gates> buffers;
    SubchunkSides sides[kSubchunks];
    SavedStep<Vec> saved[kInterval];
    for (int64_t t = 0; t < T; t += kInterval) {
      const int steps = Base::at_most(kInterval, T - t);
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const auto [next_t, next_line] = ahead_of(item, t, line, kInterval);
        const int width = Base::at_most(kLine, item.c_end - line);
        for (int first = 0; first < width; first += kLanes) {
          const auto next = Base::next_of(first / kLanes, gates.from(next_t, next_line), k.from(next_t, next_line),
                                          v.from(next_t, next_line));
          const int64_t c = line + first;
          const int count = Base::at_most(kLanes, item.c_end - c);
          const auto channels = Base::channels_at(params.channels, c, count);
          const auto interval = buffers.interval(k.from(t, c), v.from(t, c), gates.from(t, c), steps, count);
          const State<Vec> before = settled_state(table.before(t), C, c, count);
          const State<Vec> after = settled_state(table.after(t), C, c, count);
          replay_after(channels, interval, before, after, next, sides, saved);
          const State<Vec> moved =
              read_interval(channels, interval, before, sides, saved, y.target(t, line, first, width));
          if (t + steps < T) Base::store_state(table.before(t + steps), C, c, count, moved);
        }
        y.write(t, line, steps, width);
      }
    }
  }

  // ---- backward ----

  // The adjoint of the sums after a step, and sums of gradients.
  struct Carried {
    Sums<Vec> adjoint;
    Vec g_log_decay, gu;
  };

  // A step as the way along leaves it to the way back: the gradients without the part of the steps before, and the sums
  // there.
  struct Partial {
    Sums<Vec> before;
    Vec gk, gv;
  };

  // Takes the adjoint of the states after along over the interval, in the usual direction. Where it `writes`, it adds
  // the gradients that belong to these states and to the reads; `saved` then has what the read adds to the adjoint of
  // the states before, in their scale.
  template <bool writes, class Gates, class Next>
  static WKV_INLINE Carried adjoints_after(const VectorChannels& channels, const Interval<Gates>& interval,
                                           Rows<const Element> gy, State<Vec> before, Carried carried, Next next,
                                           const SubchunkSides* sides, SavedStep<Vec>* saved, Partial* partial,
                                           Target gr) {
    for (int begin = 0; begin < interval.steps; begin += kSubchunk) {
      const SubchunkSides& own = sides[begin / kSubchunk];
      before.sums = scaled(before.sums, own.enter_before);
      carried.adjoint = scaled(carried.adjoint, own.leave_after);
      const int end = begin + interval.steps_from(begin);
      struct Moved {
        State<Vec> before;
        Carried carried;
      };
      const auto steps_in = [=](const auto& scale) WKV_INLINE_LAMBDA {
        Moved moved = {before, carried};
#pragma GCC unroll 2
        for (int step = begin; step < end; ++step) {
          next.prefetch(step);
          const SavedStep<Vec> after = saved[step];
          State<Vec>& state = moved.before;
          const Vec logit = scale.logit(load(interval.keys.row(step))), vt = load(interval.v.row(step));
          const Vec at = scale.other_at(after.at, state.max);
          StepGradients<Vec> gradients;
          advance_adjoint(after.sums, scale.advance(after.at, logit), vt, moved.carried.adjoint, gradients);
          const Sums<Vec> to_before =
              read_sides_adjoint(state.sums, after.sums, scale.read(at, after.at, logit), vt, load(gy.row(step)),
                                 moved.carried.adjoint, gradients, interval.gates.at(step));
          if constexpr (writes) {
            saved[step] = {to_before, at};
            partial[step] = {state.sums, gradients.gk, gradients.gv};
            if constexpr (Gates::kInputs > 0) gr.set(step, gradients.gr);
            moved.carried.g_log_decay = moved.carried.g_log_decay + gradients.g_log_decay;
            moved.carried.gu = moved.carried.gu + gradients.gu;
          }
          state = {mix(state.sums, scale.advance(at, logit), vt), scale.next_max(state.max, logit)};
        }
        return moved;
      };
      const Moved moved = in_scale_of(own, channels, steps_in);
      before = {scaled(moved.before.sums, own.leave_before), own.before.running};
      carried = moved.carried;
      carried.adjoint = scaled(carried.adjoint, own.enter_after);
    }
    return carried;
  }

  // Takes the adjoint of the states before back over the interval, and completes the gradients.
  template <class Gates>
  static WKV_INLINE Carried adjoints_before(const VectorChannels& channels, const Interval<Gates>& interval,
                                            Carried carried, const SubchunkSides* sides, const SavedStep<Vec>* saved,
                                            const Partial* partial, Target gk, Target gv) {
    for (int begin = interval.last_begin(); begin >= 0; begin -= kSubchunk) {
      const SubchunkSides& own = sides[begin / kSubchunk];
      carried.adjoint = scaled(carried.adjoint, own.leave_before);
      const int end = begin + interval.steps_from(begin);
      const auto steps_in = [=](const auto& scale) WKV_INLINE_LAMBDA {
        Carried moved = carried;
#pragma GCC unroll 2
        for (int step = end - 1; step >= begin; --step) {
          const Vec logit = scale.logit(load(interval.keys.row(step))), vt = load(interval.v.row(step));
          const SavedStep<Vec> read = saved[step];
          const Partial known = partial[step];
          StepGradients<Vec> gradients;
          advance_adjoint(known.before, scale.advance(read.at, logit), vt, moved.adjoint, gradients);
          moved.adjoint = {moved.adjoint.num + read.sums.num, moved.adjoint.den + read.sums.den};
          gk.set(step, known.gk + gradients.gk);
          gv.set(step, known.gv + gradients.gv);
          moved.g_log_decay = moved.g_log_decay + gradients.g_log_decay;
        }
        return moved;
      };
      carried = in_scale_of(own, channels, steps_in);
      carried.adjoint = scaled(carried.adjoint, own.enter_before);
    }
    return carried;
  }

  template <class Gates>
  static void backward(const BiBackwardParams& params, const WorkItem& item) {
    const int64_t T = item.sequence.steps, C = params.C;
    double* const partials = params.partials + item.partials * 2 * C;
    if (item.opens_partials) {
      for (int64_t c = item.c_begin; c < item.c_end; ++c) partials[c] = partials[C + c] = 0;
    }
    if (T == 0) return;
    const Sides table = table_of(params.sides, item, C);
    Real* const adjoints = static_cast<Real*>(params.adjoints) + item.sequence.checkpoints * 2 * C;
    const auto adjoint = [=](int64_t t) { return adjoints + t / kInterval * 2 * C; };
    const auto load_adjoint = [=](int64_t t, int64_t c, int count) WKV_INLINE_LAMBDA {
      return Sums<Vec>{load_some(adjoint(t) + c, count), load_some(adjoint(t) + C + c, count)};
    };
    const auto store_adjoint = [=](int64_t t, int64_t c, int count, Sums<Vec> sums) WKV_INLINE_LAMBDA {
      store_some(adjoint(t) + c, sums.num, count);
      store_some(adjoint(t) + C + c, sums.den, count);
    };
    const Carried nothing = {{Vec(Real(0)), Vec(Real(0))}, Vec(Real(0)), Vec(Real(0))};
    const auto k = Base::rows_of(params.k, item.sequence), v = Base::rows_of(params.v, item.sequence);
    const Gates gates(params, item.sequence);
    const auto gy = Base::rows_of(params.gy, item.sequence);
    const auto output = [&](void* data) {
      return Output{Base::rows_of(data, item.sequence, params), Base::streams_sequence(data, params)};
    };
    Output gk = output(params.gk), gv = output(params.gv), gr = output(Gates::kInputs > 0 ? params.gr : params.gk);
    Buffers<Gates> buffers;
    SubchunkSides sides[kSubchunks];
    SavedStep<Vec> saved[kInterval];
    Partial partial[kInterval];

    // From the first interval to the last, the adjoints of the states after alone: what comes to each interval.
    const int64_t last_t = (T - 1) / kInterval * kInterval;
    for (int64_t t = 0; t < last_t; t += kInterval) {
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const auto [next_t, next_line] = ahead_of(item, t, line, kInterval);
        for (int64_t c = line, i = 0; c < std::min(line + kLine, item.c_end); c += kLanes, ++i) {
          const int count = Base::at_most(kLanes, item.c_end - c);
          const auto channels = Base::channels_at(params.channels, c, count);
          const auto interval = buffers.interval(k.from(t, c), v.from(t, c), gates.from(t, c), kInterval, count);
          const auto before = settled(Base::load_state(table.before(t), C, c, count));
          const auto after = settled(Base::load_state(table.after(t), C, c, count));
          replay_after(channels, interval, before.state, after.state,
                       Base::next_of(i, Ungated(), k.from(next_t, next_line), v.from(next_t, next_line)), sides, saved);
          Carried carried = nothing;
          if (t > 0) carried.adjoint = load_adjoint(t, c, count);
          carried = adjoints_after<false>(channels, interval, Base::whole(gy.from(t, c), kInterval, count, buffers.gy),
                                          before.state, carried,
                                          Base::next_of(i, gates.from(next_t, next_line), gy.from(next_t, next_line)),
                                          sides, saved, partial, Target{});
          store_adjoint(t + kInterval, c, count, scaled(carried.adjoint, after.factor));
        }
      }
    }
    // Back from the last to the first. An interval's adjoint of the states after makes room for that of the states
    // before, on its way to the next one.
    for (int64_t t = last_t; t >= 0; t -= kInterval) {
      const int steps = Base::at_most(kInterval, T - t);
      for (int64_t line = item.c_begin; line < item.c_end; line += kLine) {
        const auto [next_t, next_line] = ahead_of(item, t, line, -kInterval);
        const int width = Base::at_most(kLine, item.c_end - line);
        for (int first = 0, i = 0; first < width; first += kLanes, ++i) {
          const int64_t c = line + first;
          const int count = Base::at_most(kLanes, item.c_end - c);
          const auto channels = Base::channels_at(params.channels, c, count);
          const auto interval = buffers.interval(k.from(t, c), v.from(t, c), gates.from(t, c), steps, count);
          const auto before = settled(Base::load_state(table.before(t), C, c, count));
          const auto after = settled(Base::load_state(table.after(t), C, c, count));
          replay_after(channels, interval, before.state, after.state,
                       Base::next_of(i, Ungated(), k.from(next_t, next_line), v.from(next_t, next_line)), sides, saved);
          Carried carried = nothing;
          if (t > 0) carried.adjoint = load_adjoint(t, c, count);
          carried = adjoints_after<true>(channels, interval, Base::whole(gy.from(t, c), steps, count, buffers.gy),
                                         before.state, carried,
                                         Base::next_of(i, gates.from(next_t, next_line), gy.from(next_t, next_line)),
                                         sides, saved, partial, gr.target(t, line, first, width));
          carried.adjoint = t < last_t ? load_adjoint(t + kInterval, c, count) : nothing.adjoint;
          carried = adjoints_before(channels, interval, carried, sides, saved, partial,
                                    gk.target(t, line, first, width), gv.target(t, line, first, width));
          store_adjoint(t, c, count, scaled(carried.adjoint, before.factor));
          Base::add_to(partials + c, carried.g_log_decay, count);
          Base::add_to(partials + C + c, carried.gu, count);
        }
        gk.write(t, line, steps, width);
        gv.write(t, line, steps, width);
        if constexpr (Gates::kInputs > 0) gr.write(t, line, steps, width);
      }
    }
  }
};

// ---- one entry per operation ----

inline void bi_forward(const BiForwardParams& params, const WorkItem& item) {
  with_dtype(params.dtype, [&](auto type) {
    using K = BiKernel<type.value>;
    params.r.data == nullptr ? K::template forward<typename K::Ungated>(params, item)
                             : K::template forward<typename K::Gated>(params, item);
  });
}

inline void bi_backward(const BiBackwardParams& params, const WorkItem& item) {
  with_dtype(params.dtype, [&](auto type) {
    using K = BiKernel<type.value>;
    params.r.data == nullptr ? K::template backward<typename K::Ungated>(params, item)
                             : K::template backward<typename K::Gated>(params, item);
  });
}

}  // namespace WKV_ISA
}  // namespace wkv::cpu
