// The walks for any processor: SSE2 on x86-64, the compiler's own lowering elsewhere.
#include "isa.h"

namespace wkv::baseline {
static bool runs_here() { return true; }
}  // namespace wkv::baseline

#define WKV_ISA baseline
#define WKV_ISA_NAME "baseline"
#define WKV_SIMD_BYTES 16
#include "kernel.h"

const wkv::CpuKernels* wkv::cpu_kernels_baseline() { return &baseline::kKernels; }
