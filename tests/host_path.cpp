// The CUDA operators' own host code on CPU tensors: it checks, allocates, plans and fills in arguments as for a GPU,
// and its launches go to the emulator of the kernels. What belongs to a device, the runtime, streams and the guard of
// the current device, is replaced here; all else is csrc/cuda/wkv_cuda.cpp as it is.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "wkv_launch.h"

// `emulate` of emulator.cpp, which is a library of its own.
using Emulate = void (*)(int kernel, int dtype, const unsigned* grid, int threads, int shared_bytes,
                         const void* arguments, int order, uint64_t seed, int dropped_barrier);

namespace {
Emulate emulator = nullptr;
cudaError_t next_error = cudaSuccess;

AOTITorchError current_stream_of_host(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) void set_emulator(Emulate emulate) { emulator = emulate; }
// The next launch fails with this error of the runtime.
extern "C" __attribute__((visibility("default"))) void set_next_error(int error) {
  next_error = static_cast<cudaError_t>(error);
}

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define CUDA CPU  // the dispatch key of the kernels
#define DeviceGuard NoGuard
#define dlopen(name, flags) reinterpret_cast<void*>(1)
#define dlsym(library, name) reinterpret_cast<void*>(current_stream_of_host)
#include "cuda/wkv_cuda.cpp"

extern "C" {
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "an error of the runtime"; }
cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor ? 6 : 1;
  return cudaSuccess;
}
}

namespace wkv {

// Of an H100, as plans of the introspection module are by default.
DeviceLimits device_limits(int) {
  return {.multiprocessors = 132, .shared_per_block = 232448, .shared_per_multiprocessor = 233472};
}

cudaError_t launch(const std::vector<Launch>& launches, cudaStream_t) {
  const cudaError_t error = std::exchange(next_error, cudaSuccess);
  if (error != cudaSuccess) return error;
  for (const Launch& each : launches) {
    const unsigned grid[] = {each.grid.x, each.grid.y, each.grid.z};
    const void* arguments = std::visit([](const auto& typed) -> const void* { return &typed; }, each.arguments);
    emulator(static_cast<int>(each.kernel), static_cast<int>(each.dtype), grid, static_cast<int>(each.block.x),
             each.shared_bytes, arguments, /*order=*/0, /*seed=*/0, /*dropped_barrier=*/-1);
  }
  return cudaSuccess;
}

}  // namespace wkv
