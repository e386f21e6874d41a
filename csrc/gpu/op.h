// The operators on a GPU: check, allocate, plan, launch. Each is a template on a launcher, which allocates and launches
// for a device; tests have one that runs the same launches on the host. Nothing here waits for the GPU or reads from
// it, so that every call can be captured in a graph.
//
// A launcher is made of the device of the arguments and has
//   DeviceLimits limits()
//   Tensor empty(shape, dtype)                 uninitialised
//   void set_all_bits(void* memory, int64_t bytes)
//   void launch(const Launch&)                 after all earlier launches and fillings
#pragma once

#include <array>
#include <tuple>

#include "../common/checks.h"
#include "../common/math.h"
#include "launch.h"
#include "plan.h"

namespace wkv {

// ---- torch's operators that its stable interface lacks, by their schemas ----

template <class... Tensors>
Tensor call(const char* name, const char* overload, const Tensors&... tensors) {
  std::array<StableIValue, sizeof...(tensors)> stack{torch::stable::detail::from(tensors)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor row_of(Tensor state, int64_t row) { return torch::stable::narrow(state, 1, row, 1); }

// The given states, or empty ones; den == 0 alone means empty.
inline void state_after_no_steps(const std::optional<Tensor>& state, const Tensor& state_out) {
  set_zero(state_out);
  torch::stable::fill_(row_of(state_out, 2), kEmptyMax);
  if (!state.has_value()) return;
  const Tensor empty = call("aten::logical_not", "", row_of(*state, 1));
  copy(call("aten::where", "self", empty, state_out, *state), state_out);
}

// Torch counts a tensor's versions for autograd where its own operators write to it, and kernels here write to memory:
// an operator that writes no element counts once.
inline void count_version(Tensor tensor) { set_zero(torch::stable::narrow(tensor, 0, 0, 0)); }

// Kernels count sequences, steps, channels, checkpoints and columns in 32 bits.
inline void check_sizes(const Arguments& arguments) {
  constexpr int64_t kMost = 2147483647 - 4096;
  const int64_t N = arguments.sequences;
  for (const auto& [name, size] : {std::pair{"B", arguments.B}, {"T", arguments.T}, {"C", arguments.C}, {"N", N}}) {
    require(size <= kMost, "wkv: ", name, ": expected at most ", kMost, " on a GPU, got ", size);
  }
  if (arguments.nothing_to_do()) return;
  require(N > 0, "cu_seqlens: expected to end at ", arguments.T, ", the steps of k, got no sequence");
  constexpr int64_t kMostOfBatch = int64_t{1} << 37;
  const int64_t of_batch = std::max(arguments.B * std::max(arguments.T, arguments.C), N * arguments.C);
  require(of_batch <= kMostOfBatch, "wkv: B * T and B * C: expected at most ", kMostOfBatch, " on a GPU, got ",
          of_batch);
}
inline Sequence gpu_sequence(Tensor& tensor) {
  if (tensor.size(1) > 1 && tensor.stride(1) > 4294967295) tensor = torch::stable::contiguous(tensor);
  return sequence_of(tensor);
}

inline ChannelParameters channel_parameters(const Arguments& arguments) {
  return {data_of(arguments.w), data_of(arguments.u), arguments.w_dtype, arguments.u_dtype};
}

// The params that forward and backward have in common.
inline SequenceParams sequence_params(Arguments& arguments) {
  const auto& boundaries = arguments.cu_seqlens;
  return {.parameters = channel_parameters(arguments),
          .B = static_cast<uint32_t>(arguments.B),
          .T = static_cast<uint32_t>(arguments.T),
          .C = static_cast<uint32_t>(arguments.C),
          .N = static_cast<uint32_t>(arguments.sequences),
          .boundaries = {data_or_null(boundaries),
                         boundaries.has_value() && torch_type_of(*boundaries) == aoti_torch_dtype_int64()},
          .inputs = {gpu_sequence(arguments.k), gpu_sequence(arguments.v)},
          .r = arguments.r.has_value() ? gpu_sequence(*arguments.r) : Sequence{},
          .state = data_or_null(arguments.state)};
}

inline Kernel kernel_of(Operation operation) {
  switch (operation) {
    case Operation::forward:
      return Kernel::forward;
    case Operation::backward:
      return Kernel::backward;
    case Operation::mixing_forward:
      return Kernel::mixing_forward;
    case Operation::summary:
      return Kernel::summary;
    case Operation::adjoint_summary:
      return Kernel::adjoint_summary;
    default:
      return Kernel::mixing_backward;
  }
}

// Absent options take the plain kernels.
inline Operation operation_of(const Arguments& arguments, bool forward) {
  if (arguments.cu_seqlens.has_value() || arguments.r.has_value()) {
    return forward ? Operation::mixing_forward : Operation::mixing_backward;
  }
  return forward ? Operation::forward : Operation::backward;
}

// A plan, and its launches: the workspace holds params.partials, which `launch_operation` fills in.
struct Launched {
  Plan plan;
  Tensor workspace;
};

// The blocks of an operation, in as many launches as its sequences take.
template <class Launcher>
Launched launch_operation(Launcher& launcher, const Arguments& arguments, Operation operation, SequenceParams& params) {
  const auto& [dtype, B, T, C, N] =
      std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C, arguments.sequences);
  const bool is_packed = arguments.cu_seqlens.has_value();
  const Plan plan = is_packed ? make_packed_plan(operation, dtype, N, T, C, launcher.limits())
                              : make_plan(operation, dtype, B, T, C, launcher.limits());
  // Parts of gradients, then messages and tickets, in whole float64 elements, which torch's allocator aligns for any
  // type.
  const Tensor workspace = launcher.empty({(plan.partial_bytes + plan.exchange_bytes + 7) / 8}, DType::float64);
  params.partials = workspace.mutable_data_ptr();
  char* const exchange = static_cast<char*>(params.partials) + plan.partial_bytes;
  params.chunking = chunking_of(plan, B, exchange);
  if (plan.exchange_bytes > 0) launcher.set_all_bits(exchange, plan.exchange_bytes);
  // Blocks start chunk by chunk: a device takes them in this order.
  Launch launch = {kernel_of(operation),
                   dtype,
                   {static_cast<unsigned>(plan.channel_tiles), 1, 1},
                   plan.threads,
                   plan.shared_bytes,
                   &params,
                   sizeof params};
  if (is_packed && dtype != DType::float64) {
    const auto chunks = static_cast<unsigned>(plan.chunks);
    launch.grid.y = std::min(chunks, kPackedRows);
    launch.grid.z = (chunks + kPackedRows - 1) / kPackedRows;
    launcher.launch(launch);
    return {plan, workspace};
  }
  launch.grid.z = static_cast<unsigned>(plan.chunks);
  for (int64_t first = 0; first < N; first += kMaxGridYZ) {
    params.chunking.first_batch = static_cast<uint32_t>(first);
    launch.grid.y = static_cast<unsigned>(std::min(N - first, kMaxGridYZ));
    launcher.launch(launch);
  }
  return {plan, workspace};
}

// The blocks of a launch with one thread, or one group of threads, for each of `count` items.
inline unsigned blocks_for(int64_t count, int of_block) {
  const int64_t blocks = (count + of_block - 1) / of_block;
  require(blocks <= kMaxGridX, "wkv: ", count, " elements are more than a grid can hold");
  return static_cast<unsigned>(blocks);
}

// The gradients of the decay and of u from their parts.
template <class Launcher>
void launch_reduce(Launcher& launcher, DType dtype, const ReduceParams& reduce) {
  constexpr int kThreads = kReduceLanes * kReduceGroups;
  launcher.launch({Kernel::reduce,
                   dtype,
                   {blocks_for(reduce.C, kReduceLanes), 1, 1},
                   kThreads,
                   kThreads * 2 * static_cast<int>(sizeof(double)),
                   &reduce,
                   sizeof reduce});
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor> gpu_mixing_forward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                      const Tensor& v, const std::optional<Tensor>& state,
                                                      const std::optional<Tensor>& r,
                                                      const std::optional<Tensor>& cu_seqlens, bool checkpoint) {
  Arguments arguments(w, u, k, v, state, r, cu_seqlens);
  check_sizes(arguments);
  Launcher launcher(arguments.device);
  const Tensor y = arguments.empty_sequence(launcher);
  const Tensor state_out = arguments.empty_state(launcher);
  const Tensor checkpoints = arguments.empty_checkpoints(launcher, checkpoint);
  if (arguments.nothing_to_do()) {
    state_after_no_steps(arguments.state, state_out);
    return {y, state_out, checkpoints};
  }
  SequenceParams params = sequence_params(arguments);
  params.outputs[0] = y.mutable_data_ptr();
  params.checkpoints = checkpoint ? checkpoints.mutable_data_ptr() : nullptr;
  params.state_out = state_out.mutable_data_ptr();
  launch_operation(launcher, arguments, operation_of(arguments, true), params);
  return {y, state_out, checkpoints};
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor> gpu_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& state, bool checkpoint) {
  return gpu_mixing_forward<Launcher>(w, u, k, v, state, std::nullopt, std::nullopt, checkpoint);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// gr, where it is wanted, is the gradient of r, without steps if there is none.
template <class Launcher>
Gradients gpu_gradients(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& state, const std::optional<Tensor>& r,
                        const std::optional<Tensor>& cu_seqlens, const Tensor& checkpoints, const Tensor& gy,
                        const std::optional<Tensor>& gstate_out, std::optional<Tensor>* gr) {
  Arguments arguments(w, u, k, v, state, r, cu_seqlens);
  check_sizes(arguments);
  GradientArguments gradients(arguments, checkpoints, gy, gstate_out);
  const auto& [dtype, C] = std::tie(arguments.dtype, arguments.C);
  Launcher launcher(arguments.device);
  const Tensor gw = launcher.empty({C}, arguments.w_dtype), gu = launcher.empty({C}, arguments.u_dtype);
  const Tensor gk = arguments.empty_sequence(launcher), gv = arguments.empty_sequence(launcher);
  const Tensor gstate = arguments.empty_state(launcher);
  if (gr != nullptr) *gr = arguments.empty_gate_gradient(launcher);
  if (arguments.nothing_to_do()) {
    gradients.after_no_steps(gw, gu, gstate);
    return {gw, gu, gk, gv, gstate};
  }
  SequenceParams params = sequence_params(arguments);
  params.inputs[2] = gpu_sequence(gradients.gy);
  params.outputs[0] = gk.mutable_data_ptr();
  params.outputs[1] = gv.mutable_data_ptr();
  params.gr = arguments.r.has_value() ? (*gr)->mutable_data_ptr() : nullptr;
  params.checkpoints = gradients.checkpoints.mutable_data_ptr();
  params.state_out = gstate.mutable_data_ptr();
  params.gstate_out = data_or_null(gradients.gstate_out);
  const auto [plan, workspace] = launch_operation(launcher, arguments, operation_of(arguments, false), params);
  const ReduceParams reduce = {.parameters = params.parameters,
                               .C = C,
                               .partials = params.partials,
                               .rows = plan.partial_bytes / (2 * C * state_bytes(dtype)),
                               .gw = gw.mutable_data_ptr(),
                               .gu = gu.mutable_data_ptr()};
  launch_reduce(launcher, dtype, reduce);
  return {gw, gu, gk, gv, gstate};
}

template <class Launcher>
Gradients gpu_backward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                       const std::optional<Tensor>& state, const Tensor& checkpoints, const Tensor& gy,
                       const std::optional<Tensor>& gstate_out) {
  return gpu_gradients<Launcher>(w, u, k, v, state, std::nullopt, std::nullopt, checkpoints, gy, gstate_out, nullptr);
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gpu_mixing_backward(
    const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const std::optional<Tensor>& state,
    const std::optional<Tensor>& r, const std::optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& gy, const std::optional<Tensor>& gstate_out) {
  std::optional<Tensor> gr;
  const Gradients others = gpu_gradients<Launcher>(w, u, k, v, state, r, cu_seqlens, checkpoints, gy, gstate_out, &gr);
  return std::tuple_cat(others, std::tuple(*gr));
}

template <class Launcher>
Tensor gpu_step(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& state,
                const std::optional<Tensor>& r) {
  const TokenArguments arguments(w, u, k, v, state, r);
  const auto& [dtype, B, C] = std::tie(arguments.dtype, arguments.B, arguments.C);
  Launcher launcher(arguments.device);
  const Tensor y = arguments.empty_token(launcher);
  if (arguments.nothing_to_do()) return y;

  const StepParams params = {.parameters = channel_parameters(arguments),
                             .B = B,
                             .C = C,
                             .k = data_of(arguments.k),
                             .v = data_of(arguments.v),
                             .r = data_or_null(arguments.r),
                             .k_stride = arguments.k.stride(0),
                             .v_stride = arguments.v.stride(0),
                             .r_stride = arguments.r.has_value() ? arguments.r->stride(0) : 0,
                             .y = y.mutable_data_ptr(),
                             .state = state.mutable_data_ptr(),
                             .state_batch_stride = state.stride(0),
                             .state_row_stride = state.stride(1),
                             .state_channel_stride = state.stride(2)};
  launcher.launch(
      {Kernel::step, dtype, {blocks_for(B * C, kPlainThreads), 1, 1}, kPlainThreads, 0, &params, sizeof params});
  count_version(state);
  return y;
}

}  // namespace wkv
