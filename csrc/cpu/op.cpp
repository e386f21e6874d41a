// The CPU backend of the operators: checks, allocates, plans, runs kernels in parallel, and registers with torch.
//
// Where time is cut, each chunk is first summed up by itself, then the sums are joined in order, then each chunk is
// computed from the state before it. No result depends on timing.
#include "op.h"

#include <torch/csrc/stable/library.h>

namespace wkv::cpu {
namespace {

// `params` comes without channels and states.
template <class Real>
void run_forward(const Arguments& arguments, ForwardParams params) {
  const ChannelTable<Real> channels(arguments, /*is_raw=*/true);
  const Work work = work_of(arguments);
  const Scratch<Real> states(work.cut_rows * 3 * params.C);
  params.channels = channels.rows;
  params.states = states.data();
  if (work.cut_rows > 0) {
    fill_empty_states<Real>(params.states, work.cut_rows, params.C);
    ForwardParams sums = params;
    sums.y = nullptr;
    for_each(work, Order::ascending, [&](const WorkItem& item) {
      // The last chunk's sum is unused.
      if (item.is_cut() && item.t_end < item.sequence.steps) selected_kernels().forward(sums, item);
    });
    join_states<Real>(params, work);
  }
  for_each(work, Order::ascending, [&](const WorkItem& item) { selected_kernels().forward(params, item); });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Arguments& arguments, bool checkpoint) {
  check_boundaries(arguments);
  const Tensor y = arguments.empty_sequence(arguments.device);
  const Tensor state_out = arguments.empty_state(arguments.device);
  const Tensor checkpoints = arguments.empty_checkpoints(arguments.device, checkpoint);
  ForwardParams params{params_of(arguments)};
  params.y = y.mutable_data_ptr();
  params.state = data_or_null(arguments.state);
  params.state_out = state_out.mutable_data_ptr();
  params.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
  with_dtype(params.dtype, [&](auto type) {
    using Real = RealOf<type.value>;
    if (!arguments.nothing_to_do()) return run_forward<Real>(arguments, params);
    copy_first_states<Real>(params.state, params.state_out, arguments.sequences, params.C);
    if (checkpoint) fill_empty_states<Real>(params.checkpoints, params.B * checkpoints.size(1), params.C);
  });
  return {y, state_out, checkpoints};
}

// `params` comes without channels, adjoints and partials.
template <class Real>
void run_backward(const Arguments& arguments, BackwardParams params, void* gw, void* gu) {
  const int64_t C = params.C;
  const ChannelTable<Real> channels(arguments, /*is_raw=*/true);
  const Work work = work_of(arguments);
  const Scratch<Real> adjoints(work.cut_rows * 2 * C);
  const Scratch<double> partials(work.partial_rows * 2 * C);
  params.channels = channels.rows;
  params.adjoints = adjoints.data();
  if (work.cut_rows > 0) {
    first_adjoints<Real>(params, work);
    for_each(work, Order::descending, [&](const WorkItem& item) {
      if (item.is_cut() && item.t_begin > 0) selected_kernels().backward(params, item);
    });
    join_adjoints<Real>(params, work);
  }
  params.partials = partials.data();
  for_each(work, Order::descending, [&](const WorkItem& item) { selected_kernels().backward(params, item); });
  // The log-decay -exp(w) is its own derivative.
  const auto factor = [](Real log_decay) { return log_decay; };
  reduce_partials<Real>(params.partials, work.partial_rows, C, params.channels, factor, gw, gu);
}

// The first pass of either direction alone, over every chunk. `params` comes without y and states.
template <class Real>
void run_summary(const Arguments& arguments, ForwardParams params) {
  const ChannelTable<Real> channels(arguments, /*is_raw=*/true);
  const Work work = work_of(arguments);
  const Scratch<Real> states(work.cut_rows * 3 * params.C);
  params.channels = channels.rows;
  params.states = states.data();
  fill_empty_states<Real>(params.states, work.cut_rows, params.C);
  for_each(work, Order::ascending, [&](const WorkItem& item) { selected_kernels().forward(params, item); });
  last_states<Real>(params, work);
}

// `params` comes without adjoints, and without gstate_out and partials, which there are none of.
template <class Real>
void run_adjoint_summary(const Arguments& arguments, BackwardParams params, void* adjoint) {
  const ChannelTable<Real> channels(arguments, /*is_raw=*/true);
  const Work work = work_of(arguments);
  const Scratch<Real> adjoints(work.cut_rows * 2 * params.C), gstate(params.B * 3 * params.C);
  params.channels = channels.rows;
  params.adjoints = adjoints.data();
  params.gstate = gstate.data();
  std::fill(adjoints.data(), adjoints.data() + work.cut_rows * 2 * params.C, Real(0));
  for_each(work, Order::descending, [&](const WorkItem& item) { selected_kernels().backward(params, item); });
  adjoints_before<Real>(params, work, adjoint);
}

struct Gradients {
  Tensor gw, gu, gk, gv, gstate;
};

Gradients backward(const Arguments& arguments, const Tensor& checkpoints, const Tensor& gy,
                   const std::optional<Tensor>& gstate_out, const Tensor* gr) {
  check_boundaries(arguments);
  const GradientArguments given(arguments, checkpoints, gy, gstate_out);
  const Device& cpu = arguments.device;
  const DType type = state_type(arguments.dtype);
  const Tensor gw = cpu.empty({arguments.C}, type), gu = cpu.empty({arguments.C}, type);
  const Tensor gk = arguments.empty_sequence(cpu), gv = arguments.empty_sequence(cpu);
  const Tensor gstate = arguments.empty_state(cpu);
  if (arguments.nothing_to_do()) {
    given.after_no_steps(gw, gu, gstate);
  } else {
    BackwardParams params{params_of(arguments)};
    params.gy = sequence_of(given.gy);
    params.state = data_or_null(arguments.state);
    params.checkpoints = data_of(given.checkpoints);
    params.gstate_out = data_or_null(given.gstate_out);
    params.gstate = gstate.mutable_data_ptr();
    params.gk = gk.mutable_data_ptr();
    params.gv = gv.mutable_data_ptr();
    params.gr = gr != nullptr ? gr->mutable_data_ptr() : nullptr;
    with_dtype(params.dtype, [&](auto type) {
      run_backward<RealOf<type.value>>(arguments, params, gw.mutable_data_ptr(), gu.mutable_data_ptr());
    });
  }
  return {as_type_of(arguments.w, gw), as_type_of(arguments.u, gu), gk, gv, gstate};
}

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> wkv_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& state, bool checkpoint) {
  return forward(Arguments(w, u, k, v, state), checkpoint);
}

std::tuple<Tensor, Tensor, Tensor> wkv_mixing_forward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                      const Tensor& v, const std::optional<Tensor>& state,
                                                      const std::optional<Tensor>& r,
                                                      const std::optional<Tensor>& cu_seqlens, bool checkpoint) {
  return forward(Arguments(w, u, k, v, state, r, cu_seqlens), checkpoint);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv_backward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                                const Tensor& v, const std::optional<Tensor>& state,
                                                                const Tensor& checkpoints, const Tensor& gy,
                                                                const std::optional<Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state);
  const auto [gw, gu, gk, gv, gstate] = backward(arguments, checkpoints, gy, gstate_out, nullptr);
  return {gw, gu, gk, gv, gstate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv_mixing_backward(
    const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const std::optional<Tensor>& state,
    const std::optional<Tensor>& r, const std::optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& gy, const std::optional<Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state, r, cu_seqlens);
  const Tensor gr = arguments.empty_gate_gradient(arguments.device);
  const auto [gw, gu, gk, gv, gstate] = backward(arguments, checkpoints, gy, gstate_out, &gr);
  return {gw, gu, gk, gv, gstate, gr};
}

