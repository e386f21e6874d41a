// The kernels for any processor: SSE2 on x86-64, the compiler's own lowering elsewhere.
#define WKV_ISA baseline
#define WKV_SIMD_BYTES 16
#include "kernels.h"

const wkv::cpu::Kernels* wkv::cpu::kernels_baseline() { return &baseline::kKernels; }
