// The host's interface to the compiled kernels. No torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../gpu/launch.h"
#include "../gpu/plan.h"

namespace wkv {

// The limits of the current device, by its index; queried once. Throws std::runtime_error with the runtime's reason if
// a query fails.
DeviceLimits device_limits(int device);

// Puts a launch on a stream of the current device. Returns cudaErrorNoKernelImageForDevice where the build has no code
// for the device.
cudaError_t launch(const Launch& launch, cudaStream_t stream);

}  // namespace wkv
