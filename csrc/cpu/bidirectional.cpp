// The CPU backend of the bidirectional operators. Time is not cut: an item is a column of a whole sequence.
#include <torch/csrc/stable/library.h>

#include "op.h"

namespace wkv::cpu {
namespace {

// Forward and backward take a column twice, so that one should stay in the caches; narrower ones take longer to come
// from memory.
constexpr int64_t kColumnBytes = 1 << 21;

Work whole_sequences(const Arguments& arguments) {
  const int64_t bytes_of_channel = 2 * arguments.T * element_bytes(arguments.dtype);  // of k and v
  return work_of(arguments, {.time = false, .widest_column = kColumnBytes / std::max<int64_t>(bytes_of_channel, 1)});
}

std::tuple<Tensor, Tensor> bi_wkv_forward(const Tensor& log_decay, const Tensor& u, const Tensor& k, const Tensor& v,
                                          const std::optional<Tensor>& r, const std::optional<Tensor>& cu_seqlens,
                                          bool checkpoint) {
  const BiArguments arguments(log_decay, u, k, v, r, cu_seqlens);
  check_boundaries(arguments);
  const Tensor y = arguments.empty_sequence(arguments.device);
  // The kernel needs them in any case.
  const Tensor sides = arguments.empty_checkpoints(arguments.device, true);
  BiForwardParams params{params_of(arguments)};
  params.y = y.mutable_data_ptr();
  params.sides = sides.mutable_data_ptr();
  with_dtype(params.dtype, [&](auto type) {
    using Real = RealOf<type.value>;
    if (arguments.nothing_to_do()) {
      return fill_empty_states<Real>(params.sides, 2 * params.B * sides.size(1), params.C);
    }
    const ChannelTable<Real> channels(arguments, /*is_raw=*/false);
    params.channels = channels.rows;
    for_each(whole_sequences(arguments), Order::ascending,
             [&](const WorkItem& item) { selected_kernels().bi_forward(params, item); });
  });
  return {y, checkpoint ? sides : arguments.empty_checkpoints(arguments.device, false)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bi_wkv_backward(const Tensor& log_decay, const Tensor& u,
                                                                   const Tensor& k, const Tensor& v,
                                                                   const std::optional<Tensor>& r,
                                                                   const std::optional<Tensor>& cu_seqlens,
                                                                   const Tensor& checkpoints, const Tensor& gy) {
  const BiArguments arguments(log_decay, u, k, v, r, cu_seqlens);
  check_boundaries(arguments);
  const GradientArguments given(arguments, checkpoints, gy, std::nullopt);
  const Device& cpu = arguments.device;
  const DType type = state_type(arguments.dtype);
  const Tensor g_log_decay = cpu.empty({arguments.C}, type), gu = cpu.empty({arguments.C}, type);
  const Tensor gk = arguments.empty_sequence(cpu), gv = arguments.empty_sequence(cpu);
  const Tensor gr = arguments.empty_gate_gradient(cpu);
  if (arguments.nothing_to_do()) {
    set_zero(g_log_decay);
    set_zero(gu);
  } else {
    BiBackwardParams params{params_of(arguments)};
    params.gy = sequence_of(given.gy);
    params.sides = data_of(given.checkpoints);
    params.gk = gk.mutable_data_ptr();
    params.gv = gv.mutable_data_ptr();
    params.gr = gr.mutable_data_ptr();
    with_dtype(params.dtype, [&](auto dtype) {
      using Real = RealOf<dtype.value>;
      const int64_t C = params.C;
      const ChannelTable<Real> channels(arguments, /*is_raw=*/false);
      const Work work = whole_sequences(arguments);
      const Scratch<Real> adjoints(params.B * arguments.checkpoint_rows() * 2 * C);
      const Scratch<double> partials(work.partial_rows * 2 * C);
      params.channels = channels.rows;
      params.adjoints = adjoints.data();
      params.partials = partials.data();
      for_each(work, Order::descending, [&](const WorkItem& item) { selected_kernels().bi_backward(params, item); });
      // Beyond the bound a log-decay is held.
      const auto factor = [](Real log_decay) { return Real(std::abs(log_decay) >= Real(kLargestLogDecay) ? 0 : 1); };
      reduce_partials<Real>(params.partials, work.partial_rows, C, params.channels, factor,
                            g_log_decay.mutable_data_ptr(), gu.mutable_data_ptr());
    });
  }
  return {as_type_of(arguments.w, g_log_decay), as_type_of(arguments.u, gu), gk, gv, gr};
}

}  // namespace
}  // namespace wkv::cpu

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CPU, m) {
  m.impl("bi_wkv_forward", TORCH_BOX(&wkv::cpu::bi_wkv_forward));
  m.impl("_bi_wkv_backward", TORCH_BOX(&wkv::cpu::bi_wkv_backward));
}
