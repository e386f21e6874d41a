#include "wkv_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace wkv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a launch that keep the device's memory busy: modelled, to be replaced by a measurement. A multiprocessor of
// an H100 needs about 16 KB on its way (3 TB/s times 0.7 µs over 132), a forward block has 8 KB and more, and loads
// alternate with sums.
constexpr int64_t kForwardBlocksPerMultiprocessor = 8;
// Registers let three backward blocks onto a multiprocessor; twice that many even out the last wave.
constexpr int64_t kBackwardBlocksPerMultiprocessor = 6;

// One span walks without a summary, four need one and a barrier; with fewer blocks than this per multiprocessor the
// threads of single spans are too few to hide latencies.
constexpr int64_t kBlocksForSingleSpans = 16;
// Unless each has a ring of tiles: then it takes one warp for each scheduler, and room for as many rings. Modelled,
// too.
constexpr int64_t kRingsPerMultiprocessor = 4;

// Kernels compute the place of a signal in 32 bits.
constexpr int64_t kMaxSignals = 4294967295;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int shared_of_forward(const Plan& plan, int spans, int buffers) {
  return ForwardLayout(plan.dtype, spans, buffers).size;
}

// Turing has no asynchronous copies that would fill a ring, and by its shared memory no room for four either. A span of
// float64 is half a warp, whose exponentials take longer than its memory: it needs threads, not rings.
bool has_room_for_rings(const Plan& plan, const DeviceLimits& limits) {
  return plan.operation == Operation::forward && lane_count(plan.dtype) == 32 &&
         kRingsPerMultiprocessor * shared_of_forward(plan, 1, 2) <= limits.shared_per_multiprocessor;
}

// Whether sequences and channels alone make so many blocks for each multiprocessor.
bool has_blocks(const Plan& plan, const DeviceLimits& limits, int64_t per_multiprocessor) {
  return plan.B * plan.channel_tiles >= per_multiprocessor * limits.multiprocessors;
}

int choose_spans(const Plan& plan, bool single_pass, const DeviceLimits& limits, const PlanRequest& request) {
  const int most = max_spans(plan.dtype);
  if (plan.operation == Operation::backward) {
    const int spans = backward_spans(plan.dtype);
    if (request.spans != 0 && request.spans != spans) {
      refuse("spans: backward has " + std::to_string(spans) + " spans for this dtype, one tile for a checkpoint; got " +
             std::to_string(request.spans));
    }
    return spans;
  }
  if (request.spans != 0) {
    if (request.spans < 1 || request.spans > most) {
      refuse("spans: expected 1 to " + std::to_string(most) + ", got " + std::to_string(request.spans));
    }
    return static_cast<int>(request.spans);
  }
  const int64_t useful = ceil_div(plan.T, span_steps(plan.operation));
  const int64_t blocks_for_single_spans =
      has_room_for_rings(plan, limits) ? kRingsPerMultiprocessor : kBlocksForSingleSpans;
  const bool alone = !single_pass && has_blocks(plan, limits, blocks_for_single_spans);
  int spans = alone ? 1 : static_cast<int>(std::min<int64_t>({useful, 4, most}));
  // Two blocks at least of a single pass shall fit a multiprocessor: some wait while others work.
  const auto fits = [&](int64_t shared) {
    return shared <= limits.shared_per_block && (!single_pass || 2 * shared <= limits.shared_per_multiprocessor);
  };
  while (spans > 1 && !fits(shared_of_forward(plan, spans, 1))) --spans;
  return spans;
}

bool channels_suffice(const Plan& plan, const DeviceLimits& limits) {
  if (plan.operation == Operation::backward) return has_blocks(plan, limits, kBackwardBlocksPerMultiprocessor);
  return has_blocks(plan, limits,
                    has_room_for_rings(plan, limits) ? kRingsPerMultiprocessor : kForwardBlocksPerMultiprocessor);
}

