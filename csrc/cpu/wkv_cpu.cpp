// The CPU backend of the operators: allocates, splits the work over threads and, where channels are too few for them,
// over time; the walks themselves are in wkv_cpu_walk.h.
//
// Split over time, a span is first summarised on its own, then the summaries are joined in order, then every span is
// walked from its true beginning. The order of every sum is fixed, so results do not depend on timing.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../checks.h"
#include "../wkv_math.h"
#include "wkv_cpu_kernels.h"
#include "wkv_cpu_plan.h"

namespace wkv {

// The largest instruction set that is built, asked for and there. Torch's answer is what was asked for: it takes
// ATEN_CPU_CAPABILITY at its word, whatever the processor.
const CpuKernels& selected_cpu_kernels() {
  static const CpuKernels& selected = []() -> const CpuKernels& {
    const std::string asked = at::get_cpu_capability();
    const bool avx512 = asked == "AVX512", avx2 = avx512 || asked == "AVX2";
    for (const CpuKernels* kernels : {avx512 ? cpu_kernels_avx512() : nullptr, avx2 ? cpu_kernels_avx2() : nullptr}) {
      if (kernels != nullptr && kernels->runs_here()) return *kernels;
    }
    return *cpu_kernels_baseline();
  }();
  return selected;
}

namespace {

// Any NaN as the usual one, whose lower half is zero: the walks round by adding to the bits.
template <class Real>
Real plain(Real x) {
  return x == x ? x : std::numeric_limits<Real>::quiet_NaN();
}

// The units of work that a plan makes of B sequences, `spans` counting the spans that take part.
struct Units {
  CpuPlan plan;
  int64_t T, C, spans, count;

  Units(const CpuPlan& plan, int64_t B, int64_t T, int64_t C, int64_t spans)
      : plan(plan), T(T), C(C), spans(spans), count(B * spans * plan.tiles) {}

  Span operator[](int64_t i) const {
    const int64_t tile = i % plan.tiles;
    const int64_t span = i / plan.tiles % spans;
    const int64_t c_begin = tile * plan.channel_tile;
    const int64_t t_begin = span * plan.span_steps;
    return {i / plan.tiles / spans, c_begin, std::min(c_begin + plan.channel_tile, C), t_begin,
            std::min(t_begin + plan.span_steps, T)};
  }

  template <class Function>
  void for_each(const Function& function) const {
    const int64_t units_per_thread = (count + plan.threads - 1) / plan.threads;
    at::parallel_for(0, count, units_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function((*this)[i]);
    });
  }
};

// log_decay, u, decay and bonus as rows of one tensor.
struct ParameterTable {
  at::Tensor table;
  Parameters pointers;

  ParameterTable(const Arguments& arguments)
      : table(at::empty({4, arguments.C()}, arguments.k.options().dtype(state_type(arguments.k)))) {
    const int64_t C = arguments.C();
    const int64_t row_bytes = C * state_bytes(arguments.dtype);
    char* rows = static_cast<char*>(table.data_ptr());
    if (arguments.dtype == DType::float64) {
      fill<double>(arguments, rows);
    } else {
      fill<float>(arguments, rows);
    }
    pointers = {rows, rows + row_bytes, rows + 2 * row_bytes, rows + 3 * row_bytes};
    selected_cpu_kernels().exponentiate(arguments.dtype, C, rows, rows + row_bytes, rows + 2 * row_bytes,
                                        rows + 3 * row_bytes);
  }

 private:
  template <class Real>
  static void fill(const Arguments& arguments, char* rows) {
    const int64_t C = arguments.C();
    const at::Tensor w = arguments.w.to(state_type(arguments.k)), u = arguments.u.to(state_type(arguments.k));
    const Real *w_values = w.const_data_ptr<Real>(), *u_values = u.const_data_ptr<Real>();
    Real* log_decay = reinterpret_cast<Real*>(rows);
    for (int64_t c = 0; c < C; ++c) {
      log_decay[c] = plain(log_decay_of(w_values[c]));
      log_decay[C + c] = plain(u_values[c]);
    }
  }
};

// The given state or the empty one; den == 0 means empty, whatever the other two say.
template <class Real>
void copy_initial_state(const std::optional<at::Tensor>& state, const at::Tensor& target) {
  const int64_t B = target.size(0), C = target.size(2);
  const Real* source = state.has_value() ? state->const_data_ptr<Real>() : nullptr;
  Real* copy = target.data_ptr<Real>();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const int64_t num = b * 3 * C + c, den = num + C, max = den + C;
      const bool empty = source == nullptr || source[den] == Real(0);
      copy[num] = empty ? Real(0) : plain(source[num]);
      copy[den] = empty ? Real(0) : plain(source[den]);
      copy[max] = empty ? Real(kEmptyMax) : plain(source[max]);
    }
  }
}

