// The kernels for x86-64 with AVX-512, as isa_avx2.cpp has them for AVX2.
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

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define WKV_ISA avx512
#define WKV_SIMD_BYTES 64
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const wkv::cpu::Kernels* wkv::cpu::kernels_avx512() { return &avx512::kKernels; }
#else
const wkv::cpu::Kernels* wkv::cpu::kernels_avx512() { return nullptr; }
#endif
