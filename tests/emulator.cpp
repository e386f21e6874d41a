// Runs the GPU kernels' block programs on the host, the threads of a phase one after the other: forward, reversed or
// shuffled, which must not change a bit. Shared memory and registers start as NaN. A test compiles this file and calls
// `emulate`; a barrier can be dropped, to see that its absence is caught.
#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/programs.h"

namespace {

enum Order { kForward, kReversed, kShuffled };

template <class Thread>
class HostTeam {
  static_assert(std::is_trivially_copyable_v<Thread>);

 public:
  HostTeam(int count, int order, uint64_t seed, int dropped_barrier)
      : threads_(count), turns_(count), order_(order), random_(seed), dropped_barrier_(dropped_barrier) {
    std::memset(static_cast<void*>(threads_.data()), 0xff, count * sizeof(Thread));
    for (int i = 0; i < count; ++i) threads_[i].index = i;
    std::iota(turns_.begin(), turns_.end(), 0);
    if (order == kReversed) std::reverse(turns_.begin(), turns_.end());
  }

  template <class Phase>
  void phase(const Phase& function) {
    if (phases_++ == dropped_barrier_) {
      without_barrier_ = function;
      return;
    }
    if (order_ == kShuffled) std::shuffle(turns_.begin(), turns_.end(), random_);
    for (int i : turns_) {
      if (without_barrier_) without_barrier_(threads_[i]);
      function(threads_[i]);
    }
    without_barrier_ = nullptr;
  }

 private:
  std::vector<Thread> threads_;
  std::vector<int> turns_;
  int order_;
  std::mt19937_64 random_;
  int dropped_barrier_;
  int phases_ = 0;
  std::function<void(Thread&)> without_barrier_;
};

}  // namespace

extern "C" void emulate(int kernel, int dtype, const unsigned* grid, int threads, int shared_bytes,
                        const void* arguments, int order, uint64_t seed, int dropped_barrier) {
  wkv::with_program(static_cast<wkv::Kernel>(kernel), static_cast<wkv::DType>(dtype), [&]<class Program>() {
    const auto& typed = *static_cast<const typename Program::Arguments*>(arguments);
    struct alignas(128) Line {
      char bytes[128];
    };
    std::vector<Line> shared(shared_bytes / sizeof(Line) + 1);
    for (unsigned z = 0; z < grid[2]; ++z) {
      for (unsigned y = 0; y < grid[1]; ++y) {
        for (unsigned x = 0; x < grid[0]; ++x) {
          std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Line));
          HostTeam<typename Program::Thread> team(threads, order, seed + x + y + z, dropped_barrier);
          Program::run(typed, wkv::BlockIndex{x, y, z}, threads, team, shared.data()->bytes);
        }
      }
    }
  });
}
