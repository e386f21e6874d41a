// A kernel launch as data: what a launcher puts on a stream, or runs on the host.
#pragma once

#include "params.h"

namespace wkv {

struct Launch {
  Kernel kernel;
  DType dtype;
  struct {
    unsigned x, y, z;
  } grid;
  int threads, shared_bytes;
  const void* params;  // of the kernel's Params
  int params_bytes;
};

}  // namespace wkv
