// What stands between the chunks and behind them: the programs that carry summaries from chunk to chunk, one thread for
// each channel, and the one that reduces the gradients of the parameters, in a fixed order.
#pragma once

#include "backward.h"
#include "block.h"

namespace wkv {

inline constexpr int kCarryBatch = 8;

// Takes `carried` from `begin` to `end`: take(i, carried, own) for each i in order, own being load(i). Loads do not
// wait for what is carried, so `kCarryBatch` are asked for at once.
template <class Carried, class Load, class Take>
WKV_HD Carried fold(int64_t begin, int64_t end, Carried carried, const Load& load, const Take& take) {
  for (int64_t first = begin; first < end; first += kCarryBatch) {
    decltype(load(begin)) own[kCarryBatch];
#pragma unroll
    for (int i = 0; i < kCarryBatch; ++i) {
      if (first + i < end) own[i] = load(first + i);
    }
#pragma unroll
    for (int i = 0; i < kCarryBatch; ++i) {
      if (first + i < end) carried = take(first + i, carried, own[i]);
    }
  }
  return carried;
}

template <class Real>
struct CarryStates {
  using Arguments = CarryStatesArguments;
  struct Thread {
    int index;
  };

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex block, int threads, Team& team, char*) {
    team.phase([=](Thread& thread) {
      const int64_t C = arguments.C, c = static_cast<int64_t>(block.x) * threads + thread.index;
      if (c >= C) return;
      const int64_t slots = arguments.chunks - 1;
      Real* states = static_cast<Real*>(arguments.chunk_states) + block.z * slots * 3 * C + c;
      const auto& parameters = arguments.parameters;
      const Real decay =
          Real(arguments.chunk_len) * log_decay_of(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      const auto load = [=](int64_t i) {
        const Real* slot = states + i * 3 * C;
        return State<Real>{{slot[0], slot[C]}, slot[2 * C]};
      };
      fold(1, slots, load(0), load, [=](int64_t i, State<Real> carried, State<Real> own) {
        const State<Real> state = join(carried, decay, own);
        Real* slot = states + i * 3 * C;
        slot[0] = state.sums.num;
        slot[C] = state.sums.den;
        slot[2 * C] = state.max;
        return state;
      });
    });
  }
};

template <class Real>
struct CarryAdjoints {
  using Arguments = CarryAdjointsArguments;
  static constexpr int64_t kInterval = checkpoint_interval(ElementTraits<Real>::dtype);
  struct Thread {
    int index;
  };
  struct Given {
    Sums<Real> own;
    Real change_of_max;
  };

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex block, int threads, Team& team, char*) {
    team.phase([=](Thread& thread) {
      const int64_t C = arguments.C, c = static_cast<int64_t>(block.x) * threads + thread.index;
      if (c >= C) return;
      const int64_t slots = arguments.chunks - 1;
      Real* adjoints = static_cast<Real*>(arguments.chunk_adjoints) + block.z * slots * 2 * C + c;
      const int64_t checkpoints = checkpoint_count(ElementTraits<Real>::dtype, arguments.T);
      const int64_t checkpoints_of_chunk = arguments.chunk_len / kInterval;
      const Real* maxes = static_cast<const Real*>(arguments.checkpoints) + block.z * checkpoints * 3 * C + 2 * C + c;
      const auto max_after = [=](int64_t chunk) { return maxes[((chunk + 1) * checkpoints_of_chunk - 1) * 3 * C]; };
      const auto& parameters = arguments.parameters;
      const Real decay =
          Real(arguments.chunk_len) * log_decay_of(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      // Slot i lies behind chunk i; the last one is true already, and the way goes from there to the first.
      const auto slot_at = [=](int64_t i) { return adjoints + (slots - 1 - i) * 2 * C; };
      const Sums<Real> true_one{slot_at(0)[0], slot_at(0)[C]};
      fold(
          1, slots, true_one,
          [=](int64_t i) {
            const Real* slot = slot_at(i);
            return Given{{slot[0], slot[C]}, max_after(slots - 1 - i) - max_after(slots - i)};
          },
          [=](int64_t i, Sums<Real> carried, const Given& given) {
            const Sums<Real> adjoint = join_adjoint(carried, decay + given.change_of_max, given.own);
            slot_at(i)[0] = adjoint.num;
            slot_at(i)[C] = adjoint.den;
            return adjoint;
          });
    });
  }
};

// Of the threads of a block, `kReduceLanes` lie along channels and `kReduceGroups` along rows; each sums every
// kReduceGroups-th row, and then the groups are summed in their order.

template <class Real>
struct Reduce {
  using Arguments = ReduceArguments;
  struct Thread {
    int index;
  };

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex block, int, Team& team, char* shared) {
    Sums<double>* parts = reinterpret_cast<Sums<double>*>(shared);
    team.phase([=](Thread& thread) {
      const int64_t C = arguments.C, c = static_cast<int64_t>(block.x) * kReduceLanes + thread.index % kReduceLanes;
      Sums<double> sum{0, 0};
      if (c < C) {
        const Real* partials = static_cast<const Real*>(arguments.partials) + c;
#pragma unroll 4
        for (int64_t row = thread.index / kReduceLanes; row < arguments.rows; row += kReduceGroups) {
          sum.num += partials[row * 2 * C];
          sum.den += partials[row * 2 * C + C];
        }
      }
      parts[thread.index] = sum;
    });
    team.phase([=](Thread& thread) {
      const int64_t c = static_cast<int64_t>(block.x) * kReduceLanes + thread.index;
      if (thread.index >= kReduceLanes || c >= arguments.C) return;
      Sums<double> total = parts[thread.index];
      for (int group = 1; group < kReduceGroups; ++group) {
        const Sums<double> part = parts[group * kReduceLanes + thread.index];
        total = {total.num + part.num, total.den + part.den};
      }
      // The log-decay -exp(w) is its own derivative.
      const auto& parameters = arguments.parameters;
      const double log_decay = log_decay_of(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      store_parameter(arguments.gw, parameters.w_dtype, c, static_cast<Real>(total.num * log_decay));
      store_parameter(arguments.gu, parameters.u_dtype, c, static_cast<Real>(total.den));
    });
  }
};

// Zeros, for the signals of a single pass.
struct Clear {
  using Arguments = ClearArguments;
  struct Thread {
    int index;
  };

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex block, int threads, Team& team, char*) {
    team.phase([=](Thread& thread) {
      const int64_t i = static_cast<int64_t>(block.x) * threads + thread.index;
      if (i < arguments.count) arguments.words[i] = 0;
    });
  }
};

}  // namespace wkv
