// What the compilers' own question about the processor, __builtin_cpu_supports, does not cover.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace wkv {

// Clang knows no name for it before version 19. Its registers are AVX's, whose support by the operating system comes
// with the answer for AVX2.
inline bool processor_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace wkv
#endif
