// The CUDA backend of the operators: its launcher, which puts kernels on the current stream, and their registration.
// Compiled by the host compiler.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "../common/namespace.h"
#include "../gpu/bi_op.h"
#include "../gpu/summary_op.h"
#include "kernels.h"

namespace wkv {
namespace {

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that no later call reports it again
  require(false, "wkv: CUDA error: ", cudaGetErrorString(error));
}

// The function is torch's, in a library that only a torch with CUDA has: it is looked up at run time and not
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

class CudaLauncher {
 public:
  explicit CudaLauncher(const Device& device)
      : device_(device), guard_(device.index), stream_(current_stream(device.index)) {}

  DeviceLimits limits() const { return device_limits(device_.index); }
  Tensor empty(const Shape& shape, DType dtype) const { return device_.empty(shape, dtype); }
  void set_all_bits(void* memory, int64_t bytes) const {
    check_cuda(cudaMemsetAsync(memory, 0xff, static_cast<size_t>(bytes), stream_));
  }
  void launch(const Launch& launch) const {
    const cudaError_t error = wkv::launch(launch, stream_);
    // The runtime's errors for a GPU without code: the first from a launch, the second from a function attribute.
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      int major = 0, minor = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_.index));
      check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_.index));
      require(false, "wkv: cuda:", device_.index, " has compute capability ", major, ".", minor,
              ", and this build is for " WKV_CUDA_ARCHITECTURES ": rebuild with TORCH_CUDA_ARCH_LIST=", major, ".",
              minor);
    }
    check_cuda(error);
  }

 private:
  Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace wkv

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CUDA, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::gpu_forward<wkv::CudaLauncher>));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::gpu_backward<wkv::CudaLauncher>));
  m.impl("wkv_mixing_forward", TORCH_BOX(&wkv::gpu_mixing_forward<wkv::CudaLauncher>));
  m.impl("_wkv_mixing_backward", TORCH_BOX(&wkv::gpu_mixing_backward<wkv::CudaLauncher>));
  m.impl("_wkv_summary", TORCH_BOX(&wkv::gpu_summary<wkv::CudaLauncher>));
  m.impl("_wkv_adjoint_summary", TORCH_BOX(&wkv::gpu_adjoint_summary<wkv::CudaLauncher>));
  m.impl("wkv_step", TORCH_BOX(&wkv::gpu_step<wkv::CudaLauncher>));
  m.impl("bi_wkv_forward", TORCH_BOX(&wkv::gpu_bi_forward<wkv::CudaLauncher>));
  m.impl("_bi_wkv_backward", TORCH_BOX(&wkv::gpu_bi_backward<wkv::CudaLauncher>));
}

// The build, as JSON. The string belongs to the library.
WKV_EXPORTED const char* rwkv_kernels_cuda_build_info() {
  static const std::string info = [] {
    std::string architectures = "\"";
    for (const char c : std::string(WKV_CUDA_ARCHITECTURES)) architectures += c == ',' ? "\", \"" : std::string(1, c);
    return "{\"namespace\": \"" WKV_STRING(WKV_NAMESPACE) "\", \"cuda\": \"" + std::to_string(CUDART_VERSION / 1000) +
           "." + std::to_string(CUDART_VERSION % 1000 / 10) + "\", \"cuda_architectures\": [" + architectures + "\"]}";
  }();
  return info.c_str();
}
