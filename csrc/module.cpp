// The Python module: what this build is, and the plans that it makes. The operators are reached through torch.ops.
#include "module.h"

#include <torch/version.h>

#include "cpu/wkv_cpu_kernels.h"
#include "cpu/wkv_cpu_plan.h"

namespace py = pybind11;

namespace wkv {

const CpuKernels& selected_cpu_kernels();

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float64") return DType::float64;
  throw py::value_error("dtype: expected float32, float16, bfloat16 or float64, got " + name);
}

}  // namespace wkv

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = WKV_COMPILER;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  py::list built;
  for (const wkv::CpuKernels* kernels :
       {wkv::cpu_kernels_baseline(), wkv::cpu_kernels_avx2(), wkv::cpu_kernels_avx512()}) {
    if (kernels != nullptr) built.append(kernels->name);
  }
  info["cpu_instruction_sets"] = py::tuple(built);
  info["cpu_instruction_set"] = wkv::selected_cpu_kernels().name;
  info["cuda"] = wkv::cuda_version();
  info["cuda_architectures"] = wkv::cuda_architectures();
  return info;
}

py::dict plan_cpu(const std::string& dtype, int64_t B, int64_t T, int64_t C, int64_t threads) {
  const wkv::CpuPlan plan = wkv::plan_cpu(wkv::parse_dtype(dtype), B, T, C, threads);
  py::dict result;
  result["threads"] = plan.threads;
  result["channel_tile"] = plan.channel_tile;
  result["tiles"] = plan.tiles;
  result["span_steps"] = plan.span_steps;
  result["spans"] = plan.spans;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("plan_cpu", &plan_cpu, py::arg("dtype"), py::arg("B"), py::arg("T"), py::arg("C"), py::arg("threads"));
  m.def(
      "checkpoint_interval", [](const std::string& dtype) { return wkv::checkpoint_interval(wkv::parse_dtype(dtype)); },
      py::arg("dtype"));
  wkv::define_cuda(m);
}
