// The CUDA backend's launcher without a GPU, to test its errors: csrc/cuda/op.cpp as it is, for CPU tensors.
// The runtime, streams, the guard of the current device and the kernels are replaced here; a launch only fails.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gpu/op.h"

namespace {

cudaError_t launch_error = cudaSuccess, memset_error = cudaSuccess;
int errors_cleared = 0;

AOTITorchError current_stream_of_host(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define CUDA CPU  // the dispatch key of the kernels
#define DeviceGuard NoGuard
#define dlopen(name, flags) reinterpret_cast<void*>(1)
#define dlsym(library, name) reinterpret_cast<void*>(current_stream_of_host)
#include "cuda/op.cpp"

// Sets the results of later launches and fillings of memory.
WKV_EXPORTED void set_errors(int of_launch, int of_memset) {
  launch_error = static_cast<cudaError_t>(of_launch);
  memset_error = static_cast<cudaError_t>(of_memset);
}
WKV_EXPORTED int count_of_cleared_errors() { return errors_cleared; }

extern "C" {
cudaError_t CUDARTAPI cudaGetLastError() {
  ++errors_cleared;
  return cudaSuccess;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "an error of the runtime"; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor ? 6 : 1;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return memset_error; }
}

namespace wkv {

DeviceLimits device_limits(int) {
  return {.multiprocessors = 132, .shared_per_block = 232448, .shared_per_multiprocessor = 233472, .architecture = 900};
}

cudaError_t launch(const Launch&, cudaStream_t) { return launch_error; }

}  // namespace wkv
