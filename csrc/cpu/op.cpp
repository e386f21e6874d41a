// The CPU backend of the operators: allocates, splits the work over threads and, where channels are too few for them,
// over time; the walks themselves are in kernel.h.
//
// Split over time, a span is first summarised on its own, then the summaries are joined in order, then every span is
// walked from its true beginning. The order of every sum is fixed, so results do not depend on timing.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string_view>
#include <tuple>

#include "../common/checks.h"
#include "../common/math.h"
#include "../common/namespace.h"
#include "isa.h"
#include "plan.h"

namespace wkv {

const CpuKernels& selected_cpu_kernels() {
  static const CpuKernels& selected = []() -> const CpuKernels& {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view asked = variable == nullptr ? "" : variable;
    const bool avx2 = asked != "default", avx512 = avx2 && asked != "avx2";
    for (const CpuKernels* kernels : {avx512 ? cpu_kernels_avx512() : nullptr, avx2 ? cpu_kernels_avx2() : nullptr}) {
      if (kernels != nullptr && kernels->runs_here()) return *kernels;
    }
    return *cpu_kernels_baseline();
  }();
  return selected;
}

namespace {

// Memory of one call, aligned to cache lines; of any content, or zero.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(::operator new(size_t(bytes), kAlignment))) {}
  static Scratch zeros(int64_t bytes) {
    Scratch scratch(bytes);
    std::memset(scratch.data(), 0, size_t(bytes));
    return scratch;
  }
  char* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<char, Free> data_;
};

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
    const auto range = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function((*this)[i]);
    };
    const int64_t units_per_thread = (count + plan.threads - 1) / plan.threads;
    if (count <= units_per_thread) return range(0, count);
    torch::stable::parallel_for(0, count, units_per_thread, range);
  }
};

// A [C] tensor of any type and stride as Real.
template <class Element, class Real>
void convert(const Tensor& channels, Real* to) {
  const Element* from = static_cast<const Element*>(data_of(channels));
  const int64_t C = channels.size(0), stride = channels.stride(0);
  for (int64_t c = 0; c < C; ++c) to[c] = static_cast<Real>(from[c * stride]);
}

template <class Real>
void convert(const Tensor& channels, DType dtype, Real* to) {
  switch (dtype) {
    case DType::float32:
      return convert<float>(channels, to);
    case DType::float16:
      return convert<torch::headeronly::Half>(channels, to);
    case DType::bfloat16:
      return convert<torch::headeronly::BFloat16>(channels, to);
    case DType::float64:
      return convert<double>(channels, to);
  }
}

// log_decay, u, decay and bonus, [C] each.
struct ParameterTable {
  Scratch table;
  Parameters pointers;

  explicit ParameterTable(const Arguments& arguments) : table(4 * arguments.C * state_bytes(arguments.dtype)) {
    const int64_t C = arguments.C;
    const int64_t row_bytes = C * state_bytes(arguments.dtype);
    char* rows = table.data();
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
    const int64_t C = arguments.C;
    Real* log_decay = reinterpret_cast<Real*>(rows);
    Real* u = log_decay + C;
    convert(arguments.w, arguments.w_dtype, log_decay);
    convert(arguments.u, arguments.u_dtype, u);
    for (int64_t c = 0; c < C; ++c) {
      log_decay[c] = plain(log_decay_of(log_decay[c]));
      u[c] = plain(u[c]);
    }
  }
};

// States [B, 3, C] in memory, or of a tensor with any strides; num, den and max are a row each.
template <class Real>
struct States {
  Real* data;
  int64_t batch_stride, row_stride, channel_stride;

  static States contiguous(void* data, int64_t C) { return {static_cast<Real*>(data), 3 * C, C, 1}; }
  explicit operator bool() const { return data != nullptr; }
  Real* at(int64_t b, int64_t c) const { return data + b * batch_stride + c * channel_stride; }
};

template <class Real>
States<const Real> states_of(const Tensor& tensor) {
  return {static_cast<const Real*>(data_of(tensor)), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The given states, or empty ones where `source` is; den == 0 means empty, whatever the other two say.
template <class Real>
void copy_initial_states(const States<const Real>& source, const States<Real>& target, int64_t B, int64_t C) {
  const int64_t from = source.row_stride, to = target.row_stride;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const Real* given = source.at(b, c);
      Real* copy = target.at(b, c);
      const bool empty = !source || given[from] == Real(0);
      copy[0] = empty ? Real(0) : plain(given[0]);
      copy[to] = empty ? Real(0) : plain(given[from]);
      copy[2 * to] = empty ? Real(kEmptyMax) : plain(given[2 * from]);
    }
  }
}

