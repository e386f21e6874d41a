// Plans and launches as Python's dicts, for tests, benchmarks and the kernel report: pure functions of a problem, which
// need neither torch nor a toolkit nor a GPU. A module of the source tree; nothing that a user calls needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/wkv_cpu_plan.h"
#include "wkv_launch.h"
#include "wkv_plan.h"

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
    .multiprocessors = 132, .shared_per_block = 232448, .shared_per_multiprocessor = 233472};

DeviceLimits parse_limits(const py::object& limits) {
  if (limits.is_none()) return kH100;
  const auto get = [&](const char* name) { return limits[name].cast<int64_t>(); };
  return {.multiprocessors = get("multiprocessors"),
          .shared_per_block = get("shared_per_block"),
          .shared_per_multiprocessor = get("shared_per_multiprocessor")};
}

Operation parse_operation(const std::string& name) {
  if (name == "forward") return Operation::forward;
  if (name == "backward") return Operation::backward;
  throw py::value_error("operation: expected forward or backward, got " + name);
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    default:
      return "float64";
  }
}

// What was asked of a plan, as Python gives it: its keywords are the fields of PlanRequest, None leaves a choice to it.
struct Request {
  std::string schedule;
  PlanRequest asked;

  explicit Request(const py::kwargs& keywords) {
    const std::map<std::string, int64_t*> numbers = {
        {"spans", &asked.spans}, {"buffers", &asked.buffers}, {"chunk_len", &asked.chunk_len}, {"group", &asked.group}};
    for (const auto& [key, value] : keywords) {
      const auto name = key.cast<std::string>();
      if (name != "schedule" && numbers.count(name) == 0) throw py::type_error("a plan has no choice of " + name);
      if (value.is_none()) continue;
      if (name == "schedule") {
        schedule = value.cast<std::string>();
      } else {
        *numbers.at(name) = value.cast<int64_t>();
      }
    }
  }
  // Valid as long as this is.
  PlanRequest view() const {
    PlanRequest request = asked;
    if (!schedule.empty()) request.schedule = schedule.c_str();
    return request;
  }
};

py::dict plan_of_cuda(const std::string& operation, const std::string& dtype, int64_t B, int64_t T, int64_t C,
                      const py::object& limits, const py::kwargs& choices) {
  const Plan plan =
      make_plan(parse_operation(operation), parse_dtype(dtype), B, T, C, parse_limits(limits), Request(choices).view());
  py::dict result;
  result["operation"] = operation;
  result["dtype"] = dtype;
  result["B"] = plan.B;
  result["T"] = plan.T;
  result["C"] = plan.C;
  result["spans"] = plan.spans;
  result["buffers"] = plan.buffers;
  result["tile_steps"] = plan.tile_steps;
  result["chunk_len"] = plan.chunk_len;
  result["chunks"] = plan.chunks;
  result["channel_tiles"] = plan.channel_tiles;
  result["batch_per_launch"] = plan.batch_per_launch;
  result["group"] = plan.group;
  result["signal_count"] = plan.signal_count;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["schedule"] = plan.schedule;
  result["reason"] = plan.reason;
  return result;
}

// A kernel's arguments by name: addresses, sizes and strides are integers, dtypes strings; what is absent is null.
struct NamedArguments {
  py::dict values;

  int64_t integer(const std::string& name) const { return values[name.c_str()].cast<int64_t>(); }
  void* pointer(const char* name) const {
    return values.contains(name) ? reinterpret_cast<void*>(values[name].cast<uintptr_t>()) : nullptr;
  }
  DType dtype(const char* name) const { return parse_dtype(values[name].cast<std::string>()); }
  Sequence sequence(const std::string& name) const {
    return {pointer(name.c_str()), integer(name + "_batch_stride"), integer(name + "_time_stride")};
  }
  ChannelParameters parameters() const { return {pointer("w"), pointer("u"), dtype("w_dtype"), dtype("u_dtype")}; }
};

