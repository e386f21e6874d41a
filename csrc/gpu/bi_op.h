// The bidirectional operators on a GPU, on the same launchers as those of op.h.
#pragma once

#include "op.h"

namespace wkv {

// The launches of a call, one after the other.
template <class Launcher>
struct BiLaunches {
  Launcher& launcher;
  DType dtype;
  BiParams params;
  Tensor steps;  // float64, what is kept of each step

  BiLaunches(Launcher& launcher, BiArguments& arguments, int64_t step_height)
      : launcher(launcher), dtype(arguments.dtype), params{sequence_params(arguments)} {
    const auto& [B, T, C] = std::tie(arguments.B, arguments.T, arguments.C);
    if (dtype == DType::float64) {
      steps = launcher.empty({B, T, step_height, C}, dtype);
      params.steps = steps.mutable_data_ptr();
      params.step_height = static_cast<uint32_t>(step_height);
      return;
    }
    const int64_t rows = B * arguments.checkpoint_rows();
    require(rows <= kPackedRows * kMaxGridYZ, "wkv: ", rows, " intervals are more than a grid can hold");
    params.rows = static_cast<uint32_t>(rows);
    params.chunking = {.chunks = static_cast<uint32_t>(arguments.checkpoint_rows()),
                       .log2_packed_steps = static_cast<uint32_t>(
                           std::bit_width(static_cast<uint64_t>(checkpoint_interval(dtype))) - 1)};
  }

  // A block for each interval, or in float64 for each sequence.
  void launch(Kernel kernel, int inputs, int steps) {
    Launch launch = {kernel, dtype, {1, 1, 1}, 0, 0, &params, sizeof params};
    if (dtype == DType::float64) {
      launch.grid.x = blocks_for(params.C, kDoubleThreads);
      launch.threads = kDoubleThreads;
      for (uint32_t first = 0; first < params.N; first += kMaxGridYZ) {
        params.chunking.first_batch = first;
        launch.grid.y = static_cast<unsigned>(std::min<int64_t>(params.N - first, kMaxGridYZ));
        launcher.launch(launch);
      }
      return;
    }
    launch.grid = {blocks_for(params.C, kTileChannels), std::min(params.rows, kPackedRows),
                   (params.rows + kPackedRows - 1) / kPackedRows};
    launch.threads = bi_warps(steps) * kWarpThreads;
    launch.shared_bytes = bi_shared_bytes(dtype, inputs, steps);
    launcher.launch(launch);
  }

  void join(bool adjoints) {
    if (dtype == DType::float64) return;
    params.joins_adjoints = adjoints;
    const int64_t threads = 2 * int64_t{params.N} * ((int64_t{params.C} + 1) / 2);
    launcher.launch(
        {Kernel::bi_join, dtype, {blocks_for(threads, kPlainThreads), 1, 1}, kPlainThreads, 0, &params, sizeof params});
  }
};

template <class Launcher>
std::tuple<Tensor, Tensor> gpu_bi_forward(const Tensor& log_decay, const Tensor& u, const Tensor& k, const Tensor& v,
                                          const std::optional<Tensor>& r, const std::optional<Tensor>& cu_seqlens,
                                          bool checkpoint) {
  BiArguments arguments(log_decay, u, k, v, r, cu_seqlens);
  check_sizes(arguments);
  Launcher launcher(arguments.device);
  const Tensor y = arguments.empty_sequence(launcher), none = arguments.empty_checkpoints(launcher, checkpoint);
  if (arguments.nothing_to_do()) return {y, none};
  const bool is_double = arguments.dtype == DType::float64;
  if (is_double) set_zero(none);
  const Tensor table = checkpoint || is_double ? none : arguments.empty_checkpoints(launcher, true);
  BiLaunches<Launcher> launches(launcher, arguments, 3);
  launches.params.checkpoints = table.mutable_data_ptr();
  launches.params.outputs[0] = y.mutable_data_ptr();
  launches.launch(Kernel::bi_sums, 2, bi_sums_steps(arguments.dtype));
  launches.join(false);
  launches.launch(Kernel::bi_forward, 2, bi_steps(arguments.dtype));
  return {y, none};
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gpu_bi_backward(const Tensor& log_decay, const Tensor& u,
                                                                   const Tensor& k, const Tensor& v,
                                                                   const std::optional<Tensor>& r,
                                                                   const std::optional<Tensor>& cu_seqlens,
                                                                   const Tensor& checkpoints, const Tensor& gy) {
  BiArguments arguments(log_decay, u, k, v, r, cu_seqlens);
  check_sizes(arguments);
  GradientArguments gradients(arguments, checkpoints, gy, std::nullopt);
  const auto& [dtype, C] = std::tie(arguments.dtype, arguments.C);
  Launcher launcher(arguments.device);
  const Tensor g_log_decay = launcher.empty({C}, arguments.w_dtype), gu = launcher.empty({C}, arguments.u_dtype);
  const Tensor gk = arguments.empty_sequence(launcher), gv = arguments.empty_sequence(launcher);
  const Tensor gr = arguments.empty_gate_gradient(launcher);
  if (arguments.nothing_to_do()) {
    set_zero(g_log_decay);
    set_zero(gu);
    return {g_log_decay, gu, gk, gv, gr};
  }
  const bool is_double = dtype == DType::float64;
  BiLaunches<Launcher> launches(launcher, arguments, 6);
  BiParams& params = launches.params;
  const int64_t rows = is_double ? arguments.sequences : params.rows;
  const Tensor partials = launcher.empty({rows, 2, C}, state_type(dtype));
  const Tensor adjoints = is_double ? partials : arguments.empty_checkpoints(launcher, true);
  params.inputs[2] = gpu_sequence(gradients.gy);
  params.outputs[0] = gk.mutable_data_ptr();
  params.outputs[1] = gv.mutable_data_ptr();
  params.gr = arguments.r.has_value() ? gr.mutable_data_ptr() : nullptr;
  params.checkpoints = gradients.checkpoints.mutable_data_ptr();
  params.adjoints = adjoints.mutable_data_ptr();
  params.partials = partials.mutable_data_ptr();
  if (is_double) launches.launch(Kernel::bi_sums, 2, bi_sums_steps(dtype));
  launches.launch(Kernel::bi_adjoint_sums, 3, bi_steps(dtype));
  launches.join(true);
  launches.launch(Kernel::bi_backward, 3, kBiBackwardSteps);
  launch_reduce(launcher, dtype,
                {.parameters = params.parameters,
                 .is_raw = false,
                 .C = C,
                 .partials = params.partials,
                 .rows = rows,
                 .gw = g_log_decay.mutable_data_ptr(),
                 .gu = gu.mutable_data_ptr()});
  return {g_log_decay, gu, gk, gv, gr};
}

}  // namespace wkv
