// The choice of an instruction set. Compiled for none of them: it runs on any processor.
#include "isa.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace wkv::cpu {
namespace {

// Each checks every feature that the kernels are compiled for. The checks for avx2 and avx512f include that the
// operating system saves the registers.
#if defined(__x86_64__)
// __builtin_cpu_supports has no name for it in Clang before version 19.
bool processor_has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && processor_has_f16c(); }
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         processor_has_f16c();
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
#endif

}  // namespace

const Kernels& selected_kernels() {
  static const Kernels* const selected = [] {
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view largest = variable == nullptr ? "" : variable;
    const bool avx2 = largest != "default", avx512 = avx2 && largest != "avx2";
    if (avx512 && kernels_avx512() != nullptr && runs_avx512()) return kernels_avx512();
    if (avx2 && kernels_avx2() != nullptr && runs_avx2()) return kernels_avx2();
    return kernels_baseline();
  }();
  return *selected;
}

}  // namespace wkv::cpu
