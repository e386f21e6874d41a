// The table of the kernels of one instruction set: included by a file that has defined WKV_ISA and WKV_SIMD_BYTES.
#pragma once

#include "bidirectional.h"
#include "kernel.h"

namespace wkv::cpu {
namespace WKV_ISA {

inline constexpr Kernels kKernels = {WKV_STRING(WKV_ISA), exponentiate, forward,         step, backward,
                                     bi_forward,          bi_backward,  finish_streaming};

}  // namespace WKV_ISA
}  // namespace wkv::cpu
