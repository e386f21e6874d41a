// The arithmetic of a call outside its kernels: conversion of parameters and states, joins of chunks, reduction of
// gradients. `Real` is the state's type, and tensors of it are contiguous. The order of every sum is fixed.
#pragma once

#include <limits>

#include "../common/math.h"
#include "isa.h"

namespace wkv::cpu {

// NaN with a lower half of zeros: kernels round to bfloat16 by adding to the bits, which could carry a full payload
// into a number.
template <class Real>
Real canonical_nan(Real x) {
  return x == x ? x : std::numeric_limits<Real>::quiet_NaN();
}

// Turns w and u, [2, C], into the log-decay and u.
template <class Real>
void prepare_parameters(Real* rows, int64_t C) {
  for (int64_t c = 0; c < C; ++c) rows[c] = canonical_nan(log_decay_of(rows[c]));
  for (int64_t c = C; c < 2 * C; ++c) rows[c] = canonical_nan(rows[c]);
}

template <class Real>
Sums<Real> load_sums(const Real* at, int64_t C) {
  return {at[0], at[C]};
}
template <class Real>
void store_sums(Real* at, int64_t C, Sums<Real> sums) {
  at[0] = sums.num;
  at[C] = sums.den;
}
template <class Real>
State<Real> load_state(const Real* at, int64_t C) {
  return {load_sums(at, C), at[2 * C]};
}
template <class Real>
void store_state(Real* at, int64_t C, State<Real> state) {
  store_sums(at, C, state.sums);
  at[2 * C] = state.max;
}

template <class Function>
void for_each_channel(int64_t B, int64_t C, const Function& function) {
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) function(b, c);
  }
}

template <class Real>
void fill_empty_states(void* target, int64_t rows, int64_t C) {
  const State<Real> empty = empty_state<Real>();
  for (int64_t row = 0; row < rows; ++row) {
    Real* const at = static_cast<Real*>(target) + row * 3 * C;
    std::fill_n(at, C, empty.sums.num);
    std::fill_n(at + C, C, empty.sums.den);
    std::fill_n(at + 2 * C, C, empty.max);
  }
}

// The given states [B, 3, C], or empty ones where `given` is null.
template <class Real>
void copy_first_states(const void* given, void* target, int64_t B, int64_t C) {
  if (given == nullptr) return fill_empty_states<Real>(target, B, C);
  for_each_channel(B, C, [&](int64_t b, int64_t c) {
    const int64_t at = b * 3 * C + c;
    const State<Real> source = load_state(static_cast<const Real*>(given) + at, C);
    const auto [sums, max] = is_empty(source) ? empty_state<Real>() : source;
    store_state(static_cast<Real*>(target) + at, C,
                {{canonical_nan(sums.num), canonical_nan(sums.den)}, canonical_nan(max)});
  });
}

// Turns `states`, each chunk's sum of its own steps, into the state before each chunk; `state_out` has the first
// states.
template <class Real>
void join_states(const ForwardParams& params, const Plan& plan) {
  const int64_t C = params.C;
  const Real* log_decay = static_cast<const Real*>(params.channels.log_decay);
  for_each_channel(params.B, C, [&](int64_t b, int64_t c) {
    State<Real> before = load_state(static_cast<const Real*>(params.state_out) + b * 3 * C + c, C);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      Real* const at = static_cast<Real*>(params.states) + (b * plan.chunks + chunk) * 3 * C + c;
      const State<Real> own = load_state(at, C);
      store_state(at, C, before);
      before = join(before, Real(plan.chunk_steps) * log_decay[c], own);
    }
  });
}

// The gradient of (num, den) after all steps of a channel; `gstate_out` is [B, 3, C], or null for zero.
template <class Real>
Sums<Real> last_adjoint(const void* gstate_out, int64_t b, int64_t c, int64_t C) {
  if (gstate_out == nullptr) return {Real(0), Real(0)};
  const Real* at = static_cast<const Real*>(gstate_out) + b * 3 * C + c;
  return {canonical_nan(at[0]), canonical_nan(at[C])};
}

// The adjoints for the first pass: zero after each chunk but the last.
template <class Real>
void first_adjoints(const BackwardParams& params, const Plan& plan, const void* gstate_out) {
  const int64_t C = params.C;
  Real* adjoints = static_cast<Real*>(params.adjoints);
  std::fill(adjoints, adjoints + params.B * plan.chunks * 2 * C, Real(0));
  for_each_channel(params.B, C, [&](int64_t b, int64_t c) {
    store_sums(adjoints + ((b + 1) * plan.chunks - 1) * 2 * C + c, C, last_adjoint<Real>(gstate_out, b, c, C));
  });
}

// Turns the adjoint that each chunk computes from `first_adjoints` into the one after each chunk. Scales are those of
// the checkpoints, so that no maxima are joined.
template <class Real>
void join_adjoints(const BackwardParams& params, const Plan& plan, const void* gstate_out) {
  const int64_t C = params.C;
  const Real* log_decay = static_cast<const Real*>(params.channels.log_decay);
  for_each_channel(params.B, C, [&](int64_t b, int64_t c) {
    const auto max_before = [&](int64_t chunk) {
      const int64_t row = checkpoint_row(params.dtype, params.T, b, chunk * plan.chunk_steps);
      return static_cast<const Real*>(params.checkpoints)[row * 3 * C + 2 * C + c];
    };
    Sums<Real> after = last_adjoint<Real>(gstate_out, b, c, C);
    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) {
      Real* const at = static_cast<Real*>(params.adjoints) + (b * plan.chunks + chunk) * 2 * C + c;
      const Sums<Real> own = load_sums(at, C);
      store_sums(at, C, after);
      if (chunk == 0) break;
      // The last chunk's own adjoint is complete.
      const bool last = chunk == plan.chunks - 1;
      const Real decay =
          last ? Real(0) : std::exp(Real(plan.chunk_steps) * log_decay[c] + max_before(chunk) - max_before(chunk + 1));
      after = {own.num + decay * after.num, own.den + decay * after.den};
    }
  });
}

// gw and gu, state [C], from the partials of `rows` chunks; the log-decay -exp(w) is its own derivative.
template <class Real>
void reduce_partials(const BackwardParams& params, int64_t rows, void* gw, void* gu) {
  const int64_t C = params.C;
  const Real* log_decay = static_cast<const Real*>(params.channels.log_decay);
  for (int64_t c = 0; c < C; ++c) {
    double total_w = 0, total_u = 0;
    for (int64_t row = 0; row < rows; ++row) {
      total_w += params.partials[row * 2 * C + c];
      total_u += params.partials[row * 2 * C + C + c];
    }
    static_cast<Real*>(gw)[c] = static_cast<Real>(total_w * log_decay[c]);
    static_cast<Real*>(gu)[c] = static_cast<Real>(total_u);
  }
}

// gstate [B, 3, C], from the adjoints before each sequence: for consumers that respect the gauge, the gradient of max
// follows from the others.
template <class Real>
void state_gradients(const BackwardParams& params, const Plan& plan, void* gstate) {
  const int64_t C = params.C;
  for_each_channel(params.B, C, [&](int64_t b, int64_t c) {
    const Sums<Real> state = load_sums(static_cast<const Real*>(params.state) + b * 3 * C + c, C);
    const Sums<Real> g = load_sums(static_cast<const Real*>(params.adjoints) + b * plan.chunks * 2 * C + c, C);
    store_state(static_cast<Real*>(gstate) + b * 3 * C + c, C, {g, state.num * g.num + state.den * g.den});
  });
}

}  // namespace wkv::cpu
