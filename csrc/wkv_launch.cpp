#include "wkv_launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace wkv {
namespace {

constexpr int kCarryThreads = 128;
constexpr int kStepThreads = 256;
constexpr int kClearThreads = 256;

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > kMaxGridX) {
    throw std::invalid_argument("launch: " + std::to_string(items) + " elements are more than a grid can hold");
  }
  return static_cast<unsigned>(blocks);
}

void* after(void* pointer, int64_t bytes) { return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + bytes; }
const void* after(const void* pointer, int64_t bytes) {
  return pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes;
}

// The batch in parts that a grid can hold: calls function(first sequence, sequences).
template <class Function>
void for_batches(const Plan& plan, const Function& function) {
  for (int64_t b = 0; b < plan.B; b += plan.batch_per_launch) function(b, std::min(plan.batch_per_launch, plan.B - b));
}

Sequence from_batch(Sequence sequence, int64_t b, DType dtype) {
  sequence.data = after(sequence.data, b * sequence.batch_stride * element_bytes(dtype));
  return sequence;
}

Extent grid_of(const Plan& plan, int64_t chunks, int64_t batch) {
  return {static_cast<unsigned>(plan.channel_tiles), static_cast<unsigned>(chunks), static_cast<unsigned>(batch)};
}

bool is_single_pass(const Plan& plan) { return plan.signal_count > 0; }

// The signals lie at the workspace's end.
HandOver hand_over_of(const Plan& plan, void* workspace) {
  const int64_t signal_bytes = plan.signal_count * static_cast<int64_t>(sizeof(uint32_t));
  return {static_cast<uint32_t*>(after(workspace, plan.workspace_bytes - signal_bytes)),
          static_cast<uint32_t>(plan.channel_tiles), static_cast<uint32_t>(plan.group)};
}

// The one launch over all chunks, and what clears its signals.
template <class Arguments>
void add_single_pass(const Plan& plan, Kernel kernel, const Arguments& arguments, std::vector<Launch>& launches) {
  launches.push_back({Kernel::clear,
                      plan.dtype,
                      {blocks_for(plan.signal_count, kClearThreads), 1, 1},
                      {kClearThreads, 1, 1},
                      0,
                      ClearArguments{arguments.hand_over.signals, plan.signal_count}});
  // Blocks begin chunk by chunk: in this order a device starts them.
  const Extent grid{static_cast<unsigned>(plan.channel_tiles), static_cast<unsigned>(plan.B),
                    static_cast<unsigned>(plan.chunks)};
  launches.push_back(
      {kernel, plan.dtype, grid, {static_cast<unsigned>(plan.threads), 1, 1}, plan.shared_bytes, arguments});
}

Extent carry_grid(const Plan& plan, int64_t batch) {
  return {blocks_for(plan.C, kCarryThreads), 1, static_cast<unsigned>(batch)};
}

}  // namespace

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::summarise_states:
      return "summarise_states";
    case Kernel::carry_states:
      return "carry_states";
    case Kernel::forward:
      return "forward";
    case Kernel::forward_single_pass:
      return "forward_single_pass";
    case Kernel::summarise_adjoints:
      return "summarise_adjoints";
    case Kernel::carry_adjoints:
      return "carry_adjoints";
    case Kernel::backward:
      return "backward";
    case Kernel::backward_single_pass:
      return "backward_single_pass";
    case Kernel::reduce:
      return "reduce";
    case Kernel::clear:
      return "clear";
    default:
      return "step";
  }
}

