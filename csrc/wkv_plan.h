// How a GPU's threads are laid over a problem: data, made by pure functions of the problem and the device's limits. No
// torch, no CUDA calls, no globals, so that a plan can be made, printed and tested anywhere.
//
// A block owns `tile_channels` channels of one sequence over one chunk of its steps. It takes the chunk tile by tile:
// `spans` threads lie along a tile's steps, each with `span_steps` of them, and `lanes` threads along its channels.
// With one chunk the block carries the state through the whole sequence, which is the serial schedule; with more,
// chunks hand their states on to one another within a launch (a single pass), or are summarised, the summaries carried
// from one to the next, and every chunk replayed from its true beginning (chunked).
#pragma once

#include <cstdint>

#include "wkv_problem.h"

namespace wkv {

enum class Operation { forward, backward };

struct DeviceLimits {
  int64_t multiprocessors;
  int64_t shared_per_block;  // bytes, with the opt-in
  int64_t shared_per_multiprocessor;
};

inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridY = 65535;
inline constexpr int64_t kMaxGridZ = 65535;

// ---- the geometry of a block, which the kernels are compiled for ----

// A row of a tile is 128 bytes or more, a whole cache line; float64 has half the lanes so that its tiles fit as well.
constexpr int channels_per_lane(DType dtype) { return dtype == DType::float64 ? 1 : 2; }
constexpr int lane_count(DType dtype) { return dtype == DType::float64 ? 16 : 32; }
constexpr int tile_channels(DType dtype) { return lane_count(dtype) * channels_per_lane(dtype); }

// The longer a span, the less its beginning and end weigh. Backward keeps the states of a span in registers: 16 steps
// of two channels take 96.
constexpr int span_steps(Operation operation) { return operation == Operation::forward ? 32 : 16; }

constexpr int kMaxForwardThreads = 256;
constexpr int max_spans(DType dtype) { return kMaxForwardThreads / lane_count(dtype); }

// Backward starts every tile from a checkpoint.
constexpr int backward_spans(DType dtype) {
  return static_cast<int>(checkpoint_interval(dtype)) / span_steps(Operation::backward);
}

// Of each channel: log-decay, u, decay and bonus. Of the block: its place in the problem.
constexpr int kChannelValues = 4;
constexpr int kPlaceBytes = 32;

constexpr int kBackwardThreads = backward_spans(DType::float32) * lane_count(DType::float32);
static_assert(kBackwardThreads == backward_spans(DType::float64) * lane_count(DType::float64));

// Where things lie in a block's shared memory, in bytes.
struct ForwardLayout {
  int tile, summaries, carry, channels, heard, place, size;

  constexpr ForwardLayout(DType dtype, int spans, int buffers) {
    const int row = tile_channels(dtype) * static_cast<int>(element_bytes(dtype));
    const int state = 3 * tile_channels(dtype) * static_cast<int>(state_bytes(dtype));
    tile = 2 * spans * span_steps(Operation::forward) * row;  // k, then v
    summaries = buffers * tile;
    carry = summaries + spans * state;
    channels = carry + state;
    heard = channels + kChannelValues * tile_channels(dtype) * static_cast<int>(state_bytes(dtype));
    place = heard + spans * state;
    size = place + kPlaceBytes;
  }
};

struct BackwardLayout {
  int k, v, gy, summaries, start, span_max, adjoints, carry, channels, heard, place, size;

  constexpr BackwardLayout(DType dtype) {
    const int spans = backward_spans(dtype);
    const int row = tile_channels(dtype) * static_cast<int>(element_bytes(dtype));
    const int tile = static_cast<int>(checkpoint_interval(dtype)) * row;
    const int value = tile_channels(dtype) * static_cast<int>(state_bytes(dtype));
    k = 0;
    v = k + tile;
    gy = v + tile;
    summaries = gy + tile;
    start = summaries + spans * 3 * value;
    span_max = start + 3 * value;
    adjoints = span_max + (spans + 1) * value;
    carry = adjoints + spans * 2 * value;
    channels = carry + 2 * value;
    heard = summaries;  // which are of no use any more when the chunk listens
    place = channels + kChannelValues * value;
    size = place + kPlaceBytes;
  }
};

// ---- a plan ----

// What a test or a benchmark may ask for; zero and null leave the choice to the plan.
struct PlanRequest {
  const char* schedule = nullptr;  // "serial", "chunked" for three launches, or "single_pass"
  int64_t spans = 0;               // of a block
  int64_t buffers = 0;             // Plan::buffers
  int64_t chunk_len = 0;
  int64_t group = 0;  // Plan::group
};

struct Plan {
  Operation operation;
  DType dtype;
  int64_t B, T, C;
  int spans;
  int buffers;  // for tiles, of a block; two are a ring: one tile arrives while the other is walked
  int64_t tile_steps;
  int64_t chunk_len;
  int64_t chunks;
  int64_t channel_tiles;
  int64_t batch_per_launch;
  int64_t group, signal_count;  // of a single pass: chunks that hand over together, and words that signal it
  int threads;
  int shared_bytes;
  int64_t workspace_bytes;  // what the chunks hand to one another, partial sums of gw and gu, and signals
  const char* schedule;
  const char* reason;
};

// Throws std::invalid_argument for a request that no plan can meet, saying what would do.
Plan make_plan(Operation operation, DType dtype, int64_t B, int64_t T, int64_t C, const DeviceLimits& limits,
               const PlanRequest& request = {});

}  // namespace wkv