template <class Real>
void copy_initial_states(const std::optional<Tensor>& source, void* target, int64_t B, int64_t C) {
  copy_initial_states<Real>(source.has_value() ? states_of<Real>(*source) : States<const Real>{},
                            States<Real>::contiguous(target, C), B, C);
}

// Into `target`, contiguous.
void copy_initial_states(DType dtype, const std::optional<Tensor>& source, void* target, int64_t B, int64_t C) {
  if (dtype == DType::float64) {
    copy_initial_states<double>(source, target, B, C);
  } else {
    copy_initial_states<float>(source, target, B, C);
  }
}

CpuPlan plan_for(const Arguments& arguments) {
  return plan_cpu(arguments.dtype, arguments.B, arguments.T, arguments.C, torch::stable::get_num_threads());
}

// From each span's own summary [B, spans, 3, C] to the state that it starts from; `first` is [B, 3, C].
template <class Real>
void join_summaries(void* summaries, const void* first, const Parameters& parameters, const CpuPlan& plan, int64_t B,
                    int64_t C) {
  const Real* log_decay = static_cast<const Real*>(parameters.log_decay);
  const auto read = [C](const Real* p) { return State<Real>{{p[0], p[C]}, p[2 * C]}; };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      State<Real> carried = read(static_cast<const Real*>(first) + b * 3 * C + c);
      for (int64_t span = 0; span < plan.spans; ++span) {
        Real* p = static_cast<Real*>(summaries) + (b * plan.spans + span) * 3 * C + c;
        const State<Real> summary = read(p);
        p[0] = carried.sums.num;
        p[C] = carried.sums.den;
        p[2 * C] = carried.max;
        carried = join(carried, Real(plan.span_steps) * log_decay[c], summary);
      }
    }
  }
}

// The walks save the states between intervals; the one after the last step is a checkpoint as well.
void save_last(const ForwardProblem& problem) {
  if (problem.checkpoints == nullptr) return;
  const int64_t row_bytes = 3 * problem.C * state_bytes(problem.dtype);
  for (int64_t b = 0; b < problem.B; ++b) {
    std::memcpy(
        static_cast<char*>(problem.checkpoints) + checkpoint_row(problem.dtype, problem.T, b, problem.T) * row_bytes,
        static_cast<const char*>(problem.state_out) + b * row_bytes, size_t(row_bytes));
  }
}

