// One token: y, gated where there is an r, and the state moved on in place. A thread for each channel of each sequence.
#pragma once

#include "block.h"

namespace wkv {

template <class Element>
struct Step {
  using Real = typename ElementTraits<Element>::Real;

  using Arguments = StepArguments;
  struct Thread {
    int index;
  };

  template <class Team>
  WKV_HD static void run(const Arguments& arguments, BlockIndex block, int threads, Team& team, char*) {
    team.phase([=](Thread& thread) {
      const int64_t C = arguments.C, i = static_cast<int64_t>(block.x) * threads + thread.index;
      if (i >= arguments.B * C) return;
      const int64_t b = i / C, c = i % C;
      const auto& parameters = arguments.parameters;
      const RunningScale<Real> scale{{log_decay_of(load_parameter<Real>(parameters.w, parameters.w_dtype, c)),
                                      load_parameter<Real>(parameters.u, parameters.u_dtype, c)}};
      const Real kt = scale.logit(to_real(static_cast<const Element*>(arguments.k)[b * arguments.k_stride + c]));
      const Real vt = to_real(static_cast<const Element*>(arguments.v)[b * arguments.v_stride + c]);
      // An infinite r is a gate that stands open, and changes no bit.
      const Real rt = arguments.r == nullptr
                          ? Real(INFINITY)
                          : to_real(static_cast<const Element*>(arguments.r)[b * arguments.r_stride + c]);

      Real* num =
          static_cast<Real*>(arguments.state) + b * arguments.state_batch_stride + c * arguments.state_channel_stride;
      Real* den = num + arguments.state_row_stride;
      Real* max = den + arguments.state_row_stride;
      // den == 0 means empty, whatever the other two say.
      const bool empty = *den == Real(0);
      const State<Real> state = {{empty ? Real(0) : *num, *den}, empty ? Real(kEmptyMax) : *max};

      const auto weights = scale.weights(scale.at(state.max, kt));
      const Sums<Real> now = mix(state.sums, weights.read, vt);
      from_real(sigmoid(rt) * (now.num / now.den), static_cast<Element*>(arguments.y)[i]);
      const Sums<Real> after = mix(state.sums, weights.advance, vt);
      *num = after.num;
      *den = after.den;
      *max = scale.next_max(state.max, kt);
    });
  }
};

}  // namespace wkv
