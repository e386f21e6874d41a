// How the CPU operator cuts its work for threads: a pure function of the problem and the number of threads.
#pragma once

#include <algorithm>

#include "../common/params.h"

namespace wkv::cpu {

struct Plan {
  int64_t threads;          // with enough work to be worth waking
  int64_t column_channels;  // a column is these channels of one sequence
  int64_t columns;          // of a sequence
  int64_t chunk_steps;      // a multiple of the checkpoint interval
  int64_t chunks;           // of a sequence; 1: time is not cut
};

Plan make_plan(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads);

// One thread's work: a chunk of a column of sequence b. `row` counts the chunks of all sequences.
struct WorkItem {
  int64_t b, row, c_begin, c_end, t_begin, t_end;
};

struct WorkItems {
  Plan plan;
  int64_t B, T, C;

  int64_t count() const { return B * plan.chunks * plan.columns; }
  WorkItem operator[](int64_t i) const {
    const int64_t row = i / plan.columns;
    const int64_t c_begin = i % plan.columns * plan.column_channels;
    const int64_t t_begin = row % plan.chunks * plan.chunk_steps;
    return {row / plan.chunks, row,
            c_begin,           std::min(c_begin + plan.column_channels, C),
            t_begin,           std::min(t_begin + plan.chunk_steps, T)};
  }
};

}  // namespace wkv::cpu
