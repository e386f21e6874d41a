// Plans as Python's dicts, for tests, benchmarks and the kernel report: pure functions of a problem, which need neither
// torch nor a toolkit nor a GPU. A module of the source tree; nothing that a user calls needs it.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/plan.h"
#include "gpu/plan.h"

namespace py = pybind11;

namespace wkv {
namespace {

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float64") return DType::float64;
  throw py::value_error("dtype: expected float32, float16, bfloat16 or float64, got " + name);
}

py::dict plan_of_cpu(const std::string& dtype, int64_t B, int64_t T, int64_t C, int64_t threads) {
  const CpuPlan plan = plan_cpu(parse_dtype(dtype), B, T, C, threads);
  py::dict result;
  result["threads"] = plan.threads;
  result["channel_tile"] = plan.channel_tile;
  result["tiles"] = plan.tiles;
  result["span_steps"] = plan.span_steps;
  result["spans"] = plan.spans;
  return result;
}

constexpr DeviceLimits kH100 = {
    .multiprocessors = 132, .shared_per_block = 232448, .shared_per_multiprocessor = 233472, .architecture = 900};

DeviceLimits parse_limits(const py::object& limits) {
  if (limits.is_none()) return kH100;
  const auto get = [&](const char* name) { return limits[name].cast<int64_t>(); };
  return {.multiprocessors = get("multiprocessors"),
          .shared_per_block = get("shared_per_block"),
          .shared_per_multiprocessor = get("shared_per_multiprocessor"),
          .architecture = get("architecture")};
}

Operation parse_operation(const std::string& name) {
  if (name == "forward") return Operation::forward;
  if (name == "backward") return Operation::backward;
  throw py::value_error("operation: expected forward or backward, got " + name);
}

py::dict plan_of_cuda(const std::string& operation, const std::string& dtype, int64_t B, int64_t T, int64_t C,
                      const py::object& limits) {
  const Plan plan = make_plan(parse_operation(operation), parse_dtype(dtype), B, T, C, parse_limits(limits));
  py::dict result;
  result["warps"] = plan.warps;
  result["tile_steps"] = plan.tile_steps;
  result["chunk_tiles"] = plan.chunk_tiles;
  result["chunks"] = plan.chunks;
  result["channel_tiles"] = plan.channel_tiles;
  result["anchor"] = plan.anchor;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["workspace_bytes"] = plan.partial_bytes + plan.exchange_bytes;
  return result;
}

}  // namespace

}  // namespace wkv

PYBIND11_MODULE(_introspection, m) {
  m.def("plan_cpu", &wkv::plan_of_cpu, py::arg("dtype"), py::arg("B"), py::arg("T"), py::arg("C"), py::arg("threads"));
  m.def("plan_cuda", &wkv::plan_of_cuda, py::arg("operation"), py::arg("dtype"), py::arg("B"), py::arg("T"),
        py::arg("C"), py::arg("limits") = py::none());
}