std::vector<Launch> launches_of_step(DType dtype, int64_t B, int64_t C, const NamedArguments& named) {
  return step_launches(dtype, {.parameters = named.parameters(),
                               .B = B,
                               .C = C,
                               .k = named.pointer("k"),
                               .v = named.pointer("v"),
                               .r = named.pointer("r"),
                               .k_stride = named.integer("k_stride"),
                               .v_stride = named.integer("v_stride"),
                               .r_stride = named.integer("r_stride"),
                               .y = named.pointer("y"),
                               .state = named.pointer("state"),
                               .state_batch_stride = named.integer("state_batch_stride"),
                               .state_row_stride = named.integer("state_row_stride"),
                               .state_channel_stride = named.integer("state_channel_stride")});
}

std::vector<Launch> launches_of_plan(const Plan& plan, const NamedArguments& named) {
  if (plan.operation == Operation::forward) {
    const ForwardArguments given = {.parameters = named.parameters(),
                                    .B = plan.B,
                                    .T = plan.T,
                                    .C = plan.C,
                                    .k = named.sequence("k"),
                                    .v = named.sequence("v"),
                                    .state = named.pointer("state"),
                                    .y = named.pointer("y"),
                                    .state_out = named.pointer("state_out"),
                                    .checkpoints = named.pointer("checkpoints")};
    return forward_launches(plan, given, named.pointer("workspace"));
  }
  const BackwardArguments given = {.parameters = named.parameters(),
                                   .B = plan.B,
                                   .T = plan.T,
                                   .C = plan.C,
                                   .k = named.sequence("k"),
                                   .v = named.sequence("v"),
                                   .gy = named.sequence("gy"),
                                   .state = named.pointer("state"),
                                   .checkpoints = named.pointer("checkpoints"),
                                   .gstate_out = named.pointer("gstate_out"),
                                   .gk = named.pointer("gk"),
                                   .gv = named.pointer("gv"),
                                   .gstate = named.pointer("gstate")};
  return backward_launches(plan, given, named.pointer("gw"), named.pointer("gu"), named.pointer("workspace"));
}

py::dict describe(const Launch& launch) {
  const auto sizes = [](Extent extent) { return py::make_tuple(extent.x, extent.y, extent.z); };
  py::dict result;
  result["kernel"] = name_of(launch.kernel);
  result["dtype"] = name_of(launch.dtype);
  result["grid"] = sizes(launch.grid);
  result["block"] = sizes(launch.block);
  result["shared_bytes"] = launch.shared_bytes;
  result["arguments"] = std::visit(
      [](const auto& arguments) { return py::bytes(reinterpret_cast<const char*>(&arguments), sizeof arguments); },
      launch.arguments);
  return result;
}

py::list cuda_launches(const std::string& operation, const std::string& dtype, int64_t B, int64_t T, int64_t C,
                       const py::dict& arguments, const py::object& limits, const py::kwargs& choices) {
  const NamedArguments named = {arguments};
  const Request request(choices);
  const std::vector<Launch> launches = operation == "step"
                                           ? launches_of_step(parse_dtype(dtype), B, C, named)
                                           : launches_of_plan(make_plan(parse_operation(operation), parse_dtype(dtype),
                                                                        B, T, C, parse_limits(limits), request.view()),
                                                              named);
  py::list result;
  for (const Launch& launch : launches) {
    result.append(describe(launch));
  }
  return result;
}

}  // namespace

}  // namespace wkv

PYBIND11_MODULE(_introspection, m) {
  m.def("plan_cpu", &wkv::plan_of_cpu, py::arg("dtype"), py::arg("B"), py::arg("T"), py::arg("C"), py::arg("threads"));
  m.def("plan_cuda", &wkv::plan_of_cuda, py::arg("operation"), py::arg("dtype"), py::arg("B"), py::arg("T"),
        py::arg("C"), py::arg("limits") = py::none());
  m.def("cuda_launches", &wkv::cuda_launches, py::arg("operation"), py::arg("dtype"), py::arg("B"), py::arg("T"),
        py::arg("C"), py::arg("arguments"), py::arg("limits") = py::none());
}
