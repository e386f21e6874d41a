// How the CPU operator splits its work over threads: a pure function of the problem and the number of threads.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace wkv {

struct CpuPlan {
  int64_t threads;       // that have work worth waking them for
  int64_t channel_tile;  // channels per unit of work
  int64_t tiles;         // units per sequence
  int64_t span_steps;    // steps per span, a multiple of the checkpoint interval
  int64_t spans;         // 1: no split over time
};

CpuPlan plan_cpu(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads);

}  // namespace wkv
