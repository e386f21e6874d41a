// The walks for x86-64 with AVX2. The instruction set is chosen here and not by a compiler flag, so that every build
// system compiles the same list of files with the same flags; standard headers come first, to stay free of it.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "processor.h"

namespace wkv::avx2 {
// Asks for what the next lines take for granted, and is compiled without it.
static bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && processor_has_f16c();
}
}  // namespace wkv::avx2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define WKV_ISA avx2
#define WKV_ISA_NAME "avx2"
#define WKV_SIMD_BYTES 32
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const wkv::CpuKernels* wkv::cpu_kernels_avx2() { return &avx2::kKernels; }
#else
const wkv::CpuKernels* wkv::cpu_kernels_avx2() { return nullptr; }
#endif
