// What stands between the chunks and behind them: the programs that carry summaries from chunk to chunk, one thread for
// each channel, and the one that reduces the gradients of the parameters, in a fixed order.
#pragma once

#include "backward.h"
#include "block.h"

namespace wkv {

// Loads do not wait for the joins, so several chunks are asked for at once.
inline constexpr int kCarryBatch = 8;

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
          Real(arguments.chunk_len) * -std::exp(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      State<Real> carried{{states[0], states[C]}, states[2 * C]};
      for (int64_t first = 1; first < slots; first += kCarryBatch) {
        State<Real> own[kCarryBatch];
#pragma unroll
        for (int i = 0; i < kCarryBatch; ++i) {
          const Real* slot = states + (first + i) * 3 * C;
          if (first + i < slots) own[i] = {{slot[0], slot[C]}, slot[2 * C]};
        }
#pragma unroll
        for (int i = 0; i < kCarryBatch; ++i) {
          if (first + i >= slots) break;
          carried = join(carried, decay, own[i]);
          Real* slot = states + (first + i) * 3 * C;
          slot[0] = carried.sums.num;
          slot[C] = carried.sums.den;
          slot[2 * C] = carried.max;
        }
      }
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
          Real(arguments.chunk_len) * -std::exp(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      // Slot i lies behind chunk i; the last one is true already.
      Sums<Real> carried{adjoints[(slots - 1) * 2 * C], adjoints[(slots - 1) * 2 * C + C]};
      for (int64_t last = slots - 2; last >= 0; last -= kCarryBatch) {
        Sums<Real> own[kCarryBatch];
        Real change[kCarryBatch];
#pragma unroll
        for (int i = 0; i < kCarryBatch; ++i) {
          if (last < i) break;
          const Real* slot = adjoints + (last - i) * 2 * C;
          own[i] = {slot[0], slot[C]};
          change[i] = max_after(last - i) - max_after(last - i + 1);
        }
#pragma unroll
        for (int i = 0; i < kCarryBatch; ++i) {
          if (last < i) break;
          carried = join_adjoint(carried, decay + change[i], own[i]);
          Real* slot = adjoints + (last - i) * 2 * C;
          slot[0] = carried.num;
          slot[C] = carried.den;
        }
      }
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
      const double log_decay = -std::exp(load_parameter<Real>(parameters.w, parameters.w_dtype, c));
      static_cast<Real*>(arguments.gw)[c] = static_cast<Real>(total.num * log_decay);
      static_cast<Real*>(arguments.gu)[c] = static_cast<Real>(total.den);
    });
  }
};

}  // namespace wkv
