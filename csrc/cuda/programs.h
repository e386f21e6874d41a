// Which program each kernel runs, for the device and for the emulation on the host alike. A program has its Arguments,
// the Thread that lives through its phases, and `run` for one block.
#pragma once

#include "../wkv_launch.h"
#include "backward.h"
#include "carry.h"
#include "forward.h"
#include "step.h"

namespace wkv {

// A single pass needs a warp for the lanes of a span, which float64 does not have; no plan asks it for one.
template <class Element>
inline constexpr Pass kSingle = lane_count(ElementTraits<Element>::dtype) == 32 ? Pass::single : Pass::replay;

// Calls function.operator()<Program>().
template <class Element, class Function>
auto with_program_of(Kernel kernel, const Function& function) {
  using Real = typename ElementTraits<Element>::Real;
  switch (kernel) {
    case Kernel::summarise_states:
      return function.template operator()<Forward<Element, Pass::summarise>>();
    case Kernel::carry_states:
      return function.template operator()<CarryStates<Real>>();
    case Kernel::forward:
      return function.template operator()<Forward<Element, Pass::replay>>();
    case Kernel::forward_single_pass:
      return function.template operator()<Forward<Element, kSingle<Element>>>();
    case Kernel::summarise_adjoints:
      return function.template operator()<Backward<Element, Pass::summarise>>();
    case Kernel::carry_adjoints:
      return function.template operator()<CarryAdjoints<Real>>();
    case Kernel::backward:
      return function.template operator()<Backward<Element, Pass::replay>>();
    case Kernel::backward_single_pass:
      return function.template operator()<Backward<Element, kSingle<Element>>>();
    case Kernel::clear:
      return function.template operator()<Clear>();
    case Kernel::reduce:
      return function.template operator()<Reduce<Real>>();
    default:
      return function.template operator()<Step<Element>>();
  }
}

template <class Function>
auto with_program(Kernel kernel, DType dtype, const Function& function) {
  switch (dtype) {
    case DType::float32:
      return with_program_of<float>(kernel, function);
    case DType::float16:
      return with_program_of<Half>(kernel, function);
    case DType::bfloat16:
      return with_program_of<Bfloat16>(kernel, function);
    default:
      return with_program_of<double>(kernel, function);
  }
}

}  // namespace wkv
