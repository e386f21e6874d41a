#include "wkv_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace wkv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a launch that keep the device's memory busy. A forward block of 64 threads has about 16 KB on its way, a
// multiprocessor of an H100 needs 30 KB (3 TB/s times 0.7 µs over 132), and loads alternate with sums.
constexpr int64_t kForwardBlocksPerMultiprocessor = 8;
// Registers and shared memory let two backward blocks onto a multiprocessor; twice that many even out the last wave.
constexpr int64_t kBackwardBlocksPerMultiprocessor = 4;

// One span walks without a summary, four need one and a barrier; with fewer blocks than this per multiprocessor the
// threads of single spans are too few to hide latencies.
constexpr int64_t kBlocksForSingleSpans = 16;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int choose_spans(Operation operation, DType dtype, int64_t T, int64_t blocks, const DeviceLimits& limits,
                 int64_t warps) {
  const int most = max_spans(dtype);
  if (operation == Operation::backward) {
    const int spans = backward_spans(dtype);
    if (warps != 0 && warps != spans) {
      refuse("warps: backward has " + std::to_string(spans) + " spans for this dtype, one tile for a checkpoint; got " +
             std::to_string(warps));
    }
    return spans;
  }
  if (warps != 0) {
    if (warps < 1 || warps > most) {
      refuse("warps: expected 1 to " + std::to_string(most) + ", got " + std::to_string(warps));
    }
    return static_cast<int>(warps);
  }
  if (blocks >= kBlocksForSingleSpans * limits.multiprocessors) return 1;
  const int64_t useful = ceil_div(T, span_steps(operation));
  return static_cast<int>(std::min<int64_t>({useful, 4, most}));
}

}  // namespace

Plan make_plan(Operation operation, DType dtype, int64_t B, int64_t T, int64_t C, const DeviceLimits& limits,
               const PlanRequest& request) {
  if (B < 1 || T < 1 || C < 1) refuse("plan: expected B, T and C of at least 1");
  const bool forward = operation == Operation::forward;
  const std::string schedule = request.schedule == nullptr ? "" : request.schedule;
  if (!schedule.empty() && schedule != "serial" && schedule != "chunked") {
    refuse("schedule: expected serial or chunked, got " + schedule);
  }

  Plan plan = {};
  plan.operation = operation;
  plan.dtype = dtype;
  plan.B = B;
  plan.T = T;
  plan.C = C;
  plan.channel_tiles = ceil_div(C, tile_channels(dtype));
  plan.batch_per_launch = std::min(B, kMaxGridZ);
  const int64_t blocks = B * plan.channel_tiles;
  plan.spans = choose_spans(operation, dtype, T, blocks, limits, request.warps);
  plan.tile_steps = plan.spans * span_steps(operation);
  plan.threads = plan.spans * lane_count(dtype);
  plan.shared_bytes = forward ? ForwardLayout(dtype, plan.spans).size : BackwardLayout(dtype).size;
  if (plan.shared_bytes > limits.shared_per_block) {
    refuse("plan: a block needs " + std::to_string(plan.shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(limits.shared_per_block));
  }

  const int64_t tiles = ceil_div(T, plan.tile_steps);
  int64_t tiles_per_chunk = tiles;
  if (request.chunk_len != 0) {
    if (schedule == "serial") refuse("chunk_len: a serial schedule has one chunk");
    if (request.chunk_len < 0 || request.chunk_len % plan.tile_steps != 0) {
      refuse("chunk_len: expected a multiple of " + std::to_string(plan.tile_steps) + " steps, a tile, got " +
             std::to_string(request.chunk_len));
    }
    tiles_per_chunk = std::min(tiles, request.chunk_len / plan.tile_steps);
    plan.reason = "chunk_len was asked for";
  } else if (schedule == "serial") {
    plan.reason = "serial was asked for";
  } else {
    const int64_t per_multiprocessor = forward ? kForwardBlocksPerMultiprocessor : kBackwardBlocksPerMultiprocessor;
    const int64_t wanted = ceil_div(per_multiprocessor * limits.multiprocessors, blocks);
    if (schedule == "chunked") {
      tiles_per_chunk = ceil_div(tiles, std::max<int64_t>(wanted, 2));
      plan.reason = "chunked was asked for";
    } else if (wanted == 1) {
      plan.reason = "the channels alone keep the device busy";
    } else if (tiles == 1) {
      plan.reason = "one tile holds the whole sequence";
    } else {
      tiles_per_chunk = ceil_div(tiles, wanted);
      plan.reason = "the channels alone leave multiprocessors idle";
    }
  }
  tiles_per_chunk = std::max(tiles_per_chunk, ceil_div(tiles, kMaxGridY));
  plan.chunk_len = tiles_per_chunk * plan.tile_steps;
  plan.chunks = ceil_div(tiles, tiles_per_chunk);
  plan.schedule = plan.chunks == 1 ? "serial" : "chunked";

  const int64_t value = C * state_bytes(dtype);
  plan.workspace_bytes = B * value * (forward ? 3 * (plan.chunks - 1) : 2 * (plan.chunks - 1) + 2 * plan.chunks);
  return plan;
}

}  // namespace wkv
