// The walks for x86-64 with AVX-512. The instruction set is chosen here and not by a compiler flag, so that every build
// system compiles the same list of files with the same flags; standard headers come first, to stay free of it.
#include "isa.h"

#if defined(__x86_64__)
// GCC 12 takes the deliberately undefined operands of these intrinsics for mistakes (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cmath>
#include <cstring>

#include "processor.h"

namespace wkv::avx512 {
// Asks for what the next lines take for granted, and is compiled without it.
static bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         processor_has_f16c();
}
}  // namespace wkv::avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define WKV_ISA avx512
#define WKV_ISA_NAME "avx512"
#define WKV_SIMD_BYTES 64
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const wkv::CpuKernels* wkv::cpu_kernels_avx512() { return &avx512::kKernels; }
#else
const wkv::CpuKernels* wkv::cpu_kernels_avx512() { return nullptr; }
#endif
