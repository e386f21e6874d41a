// The CPU backend of the operators: checks, allocates, plans, runs kernels in parallel, and registers with torch.
//
// Where time is cut, each chunk is first summed up by itself, then the sums are joined in order, then each chunk is
// computed from the state before it. No result depends on timing.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>
#include <new>

#include "../common/checks.h"
#include "../common/namespace.h"
#include "joins.h"

namespace wkv::cpu {
namespace {

// Uninitialised memory of one call, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count > 0) data_.reset(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlignment)));
  }
  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

template <class Function>
void for_each(const WorkItems& items, const Function& function) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(items[i]);
  };
  const int64_t count = items.count(), per_thread = (count + items.plan.threads - 1) / items.plan.threads;
  if (count <= per_thread) return range(0, count);
  torch::stable::parallel_for(0, count, per_thread, range);
}

// Leaves out the channels.
Params params_of(const Arguments& arguments) {
  return {.dtype = arguments.dtype,
          .B = arguments.B,
          .T = arguments.T,
          .C = arguments.C,
          .k = sequence_of(arguments.k),
          .v = sequence_of(arguments.v)};
}

WorkItems work_items_of(const Params& params) {
  const auto& [dtype, B, T, C, k, v, channels] = params;
  return {make_plan(dtype, B, T, C, torch::stable::get_num_threads()), B, T, C};
}

// A contiguous [C] tensor of any type as Real.
template <class Real>
void convert(const Tensor& channels, DType dtype, Real* to) {
  with_dtype(dtype, [&](auto type) {
    using Element = ElementOf<type.value, torch::headeronly::Half, torch::headeronly::BFloat16>;
    std::copy_n(static_cast<const Element*>(data_of(channels)), channels.size(0), to);
  });
}

// The rows of Channels, computed from w and u.
template <class Real>
struct ChannelTable {
  Scratch<Real> table;
  Channels rows;

  explicit ChannelTable(const Arguments& arguments) : table(4 * arguments.C) {
    const int64_t C = arguments.C;
    Real* const row = table.data();
    convert(arguments.w, arguments.w_dtype, row);
    convert(arguments.u, arguments.u_dtype, row + C);
    prepare_parameters(row, C);
    selected_kernels().exponentiate(arguments.dtype, C, row);
    rows = {row, row + C, row + 2 * C, row + 3 * C};
  }
};

// `params` comes without channels and states.
template <class Real>
void run_forward(const Arguments& arguments, ForwardParams params) {
  copy_first_states<Real>(data_or_null(arguments.state), params.state_out, params.B, params.C);
  if (arguments.nothing_to_do()) return;
  const ChannelTable<Real> channels(arguments);
  const WorkItems items = work_items_of(params);
  const int64_t rows = params.B * items.plan.chunks;
  const bool is_cut = items.plan.chunks > 1;
  const Scratch<Real> states(is_cut ? rows * 3 * params.C : 0);
  params.channels = channels.rows;
  params.states = is_cut ? states.data() : params.state_out;
  if (is_cut) {
    fill_empty_states<Real>(params.states, rows, params.C);
    ForwardParams sums = params;
    sums.y = nullptr;
    for_each(items, [&](const WorkItem& item) {
      // The last chunk's sum is unused.
      if (item.t_end < params.T) selected_kernels().forward(sums, item);
    });
    join_states<Real>(params, items.plan);
  }
  for_each(items, [&](const WorkItem& item) { selected_kernels().forward(params, item); });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& state, bool checkpoint) {
  const Arguments arguments(w, u, k, v, state);
  const Tensor y = arguments.empty_sequence(arguments.device);
  const Tensor state_out = arguments.empty_state(arguments.device);
  const Tensor checkpoints = arguments.empty_checkpoints(arguments.device, checkpoint);
  ForwardParams params{params_of(arguments)};
  params.y = y.mutable_data_ptr();
  params.state_out = state_out.mutable_data_ptr();
  params.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
  with_dtype(params.dtype, [&](auto type) { run_forward<RealOf<type.value>>(arguments, params); });
  return {y, state_out, checkpoints};
}

// `params` comes without channels, state, adjoints and partials.
template <class Real>
void run_backward(const Arguments& arguments, BackwardParams params, const void* gstate_out, void* gw, void* gu,
                  void* gstate) {
  const int64_t B = params.B, C = params.C;
  const ChannelTable<Real> channels(arguments);
  const WorkItems items = work_items_of(params);
  const int64_t rows = B * items.plan.chunks;
  const Scratch<Real> state(B * 3 * C), adjoints(rows * 2 * C);
  const Scratch<double> partials(rows * 2 * C);
  copy_first_states<Real>(data_or_null(arguments.state), state.data(), B, C);
  std::fill(partials.data(), partials.data() + rows * 2 * C, 0.0);
  params.channels = channels.rows;
  params.state = state.data();
  params.adjoints = adjoints.data();
  first_adjoints<Real>(params, items.plan, gstate_out);
  if (items.plan.chunks > 1) {
    for_each(items, [&](const WorkItem& item) {
      if (item.t_begin > 0) selected_kernels().backward(params, item);
    });
    join_adjoints<Real>(params, items.plan, gstate_out);
  }
  params.partials = partials.data();
  for_each(items, [&](const WorkItem& item) { selected_kernels().backward(params, item); });
  reduce_partials<Real>(params, rows, gw, gu);
  state_gradients<Real>(params, items.plan, gstate);
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
    params.checkpoints = data_of(given.checkpoints);
    params.gk = gk.mutable_data_ptr();
    params.gv = gv.mutable_data_ptr();
    with_dtype(params.dtype, [&](auto type) {
      run_backward<RealOf<type.value>>(arguments, params, data_or_null(given.gstate_out), gw.mutable_data_ptr(),
                                       gu.mutable_data_ptr(), gstate.mutable_data_ptr());
    });
  }
  return {as_type_of(w, gw), as_type_of(u, gu), gk, gv, gstate};
}

Tensor step(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& state,
            const std::optional<Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const Tensor y = arguments.empty_token(arguments.device);
  if (arguments.nothing_to_do()) return y;

  const Tensor given = as_contiguous(state), moved = arguments.empty_state(arguments.device);
  StepParams params{params_of(arguments)};
  if (arguments.r.has_value()) params.r = sequence_of(*arguments.r);
  params.y = y.mutable_data_ptr();
  params.state = moved.mutable_data_ptr();
  with_dtype(params.dtype, [&](auto type) {
    using Real = RealOf<type.value>;
    copy_first_states<Real>(data_of(given), params.state, params.B, params.C);
    const ChannelTable<Real> channels(arguments);
    params.channels = channels.rows;
    for_each(work_items_of(params), [&](const WorkItem& item) { selected_kernels().step(params, item); });
  });
  // Torch's copy counts the state's version for autograd.
  copy(moved, state);
  return y;
}

}  // namespace
}  // namespace wkv::cpu

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CPU, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::cpu::forward));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::cpu::backward));
  m.impl("wkv_step", TORCH_BOX(&wkv::cpu::step));
}
