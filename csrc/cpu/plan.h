// How the CPU operator cuts its work for threads: a pure function of the problem and the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/params.h"

namespace wkv::cpu {

struct Plan {
  int64_t threads;          // with enough work to be worth waking
  int64_t column_channels;  // a column is these channels of a sequence
  int64_t columns;          // of a sequence
  int64_t chunk_steps;      // a multiple of the checkpoint interval
  int64_t chunks;           // of the longest sequence; 1: time is not cut
};

// A part of a sequence in time, with its rows in the tables of a call; -1 where it has none.
struct Chunk {
  SequenceView<int64_t> sequence;
  int64_t n;                 // the sequence's row of states
  int64_t row;               // among the chunks of sequences that are cut
  int64_t partials;          // of the gradients of the log-decay and u, which neighbours may share
  bool opens_partials;       // backward, which goes from the last chunk to the first, comes to these partials here
  int64_t spare_checkpoint;  // no state has it
  int64_t t_begin, t_end;

  bool is_cut() const { return row >= 0; }
};

// One thread's work: a column of a chunk.
struct WorkItem : Chunk {
  int64_t c_begin, c_end;
};

// The work items of a call: one column after the other and in each all chunks, in the order of memory. A thread takes a
// share, neighbours in this order, no two of which in different shares have partials in common.
struct Work {
  Plan plan;
  DType dtype;
  int64_t B, T, C;
  int64_t cut_rows, partial_rows;
  std::vector<Chunk> packed;    // the chunks of packed sequences; empty where sequences are not packed
  std::vector<int64_t> shares;  // of packed sequences: the first item of each, and the end of the last

  int64_t chunks() const { return packed.empty() ? B * plan.chunks : static_cast<int64_t>(packed.size()); }
  int64_t count() const { return chunks() * plan.columns; }

  Chunk chunk(int64_t i) const {
    if (!packed.empty()) return packed[static_cast<size_t>(i)];
    const int64_t b = i / plan.chunks, t_begin = i % plan.chunks * plan.chunk_steps;
    return {.sequence = view_of_batch(dtype, T, b),
            .n = b,
            .row = plan.chunks > 1 ? i : -1,
            .partials = i,
            .opens_partials = true,
            .spare_checkpoint = -1,
            .t_begin = t_begin,
            .t_end = std::min(t_begin + plan.chunk_steps, T)};
  }
  WorkItem operator[](int64_t i) const {
    const int64_t c_begin = i / chunks() * plan.column_channels;
    return {chunk(i % chunks()), c_begin, std::min(c_begin + plan.column_channels, C)};
  }

  // The first item of a thread's share; those of the thread after the last are the end.
  int64_t share(int64_t thread) const {
    if (!shares.empty()) return shares[static_cast<size_t>(thread)];
    return std::min(thread * ((count() + plan.threads - 1) / plan.threads), count());
  }
};

// The cuts that an operation allows.
struct Cuts {
  bool time = true;                 // whether chunks may be parts of sequences
  int64_t widest_column = 1 << 30;  // channels
};

Work make_work(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads, Cuts cuts = {});

// Of N sequences, whose boundaries rise from 0 to `total`.
Work make_packed_work(DType dtype, Boundaries boundaries, int64_t N, int64_t total, int64_t C, int64_t threads,
                      Cuts cuts = {});

}  // namespace wkv::cpu