at::Tensor initial_state(const Arguments& arguments) {
  at::Tensor state = arguments.empty_state();
  if (arguments.dtype == DType::float64) {
    copy_initial_state<double>(arguments.state, state);
  } else {
    copy_initial_state<float>(arguments.state, state);
  }
  return state;
}

CpuPlan plan_for(const Arguments& arguments) {
  return plan_cpu(arguments.dtype, arguments.B(), arguments.T(), arguments.C(), at::get_num_threads());
}

// From each span's own summary [B, spans, 3, C] to the state that it starts from.
template <class Real>
void join_summaries(const at::Tensor& summaries, const at::Tensor& first, const Real* log_decay, int64_t span_steps) {
  const int64_t B = summaries.size(0), spans = summaries.size(1), C = summaries.size(3);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const auto at = [&](const at::Tensor& states, int64_t row) { return states.data_ptr<Real>() + row * 3 * C + c; };
      const auto read = [&](const Real* p) { return State<Real>{{p[0], p[C]}, p[2 * C]}; };
      State<Real> carried = read(at(first, b));
      for (int64_t span = 0; span < spans; ++span) {
        Real* p = at(summaries, b * spans + span);
        const State<Real> summary = read(p);
        p[0] = carried.sums.num;
        p[C] = carried.sums.den;
        p[2 * C] = carried.max;
        carried = join(carried, Real(span_steps) * log_decay[c], summary);
      }
    }
  }
}

// The walks save the states between intervals; the one after the last step is a checkpoint as well.
void save_last(const at::Tensor& checkpoints, const at::Tensor& state_out) {
  if (checkpoints.size(1) > 0) checkpoints.select(1, checkpoints.size(1) - 1).copy_(state_out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                       const at::Tensor& v, const std::optional<at::Tensor>& state,
                                                       bool checkpoint) {
  const Arguments arguments(w, u, k, v, state);
  const at::Tensor y = arguments.empty_sequence();
  const at::Tensor state_out = initial_state(arguments);
  const at::Tensor checkpoints = arguments.empty_checkpoints(checkpoint);
  if (y.numel() == 0) return {y, state_out, checkpoints};

  const ParameterTable parameters(arguments);
  const CpuPlan plan = plan_for(arguments);
  ForwardProblem problem = {arguments.dtype,
                            arguments.B(),
                            arguments.T(),
                            arguments.C(),
                            sequence_of(arguments.k),
                            sequence_of(arguments.v),
                            y.data_ptr(),
                            state_out.data_ptr(),
                            checkpoint ? checkpoints.data_ptr() : nullptr};
  const CpuKernels& kernels = selected_cpu_kernels();
  const int64_t row_bytes = 3 * problem.C * state_bytes(problem.dtype);

  if (plan.spans == 1) {
    Units(plan, problem.B, problem.T, problem.C, 1).for_each([&](const Span& span) {
      kernels.forward(problem, parameters.pointers, span, static_cast<char*>(problem.state_out) + span.b * row_bytes);
    });
    save_last(checkpoints, state_out);
    return {y, state_out, checkpoints};
  }

  at::Tensor starts = at::empty({problem.B, plan.spans, 3, problem.C}, state_out.options());
  const auto start_of = [&](const Span& span) {
    return static_cast<char*>(starts.data_ptr()) + (span.b * plan.spans + span.t_begin / plan.span_steps) * row_bytes;
  };
  ForwardProblem summary = problem;
  summary.y = nullptr;
  starts.slice(2, 0, 2).zero_();
  starts.slice(2, 2, 3).fill_(kEmptyMax);
  // What the last span sums up to, nobody asks.
  Units(plan, problem.B, problem.T, problem.C, plan.spans).for_each([&](const Span& span) {
    if (span.t_end < problem.T) kernels.forward(summary, parameters.pointers, span, start_of(span));
  });
  if (problem.dtype == DType::float64) {
    join_summaries(starts, state_out, static_cast<const double*>(parameters.pointers.log_decay), plan.span_steps);
  } else {
    join_summaries(starts, state_out, static_cast<const float*>(parameters.pointers.log_decay), plan.span_steps);
  }
  Units(plan, problem.B, problem.T, problem.C, plan.spans).for_each([&](const Span& span) {
    kernels.forward(problem, parameters.pointers, span, start_of(span));
  });
  state_out.copy_(starts.select(1, plan.spans - 1));
  save_last(checkpoints, state_out);
  return {y, state_out, checkpoints};
}

// The gradient of (num, den) after the last step, [B, 2, C]: the given one or zero.
template <class Real>
at::Tensor adjoint_after_last(const at::Tensor& state, const std::optional<at::Tensor>& gstate_out) {
  const at::Tensor adjoint = at::zeros({state.size(0), 2, state.size(2)}, state.options());
  if (gstate_out.has_value()) {
    adjoint.copy_(gstate_out->slice(1, 0, 2));
    Real* values = adjoint.data_ptr<Real>();
    std::transform(values, values + adjoint.numel(), values, plain<Real>);
  }
  return adjoint;
}

// From each span's own adjoint [B, spans, 2, C], taken from zero but for the last, to the adjoint after that span.
template <class Real>
void join_adjoints(const at::Tensor& adjoints, const at::Tensor& after_last, const BackwardProblem& problem,
                   const Real* log_decay, int64_t span_steps) {
  const int64_t B = problem.B, C = problem.C, spans = adjoints.size(1);
  const int64_t checkpoints = checkpoint_count(problem.dtype, problem.T);
  const int64_t span_chunks = span_steps / checkpoint_interval(problem.dtype);
  const Real* saved = static_cast<const Real*>(problem.checkpoints);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const auto max_before = [&](int64_t span) {
        return saved[((b * checkpoints + span * span_chunks - 1) * 3 + 2) * C + c];
      };
      Real carried[2] = {after_last.const_data_ptr<Real>()[b * 2 * C + c],
                         after_last.const_data_ptr<Real>()[b * 2 * C + C + c]};
      for (int64_t span = spans - 1; span >= 0; --span) {
        Real* p = adjoints.data_ptr<Real>() + (b * spans + span) * 2 * C + c;
        const Real own[2] = {p[0], p[C]};
        p[0] = carried[0];
        p[C] = carried[1];
        if (span == 0) break;
        const bool last = span == spans - 1;
        const Real decay =
            last ? Real(0) : std::exp(Real(span_steps) * log_decay[c] + max_before(span) - max_before(span + 1));
        carried[0] = own[0] + decay * carried[0];
        carried[1] = own[1] + decay * carried[1];
      }
    }
  }
}

