// The kernels for x86-64 with AVX2. A pragma chooses the instruction set and not a compiler flag, so that every build
// system compiles all files with the same flags; standard headers come first, to stay free of it.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define WKV_ISA avx2
#define WKV_SIMD_BYTES 32
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const wkv::cpu::Kernels* wkv::cpu::kernels_avx2() { return &avx2::kKernels; }
#else
const wkv::cpu::Kernels* wkv::cpu::kernels_avx2() { return nullptr; }
#endif
