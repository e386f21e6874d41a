// The __global__ wrappers of the block programs, and their launch. No torch.
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "programs.h"
#include "wkv_kernels.h"

namespace wkv {
namespace {

template <class Thread>
struct DeviceTeam {
  Thread thread;

  template <class Phase>
  __device__ __forceinline__ void phase(const Phase& function) {
    function(thread);
    __syncthreads();
  }
};

// Threads of a block, and blocks of a multiprocessor that the registers shall suffice for.
template <class Program>
struct Bounds {
  static constexpr int kThreads = kMaxForwardThreads, kBlocks = 1;
};
// Left alone, nvcc 13.0 spends 168 registers on a forward thread for sm_100, where 110 do.
template <class Element, Pass pass>
struct Bounds<Forward<Element, pass>> {
  static constexpr int kThreads = kMaxForwardThreads, kBlocks = std::is_same_v<Element, double> ? 1 : 2;
};
// Backward blocks hide each other's latencies, as many as shared memory has room for: in float32 one on Turing, three
// on Hopper and Blackwell's servers, two elsewhere. A float64 block needs the registers of two.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
inline constexpr int kBackwardBlocks = 1;
#elif __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
inline constexpr int kBackwardBlocks = 3;
#else
inline constexpr int kBackwardBlocks = 2;
#endif
template <class Element, Pass pass>
struct Bounds<Backward<Element, pass>> {
  static constexpr int kThreads = kBackwardThreads, kBlocks = std::is_same_v<Element, double> ? 1 : kBackwardBlocks;
};
template <class Real>
struct Bounds<Reduce<Real>> {
  static constexpr int kThreads = kReduceLanes * kReduceGroups, kBlocks = 1;
};

template <class Program>
__global__ void __launch_bounds__(Bounds<Program>::kThreads, Bounds<Program>::kBlocks)
    wkv_kernel(const __grid_constant__ typename Program::Arguments arguments) {
  extern __shared__ __align__(128) char shared[];
  DeviceTeam<typename Program::Thread> team;
  team.thread.index = static_cast<int>(threadIdx.x);
  Program::run(arguments, {blockIdx.x, blockIdx.y, blockIdx.z}, static_cast<int>(blockDim.x), team, shared);
}

template <class Program>
cudaError_t launch_program(const Launch& launch, const typename Program::Arguments& arguments, cudaStream_t stream) {
  // What a kernel may have without asking.
  constexpr int kSharedByDefault = 48 * 1024;
  if (launch.shared_bytes > kSharedByDefault) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    // Always the most there is: another thread may launch the same kernel with more.
    error = cudaFuncSetAttribute(wkv_kernel<Program>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(device_limits(device).shared_per_block));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(launch.grid.x, launch.grid.y, launch.grid.z), block(launch.block.x, launch.block.y, launch.block.z);
  wkv_kernel<Program><<<grid, block, launch.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
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
      cudaGetLastError();  // so that nobody else is told
      throw std::runtime_error("cuda:" + std::to_string(device) +
                               " does not tell its limits: " + cudaGetErrorString(error));
    }
    return static_cast<int64_t>(value);
  };
  const DeviceLimits limits = {attribute(cudaDevAttrMultiProcessorCount),
                               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                               attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  return asked[device] = limits;
}

cudaError_t launch(const std::vector<Launch>& launches, cudaStream_t stream) {
  for (const Launch& each : launches) {
    const cudaError_t error = with_program(each.kernel, each.dtype, [&]<class Program>() {
      return launch_program<Program>(each, std::get<typename Program::Arguments>(each.arguments), stream);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace wkv
