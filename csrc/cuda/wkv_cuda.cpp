// The CUDA backend of the operators: checks, allocates, plans and launches; the kernels are in wkv_kernels.cu. Compiled
// by the host compiler. Nothing here waits for the GPU or reads from it, so that every call can be captured in a graph.
#include <ATen/MemoryOverlap.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../wkv_math.h"
#include "wkv_kernels.h"

namespace wkv {

namespace {

struct {
  std::string schedule;
  PlanRequest request;
} forced;

}  // namespace

// What every plan from now on shall meet: for tests and benchmarks.
void force_cuda_plan(const PlanRequest& request) {
  forced.request = request;
  if (request.schedule != nullptr) {
    forced.schedule = request.schedule;
    forced.request.schedule = forced.schedule.c_str();
  }
}

namespace {

Plan plan_for(Operation operation, const Arguments& arguments) {
  return make_plan(operation, arguments.dtype, arguments.B(), arguments.T(), arguments.C(),
                   device_limits(arguments.k.device().index()), forced.request);
}

at::Tensor workspace_of(const Plan& plan, const Arguments& arguments) {
  return at::empty({plan.workspace_bytes}, arguments.k.options().dtype(at::kByte));
}

ChannelParameters parameters_of(const Arguments& arguments) {
  return {arguments.w.const_data_ptr(), arguments.u.const_data_ptr(), arguments.w_dtype, arguments.u_dtype};
}

const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// On the current stream of the current device.
void run(const std::vector<Launch>& launches) {
  const cudaError_t error = launch(launches, c10::cuda::getCurrentCUDAStream());
  // The runtime's two ways to say that it has no code for this GPU, of a launch and of a function.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // so that nobody else is told
    int device = 0, major = 0, minor = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    TORCH_CHECK(false, "wkv: cuda:", device, " has compute capability ", major, ".", minor,
                ", and this build is for " WKV_CUDA_ARCHITECTURES ": rebuild with TORCH_CUDA_ARCH_LIST=", major, ".",
                minor);
  }
  C10_CUDA_CHECK(error);
}

// The state after no step at all: the given one, or the empty one where there is none; den == 0 means empty, whatever
// the other two say.
void pass_through(const std::optional<at::Tensor>& state, const at::Tensor& state_out) {
  state_out.zero_();
  state_out.select(1, 2).fill_(kEmptyMax);
  if (state.has_value()) state_out.copy_(state_out.where(state->slice(1, 1, 2).eq(0), *state));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k,
                                                       const at::Tensor& v, const std::optional<at::Tensor>& state,
                                                       bool checkpoint) {
  const Arguments arguments(w, u, k, v, state);
  const c10::cuda::CUDAGuard guard(k.device());
  const at::Tensor y = arguments.empty_sequence();
  const at::Tensor state_out = arguments.empty_state();
  const at::Tensor checkpoints = arguments.empty_checkpoints(checkpoint);
  if (y.numel() == 0) {
    pass_through(arguments.state, state_out);
    return {y, state_out, checkpoints};
  }

  const Plan plan = plan_for(Operation::forward, arguments);
  const at::Tensor workspace = workspace_of(plan, arguments);
  const ForwardArguments given = {.parameters = parameters_of(arguments),
                                  .B = arguments.B(),
                                  .T = arguments.T(),
                                  .C = arguments.C(),
                                  .k = sequence_of(arguments.k),
                                  .v = sequence_of(arguments.v),
                                  .state = data_or_null(arguments.state),
                                  .y = y.data_ptr(),
                                  .state_out = state_out.data_ptr(),
                                  .checkpoints = checkpoint ? checkpoints.data_ptr() : nullptr};
  run(forward_launches(plan, given, workspace.data_ptr()));
  return {y, state_out, checkpoints};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& state, const at::Tensor& checkpoints, const at::Tensor& gy,
    const std::optional<at::Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state);
  const GradientArguments gradients(arguments, checkpoints, gy, gstate_out);
  const c10::cuda::CUDAGuard guard(k.device());
  const at::Tensor gw = at::empty({arguments.C()}, arguments.w.options());
  const at::Tensor gu = at::empty({arguments.C()}, arguments.u.options());
  const at::Tensor gk = arguments.empty_sequence(), gv = arguments.empty_sequence();
  const at::Tensor gstate = arguments.empty_state();
  if (gk.numel() == 0) {
    gw.zero_();
    gu.zero_();
    gstate.zero_();
    if (gradients.gstate_out.has_value()) gstate.copy_(*gradients.gstate_out);
  } else {
    const Plan plan = plan_for(Operation::backward, arguments);
    const at::Tensor workspace = workspace_of(plan, arguments);
    const BackwardArguments given = {.parameters = parameters_of(arguments),
                                     .B = arguments.B(),
                                     .T = arguments.T(),
                                     .C = arguments.C(),
                                     .k = sequence_of(arguments.k),
                                     .v = sequence_of(arguments.v),
                                     .gy = sequence_of(gradients.gy),
                                     .state = data_or_null(arguments.state),
                                     .checkpoints = gradients.checkpoints.const_data_ptr(),
                                     .gstate_out = data_or_null(gradients.gstate_out),
                                     .gk = gk.data_ptr(),
                                     .gv = gv.data_ptr(),
                                     .gstate = gstate.data_ptr()};
    run(backward_launches(plan, given, gw.data_ptr(), gu.data_ptr(), workspace.data_ptr()));
  }
  return {gw, gu, gk, gv, gstate};
}

at::Tensor step(const at::Tensor& w, const at::Tensor& u, const at::Tensor& k, const at::Tensor& v, at::Tensor& state,
                const std::optional<at::Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, std::nullopt, r);
  check_like("state", state, {arguments.B(), 3, arguments.C()}, state_type(k), k);
  at::assert_no_internal_overlap(state);
  const c10::cuda::CUDAGuard guard(k.device());
  const at::Tensor y = arguments.empty_token();
  if (y.numel() == 0) return y;

  const StepArguments given = {.parameters = parameters_of(arguments),
                               .B = arguments.B(),
                               .C = arguments.C(),
                               .k = arguments.k.const_data_ptr(),
                               .v = arguments.v.const_data_ptr(),
                               .r = data_or_null(arguments.r),
                               .k_stride = arguments.k.stride(0),
                               .v_stride = arguments.v.stride(0),
                               .r_stride = arguments.r.has_value() ? arguments.r->stride(0) : 0,
                               .y = y.data_ptr(),
                               .state = state.data_ptr(),
                               .state_batch_stride = state.stride(0),
                               .state_row_stride = state.stride(1),
                               .state_channel_stride = state.stride(2)};
  run(step_launches(arguments.dtype, given));
  return y;
}

}  // namespace
}  // namespace wkv

TORCH_LIBRARY_IMPL(rwkv_kernels, CUDA, m) {
  m.impl("wkv_forward", wkv::forward);
  m.impl("_wkv_backward", wkv::backward);
  m.impl("wkv_step", wkv::step);
}
