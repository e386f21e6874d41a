// What the host asks of the compiled kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../wkv_launch.h"

namespace wkv {

// Of one device, asked once. Throws std::runtime_error with the runtime's reason where the device does not say.
DeviceLimits device_limits(int device);

// Puts the launches on a stream of the current device, in order. Returns cudaErrorNoKernelImageForDevice where the
// build has no code for the device.
cudaError_t launch(const std::vector<Launch>& launches, cudaStream_t stream);

}  // namespace wkv