std::vector<Launch> forward_launches(const Plan& plan, ForwardArguments whole, void* workspace) {
  const DType dtype = plan.dtype;
  const int64_t state_size = state_bytes(dtype) * plan.C;
  const int64_t output_size = plan.T * plan.C * element_bytes(dtype);
  const Extent block{static_cast<unsigned>(plan.threads), 1, 1};
  whole.chunk_len = plan.chunk_len;
  whole.chunks = plan.chunks;
  whole.buffers = plan.buffers;
  whole.chunk_states = workspace;

  std::vector<Launch> launches;
  if (is_single_pass(plan)) {
    whole.hand_over = hand_over_of(plan, workspace);
    add_single_pass(plan, Kernel::forward_single_pass, whole, launches);
    return launches;
  }
  for_batches(plan, [&](int64_t b, int64_t batch) {
    ForwardArguments part = whole;
    part.B = batch;
    part.k = from_batch(whole.k, b, dtype);
    part.v = from_batch(whole.v, b, dtype);
    part.state = after(whole.state, b * 3 * state_size);
    part.y = after(whole.y, b * output_size);
    part.state_out = after(whole.state_out, b * 3 * state_size);
    part.checkpoints = after(whole.checkpoints, b * checkpoint_count(dtype, plan.T) * 3 * state_size);
    part.chunk_states = after(whole.chunk_states, b * (plan.chunks - 1) * 3 * state_size);
    if (plan.chunks > 1) {
      launches.push_back(
          {Kernel::summarise_states, dtype, grid_of(plan, plan.chunks - 1, batch), block, plan.shared_bytes, part});
      launches.push_back(
          {Kernel::carry_states,
           dtype,
           carry_grid(plan, batch),
           {kCarryThreads, 1, 1},
           0,
           CarryStatesArguments{part.parameters, plan.C, part.chunk_states, plan.chunk_len, plan.chunks}});
    }
    launches.push_back({Kernel::forward, dtype, grid_of(plan, plan.chunks, batch), block, plan.shared_bytes, part});
  });
  return launches;
}

std::vector<Launch> backward_launches(const Plan& plan, BackwardArguments whole, void* gw, void* gu, void* workspace) {
  const DType dtype = plan.dtype;
  const int64_t state_size = state_bytes(dtype) * plan.C;
  const int64_t output_size = plan.T * plan.C * element_bytes(dtype);
  const Extent block{static_cast<unsigned>(plan.threads), 1, 1};
  whole.chunk_len = plan.chunk_len;
  whole.chunks = plan.chunks;
  whole.partials = workspace;
  whole.chunk_adjoints = after(workspace, plan.B * plan.chunks * 2 * state_size);

  std::vector<Launch> launches;
  const auto add_batch = [&](int64_t b, int64_t batch) {
    BackwardArguments part = whole;
    part.B = batch;
    part.k = from_batch(whole.k, b, dtype);
    part.v = from_batch(whole.v, b, dtype);
    part.gy = from_batch(whole.gy, b, dtype);
    part.state = after(whole.state, b * 3 * state_size);
    part.checkpoints = after(whole.checkpoints, b * checkpoint_count(dtype, plan.T) * 3 * state_size);
    part.gstate_out = after(whole.gstate_out, b * 3 * state_size);
    part.gk = after(whole.gk, b * output_size);
    part.gv = after(whole.gv, b * output_size);
    part.gstate = after(whole.gstate, b * 3 * state_size);
    part.partials = after(whole.partials, b * plan.chunks * 2 * state_size);
    part.chunk_adjoints = after(whole.chunk_adjoints, b * (plan.chunks - 1) * 2 * state_size);
    if (plan.chunks > 1) {
      launches.push_back(
          {Kernel::summarise_adjoints, dtype, grid_of(plan, plan.chunks - 1, batch), block, plan.shared_bytes, part});
      launches.push_back({Kernel::carry_adjoints,
                          dtype,
                          carry_grid(plan, batch),
                          {kCarryThreads, 1, 1},
                          0,
                          CarryAdjointsArguments{part.parameters, plan.T, plan.C, part.checkpoints, part.chunk_adjoints,
                                                 plan.chunk_len, plan.chunks}});
    }
    launches.push_back({Kernel::backward, dtype, grid_of(plan, plan.chunks, batch), block, plan.shared_bytes, part});
  };
  if (is_single_pass(plan)) {
    whole.hand_over = hand_over_of(plan, workspace);
    add_single_pass(plan, Kernel::backward_single_pass, whole, launches);
  } else {
    for_batches(plan, add_batch);
  }
  constexpr int kReduceThreads = kReduceLanes * kReduceGroups;
  launches.push_back({Kernel::reduce,
                      dtype,
                      {blocks_for(plan.C, kReduceLanes), 1, 1},
                      {kReduceThreads, 1, 1},
                      kReduceThreads * 2 * static_cast<int>(sizeof(double)),
                      ReduceArguments{whole.parameters, plan.C, whole.partials, plan.B * plan.chunks, gw, gu}});
  return launches;
}

std::vector<Launch> step_launches(DType dtype, const StepArguments& arguments) {
  return {{Kernel::step,
           dtype,
           {blocks_for(arguments.B * arguments.C, kStepThreads), 1, 1},
           {kStepThreads, 1, 1},
           0,
           arguments}};
}

}  // namespace wkv
