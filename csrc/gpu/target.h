// The machine as the kernels see it: approximate functions, 16-bit numbers, asynchronous copies, messages between
// blocks, votes. The targets are CUDA and the host, where tests run the same kernels; a further target is a further
// branch in this file. Toolkit headers appear in no other file of this folder, torch in op.h alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// 1 in the pass for a GPU, 0 in the host's, of a file that is compiled for both.
#if defined(__CUDA_ARCH__)
#define WKV_ON_DEVICE 1
#else
#define WKV_ON_DEVICE 0
#endif

namespace wkv {
#if WKV_ON_DEVICE
inline constexpr int kCudaArch = __CUDA_ARCH__;
#else
inline constexpr int kCudaArch = 0;
#endif
}  // namespace wkv

namespace wkv {

#if !defined(__CUDACC__)
void pause_on_host();  // defined by the program that runs the kernels there
#endif

template <class To, class From>
WKV_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- functions of a float; those of the device are off by 2 ulp at most ----

WKV_HD float exp2_approximate(float x) {
#if WKV_ON_DEVICE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

WKV_HD float log2_approximate(float x) {
#if WKV_ON_DEVICE
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}

WKV_HD float reciprocal_approximate(float x) {
#if WKV_ON_DEVICE
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// a · b + c, rounded once.
WKV_HD float fused(float a, float b, float c) { return WKV_ON_DEVICE ? fmaf(a, b, c) : std::fma(a, b, c); }

// The larger and the smaller one of those that are not NaN.
WKV_HD float larger_float(float a, float b) { return WKV_ON_DEVICE ? fmaxf(a, b) : b > a || a != a ? b : a; }
WKV_HD float smaller_float(float a, float b) { return WKV_ON_DEVICE ? fminf(a, b) : b < a || a != a ? b : a; }

// ---- 16-bit numbers, alone and in pairs of neighbours ----

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

WKV_HD float to_real(float x) { return x; }
WKV_HD double to_real(double x) { return x; }
WKV_HD float to_real(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
WKV_HD float to_real(Half x) {
#if WKV_ON_DEVICE
  return __half2float(bits_as<__half>(x.bits));
#else
  return static_cast<float>(bits_as<_Float16>(x.bits));
#endif
}

WKV_HD void from_real(float x, float& element) { element = x; }
WKV_HD void from_real(double x, double& element) { element = x; }
WKV_HD void from_real(float x, Half& element) {
#if WKV_ON_DEVICE
  element.bits = bits_as<uint16_t>(__float2half_rn(x));
#else
  element.bits = bits_as<uint16_t>(static_cast<_Float16>(x));
#endif
}
WKV_HD void from_real(float x, Bfloat16& element) {
#if WKV_ON_DEVICE
  element.bits = bits_as<uint16_t>(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  element.bits = static_cast<uint16_t>((x == x ? rounded : 0x7fc00000) >> 16);
#endif
}

struct alignas(8) FloatPair {
  float x, y;
};

// Two neighbours as they lie in memory.
template <class Element>
struct alignas(2 * sizeof(Element)) Packed {
  Element x, y;
};

template <class Element>
WKV_HD FloatPair unpack(Packed<Element> packed) {
#if WKV_ON_DEVICE
  if constexpr (sizeof(Element) == 2) {
    const uint32_t both = bits_as<uint32_t>(packed);
    if constexpr (std::is_same_v<Element, Bfloat16>) {
      return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
    } else {
      const float2 floats = __half22float2(bits_as<__half2>(both));
      return {floats.x, floats.y};
    }
  }
#endif
  return {to_real(packed.x), to_real(packed.y)};
}

template <class Element>
WKV_HD Packed<Element> pack(FloatPair pair) {
#if WKV_ON_DEVICE
  if constexpr (std::is_same_v<Element, Bfloat16>) {
    return bits_as<Packed<Element>>(__floats2bfloat162_rn(pair.x, pair.y));
  } else if constexpr (std::is_same_v<Element, Half>) {
    return bits_as<Packed<Element>>(__floats2half2_rn(pair.x, pair.y));
  }
#endif
  Packed<Element> packed;
  from_real(pair.x, packed.x);
  from_real(pair.y, packed.y);
  return packed;
}

// Component by component; 16-bit numbers are compared without conversion to float32 where the device can.
#if WKV_ON_DEVICE && __CUDA_ARCH__ >= 800
template <class Element>
using DevicePair = std::conditional_t<std::is_same_v<Element, Half>, __half2, __nv_bfloat162>;
#define WKV_OF_PACKED(on_pairs, on_floats)                                             \
  if constexpr (sizeof(Element) == 2) {                                                \
    using Device = DevicePair<Element>;                                                \
    return bits_as<Packed<Element>>(on_pairs(bits_as<Device>(a), bits_as<Device>(b))); \
  }                                                                                    \
  return pack<Element>({on_floats(to_real(a.x), to_real(b.x)), on_floats(to_real(a.y), to_real(b.y))})
#else
#define WKV_OF_PACKED(on_pairs, on_floats) \
  return pack<Element>({on_floats(to_real(a.x), to_real(b.x)), on_floats(to_real(a.y), to_real(b.y))})
#endif
template <class Element>
WKV_HD Packed<Element> larger_of(Packed<Element> a, Packed<Element> b) {
  WKV_OF_PACKED(__hmax2, larger_float);
}
template <class Element>
WKV_HD Packed<Element> smaller_of(Packed<Element> a, Packed<Element> b) {
  WKV_OF_PACKED(__hmin2, smaller_float);
}
#undef WKV_OF_PACKED

// ---- memory ----

struct alignas(16) Vector {
  uint32_t words[4];
};

// Copies from global to shared memory; complete once the same thread has waited for its copies.
WKV_HD void copy_async(void* shared, const void* global) {
#if WKV_ON_DEVICE && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#else
  *static_cast<Vector*>(shared) = *static_cast<const Vector*>(global);
#endif
}

WKV_HD void wait_for_copies() {
#if WKV_ON_DEVICE && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Loads what no thread of the launch writes, so that loads need not wait for stores.
template <class Element>
WKV_HD Element load_constant(const Element* at) {
#if WKV_ON_DEVICE
  if constexpr (sizeof(Element) == 2) {
    return bits_as<Element>(__ldg(reinterpret_cast<const unsigned short*>(at)));
  } else {
    return __ldg(at);
  }
#else
  return *at;
#endif
}

// Brings a line to the L2 cache, for a load that follows.
WKV_HD void prefetch(const void* global) {
#if WKV_ON_DEVICE
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  static_cast<void>(global);
#endif
}

// A message is words of 64 bits that are written and read whole, each of two floats. The words need no order among
// themselves: each shows by itself whether it has been written, because memory is set to `kNothing` before the launch,
// and no word that is published has these bits in its lower half.
using Word = unsigned long long;
inline constexpr uint32_t kNothing = 0xffffffffu;

WKV_HD void store_relaxed(Word* target, Word word) {
#if WKV_ON_DEVICE
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(target), "l"(word) : "memory");
#else
  __atomic_store_n(target, word, __ATOMIC_RELAXED);
#endif
}

WKV_HD Word load_relaxed(const Word* source) {
#if WKV_ON_DEVICE
  Word word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(source) : "memory");
  return word;
#else
  return __atomic_load_n(source, __ATOMIC_RELAXED);
#endif
}

// Counts from -1, the value of all bits set.
WKV_HD uint32_t take_ticket(uint32_t* counter) {
#if WKV_ON_DEVICE
  return atomicAdd(counter, 1u) + 1;
#else
  return __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED) + 1;
#endif
}

// Pauses between two reads of a word that has not been written yet.
WKV_HD void pause_polling() {
#if WKV_ON_DEVICE
  __nanosleep(20);
#elif !defined(__CUDACC__)
  pause_on_host();
#endif
}

// Whether the value is true in all threads of the warp. On the host each thread decides by itself: either answer is
// right for each.
WKV_HD bool warp_agrees(bool value) {
#if WKV_ON_DEVICE
  return __all_sync(0xffffffff, value);
#else
  return value;
#endif
}

// ---- the threads of a block ----

struct BlockIndex {
  unsigned x, y, z;
};

#if defined(__CUDACC__)
// Runs a kernel's phases, the code of each thread between two barriers. Tests define other teams, whose threads take
// turns in any order or are threads of the host.
template <class Thread>
struct DeviceTeam {
  Thread thread;

  // A barrier of the block follows.
  template <class Phase>
  __device__ __forceinline__ void phase(const Phase& function) {
    function(thread);
    __syncthreads();
  }
  // A barrier of the warp alone follows.
  template <class Phase>
  __device__ __forceinline__ void warp_phase(const Phase& function) {
    function(thread);
    __syncwarp();
  }
  // A barrier of the block follows, and all threads learn whether the function was true for each.
  template <class Phase>
  __device__ __forceinline__ bool agree(const Phase& function) {
    return __syncthreads_and(function(thread));
  }
  // No barrier or vote follows.
  template <class Phase>
  __device__ __forceinline__ void last_phase(const Phase& function) {
    function(thread);
  }
};
#endif

}  // namespace wkv