int choose_buffers(const Plan& plan, bool single_pass, int64_t tiles_per_chunk, const DeviceLimits& limits,
                   const PlanRequest& request) {
  const bool can_be_ring = plan.operation == Operation::forward && plan.spans == 1 && !single_pass;
  if (request.buffers == 2 && !can_be_ring) {
    refuse("buffers: two are a ring, which forward has with spans=1 and a serial or chunked schedule");
  }
  if (request.buffers < 0 || request.buffers > 2) {
    refuse("buffers: expected 1 or 2, got " + std::to_string(request.buffers));
  }
  if (request.buffers != 0) return static_cast<int>(request.buffers);
  return can_be_ring && tiles_per_chunk > 1 && has_room_for_rings(plan, limits) ? 2 : 1;
}

// The more chunks hand over together, the fewer wait in a row, and the more each has to read and join. So it is four in
// a row among the blocks that run at the same time, four on each multiprocessor, which takes them half as long as the
// data of these blocks does on an H100: modelled.
int64_t choose_group(const Plan& plan, const DeviceLimits& limits, const PlanRequest& request) {
  constexpr int64_t kMost = 32;  // one warp awaits the chunks of a group
  if (request.group < 0 || request.group > kMost) {
    refuse("group: expected 1 to " + std::to_string(kMost) + ", got " + std::to_string(request.group));
  }
  if (request.group != 0) return request.group;
  return std::clamp<int64_t>(ceil_div(limits.multiprocessors, plan.B * plan.channel_tiles), 1, kMost);
}

// How many chunks the device can use at once.
int64_t wanted_chunks(const Plan& plan, const DeviceLimits& limits) {
  const int64_t per_multiprocessor =
      plan.operation == Operation::forward ? kForwardBlocksPerMultiprocessor : kBackwardBlocksPerMultiprocessor;
  return ceil_div(per_multiprocessor * limits.multiprocessors, plan.B * plan.channel_tiles);
}

// Why a single pass cannot be, or null.
const char* why_no_single_pass(const Plan& plan, const DeviceLimits& limits, const PlanRequest& request) {
  if (lane_count(plan.dtype) < 32) return "a single pass needs a warp for the lanes of a span, and float64 has half";
  const int64_t chunk_len = choose_spans(plan, true, limits, request) * span_steps(plan.operation);
  const int64_t chunks = ceil_div(plan.T, chunk_len);
  if (plan.B > kMaxGridY || chunks > kMaxGridZ) return "a single pass has more blocks than a grid";
  // A quotient, since the product itself may overflow.
  if (plan.channel_tiles > kMaxSignals / ((1 + chunks) * plan.B)) {
    return "a single pass has more signals than 32 bits can count";
  }
  return nullptr;
}

void choose_schedule(Plan& plan, const DeviceLimits& limits, const PlanRequest& request) {
  const std::string asked = request.schedule == nullptr ? "" : request.schedule;
  const char* why_not = why_no_single_pass(plan, limits, request);
  const int64_t least_tile =
      plan.operation == Operation::forward ? 4 * span_steps(plan.operation) : checkpoint_interval(plan.dtype);
  if (asked == "serial") {
    plan.schedule = "serial";
    plan.reason = "serial was asked for";
  } else if (asked == "chunked") {
    plan.schedule = "chunked";
    plan.reason = "chunked was asked for";
  } else if (asked == "single_pass") {
    if (why_not != nullptr) refuse(std::string("schedule: ") + why_not);
    plan.schedule = "single_pass";
    plan.reason = "single_pass was asked for";
  } else if (!asked.empty()) {
    refuse("schedule: expected serial, chunked or single_pass, got " + asked);
  } else if (request.chunk_len != 0) {
    plan.schedule = "chunked";
    plan.reason = "chunk_len was asked for";
  } else if (channels_suffice(plan, limits)) {
    plan.schedule = "serial";
    plan.reason = "the channels alone keep the device busy";
  } else if (plan.T <= least_tile) {
    plan.schedule = "serial";
    plan.reason = "one tile holds the whole sequence";
  } else {
    plan.schedule = why_not == nullptr ? "single_pass" : "chunked";
    plan.reason = why_not == nullptr ? "the channels alone leave multiprocessors idle" : why_not;
  }
}

