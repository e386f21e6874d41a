// The operators of summaries on a GPU, on a launcher as op.h has it.
#pragma once

#include "op.h"

namespace wkv {

template <class Launcher>
Tensor gpu_summary(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  Arguments arguments(w, u, k, v, std::nullopt);
  check_sizes(arguments);
  Launcher launcher(arguments.device);
  const Tensor state = arguments.empty_state(launcher);
  if (arguments.nothing_to_do()) {
    state_after_no_steps(std::nullopt, state);
    return state;
  }
  SequenceParams params = sequence_params(arguments);
  params.state_out = state.mutable_data_ptr();
  launch_operation(launcher, arguments, Operation::summary, params);
  return state;
}

template <class Launcher>
Tensor gpu_adjoint_summary(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& state, const std::optional<Tensor>& r,
                           const Tensor& checkpoints, const Tensor& gy) {
  Arguments arguments(w, u, k, v, state, r);
  check_sizes(arguments);
  GradientArguments gradients(arguments, checkpoints, gy, std::nullopt);
  Launcher launcher(arguments.device);
  const Tensor adjoint = launcher.empty({arguments.B, 2, arguments.C}, state_type(arguments.dtype));
  if (arguments.nothing_to_do()) {
    set_zero(adjoint);
    return adjoint;
  }
  SequenceParams params = sequence_params(arguments);
  params.inputs[2] = gpu_sequence(gradients.gy);
  params.checkpoints = gradients.checkpoints.mutable_data_ptr();
  params.state_out = adjoint.mutable_data_ptr();
  launch_operation(launcher, arguments, Operation::adjoint_summary, params);
  return adjoint;
}

}  // namespace wkv
