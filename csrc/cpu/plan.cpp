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

// A sequence's states take about the time of this many steps.
constexpr int64_t kStepsOfStates = 2;

// Packed sequences have partials in common up to about this many steps, whose traffic is many times that of partials.
constexpr int64_t kStepsOfPartials = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t useful_threads(int64_t steps, int64_t C, int64_t threads) {
  return std::clamp<int64_t>(steps * C / kElementsPerThread, 1, std::max<int64_t>(threads, 1));
}

// In narrowest columns.
int64_t widest_column(int64_t C) { return std::max<int64_t>(divide_up(C, kLeastChannels), 1); }

// The width of columns, in narrowest ones: the widest with a good balance, or that with the best. `balance_of` is the
// part of the time that threads are busy.
template <class Balance>
int64_t column_width(int64_t C, Cuts cuts, const Balance& balance_of) {
  const int64_t widest = widest_column(C), limit = std::max<int64_t>(cuts.widest_column / kLeastChannels, 1);
  int64_t width = std::min(widest, limit);
  double best = 0;
  for (int64_t columns = divide_up(widest, limit); columns <= widest && best < kGoodBalance; ++columns) {
    const int64_t candidate = divide_up(widest, columns);
    const double balance = balance_of(candidate);
    if (balance > best) {
      best = balance;
      width = candidate;
    }
  }
  return width;
}

// `sequences` of T steps are all the work.
Plan plan_of(DType dtype, int64_t sequences, int64_t T, int64_t C, int64_t threads, int64_t width, Cuts cuts) {
  const int64_t column_channels = width * kLeastChannels;
  const int64_t intervals = divide_up(T, checkpoint_interval(dtype));
  const int64_t most_chunks = cuts.time ? std::max<int64_t>(intervals / kLeastIntervalsPerChunk, 1) : 1;
  const int64_t wanted_chunks = std::clamp<int64_t>(threads / (sequences * widest_column(C)), 1, most_chunks);
  const int64_t chunk_intervals = std::max<int64_t>(divide_up(intervals, wanted_chunks), 1);
  return {.threads = threads,
          .column_channels = column_channels,
          .columns = divide_up(C, column_channels),
          .chunk_steps = chunk_intervals * checkpoint_interval(dtype),
          .chunks = std::max<int64_t>(divide_up(intervals, chunk_intervals), 1)};
}

// ---- packed sequences ----

void add_chunks(Work& work, Boundaries boundaries, int64_t N) {
  const int64_t interval = checkpoint_interval(work.dtype), chunk_steps = work.plan.chunk_steps;
  work.packed.reserve(static_cast<size_t>(N));
  int64_t room = 0;  // of the partials
  for (int64_t n = 0; n < N; ++n) {
    const auto sequence = view_of_packed(work.dtype, boundaries, work.T, n);
    const int64_t after = packed_row(sequence.begin + sequence.steps, n + 1, interval);
    const int64_t unused = sequence.checkpoints + checkpoint_count(work.dtype, sequence.steps);
    const bool is_cut = sequence.steps > chunk_steps;
    int64_t t_begin = 0;
    do {
      if (is_cut || room <= 0) {
        ++work.partial_rows;
        room = is_cut ? 0 : kStepsOfPartials;
      }
      const int64_t t_end = std::min(t_begin + chunk_steps, sequence.steps);
      room -= t_end - t_begin + kStepsOfStates;
      work.packed.push_back({.sequence = sequence,
                             .n = n,
                             .row = is_cut ? work.cut_rows++ : -1,
                             .partials = work.partial_rows - 1,
                             .opens_partials = false,
                             .spare_checkpoint = unused < after && t_end == sequence.steps ? unused : -1,
                             .t_begin = t_begin,
                             .t_end = t_end});
      t_begin = t_end;
    } while (t_begin < sequence.steps);
  }
  for (size_t i = 0; i < work.packed.size(); ++i) {
    work.packed[i].opens_partials =
        i + 1 == work.packed.size() || work.packed[i + 1].partials > work.packed[i].partials;
  }
}

// The chunks that have partials in common are one part: the first chunk of each, and the cost of all before it. Both
// end with those of all.
struct Parts {
  std::vector<int64_t> first, cost_before;

