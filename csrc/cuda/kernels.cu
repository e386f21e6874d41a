// The CUDA kernels and their launch. No torch.
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../gpu/kernels.h"
#include "kernels.h"

namespace wkv {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Bounds<Kernel>::threads, Bounds<Kernel>::blocks)
    wkv_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(128) char shared[];
  DeviceTeam<typename Kernel::Thread> team;
  team.thread.index = static_cast<int>(threadIdx.x);
  Kernel::run(params, {blockIdx.x, blockIdx.y, blockIdx.z}, static_cast<int>(blockDim.x), team, shared);
}

template <class Kernel>
cudaError_t launch_kernel(const Launch& launch, cudaStream_t stream) {
  // Dynamic shared memory available without the opt-in attribute.
  constexpr int kSharedByDefault = 48 * 1024;
  if (launch.shared_bytes > kSharedByDefault) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    // Always the device's maximum: another thread may launch the same kernel with more.
    error = cudaFuncSetAttribute(wkv_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device_limits(device).shared_per_block));
    if (error != cudaSuccess) return error;
  }
  wkv_kernel<Kernel>
      <<<dim3(launch.grid.x, launch.grid.y, launch.grid.z), launch.threads, launch.shared_bytes, stream>>>(
          *static_cast<const typename Kernel::Params*>(launch.params));
  return cudaGetLastError();
}

// The architecture that the kernels for the current device are compiled for; 0 without such kernels, which a launch
// reports.
int64_t architecture_of_code() {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, wkv_kernel<Forward<float>>) != cudaSuccess) cudaGetLastError();
  return attributes.ptxVersion * 10;
}

}  // namespace

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> asked;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = asked.find(device);
  if (known != asked.end()) return known->second;
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears it, so that no later call reports it again
      throw std::runtime_error("cuda:" + std::to_string(device) +
                               " does not tell its limits: " + cudaGetErrorString(error));
    }
    return static_cast<int64_t>(value);
  };
  const DeviceLimits limits = {attribute(cudaDevAttrMultiProcessorCount),
                               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                               attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), architecture_of_code()};
  return asked[device] = limits;
}

cudaError_t launch(const Launch& launch, cudaStream_t stream) {
  return with_kernel(launch.kernel, launch.dtype,
                     [&]<class Kernel>() { return launch_kernel<Kernel>(launch, stream); });
}

}  // namespace wkv
