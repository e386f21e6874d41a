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
  for (const auto& [name, size] : {std::pair{"B", arguments.B}, {"T", arguments.T}, {"C", arguments.C}}) {
    require(size <= kMost, "wkv: ", name, ": expected at most ", kMost, " on a GPU, got ", size);
  }
  if (arguments.nothing_to_do()) return;
  constexpr int64_t kMostOfBatch = int64_t{1} << 37;
  const int64_t of_batch = arguments.B * std::max(arguments.T, arguments.C);
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
  return {.parameters = channel_parameters(arguments),
          .B = static_cast<uint32_t>(arguments.B),
          .T = static_cast<uint32_t>(arguments.T),
          .C = static_cast<uint32_t>(arguments.C),
          .inputs = {gpu_sequence(arguments.k), gpu_sequence(arguments.v)},
          .state = data_or_null(arguments.state)};
}

// The blocks of a plan, in as many launches as its sequences take. Returns the memory behind params.partials, which
// this fills in.
template <class Launcher>
Tensor launch_plan(Launcher& launcher, Kernel kernel, DType dtype, const Plan& plan, SequenceParams& params) {
  // Parts of gradients, then messages and tickets, in whole float64 elements, which torch's allocator aligns for any
  // type.
  const Tensor workspace = launcher.empty({(plan.partial_bytes + plan.exchange_bytes + 7) / 8}, DType::float64);
  params.partials = workspace.mutable_data_ptr();
  char* const exchange = static_cast<char*>(params.partials) + plan.partial_bytes;
  params.chunking = chunking_of(plan, params.B, exchange);
  if (plan.exchange_bytes > 0) launcher.set_all_bits(exchange, plan.exchange_bytes);
  for (int64_t first = 0; first < params.B; first += kMaxGridYZ) {
    params.chunking.first_batch = static_cast<uint32_t>(first);
    launcher.launch(
        {kernel,
         dtype,
         // Blocks start chunk by chunk: a device takes them in this order.
         {static_cast<unsigned>(plan.channel_tiles),
          static_cast<unsigned>(std::min(int64_t{params.B} - first, kMaxGridYZ)), static_cast<unsigned>(plan.chunks)},
         plan.threads,
         plan.shared_bytes,
         &params,
         sizeof params});
  }
  return workspace;
}

// The blocks of a launch with one thread, or one group of threads, for each of `count` items.
inline unsigned blocks_for(int64_t count, int of_block) {
  const int64_t blocks = (count + of_block - 1) / of_block;
  require(blocks <= kMaxGridX, "wkv: ", count, " elements are more than a grid can hold");
  return static_cast<unsigned>(blocks);
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor> gpu_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& state, bool checkpoint) {
  Arguments arguments(w, u, k, v, state);
  check_sizes(arguments);
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
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
  const Plan plan = make_plan(Operation::forward, dtype, B, T, C, launcher.limits());
  launch_plan(launcher, Kernel::forward, dtype, plan, params);
  return {y, state_out, checkpoints};
}

template <class Launcher>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gpu_backward(const Tensor& w, const Tensor& u, const Tensor& k,
                                                                const Tensor& v, const std::optional<Tensor>& state,
                                                                const Tensor& checkpoints, const Tensor& gy,
                                                                const std::optional<Tensor>& gstate_out) {
  Arguments arguments(w, u, k, v, state);
  check_sizes(arguments);
  GradientArguments gradients(arguments, checkpoints, gy, gstate_out);
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
  Launcher launcher(arguments.device);
  const Tensor gw = launcher.empty({C}, arguments.w_dtype), gu = launcher.empty({C}, arguments.u_dtype);
  const Tensor gk = arguments.empty_sequence(launcher), gv = arguments.empty_sequence(launcher);
  const Tensor gstate = arguments.empty_state(launcher);
  if (arguments.nothing_to_do()) {
    gradients.after_no_steps(gw, gu, gstate);
    return {gw, gu, gk, gv, gstate};
  }
  SequenceParams params = sequence_params(arguments);
  params.inputs[2] = gpu_sequence(gradients.gy);
  params.outputs[0] = gk.mutable_data_ptr();
  params.outputs[1] = gv.mutable_data_ptr();
  params.checkpoints = gradients.checkpoints.mutable_data_ptr();
  params.state_out = gstate.mutable_data_ptr();
  params.gstate_out = data_or_null(gradients.gstate_out);
  const Plan plan = make_plan(Operation::backward, dtype, B, T, C, launcher.limits());
  const Tensor workspace = launch_plan(launcher, Kernel::backward, dtype, plan, params);
  const ReduceParams reduce = {.parameters = params.parameters,
                               .C = C,
                               .partials = params.partials,
                               .rows = B * plan.chunks,
                               .gw = gw.mutable_data_ptr(),
                               .gu = gu.mutable_data_ptr()};
  constexpr int kThreads = kReduceLanes * kReduceGroups;
  launcher.launch({Kernel::reduce,
                   dtype,
                   {blocks_for(C, kReduceLanes), 1, 1},
                   kThreads,
                   kThreads * 2 * static_cast<int>(sizeof(double)),
                   &reduce,
                   sizeof reduce});
  return {gw, gu, gk, gv, gstate};
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