// gw and gu from the partial sums [B, spans, 2, C], in a fixed order; the log-decay -exp(w) is its own derivative.
template <class Real>
void reduce_parameter_gradients(const at::Tensor& partial, const Real* log_decay, Real* gw, Real* gu) {
  const int64_t rows = partial.size(0) * partial.size(1), C = partial.size(3);
  const double* sums = partial.const_data_ptr<double>();
  for (int64_t c = 0; c < C; ++c) {
    double total_w = 0, total_u = 0;
    for (int64_t row = 0; row < rows; ++row) {
      total_w += sums[row * 2 * C + c];
      total_u += sums[row * 2 * C + C + c];
    }
    gw[c] = static_cast<Real>(total_w * log_decay[c]);
    gu[c] = static_cast<Real>(total_u);
  }
}

// The gradient with respect to the state: for consumers that respect the gauge, that of max follows from the others.
template <class Real>
void state_gradient(const at::Tensor& state, const at::Tensor& adjoint, const at::Tensor& gstate) {
  const int64_t B = state.size(0), C = state.size(2);
  const Real* value = state.const_data_ptr<Real>();
  const Real* sums = adjoint.const_data_ptr<Real>();
  Real* gradient = gstate.data_ptr<Real>();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const Real* s = value + b * 3 * C + c;
      const Real* a = sums + b * 2 * C + c;
      Real* g = gradient + b * 3 * C + c;
      g[0] = a[0];
      g[C] = a[C];
      g[2 * C] = s[0] * a[0] + s[C] * a[C];
    }
  }
}