  explicit Parts(const std::vector<Chunk>& chunks) {
    int64_t cost = 0, partials = -1;
    for (size_t i = 0; i < chunks.size(); ++i) {
      if (chunks[i].partials > partials) {
        partials = chunks[i].partials;
        first.push_back(static_cast<int64_t>(i));
        cost_before.push_back(cost);
      }
      cost += chunks[i].t_end - chunks[i].t_begin + kStepsOfStates;
    }
    first.push_back(static_cast<int64_t>(chunks.size()));
    cost_before.push_back(cost);
  }

  int64_t chunks() const { return first.back(); }
  int64_t cost() const { return cost_before.back(); }
  // Whose first chunk is the nearest to a cost.
  size_t nearest(double cost) const {
    const size_t after = static_cast<size_t>(
        std::lower_bound(cost_before.begin(), cost_before.end(), static_cast<int64_t>(cost)) - cost_before.begin());
    if (after == 0) return 0;
    return cost - double(cost_before[after - 1]) < double(cost_before[after]) - cost ? after - 1 : after;
  }
};

// Neighbouring items of as nearly as possible the same cost for each thread.
struct Shares {
  std::vector<int64_t> first;
  double balance;

  Shares(const Parts& parts, int64_t C, int64_t column_channels, int64_t threads) : first{0} {
    const int64_t columns = divide_up(C, column_channels);
    const double all = double(C) * double(parts.cost()), whole_column = double(column_channels) * double(parts.cost());
    double before = 0, longest = 0;
    for (int64_t thread = 1; thread <= threads; ++thread) {
      int64_t item = columns * parts.chunks();
      double cost = all;
      if (thread < threads) {
        const double wanted = all * double(thread) / double(threads);
        const int64_t column = std::min(static_cast<int64_t>(wanted / whole_column), columns - 1);
        const int64_t channels = std::min(column_channels, C - column * column_channels);
        const size_t part = parts.nearest((wanted - double(column) * whole_column) / double(channels));
        item = column * parts.chunks() + parts.first[part];
        cost = double(column) * whole_column + double(channels) * double(parts.cost_before[part]);
      }
      first.push_back(item);
      longest = std::max(longest, cost - before);
      before = cost;
    }
    balance = longest > 0 ? all / double(threads) / longest : 1;
  }
};

}  // namespace

Work make_work(DType dtype, int64_t B, int64_t T, int64_t C, int64_t threads, Cuts cuts) {
  threads = useful_threads(B * T, C, threads);
  const int64_t sequences = std::max<int64_t>(B, 1);
  const int64_t width = column_width(C, cuts, [&](int64_t width) {
    const int64_t items = sequences * divide_up(widest_column(C), width);
    return double(items) / double(divide_up(items, threads) * threads);
  });
  Work work{.plan = plan_of(dtype, sequences, T, C, threads, width, cuts), .dtype = dtype, .B = B, .T = T, .C = C};
  work.cut_rows = work.plan.chunks > 1 ? work.chunks() : 0;
  work.partial_rows = work.chunks();
  return work;
}

Work make_packed_work(DType dtype, Boundaries boundaries, int64_t N, int64_t total, int64_t C, int64_t threads,
                      Cuts cuts) {
  int64_t longest = 0;
  for (int64_t n = 0; n < N; ++n) longest = std::max(longest, boundaries[n + 1] - boundaries[n]);
  threads = useful_threads(total + N * kStepsOfStates, C, threads);
  // Time is cut as it is for as many sequences of the longest one's length as are equal in work.
  const int64_t sequences = std::max<int64_t>(total / std::max<int64_t>(longest, 1), 1);
  const auto plan = [&](int64_t width) { return plan_of(dtype, sequences, longest, C, threads, width, cuts); };
  Work work{.plan = plan(1), .dtype = dtype, .B = 1, .T = total, .C = C};
  add_chunks(work, boundaries, N);
  const Parts parts(work.packed);
  work.plan = plan(
      column_width(C, cuts, [&](int64_t width) { return Shares(parts, C, width * kLeastChannels, threads).balance; }));
  work.shares = Shares(parts, C, work.plan.column_channels, threads).first;
  return work;
}

}  // namespace wkv::cpu
