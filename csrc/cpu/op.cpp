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

enum class Order { ascending, descending };  // of a thread's items in memory

template <class Function>
void for_each(const Work& work, Order order, const Function& function) {
  const auto shares = [&](int64_t first, int64_t last) {
    const int64_t begin = work.share(first), end = work.share(last);
    for (int64_t i = begin; i < end; ++i) function(work[order == Order::ascending ? i : begin + end - 1 - i]);
    selected_kernels().finish();
  };
  if (work.plan.threads == 1) return shares(0, 1);
  torch::stable::parallel_for(0, work.plan.threads, 1, shares);
}

// Leaves out the channels.
Params params_of(const Arguments& arguments) {
  return {.dtype = arguments.dtype,
          .B = arguments.B,
          .T = arguments.T,
          .C = arguments.C,
          .k = sequence_of(arguments.k),
          .v = sequence_of(arguments.v),
          .r = arguments.r.has_value() ? sequence_of(*arguments.r) : Sequence{}};
}

Boundaries boundaries_of(const Arguments& arguments) {
  return {data_of(*arguments.cu_seqlens), torch_type_of(*arguments.cu_seqlens) == aoti_torch_dtype_int64()};
}

// Where a sequence lies decides what is read and written, so boundaries are checked before anything is.
void check_boundaries(const Arguments& arguments) {
  if (!arguments.cu_seqlens.has_value()) return;
  const Boundaries boundaries = boundaries_of(arguments);
  const int64_t N = arguments.sequences;
  require(boundaries[0] == 0, "cu_seqlens: expected to start at 0, got ", boundaries[0]);
  require(boundaries[N] == arguments.T, "cu_seqlens: expected to end at ", arguments.T,
          ", the number of steps of k, got ", boundaries[N]);
  for (int64_t n = 0; n < N; ++n) {
    require(boundaries[n] <= boundaries[n + 1], "cu_seqlens: expected to rise, got ", boundaries[n + 1], " after ",
            boundaries[n], " at ", n + 1);
  }
}

Work work_of(const Arguments& arguments) {
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
  const int64_t threads = torch::stable::get_num_threads();
  if (!arguments.cu_seqlens.has_value()) return make_work(dtype, B, T, C, threads);
  return make_packed_work(dtype, boundaries_of(arguments), arguments.sequences, T, C, threads);
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
  const ChannelTable<Real> channels(arguments);
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
  const ChannelTable<Real> channels(arguments);
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
  reduce_partials<Real>(params, work.partial_rows, gw, gu);
}

Tensor as_type_of(const Tensor& parameter, const Tensor& gradient) {
  return torch_type_of(parameter) == torch_type_of(gradient) ? gradient
                                                             : torch::stable::to(gradient, parameter.scalar_type());
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
    const ChannelTable<Real> channels(arguments);
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
  m.impl("wkv_step", TORCH_BOX(&wkv::cpu::wkv_step));
}
