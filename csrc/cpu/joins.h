// The arithmetic of a call outside its kernels: conversion of parameters and states, joins of chunks, reduction of
// gradients. `Real` is the state's type, and tensors of it are contiguous. The order of every sum is fixed.
#pragma once

#include <vector>

#include "../common/bidirectional.h"
#include "../common/math.h"
#include "isa.h"

namespace wkv::cpu {

// Turns w, or the log-decay of the bidirectional operator, and u, [2, C], into the log-decay and u of the kernels.
template <class Real>
void prepare_parameters(Real* rows, int64_t C, bool is_raw) {
  for (int64_t c = 0; c < C; ++c) rows[c] = canonical_nan(is_raw ? log_decay_of(rows[c]) : bounded_log_decay(rows[c]));
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

// The state before all steps of a channel; `given` is [rows, 3, C], or null for empty ones.
template <class Real>
State<Real> first_state(const void* given, int64_t row, int64_t c, int64_t C) {
  if (given == nullptr) return empty_state<Real>();
  return normal_form(load_state(static_cast<const Real*>(given) + row * 3 * C + c, C));
}

template <class Real>
void copy_first_states(const void* given, void* target, int64_t rows, int64_t C) {
  if (given == nullptr) return fill_empty_states<Real>(target, rows, C);
  for_each_channel(rows, C, [&](int64_t row, int64_t c) {
    store_state(static_cast<Real*>(target) + row * 3 * C + c, C, first_state<Real>(given, row, c, C));
  });
}

// Calls function(first chunk, number of chunks, c) for the channels of each sequence that is cut.
template <class Function>
void for_each_cut_channel(const Work& work, const Function& function) {
  for (int64_t i = 0; i < work.chunks(); ++i) {
    const Chunk chunk = work.chunk(i);
    if (!chunk.is_cut() || chunk.t_begin > 0) continue;
    const int64_t chunks = (chunk.sequence.steps + work.plan.chunk_steps - 1) / work.plan.chunk_steps;
    for (int64_t c = 0; c < work.C; ++c) function(chunk, chunks, c);
  }
}

// Turns `states`, each chunk's sum of its own steps, into the state before each chunk.
template <class Real>
void join_states(const ForwardParams& params, const Work& work) {
  const int64_t C = params.C;
  const Real* log_decay = static_cast<const Real*>(params.channels.log_decay);
  for_each_cut_channel(work, [&](const Chunk& first, int64_t chunks, int64_t c) {
    State<Real> before = first_state<Real>(params.state, first.n, c, C);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      Real* const at = static_cast<Real*>(params.states) + (first.row + chunk) * 3 * C + c;
      const State<Real> own = load_state(at, C);
      store_state(at, C, before);
      before = join(before, Real(work.plan.chunk_steps) * log_decay[c], own);
    }
  });
}

// The state after all steps, from each chunk's sum of its own steps, where none is before them.
template <class Real>
void last_states(const ForwardParams& params, const Work& work) {
  const int64_t C = params.C;
  const Real* log_decay = static_cast<const Real*>(params.channels.log_decay);
  for_each_cut_channel(work, [&](const Chunk& first, int64_t chunks, int64_t c) {
    State<Real> after = empty_state<Real>();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t steps = std::min(work.plan.chunk_steps, first.sequence.steps - chunk * work.plan.chunk_steps);
      const Real* const own = static_cast<const Real*>(params.states) + (first.row + chunk) * 3 * C + c;
      after = join(after, Real(steps) * log_decay[c], load_state(own, C));
    }
    store_state(static_cast<Real*>(params.state_out) + first.n * 3 * C + c, C, after);
  });
}

// The gradient of (num, den) after all steps of a channel; `gstate_out` is [rows, 3, C], or null for zero.
template <class Real>
Sums<Real> last_adjoint(const void* gstate_out, int64_t row, int64_t c, int64_t C) {
  if (gstate_out == nullptr) return {Real(0), Real(0)};
  const Real* at = static_cast<const Real*>(gstate_out) + row * 3 * C + c;
  return {canonical_nan(at[0]), canonical_nan(at[C])};
}

