// The plan of a launch: which threads compute what, a pure function of the problem and the device's limits.
//
// A block owns `kTileChannels` channels of one sequence over one chunk of its steps, which it takes tile by tile: a
// warp for each subchunk of a tile. Blocks that have the same channels of the same sequence, a column, pass their
// states from chunk to chunk by look-back.
#pragma once

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "params.h"
#include "tuning.h"

namespace wkv {

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_block;  // bytes, with the opt-in
  int64_t shared_per_multiprocessor;
  int64_t architecture;  // that the code is compiled for, as __CUDA_ARCH__ has it, 900 for 9.0: older code runs on
                         // newer GPUs
};

inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridYZ = 65535;
// Words of messages of a column are counted in 32 bits, 96 a chunk.
inline constexpr int64_t kMostPackedChunks = 44'000'000;

// Shared memory that the device reserves for each block, in bytes.
inline constexpr int64_t kReservedShared = 1024;

constexpr int tile_bytes(DType dtype, int steps) {
  return steps * kTileChannels * static_cast<int>(element_bytes(dtype));
}

// Of k, v, channels, ticket, and the state that the next tile starts from. r takes the place of k, where messages would
// be.
constexpr int forward_shared_bytes(DType dtype, int warps, bool mixing = false) {
  const int of_mixing = mixing ? forward_message_rows(warps) * kRowBytes + kPlaceBytes : 0;
  return 2 * tile_bytes(dtype, warps * kForwardSteps) + kChannelRows * kRowBytes + kTicketBytes + kStateBytes +
         of_mixing;
}

// Of k, v, gy, perhaps r, channels and ticket.
constexpr int backward_shared_bytes(DType dtype, int64_t architecture, bool mixing = false) {
  const int inputs = mixing && backward_stages_gate(dtype, architecture) ? 4 : 3;
  return inputs * tile_bytes(dtype, kBackwardWarps * kBackwardSteps) + kChannelRows * kRowBytes + kTicketBytes +
         (mixing ? kPlaceBytes : 0);
}

// Of the bidirectional kernels' tile, with the sums of its warps.
constexpr int bi_shared_bytes(DType dtype, int inputs, int steps) {
  return inputs * tile_bytes(dtype, bi_warps(steps) * steps) +
         (bi_warps(steps) * kBiRowsOfWarp + kChannelRows) * kRowBytes + kTicketBytes + kPlaceBytes;
}

struct Plan {
  int warps;  // of a tile
  int64_t tile_steps;
  int64_t chunk_tiles;  // tiles of a chunk
  int64_t chunks;
  int64_t channel_tiles;
  int64_t anchor;
  int threads;
  int shared_bytes;
  int64_t partial_bytes;   // of the gradients of w and u
  int64_t exchange_bytes;  // of messages and tickets, all bits of which are set before the launch
};

namespace plan_detail {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument("plan: " + what); }

inline int forward_warps(DType dtype, int64_t T, const DeviceLimits& limits, bool mixing) {
  const auto fits = [&](int warps) {
    const int64_t shared = forward_shared_bytes(dtype, warps, mixing);
    return shared <= limits.shared_per_block && 2 * (shared + kReservedShared) <= limits.shared_per_multiprocessor;
  };
  int warps = forward_warps(dtype, limits.architecture);
  while (warps > forward_least_warps(dtype) && (!fits(warps) || warps / 2 * kForwardSteps >= T)) warps /= 2;
  return warps;
}

// The blocks for sequences of T steps, without chunks.
inline Plan plan_of_blocks(Operation operation, DType dtype, int64_t T, int64_t C, const DeviceLimits& limits) {
  const bool forward = is_forward(operation), mixing = is_mixing(operation);
  Plan plan = {};
  plan.channel_tiles = ceil_div(C, dtype == DType::float64 ? kDoubleThreads : kTileChannels);
  if (plan.channel_tiles > kMaxGridX) {
    refuse("C has " + std::to_string(plan.channel_tiles) + " tiles of channels, a grid has " +
           std::to_string(kMaxGridX) + " blocks at most");
  }
  if (dtype == DType::float64) {
    plan.chunks = 1;
    plan.threads = kDoubleThreads;
    plan.shared_bytes = has_partials(operation) ? kDoubleThreads * kDoubleSegments * 3 * 8 : 0;
    return plan;
  }
  plan.warps = forward ? forward_warps(dtype, T, limits, mixing) : kBackwardWarps;
  plan.tile_steps = plan.warps * (forward ? kForwardSteps : kBackwardSteps);
  plan.threads = plan.warps * kWarpThreads;
  plan.shared_bytes = forward ? forward_shared_bytes(dtype, plan.warps, mixing)
                              : backward_shared_bytes(dtype, limits.architecture, mixing);
  if (plan.shared_bytes > limits.shared_per_block) {
    refuse("a block needs " + std::to_string(plan.shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(limits.shared_per_block));
  }
  return plan;
}

// Of so many rows of partials and columns of chunks.
inline void add_memory(Plan& plan, Operation operation, DType dtype, int64_t rows, int64_t C, int64_t columns) {
  if (has_partials(operation)) plan.partial_bytes = rows * 2 * C * state_bytes(dtype);
  if (plan.chunks > 1) {
    plan.exchange_bytes = columns * ((plan.chunks - 1) * kStateBytes + static_cast<int64_t>(sizeof(uint32_t)));
  }
}

}  // namespace plan_detail

