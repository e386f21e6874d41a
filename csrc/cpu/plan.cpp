#include "plan.h"

namespace wkv::cpu {
namespace {

// The narrowest column: whole cache lines for every element type, so that no two threads write to one.
constexpr int64_t kLeastChannels = 64;

// Waking a thread costs some microseconds, the time of about this many elements.
constexpr int64_t kElementsPerThread = 16384;

// Where time is cut, a chunk is computed twice: a short one costs more than it saves.
constexpr int64_t kLeastIntervalsPerChunk = 4;

// Columns are wide, for long reads from memory, and narrowed only for threads that would have no work.
constexpr double kGoodBalance = 0.9;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan make_plan(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads) {
  const int64_t useful_threads = std::clamp<int64_t>(B * T * C / kElementsPerThread, 1, std::max<int64_t>(threads, 1));
  const int64_t sequences = std::max<int64_t>(B, 1);
  const int64_t most_columns = std::max<int64_t>(divide_up(C, kLeastChannels), 1);

  int64_t width = most_columns;  // of a column, in narrowest ones
  double best_balance = 0;
  for (int64_t columns = 1; columns <= most_columns && best_balance < kGoodBalance; ++columns) {
    const int64_t candidate = divide_up(most_columns, columns);
    const int64_t items = sequences * divide_up(most_columns, candidate);
    const double balance = double(items) / double(divide_up(items, useful_threads) * useful_threads);
    if (balance > best_balance) {
      best_balance = balance;
      width = candidate;
    }
  }
  const int64_t column_channels = width * kLeastChannels;

  const int64_t intervals = divide_up(T, checkpoint_interval(dtype));
  const int64_t wanted_chunks = std::clamp<int64_t>(useful_threads / (sequences * most_columns), 1,
                                                    std::max<int64_t>(intervals / kLeastIntervalsPerChunk, 1));
  const int64_t chunk_intervals = std::max<int64_t>(divide_up(intervals, wanted_chunks), 1);
  return {.threads = useful_threads,
          .column_channels = column_channels,
          .columns = divide_up(C, column_channels),
          .chunk_steps = chunk_intervals * checkpoint_interval(dtype),
          .chunks = std::max<int64_t>(divide_up(intervals, chunk_intervals), 1)};
}

}  // namespace wkv::cpu