// The adjoints for the first pass: zero after each chunk but the last.
template <class Real>
void first_adjoints(const BackwardParams& params, const Work& work) {
  const int64_t C = params.C;
  Real* adjoints = static_cast<Real*>(params.adjoints);
  std::fill(adjoints, adjoints + work.cut_rows * 2 * C, Real(0));
  for_each_cut_channel(work, [&](const Chunk& first, int64_t chunks, int64_t c) {
    store_sums(adjoints + (first.row + chunks - 1) * 2 * C + c, C,
               last_adjoint<Real>(params.gstate_out, first.n, c, C));
  });
}

// The part of an adjoint after a chunk that is in the one before it. Scales are those of the checkpoints, so that no
// maxima are joined.
template <class Real>
Real adjoint_decay(const BackwardParams& params, const Work& work, const Chunk& first, int64_t chunk, int64_t c) {
  const int64_t C = params.C, chunk_steps = work.plan.chunk_steps;
  const auto max_before = [&](int64_t chunk) {
    if (chunk == 0) return first_state<Real>(params.state, first.n, c, C).max;
    const int64_t row = first.sequence.checkpoint_row(params.dtype, chunk * chunk_steps);
    return static_cast<const Real*>(params.checkpoints)[row * 3 * C + 2 * C + c];
  };
  const Real log_decay = static_cast<const Real*>(params.channels.log_decay)[c];
  return std::exp(Real(chunk_steps) * log_decay + max_before(chunk) - max_before(chunk + 1));
}

// Turns the adjoint that each chunk computes from `first_adjoints` into the one after each chunk.
template <class Real>
void join_adjoints(const BackwardParams& params, const Work& work) {
  const int64_t C = params.C;
  for_each_cut_channel(work, [&](const Chunk& first, int64_t chunks, int64_t c) {
    Sums<Real> after = last_adjoint<Real>(params.gstate_out, first.n, c, C);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      Real* const at = static_cast<Real*>(params.adjoints) + (first.row + chunk) * 2 * C + c;
      const Sums<Real> own = load_sums(at, C);
      store_sums(at, C, after);
      if (chunk == 0) break;
      // The last chunk's own adjoint is complete.
      const Real decay = chunk == chunks - 1 ? Real(0) : adjoint_decay<Real>(params, work, first, chunk, c);
      after = {own.num + decay * after.num, own.den + decay * after.den};
    }
  });
}

// The adjoint [B, 2, C] before all steps, from the one that each chunk computes of its own steps; that of a first chunk
// is in `gstate`.
template <class Real>
void adjoints_before(const BackwardParams& params, const Work& work, void* target) {
  const int64_t C = params.C;
  const Real* adjoints = static_cast<const Real*>(params.adjoints);
  const Real* gstate = static_cast<const Real*>(params.gstate);
  Real* const before = static_cast<Real*>(target);
  for_each_channel(params.B, C, [&](int64_t b, int64_t c) {
    store_sums(before + b * 2 * C + c, C, load_sums(gstate + b * 3 * C + c, C));
  });
  for_each_cut_channel(work, [&](const Chunk& first, int64_t chunks, int64_t c) {
    const auto own = [&](int64_t chunk) {
      return chunk == 0 ? load_sums(gstate + first.n * 3 * C + c, C)
                        : load_sums(adjoints + (first.row + chunk) * 2 * C + c, C);
    };
    Sums<Real> after = own(chunks - 1);
    for (int64_t chunk = chunks - 2; chunk >= 0; --chunk) {
      const Real decay = adjoint_decay<Real>(params, work, first, chunk, c);
      after = {own(chunk).num + decay * after.num, own(chunk).den + decay * after.den};
    }
    store_sums(before + first.n * 2 * C + c, C, after);
  });
}

// The gradients of the decay parameter and of u, state [C], from rows of partials; factor(log_decay) is the derivative
// of the log-decay by the parameter.
template <class Real, class Factor>
void reduce_partials(const double* partials, int64_t rows, int64_t C, const Channels& channels, const Factor& factor,
                     void* g_decay, void* gu) {
  const Real* log_decay = static_cast<const Real*>(channels.log_decay);
  std::vector<double> totals(2 * C);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < 2 * C; ++c) totals[c] += partials[row * 2 * C + c];
  }
  for (int64_t c = 0; c < C; ++c) {
    static_cast<Real*>(g_decay)[c] = static_cast<Real>(totals[c] * factor(log_decay[c]));
    static_cast<Real*>(gu)[c] = static_cast<Real>(totals[C + c]);
  }
}

}  // namespace wkv::cpu
