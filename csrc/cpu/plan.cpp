#include "plan.h"

#include <algorithm>

namespace wkv {
namespace {

// The narrowest tile: whole cache lines for every element type, so that no two threads write to one.
constexpr int64_t kTileChannels = 64;

// Waking a thread costs some microseconds, the time of about this many elements.
constexpr int64_t kElementsPerThread = 16384;

// A span is walked twice, so a short one costs more than it saves.
constexpr int64_t kLeastChunksPerSpan = 4;

// A tile should be wide, for long reads from memory; it is narrowed only for threads that would have no work.
constexpr double kGoodBalance = 0.9;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

CpuPlan plan_cpu(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads) {
  const int64_t useful_threads = std::clamp<int64_t>(B * T * C / kElementsPerThread, 1, std::max<int64_t>(threads, 1));
  const int64_t columns = std::max<int64_t>(divide_up(C, kTileChannels), 1);

  int64_t tiles = 1;
  double best_balance = 0;
  for (int64_t candidate = 1; candidate <= columns; ++candidate) {
    const int64_t width = divide_up(columns, candidate);
    const int64_t units = std::max<int64_t>(B, 1) * divide_up(columns, width);
    const double balance = double(units) / double(divide_up(units, useful_threads) * useful_threads);
    if (balance > best_balance) {
      best_balance = balance;
      tiles = candidate;
    }
    if (best_balance >= kGoodBalance) break;
  }
  const int64_t channel_tile = divide_up(columns, tiles) * kTileChannels;

  const int64_t chunks = divide_up(T, checkpoint_interval(dtype));
  const int64_t idle_factor = useful_threads / (std::max<int64_t>(B, 1) * columns);
  const int64_t wanted_spans = std::clamp<int64_t>(idle_factor, 1, std::max<int64_t>(chunks / kLeastChunksPerSpan, 1));
  const int64_t span_chunks = std::max<int64_t>(divide_up(chunks, wanted_spans), 1);
  return {useful_threads, channel_tile, divide_up(C, channel_tile), span_chunks * checkpoint_interval(dtype),
          std::max<int64_t>(divide_up(chunks, span_chunks), 1)};
}

}  // namespace wkv
