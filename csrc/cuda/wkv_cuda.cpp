// The CUDA backend of the operators: checks, allocates, plans and launches; the kernels are in wkv_kernels.cu. Compiled
// by the host compiler. Nothing here waits for the GPU or reads from it, so that every call can be captured in a graph.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../namespace.h"
#include "../wkv_math.h"
#include "wkv_kernels.h"

namespace wkv {
namespace {

using torch::stable::accelerator::DeviceGuard;

struct {
  std::string schedule;
  PlanRequest request;
} forced;

Plan plan_for(Operation operation, const Arguments& arguments) {
  return make_plan(operation, arguments.dtype, arguments.B, arguments.T, arguments.C,
                   device_limits(arguments.device.index), forced.request);
}

Tensor workspace_of(const Plan& plan, const Arguments& arguments) {
  // Memory of whole float32 elements, which torch's allocator aligns for any type.
  return empty({(plan.workspace_bytes + 3) / 4}, DType::float32, arguments.device);
}

// w and u as the kernels take them, contiguous. Owns the copies until the launch.
struct ContiguousParameters {
  Tensor w, u;
  ChannelParameters pointers;

  explicit ContiguousParameters(const Arguments& arguments)
      : w(as_contiguous(arguments.w)),
        u(as_contiguous(arguments.u)),
        pointers{data_of(w), data_of(u), arguments.w_dtype, arguments.u_dtype} {}
};

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that no later call reports it again
  require(false, "wkv: CUDA error: ", cudaGetErrorString(error));
}

// The function is torch's, in a library that only a torch with CUDA has: looked up where that is loaded, and not
// linked, so that these sources build beside any torch.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  require(function != nullptr,
          "wkv: this torch has no CUDA streams: libtorch_cuda.so is not loaded, or is older than "
          "torch 2.11");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// On the current stream of the device, which is the current one.
void run(const std::vector<Launch>& launches, const Device& device) {
  const cudaError_t error = launch(launches, current_stream(device.index));
  // The runtime's two ways to say that it has no code for this GPU, of a launch and of a function.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index));
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index));
    require(false, "wkv: cuda:", device.index, " has compute capability ", major, ".", minor,
            ", and this build is for " WKV_CUDA_ARCHITECTURES ": rebuild with TORCH_CUDA_ARCH_LIST=", major, ".",
            minor);
  }
  check_cuda(error);
}

// ---- torch's operators that its stable interface names nowhere, by their schemas ----

