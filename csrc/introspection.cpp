// Plans as Python's dicts, for tests, benchmarks and the kernel report: pure functions of a problem, which need neither
// torch nor a toolkit nor a GPU. A module of the source tree; nothing that a user calls needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/plan.h"
#include "gpu/plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace wkv {
namespace {

DType parse_dtype(const std::string& name) {
  for (const DType dtype : kDTypes) {
    if (name == name_of(dtype)) return dtype;
  }
  throw py::value_error("dtype: expected float32, float16, bfloat16 or float64, got " + name);
}

py::dict dict_of(const cpu::Plan& plan) {
  return py::dict("threads"_a = plan.threads, "column_channels"_a = plan.column_channels, "columns"_a = plan.columns,
                  "chunk_steps"_a = plan.chunk_steps, "chunks"_a = plan.chunks);
}

py::dict plan_of_cpu(const std::string& dtype, int64_t B, int64_t T, int64_t C, int64_t threads) {
  return dict_of(cpu::make_work(parse_dtype(dtype), B, T, C, threads).plan);
}

// With the items of every thread.
py::dict packed_plan_of_cpu(const std::string& dtype, const std::vector<int64_t>& boundaries, int64_t C,
                            int64_t threads) {
  const cpu::Work work =
      cpu::make_packed_work(parse_dtype(dtype), {boundaries.data(), true}, static_cast<int64_t>(boundaries.size()) - 1,
                            boundaries.back(), C, threads);
  py::list shares;
  for (int64_t thread = 0; thread < work.plan.threads; ++thread) {
    py::list items;
    for (int64_t i = work.share(thread); i < work.share(thread + 1); ++i) {
      const cpu::WorkItem item = work[i];
      items.append(py::dict("n"_a = item.n, "row"_a = item.row, "partials"_a = item.partials,
                            "opens_partials"_a = item.opens_partials, "spare_checkpoint"_a = item.spare_checkpoint,
                            "t_begin"_a = item.t_begin, "t_end"_a = item.t_end, "c_begin"_a = item.c_begin,
                            "c_end"_a = item.c_end));
    }
    shares.append(items);
  }
  py::dict plan = dict_of(work.plan);
  plan["shares"] = shares;
  return plan;
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
  if (name == "mixing_forward") return Operation::mixing_forward;
  if (name == "mixing_backward") return Operation::mixing_backward;
  if (name == "summary") return Operation::summary;
  if (name == "adjoint_summary") return Operation::adjoint_summary;
  throw py::value_error(
      "operation: expected forward, backward, mixing_forward, mixing_backward, summary or "
      "adjoint_summary, got " +
      name);
}

py::dict dict_of(const Plan& plan) {
  return py::dict("warps"_a = plan.warps, "tile_steps"_a = plan.tile_steps, "chunk_tiles"_a = plan.chunk_tiles,
                  "chunks"_a = plan.chunks, "channel_tiles"_a = plan.channel_tiles, "anchor"_a = plan.anchor,
                  "threads"_a = plan.threads, "shared_bytes"_a = plan.shared_bytes,
                  "workspace_bytes"_a = plan.partial_bytes + plan.exchange_bytes);
}

py::dict plan_of_cuda(const std::string& operation, const std::string& dtype, int64_t B, int64_t T, int64_t C,
                      const py::object& limits) {
  return dict_of(make_plan(parse_operation(operation), parse_dtype(dtype), B, T, C, parse_limits(limits)));
}

py::dict packed_plan_of_cuda(const std::string& operation, const std::string& dtype, int64_t N, int64_t total,
                             int64_t C, const py::object& limits) {
  return dict_of(make_packed_plan(parse_operation(operation), parse_dtype(dtype), N, total, C, parse_limits(limits)));
}

}  // namespace
}  // namespace wkv

PYBIND11_MODULE(_introspection, m) {
  m.def("plan_cpu", &wkv::plan_of_cpu, "dtype"_a, "B"_a, "T"_a, "C"_a, "threads"_a);
  m.def("packed_plan_cpu", &wkv::packed_plan_of_cpu, "dtype"_a, "cu_seqlens"_a, "C"_a, "threads"_a);
  m.def("plan_cuda", &wkv::plan_of_cuda, "operation"_a, "dtype"_a, "B"_a, "T"_a, "C"_a, "limits"_a = py::none());
  m.def("packed_plan_cuda", &wkv::packed_plan_of_cuda, "operation"_a, "dtype"_a, "N"_a, "total"_a, "C"_a,
        "limits"_a = py::none());
}