int64_t choose_tiles_per_chunk(const Plan& plan, int64_t tiles, const DeviceLimits& limits,
                               const PlanRequest& request) {
  const std::string schedule = plan.schedule;
  if (request.chunk_len != 0) {
    if (schedule != "chunked") refuse("chunk_len: a " + schedule + " schedule has no choice of it");
    if (request.chunk_len < 0 || request.chunk_len % plan.tile_steps != 0) {
      refuse("chunk_len: expected a multiple of " + std::to_string(plan.tile_steps) + " steps, a tile, got " +
             std::to_string(request.chunk_len));
    }
    if (ceil_div(plan.T, request.chunk_len) > kMaxGridY) refuse("chunk_len: more chunks than a grid has blocks");
    return std::min(tiles, request.chunk_len / plan.tile_steps);
  }
  if (schedule == "serial") return tiles;
  if (schedule == "single_pass") return 1;
  return std::max(ceil_div(tiles, std::max<int64_t>(wanted_chunks(plan, limits), 2)), ceil_div(tiles, kMaxGridY));
}

}  // namespace

Plan make_plan(Operation operation, DType dtype, int64_t B, int64_t T, int64_t C, const DeviceLimits& limits,
               const PlanRequest& request) {
  if (B < 1 || T < 1 || C < 1) refuse("plan: expected B, T and C of at least 1");
  Plan plan = {};
  plan.operation = operation;
  plan.dtype = dtype;
  plan.B = B;
  plan.T = T;
  plan.C = C;
  plan.channel_tiles = ceil_div(C, tile_channels(dtype));
  if (plan.channel_tiles > kMaxGridX) {
    refuse("plan: C has " + std::to_string(plan.channel_tiles) + " tiles of channels, a grid has " +
           std::to_string(kMaxGridX) + " blocks at most");
  }
  plan.batch_per_launch = std::min(B, kMaxGridZ);
  choose_schedule(plan, limits, request);
  const bool single_pass = std::strcmp(plan.schedule, "single_pass") == 0;
  if (request.group != 0 && !single_pass) refuse("group: it is of a single_pass schedule alone");
  plan.spans = choose_spans(plan, single_pass, limits, request);
  plan.tile_steps = plan.spans * span_steps(operation);
  plan.threads = plan.spans * lane_count(dtype);

  const int64_t tiles = ceil_div(T, plan.tile_steps);
  const int64_t tiles_per_chunk = choose_tiles_per_chunk(plan, tiles, limits, request);
  plan.chunk_len = tiles_per_chunk * plan.tile_steps;
  plan.chunks = ceil_div(tiles, tiles_per_chunk);
  if (plan.chunks == 1) plan.schedule = "serial";

  const bool forward = operation == Operation::forward;
  plan.buffers = choose_buffers(plan, single_pass, tiles_per_chunk, limits, request);
  plan.shared_bytes = forward ? shared_of_forward(plan, plan.spans, plan.buffers) : BackwardLayout(dtype).size;
  if (plan.shared_bytes > limits.shared_per_block) {
    refuse("plan: a block needs " + std::to_string(plan.shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(limits.shared_per_block));
  }

  const int64_t value = C * state_bytes(dtype);
  plan.workspace_bytes = B * value * (forward ? 3 * (plan.chunks - 1) : 2 * (plan.chunks - 1) + 2 * plan.chunks);
  if (single_pass && plan.chunks > 1) {
    plan.group = choose_group(plan, limits, request);
    plan.signal_count = (1 + plan.chunks) * B * plan.channel_tiles;
    plan.workspace_bytes += plan.signal_count * static_cast<int64_t>(sizeof(uint32_t));
  }
  return plan;
}

}  // namespace wkv