// The forward pass of a plan that splits time: state_out has the states before the first step, then those after the
// last.
template <class Real>
void forward_in_spans(const ForwardProblem& problem, const Parameters& parameters, const CpuPlan& plan) {
  const CpuKernels& kernels = selected_cpu_kernels();
  const int64_t B = problem.B, C = problem.C, row_bytes = 3 * C * int64_t(sizeof(Real));
  const Scratch starts(B * plan.spans * row_bytes);
  const auto start_of = [&](int64_t b, int64_t span) { return starts.data() + (b * plan.spans + span) * row_bytes; };
  copy_initial_states<Real>(std::nullopt, starts.data(), B * plan.spans, C);

  const Units units(plan, B, problem.T, C, plan.spans);
  ForwardProblem summary = problem;
  summary.y = nullptr;
  // The last span's summary is unused.
  units.for_each([&](const Span& span) {
    if (span.t_end < problem.T) {
      kernels.forward(summary, parameters, span, start_of(span.b, span.t_begin / plan.span_steps));
    }
  });
  join_summaries<Real>(starts.data(), problem.state_out, parameters, plan, B, C);
  units.for_each([&](const Span& span) {
    kernels.forward(problem, parameters, span, start_of(span.b, span.t_begin / plan.span_steps));
  });
  for (int64_t b = 0; b < B; ++b) {
    std::memcpy(static_cast<char*>(problem.state_out) + b * row_bytes, start_of(b, plan.spans - 1), size_t(row_bytes));
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& state, bool checkpoint) {
  const Arguments arguments(w, u, k, v, state);
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
  const Tensor y = arguments.empty_sequence();
  const Tensor state_out = arguments.empty_state();
  const Tensor checkpoints = arguments.empty_checkpoints(checkpoint);
  copy_initial_states(dtype, arguments.state, state_out.mutable_data_ptr(), B, C);
  if (arguments.nothing_to_do()) return {y, state_out, checkpoints};

  const ParameterTable parameters(arguments);
  const CpuPlan plan = plan_for(arguments);
  const ForwardProblem problem = {dtype,
                                  B,
                                  T,
                                  C,
                                  sequence_of(arguments.k),
                                  sequence_of(arguments.v),
                                  y.mutable_data_ptr(),
                                  state_out.mutable_data_ptr(),
                                  checkpoint ? checkpoints.mutable_data_ptr() : nullptr};
  if (plan.spans == 1) {
    const int64_t row_bytes = 3 * C * state_bytes(dtype);
    Units(plan, B, T, C, 1).for_each([&](const Span& span) {
      selected_cpu_kernels().forward(problem, parameters.pointers, span,
                                     static_cast<char*>(problem.state_out) + span.b * row_bytes);
    });
  } else if (dtype == DType::float64) {
    forward_in_spans<double>(problem, parameters.pointers, plan);
  } else {
    forward_in_spans<float>(problem, parameters.pointers, plan);
  }
  save_last(problem);
  return {y, state_out, checkpoints};
}

// The gradient of (num, den) after the last step of sequence b, [2, C]: the given one, [B, 3, C], or zero.
template <class Real>
void copy_adjoint_after_last(const void* gstate_out, int64_t b, int64_t C, Real* target) {
  if (gstate_out == nullptr) {
    std::fill(target, target + 2 * C, Real(0));
  } else {
    const Real* given = static_cast<const Real*>(gstate_out) + b * 3 * C;
    std::transform(given, given + 2 * C, target, plain<Real>);
  }
}

// From each span's own adjoint [B, spans, 2, C], taken from zero but for the last, which is the one after all steps, to
// the adjoint after that span.
template <class Real>
void join_adjoints(Real* adjoints, const void* gstate_out, const BackwardProblem& problem, const Real* log_decay,
                   const CpuPlan& plan) {
  const int64_t B = problem.B, C = problem.C, spans = plan.spans;
  const int64_t checkpoints = checkpoint_count(problem.dtype, problem.T);
  const int64_t span_chunks = plan.span_steps / checkpoint_interval(problem.dtype);
  const Real* saved = static_cast<const Real*>(problem.checkpoints);
  const Scratch after_last(2 * C * int64_t(sizeof(Real)));
  Real* last_adjoint = reinterpret_cast<Real*>(after_last.data());
  for (int64_t b = 0; b < B; ++b) {
    copy_adjoint_after_last(gstate_out, b, C, last_adjoint);
    for (int64_t c = 0; c < C; ++c) {
      const auto max_before = [&](int64_t span) {
        return saved[((b * checkpoints + span * span_chunks - 1) * 3 + 2) * C + c];
      };
      Real carried[2] = {last_adjoint[c], last_adjoint[C + c]};
      for (int64_t span = spans - 1; span >= 0; --span) {
        Real* p = adjoints + (b * spans + span) * 2 * C + c;
        const Real own[2] = {p[0], p[C]};
        p[0] = carried[0];
        p[C] = carried[1];
        if (span == 0) break;
        const bool last = span == spans - 1;
        const Real decay =
            last ? Real(0) : std::exp(Real(plan.span_steps) * log_decay[c] + max_before(span) - max_before(span + 1));
        carried[0] = own[0] + decay * carried[0];
        carried[1] = own[1] + decay * carried[1];
      }
    }
  }
}

// gw and gu from the partial sums [rows, 2, C], in a fixed order; the log-decay -exp(w) is its own derivative.
template <class Real>
void reduce_parameter_gradients(const double* partial, int64_t rows, int64_t C, const Real* log_decay, Real* gw,
                                Real* gu) {
  for (int64_t c = 0; c < C; ++c) {
    double total_w = 0, total_u = 0;
    for (int64_t row = 0; row < rows; ++row) {
      total_w += partial[row * 2 * C + c];
      total_u += partial[row * 2 * C + C + c];
    }
    gw[c] = static_cast<Real>(total_w * log_decay[c]);
    gu[c] = static_cast<Real>(total_u);
  }
}

// The gradient with respect to the state: for consumers that respect the gauge, that of max follows from the others.
// `adjoint` [2, C] and `gradient` [3, C] are of one sequence.
template <class Real>
void state_gradient(const Real* state, const Real* adjoint, int64_t C, Real* gradient) {
  for (int64_t c = 0; c < C; ++c) {
    gradient[c] = adjoint[c];
    gradient[C + c] = adjoint[C + c];
    gradient[2 * C + c] = state[c] * adjoint[c] + state[C + c] * adjoint[C + c];
  }
}

template <class Real>
void backward_as(const BackwardProblem& problem, const Parameters& parameters, const CpuPlan& plan,
                 const void* gstate_out, void* gstate) {
  const int64_t B = problem.B, C = problem.C, rows = B * plan.spans;
  const CpuKernels& kernels = selected_cpu_kernels();
  const Real* log_decay = static_cast<const Real*>(parameters.log_decay);
  const Scratch adjoint_memory = Scratch::zeros(rows * 2 * C * int64_t(sizeof(Real)));
  const Scratch partial_memory = Scratch::zeros(rows * 2 * C * int64_t(sizeof(double)));
  Real* adjoints = reinterpret_cast<Real*>(adjoint_memory.data());
  double* partial = reinterpret_cast<double*>(partial_memory.data());
  const auto row_of = [&](const Span& span) { return (span.b * plan.spans + span.t_begin / plan.span_steps) * 2 * C; };

  for (int64_t b = 0; b < B; ++b) {
    copy_adjoint_after_last(gstate_out, b, C, adjoints + ((b + 1) * plan.spans - 1) * 2 * C);
  }
  const Units units(plan, B, problem.T, C, plan.spans);
  if (plan.spans > 1) {
    units.for_each([&](const Span& span) {
      if (span.t_begin > 0) kernels.backward(problem, parameters, span, adjoints + row_of(span), nullptr);
    });
    join_adjoints<Real>(adjoints, gstate_out, problem, log_decay, plan);
  }
  units.for_each([&](const Span& span) {
    kernels.backward(problem, parameters, span, adjoints + row_of(span), partial + row_of(span));
  });
  reduce_parameter_gradients<Real>(partial, rows, C, log_decay, static_cast<Real*>(problem.gw),
                                   static_cast<Real*>(problem.gu));
  for (int64_t b = 0; b < B; ++b) {
    state_gradient(static_cast<const Real*>(problem.state) + b * 3 * C, adjoints + b * plan.spans * 2 * C, C,
                   static_cast<Real*>(gstate) + b * 3 * C);
  }
}

Tensor as_type_of(const Tensor& parameter, const Tensor& gradient) {
  return torch_type_of(parameter) == torch_type_of(gradient) ? gradient
                                                             : torch::stable::to(gradient, parameter.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                            const Tensor& v, const std::optional<Tensor>& state,
                                                            const Tensor& checkpoints, const Tensor& gy,
                                                            const std::optional<Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state);
  const GradientArguments given(arguments, checkpoints, gy, gstate_out);
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
  const Tensor gw = empty({C}, state_type(dtype), arguments.device);
  const Tensor gu = empty({C}, state_type(dtype), arguments.device);
  const Tensor gk = arguments.empty_sequence(), gv = arguments.empty_sequence();
  const Tensor gstate = arguments.empty_state();
  if (arguments.nothing_to_do()) {
    set_zero(gw);
    set_zero(gu);
    if (given.gstate_out.has_value()) {
      copy(*given.gstate_out, gstate);
    } else {
      set_zero(gstate);
    }
  } else {
    const ParameterTable parameters(arguments);
    const Scratch first_state(B * 3 * C * state_bytes(dtype));
    copy_initial_states(dtype, arguments.state, first_state.data(), B, C);
    const BackwardProblem problem = {dtype,
                                     B,
                                     T,
                                     C,
                                     sequence_of(arguments.k),
                                     sequence_of(arguments.v),
                                     sequence_of(given.gy),
                                     first_state.data(),
                                     data_of(given.checkpoints),
                                     gw.mutable_data_ptr(),
                                     gu.mutable_data_ptr(),
                                     gk.mutable_data_ptr(),
                                     gv.mutable_data_ptr()};
    const CpuPlan plan = plan_for(arguments);
    const void* after_last = data_or_null(given.gstate_out);
    if (dtype == DType::float64) {
      backward_as<double>(problem, parameters.pointers, plan, after_last, gstate.mutable_data_ptr());
    } else {
      backward_as<float>(problem, parameters.pointers, plan, after_last, gstate.mutable_data_ptr());
    }
  }
  return {as_type_of(w, gw), as_type_of(u, gu), gk, gv, gstate};
}

Tensor step(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& state,
            const std::optional<Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const auto& [dtype, B, C] = std::tie(arguments.dtype, arguments.B, arguments.C);
  const Tensor y = arguments.empty_token();
  if (arguments.nothing_to_do()) return y;

  const ParameterTable parameters(arguments);
  const Tensor moved = arguments.empty_state();
  copy_initial_states(dtype, state, moved.mutable_data_ptr(), B, C);
  const StepProblem problem = {dtype,
                               C,
                               sequence_of(arguments.k),
                               sequence_of(arguments.v),
                               arguments.r.has_value() ? sequence_of(*arguments.r) : Sequence{},
                               y.mutable_data_ptr(),
                               moved.mutable_data_ptr()};
  Units(plan_for(arguments), B, 1, C, 1).for_each([&](const Span& span) {
    selected_cpu_kernels().step(problem, parameters.pointers, span);
  });
  // By torch, which counts the state's versions for autograd.
  copy(moved, state);
  return y;
}

}  // namespace
}  // namespace wkv

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CPU, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::forward));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::backward));
  m.impl("wkv_step", TORCH_BOX(&wkv::step));
}