Tensor logical_not(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::logical_not", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor where(const Tensor& condition, const Tensor& yes, const Tensor& no) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(condition), torch::stable::detail::from(yes),
                                    torch::stable::detail::from(no)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::where", "self", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor row_of(Tensor state, int64_t row) { return torch::stable::narrow(state, 1, row, 1); }

// The states after no step at all: the given ones, or empty ones; den == 0 means empty, whatever the other two say.
void pass_through(const std::optional<Tensor>& state, const Tensor& state_out) {
  set_zero(state_out);
  torch::stable::fill_(row_of(state_out, 2), kEmptyMax);
  if (state.has_value()) copy(where(logical_not(row_of(*state, 1)), state_out, *state), state_out);
}

// Torch counts a tensor's versions for autograd where its own operators write to it, and kernels here write to memory:
// an operator that writes no element counts once.
void count_version(Tensor tensor) { set_zero(torch::stable::narrow(tensor, 0, 0, 0)); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& state, bool checkpoint) {
  const Arguments arguments(w, u, k, v, state);
  const DeviceGuard guard(arguments.device.index);
  const Tensor y = arguments.empty_sequence();
  const Tensor state_out = arguments.empty_state();
  const Tensor checkpoints = arguments.empty_checkpoints(checkpoint);
  if (arguments.nothing_to_do()) {
    pass_through(arguments.state, state_out);
    return {y, state_out, checkpoints};
  }

  const Plan plan = plan_for(Operation::forward, arguments);
  const Tensor workspace = workspace_of(plan, arguments);
  const ContiguousParameters parameters(arguments);
  const ForwardArguments given = {.parameters = parameters.pointers,
                                  .B = arguments.B,
                                  .T = arguments.T,
                                  .C = arguments.C,
                                  .k = sequence_of(arguments.k),
                                  .v = sequence_of(arguments.v),
                                  .state = data_or_null(arguments.state),
                                  .y = y.mutable_data_ptr(),
                                  .state_out = state_out.mutable_data_ptr(),
                                  .checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr};
  run(forward_launches(plan, given, workspace.mutable_data_ptr()), arguments.device);
  return {y, state_out, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                            const Tensor& v, const std::optional<Tensor>& state,
                                                            const Tensor& checkpoints, const Tensor& gy,
                                                            const std::optional<Tensor>& gstate_out) {
  const Arguments arguments(w, u, k, v, state);
  const GradientArguments gradients(arguments, checkpoints, gy, gstate_out);
  const DeviceGuard guard(arguments.device.index);
  const Tensor gw = empty({arguments.C}, arguments.w_dtype, arguments.device);
  const Tensor gu = empty({arguments.C}, arguments.u_dtype, arguments.device);
  const Tensor gk = arguments.empty_sequence(), gv = arguments.empty_sequence();
  const Tensor gstate = arguments.empty_state();
  if (arguments.nothing_to_do()) {
    set_zero(gw);
    set_zero(gu);
    set_zero(gstate);
    if (gradients.gstate_out.has_value()) copy(*gradients.gstate_out, gstate);
  } else {
    const Plan plan = plan_for(Operation::backward, arguments);
    const Tensor workspace = workspace_of(plan, arguments);
    const ContiguousParameters parameters(arguments);
    const BackwardArguments given = {.parameters = parameters.pointers,
                                     .B = arguments.B,
                                     .T = arguments.T,
                                     .C = arguments.C,
                                     .k = sequence_of(arguments.k),
                                     .v = sequence_of(arguments.v),
                                     .gy = sequence_of(gradients.gy),
                                     .state = data_or_null(arguments.state),
                                     .checkpoints = data_of(gradients.checkpoints),
                                     .gstate_out = data_or_null(gradients.gstate_out),
                                     .gk = gk.mutable_data_ptr(),
                                     .gv = gv.mutable_data_ptr(),
                                     .gstate = gstate.mutable_data_ptr()};
    run(backward_launches(plan, given, gw.mutable_data_ptr(), gu.mutable_data_ptr(), workspace.mutable_data_ptr()),
        arguments.device);
  }
  return {gw, gu, gk, gv, gstate};
}

Tensor step(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& state,
            const std::optional<Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const DeviceGuard guard(arguments.device.index);
  const Tensor y = arguments.empty_token();
  if (arguments.nothing_to_do()) return y;

  const ContiguousParameters parameters(arguments);
  const StepArguments given = {.parameters = parameters.pointers,
                               .B = arguments.B,
                               .C = arguments.C,
                               .k = data_of(arguments.k),
                               .v = data_of(arguments.v),
                               .r = data_or_null(arguments.r),
                               .k_stride = arguments.k.stride(0),
                               .v_stride = arguments.v.stride(0),
                               .r_stride = arguments.r.has_value() ? arguments.r->stride(0) : 0,
                               .y = y.mutable_data_ptr(),
                               .state = state.mutable_data_ptr(),
                               .state_batch_stride = state.stride(0),
                               .state_row_stride = state.stride(1),
                               .state_channel_stride = state.stride(2)};
  run(step_launches(arguments.dtype, given), arguments.device);
  count_version(state);
  return y;
}

}  // namespace
}  // namespace wkv

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CUDA, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::forward));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::backward));
  m.impl("wkv_step", TORCH_BOX(&wkv::step));
}

// What this library is, as JSON. The string belongs to the library.
WKV_EXPORTED const char* rwkv_kernels_cuda_build_info() {
  static const std::string info = [] {
    std::string architectures = "\"";
    for (const char c : std::string(WKV_CUDA_ARCHITECTURES)) architectures += c == ',' ? "\", \"" : std::string(1, c);
    return "{\"namespace\": \"" WKV_STRING(WKV_NAMESPACE) "\", \"cuda\": \"" + std::to_string(CUDART_VERSION / 1000) +
           "." + std::to_string(CUDART_VERSION % 1000 / 10) + "\", \"cuda_architectures\": [" + architectures + "\"]}";
  }();
  return info.c_str();
}

// What every plan from now on shall meet, null and 0 leaving a choice to it: for benchmarks.
WKV_EXPORTED void rwkv_kernels_force_cuda_plan(const char* schedule, int64_t spans, int64_t buffers, int64_t chunk_len,
                                               int64_t group) {
  wkv::forced.schedule = schedule == nullptr ? "" : schedule;
  wkv::forced.request = {schedule == nullptr ? nullptr : wkv::forced.schedule.c_str(), spans, buffers, chunk_len,
                         group};
}