template <class Real>
void backward_as(BackwardProblem& problem, const ParameterTable& parameters, const CpuPlan& plan,
                 const at::Tensor& first_state, const std::optional<at::Tensor>& gstate_out, const at::Tensor& gstate) {
  const int64_t B = problem.B, C = problem.C;
  const auto options = first_state.options();
  const at::Tensor after_last = adjoint_after_last<Real>(first_state, gstate_out);
  const at::Tensor adjoints = at::zeros({B, plan.spans, 2, C}, options);
  const at::Tensor partial = at::zeros({B, plan.spans, 2, C}, options.dtype(at::kDouble));
  const CpuKernels& kernels = selected_cpu_kernels();
  const Real* log_decay = static_cast<const Real*>(parameters.pointers.log_decay);
  const auto row_of = [&](const at::Tensor& rows, const Span& span) {
    return (span.b * plan.spans + span.t_begin / plan.span_steps) * 2 * C * rows.element_size() +
           static_cast<char*>(rows.data_ptr());
  };

  adjoints.select(1, plan.spans - 1).copy_(after_last);
  const Units units(plan, B, problem.T, C, plan.spans);
  if (plan.spans > 1) {
    units.for_each([&](const Span& span) {
      if (span.t_begin > 0) kernels.backward(problem, parameters.pointers, span, row_of(adjoints, span), nullptr);
    });
    join_adjoints<Real>(adjoints, after_last, problem, log_decay, plan.span_steps);
  }
  units.for_each([&](const Span& span) {
    kernels.backward(problem, parameters.pointers, span, row_of(adjoints, span),
                     reinterpret_cast<double*>(row_of(partial, span)));
  });
  reduce_parameter_gradients<Real>(partial, log_decay, static_cast<Real*>(problem.gw), static_cast<Real*>(problem.gu));
  state_gradient<Real>(first_state, adjoints.select(1, 0).contiguous(), gstate);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& state, const at::Tensor& checkpoints, const at::Tensor& gy,
    const std::optional<at::Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state);
  const GradientArguments given(arguments, checkpoints, gy, gstate_out);
  const auto accumulated = arguments.k.options().dtype(state_type(arguments.k));
  const at::Tensor gw = at::empty({arguments.C()}, accumulated), gu = at::empty({arguments.C()}, accumulated);
  const at::Tensor gk = arguments.empty_sequence(), gv = arguments.empty_sequence();
  const at::Tensor gstate = arguments.empty_state();
  if (gk.numel() == 0) {
    gw.zero_();
    gu.zero_();
    if (given.gstate_out.has_value()) {
      gstate.copy_(*given.gstate_out);
    } else {
      gstate.zero_();
    }
  } else {
    const ParameterTable parameters(arguments);
    const at::Tensor first_state = initial_state(arguments);
    BackwardProblem problem = {arguments.dtype,
                               arguments.B(),
                               arguments.T(),
                               arguments.C(),
                               sequence_of(arguments.k),
                               sequence_of(arguments.v),
                               sequence_of(given.gy),
                               first_state.const_data_ptr(),
                               given.checkpoints.const_data_ptr(),
                               gw.data_ptr(),
                               gu.data_ptr(),
                               gk.data_ptr(),
                               gv.data_ptr()};
    if (arguments.dtype == DType::float64) {
      backward_as<double>(problem, parameters, plan_for(arguments), first_state, given.gstate_out, gstate);
    } else {
      backward_as<float>(problem, parameters, plan_for(arguments), first_state, given.gstate_out, gstate);
    }
  }
  return {gw.to(w.scalar_type()), gu.to(u.scalar_type()), gk, gv, gstate};
}

at::Tensor step(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, at::Tensor& state,
                const std::optional<at::Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const at::Tensor y = arguments.empty_token();
  if (y.numel() == 0) return y;

  const ParameterTable parameters(arguments);
  const at::Tensor moved = initial_state(arguments);
  const StepProblem problem = {arguments.dtype,
                               arguments.C(),
                               sequence_of(arguments.k),
                               sequence_of(arguments.v),
                               arguments.r.has_value() ? sequence_of(*arguments.r) : Sequence{},
                               y.data_ptr(),
                               moved.data_ptr()};
  Units(plan_for(arguments), arguments.B(), 1, arguments.C(), 1).for_each([&](const Span& span) {
    selected_cpu_kernels().step(problem, parameters.pointers, span);
  });
  state.copy_(moved);
  return y;
}

}  // namespace
}  // namespace wkv

TORCH_LIBRARY_IMPL(rwkv_kernels, CPU, m) {
  m.impl("wkv_forward", wkv::forward);
  m.impl("_wkv_backward", wkv::backward);
  m.impl("wkv_step", wkv::step);
}
