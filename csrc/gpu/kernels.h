// All kernels, and the launch bounds of each.
#pragma once

#include "backward.h"
#include "bi_double.h"
#include "forward.h"
#include "small.h"
#include "summary.h"

namespace wkv {

// A reduction's partials have the accumulation type.
template <class Element>
using ReduceOf = Reduce<RealOf<kTypeOf<Element>>>;

// Tables have float32 states; float64 has no table.
template <class Element>
using BiJoinOf = BiJoin<float>;

// Calls function.operator()<Type>() for a kernel of a dtype.
template <class Function>
auto with_kernel(Kernel kernel, DType dtype, const Function& function) {
  return with_dtype(dtype, [&](auto constant) {
    using Element = ElementOf<constant.value, Half, Bfloat16>;
    switch (kernel) {
#define WKV_KERNEL(name, Type) \
  case Kernel::name:           \
    return function.template operator()<Type<Element>>();
#include "kernels.def"
#undef WKV_KERNEL
    }
    return function.template operator()<Step<Element>>();
  });
}

// Launch bounds: the most threads of a block, and the blocks of a multiprocessor that registers must allow.
template <class Kernel>
struct Bounds {
  static constexpr int threads = kPlainThreads, blocks = 1;
};
template <class Element>
struct Bounds<Forward<Element>> {
  static constexpr DType dtype = kTypeOf<Element>;
  static constexpr int threads = forward_warps(dtype, kCudaArch) * kWarpThreads;
  static constexpr int blocks = forward_blocks(dtype, kCudaArch);
};
template <class Element>
struct Bounds<MixingForward<Element>> : Bounds<Forward<Element>> {};
template <class Element>
struct Bounds<Backward<Element>> {
  static constexpr int threads = kBackwardWarps * kWarpThreads;
  static constexpr int blocks = backward_blocks(kTypeOf<Element>, kCudaArch);
};
template <class Element>
struct Bounds<MixingBackward<Element>> : Bounds<Backward<Element>> {};
template <class Element>
struct Bounds<Summary<Element>> : Bounds<Forward<Element>> {};
template <class Element>
struct Bounds<AdjointSummary<Element>> : Bounds<Backward<Element>> {};
template <class Element, int steps>
struct BiBounds {
  static constexpr int threads = bi_warps(steps) * kWarpThreads, blocks = steps / 8;
};
template <int steps>
struct BiBounds<double, steps> {
  static constexpr int threads = kDoubleThreads, blocks = 1;
};
template <class Element>
struct Bounds<BiSums<Element>> : BiBounds<Element, bi_sums_steps(kTypeOf<Element>)> {};
template <class Element>
struct Bounds<BiForward<Element>> : BiBounds<Element, bi_steps(kTypeOf<Element>)> {};
template <class Element>
struct Bounds<BiAdjointSums<Element>> : BiBounds<Element, bi_steps(kTypeOf<Element>)> {};
template <class Element>
struct Bounds<BiBackward<Element>> : BiBounds<Element, kBiBackwardSteps> {};
template <>
struct Bounds<Forward<double>> {
  static constexpr int threads = kDoubleThreads, blocks = 1;
};
template <>
struct Bounds<Backward<double>> {
  static constexpr int threads = kDoubleThreads, blocks = 1;
};
template <class Real>
struct Bounds<Reduce<Real>> {
  static constexpr int threads = kReduceLanes * kReduceGroups, blocks = 1;
};

}  // namespace wkv
