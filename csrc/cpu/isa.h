// The interface between the CPU operator, which splits the work, and the kernels, which exist once per instruction set.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace wkv {

// One thread's work: some channels of one sequence, over some of its steps. t_begin is a multiple of the checkpoint
// interval.
struct Span {
  int64_t b, c_begin, c_end, t_begin, t_end;
};

// What the walks need of w and u, state_bytes wide, [C] each.
struct Parameters {
  const void* log_decay;  // -exp(w)
  const void* u;
  const void* decay;  // exp(log_decay)
  const void* bonus;  // exp(u)
};

struct CpuKernels {
  const char* name;

  // Whether this processor has every instruction that the kernels are compiled for, and the operating system keeps the
  // registers.
  bool (*runs_here)();

  // Fills decay and bonus from log_decay and u.
  void (*exponentiate)(DType dtype, int64_t C, const void* log_decay, const void* u, void* decay, void* bonus);

  // Carries `state` [3, C] over the span. Writes y and checkpoints unless `problem.y` is null.
  void (*forward)(const ForwardProblem& problem, const Parameters& parameters, const Span& span, void* state);

  // The span's one token.
  void (*step)(const StepProblem& problem, const Parameters& parameters, const Span& span);

  // Carries `adjoint` [2, C], the gradient of the state's (num, den), from after the span to before it. Writes gk and
  // gv and adds to `gw_gu` [2, C], the gradients of log_decay and u, unless `gw_gu` is null.
  void (*backward)(const BackwardProblem& problem, const Parameters& parameters, const Span& span, void* adjoint,
                   double* gw_gu);
};

// Null where the compiler or the processor's family has no such instruction set.
const CpuKernels* cpu_kernels_baseline();
const CpuKernels* cpu_kernels_avx2();
const CpuKernels* cpu_kernels_avx512();

// The largest instruction set that is built, is there, and is not above what ATEN_CPU_CAPABILITY, torch's variable for
// the same purpose, allows: default, avx2 or avx512.
const CpuKernels& selected_cpu_kernels();

}  // namespace wkv