// Throws std::invalid_argument for a problem that no grid can hold.
inline Plan make_plan(Operation operation, DType dtype, int64_t B, int64_t T, int64_t C, const DeviceLimits& limits) {
  using namespace plan_detail;
  if (B < 1 || T < 1 || C < 1) refuse("expected B, T and C of at least 1");
  Plan plan = plan_of_blocks(operation, dtype, T, C, limits);
  if (dtype != DType::float64) {
    const int64_t tiles = ceil_div(T, plan.tile_steps);
    const bool columns_suffice = plan.channel_tiles >= ceil_div(kColumnsPerMultiprocessor * limits.multiprocessors, B);
    plan.chunk_tiles = ceil_div(tiles, kMaxGridYZ);
    if (columns_suffice) {
      const int64_t chunks = ceil_div(kBlocksPerMultiprocessor * limits.multiprocessors, B * plan.channel_tiles);
      plan.chunk_tiles = std::max(plan.chunk_tiles, tiles / chunks);
    }
    plan.chunks = ceil_div(tiles, plan.chunk_tiles);
    // A chunk of several tiles knows its sum only after it has received the state before it: it has no partial to
    // publish.
    plan.anchor = columns_suffice || plan.chunk_tiles > 1 ? 1 : kAnchor;
  }
  add_memory(plan, operation, dtype, B * plan.chunks, C, B * plan.channel_tiles);
  return plan;
}

// Of N sequences that are packed into `total` steps. How long each is, no host knows: a tile is that of the mean
// length, and a chunk is one tile, so that a long sequence among short ones has as many blocks as it has alone. All
// chunks of the same channels are one column.
inline Plan make_packed_plan(Operation operation, DType dtype, int64_t N, int64_t total, int64_t C,
                             const DeviceLimits& limits) {
  using namespace plan_detail;
  if (N < 1 || total < 1 || C < 1) refuse("expected N, total and C of at least 1");
  Plan plan = plan_of_blocks(operation, dtype, ceil_div(total, N), C, limits);
  if (dtype != DType::float64) {
    plan.chunk_tiles = 1;
    plan.chunks = packed_row(total, N, plan.tile_steps);
    if (plan.chunks > kMostPackedChunks) {
      refuse("packed sequences have " + std::to_string(plan.chunks) + " chunks, " + std::to_string(kMostPackedChunks) +
             " at most can be counted");
    }
    plan.anchor = kAnchor;
  }
  add_memory(plan, operation, dtype, dtype == DType::float64 ? N : plan.chunks, C, plan.channel_tiles);
  return plan;
}

// A plan as kernels see it, of B sequences that are not packed, or B = 1; `exchange` has the plan's exchange_bytes, of
// messages and then tickets.
inline Chunking chunking_of(const Plan& plan, int64_t B, void* exchange) {
  const int64_t message_bytes = B * plan.channel_tiles * (plan.chunks - 1) * kStateBytes;
  char* const tickets = static_cast<char*>(exchange) + message_bytes;
  return {.first_batch = 0,
          .chunks = static_cast<uint32_t>(plan.chunks),
          .chunk_tiles = static_cast<int32_t>(plan.chunk_tiles),
          .channel_tiles = static_cast<uint32_t>(plan.channel_tiles),
          .anchor = static_cast<uint32_t>(plan.anchor),
          .tickets = plan.chunks > 1 ? reinterpret_cast<uint32_t*>(tickets) : nullptr,
          .messages = exchange,
          .log2_packed_steps = static_cast<uint32_t>(std::bit_width(static_cast<uint64_t>(plan.tile_steps)) - 1)};
}

}  // namespace wkv