Tensor wkv_summary(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  const Arguments arguments(w, u, k, v, std::nullopt);
  const Tensor state = arguments.empty_state(arguments.device);
  ForwardParams params{params_of(arguments)};
  params.state_out = state.mutable_data_ptr();
  with_dtype(params.dtype, [&](auto type) {
    using Real = RealOf<type.value>;
    if (!arguments.nothing_to_do()) return run_summary<Real>(arguments, params);
    copy_first_states<Real>(nullptr, params.state_out, params.B, params.C);
  });
  return state;
}

Tensor wkv_adjoint_summary(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& state, const std::optional<Tensor>& r,
                           const Tensor& checkpoints, const Tensor& gy) {
  const Arguments arguments(w, u, k, v, state, r);
  const GradientArguments given(arguments, checkpoints, gy, std::nullopt);
  const Tensor adjoint = arguments.device.empty({arguments.B, 2, arguments.C}, state_type(arguments.dtype));
  if (arguments.nothing_to_do()) {
    set_zero(adjoint);
    return adjoint;
  }
  BackwardParams params{params_of(arguments)};
  params.gy = sequence_of(given.gy);
  params.state = data_or_null(arguments.state);
  params.checkpoints = data_of(given.checkpoints);
  with_dtype(params.dtype, [&](auto type) {
    run_adjoint_summary<RealOf<type.value>>(arguments, params, adjoint.mutable_data_ptr());
  });
  return adjoint;
}

Tensor wkv_step(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& state,
                const std::optional<Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const Tensor y = arguments.empty_token(arguments.device);
  if (arguments.nothing_to_do()) return y;

  const Tensor given = as_contiguous(state), moved = arguments.empty_state(arguments.device);
  StepParams params{params_of(arguments)};
  params.y = y.mutable_data_ptr();
  params.state = moved.mutable_data_ptr();
  with_dtype(params.dtype, [&](auto type) {
    using Real = RealOf<type.value>;
    copy_first_states<Real>(data_of(given), params.state, params.B, params.C);
    const ChannelTable<Real> channels(arguments, /*is_raw=*/true);
    params.channels = channels.rows;
    for_each(work_of(arguments), Order::ascending,
             [&](const WorkItem& item) { selected_kernels().step(params, item); });
  });
  // Torch's copy counts the state's version for autograd.
  copy(moved, state);
  return y;
}

}  // namespace
}  // namespace wkv::cpu

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CPU, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::cpu::wkv_forward));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::cpu::wkv_backward));
  m.impl("wkv_mixing_forward", TORCH_BOX(&wkv::cpu::wkv_mixing_forward));
  m.impl("_wkv_mixing_backward", TORCH_BOX(&wkv::cpu::wkv_mixing_backward));
  m.impl("_wkv_summary", TORCH_BOX(&wkv::cpu::wkv_summary));
  m.impl("_wkv_adjoint_summary", TORCH_BOX(&wkv::cpu::wkv_adjoint_summary));
  m.impl("wkv_step", TORCH_BOX(&wkv::cpu::wkv_step));
}
