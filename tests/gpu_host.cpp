// The GPU's operators on CPU tensors: the host path of csrc/gpu/op.h with a launcher whose launches run on the host.
// They are run by an emulation of a block's threads, which take turns in any order, or by a function that a test gives.
//
// Outputs and workspaces begin as NaN, between guards. Shared memory and registers of the emulation begin as NaN, too;
// blocks run one after the other. A barrier of those blocks that start last of their columns can be dropped, to test
// that its absence is detected.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "common/namespace.h"
#include "gpu/bi_op.h"
#include "gpu/kernels.h"
#include "gpu/op.h"
#include "gpu/summary_op.h"

namespace wkv {

void pause_on_host() { __builtin_trap(); }  // every awaited block has already run

namespace {

enum Order { kForward, kReversed, kShuffled };

// Runs a launch elsewhere; 0 for success.
using Runner = int (*)(const char* kernel, const char* dtype, const unsigned* grid, int threads, int shared_bytes,
                       const void* params, int params_bytes);

struct {
  DeviceLimits limits;
  int order, block_order;
  uint64_t seed;
  const char* unsynchronised;  // the kernel whose barrier is dropped, or null
  int dropped_barrier;
  Runner runner;  // or null for the emulation
} settings;

// The barriers of each kernel's last block.
int barriers_of_last_block[kKernels];

// ---- memory between guards ----

constexpr int64_t kGuard = 64;  // elements

struct Allocation {
  Tensor whole;
  DType dtype;
  int64_t count;

  char* begin() const { return static_cast<char*>(whole.mutable_data_ptr()); }
  int64_t bytes() const { return (count + 2 * kGuard) * element_bytes(dtype); }
};
std::vector<Allocation> allocations;

Tensor allocate(const Shape& shape, DType dtype, const Device& device) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  const Tensor whole = device.empty({count + 2 * kGuard}, dtype);
  Tensor inner = torch::stable::narrow(const_cast<Tensor&>(whole), 0, kGuard, count);
  Tensor filled = whole;
  torch::stable::fill_(filled, 1.0);
  torch::stable::fill_(inner, std::numeric_limits<double>::quiet_NaN());
  allocations.push_back({whole, dtype, count});
  return torch::stable::view(inner, shape);
}

bool guards_hold(const Allocation& allocation) {
  const int64_t size = element_bytes(allocation.dtype);
  const char* const behind = allocation.begin() + (allocation.count + kGuard) * size;
  for (int64_t i = 0; i < kGuard * size; ++i) {
    // All elements of the guards are the same.
    if (allocation.begin()[i] != allocation.begin()[i % size] || behind[i] != allocation.begin()[i % size])
      return false;
  }
  return true;
}

// ---- the emulation ----

std::vector<int64_t> turns(int64_t count, int order, std::mt19937_64& random) {
  std::vector<int64_t> result(count);
  std::iota(result.begin(), result.end(), 0);
  if (order == kReversed) std::reverse(result.begin(), result.end());
  if (order == kShuffled) std::shuffle(result.begin(), result.end(), random);
  return result;
}

template <class Thread>
class HostTeam {
  static_assert(std::is_trivially_copyable_v<Thread>);

 public:
  HostTeam(int count, int dropped_barrier, std::mt19937_64& random)
      : threads_(count), dropped_barrier_(dropped_barrier), random_(random) {
    std::memset(static_cast<void*>(threads_.data()), 0xff, count * sizeof(Thread));
    for (int i = 0; i < count; ++i) threads_[i].index = i;
  }
  int barriers() const { return barriers_; }

  template <class Phase>
  void phase(const Phase& function) {
    const bool dropped = barriers_++ == dropped_barrier_;
    pending_.push_back({function, !dropped});
    if (!dropped) run_pending();
  }
  template <class Phase>
  void warp_phase(const Phase& function) {
    pending_.push_back({function, barriers_++ != dropped_barrier_});
  }
  template <class Phase>
  bool agree(const Phase& function) {
    bool all = true;
    ++barriers_;
    pending_.push_back({[&](Thread& thread) { all &= function(thread); }, true});
    run_pending();
    return all;
  }
  template <class Phase>
  void last_phase(const Phase& function) {
    pending_.push_back({function, false});
    run_pending();
  }

 private:
  struct Step {
    std::function<void(Thread&)> function;
    bool synchronises;  // the warp
  };

  // Runs the pending phases warp by warp, up to a barrier of the block.
  void run_pending() {
    const auto in_turn = [this](int64_t count) { return turns(count, settings.order, random_); };
    const auto count = static_cast<int64_t>(threads_.size());
    for (const int64_t warp : in_turn((count + kWarpThreads - 1) / kWarpThreads)) {
      const int64_t first = warp * kWarpThreads;
      for (size_t begin = 0, end; begin < pending_.size(); begin = end) {
        end = begin + 1;
        while (end < pending_.size() && !pending_[end - 1].synchronises) ++end;
        for (const int64_t lane : in_turn(std::min<int64_t>(kWarpThreads, count - first))) {
          for (size_t step = begin; step < end; ++step) pending_[step].function(threads_[first + lane]);
        }
      }
    }
    pending_.clear();
  }

  std::vector<Thread> threads_;
  std::vector<Step> pending_;
  int barriers_ = 0, dropped_barrier_;
  std::mt19937_64& random_;
};

template <class Kernel>
void emulate(const Launch& launch) {
  const auto& params = *static_cast<const typename Kernel::Params*>(launch.params);
  const bool drops =
      settings.unsynchronised != nullptr && std::strcmp(settings.unsynchronised, name_of(launch.kernel)) == 0;
  struct alignas(128) Line {
    char bytes[128];
  };
  std::vector<Line> shared(launch.shared_bytes / sizeof(Line) + 1);
  std::mt19937_64 random(settings.seed);
  const auto& [columns, sequences, chunks] = launch.grid;
  std::vector<unsigned> started(int64_t{columns} * sequences);
  // Tickets make every order correct.
  for (const int64_t i : turns(int64_t{columns} * sequences * chunks, settings.block_order, random)) {
    const bool is_last = ++started[i % (int64_t{columns} * sequences)] == chunks;
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(Line));
    HostTeam<typename Kernel::Thread> team(launch.threads, drops && is_last ? settings.dropped_barrier : -1, random);
    const BlockIndex block = {static_cast<unsigned>(i % columns), static_cast<unsigned>(i / columns % sequences),
                              static_cast<unsigned>(i / columns / sequences)};
    Kernel::run(params, block, launch.threads, team, shared.data()->bytes);
    barriers_of_last_block[static_cast<int>(launch.kernel)] = team.barriers();
  }
}

// ---- the launcher ----

class HostLauncher {
 public:
  explicit HostLauncher(const Device& device) : device_(device) {}

  DeviceLimits limits() const { return settings.limits; }
  Tensor empty(const Shape& shape, DType dtype) const { return allocate(shape, dtype, device_); }
  void set_all_bits(void* memory, int64_t bytes) const { std::memset(memory, 0xff, static_cast<size_t>(bytes)); }
  void launch(const Launch& launch) const {
    if (settings.runner == nullptr) {
      with_kernel(launch.kernel, launch.dtype, [&]<class Kernel>() { emulate<Kernel>(launch); });
      return;
    }
    const unsigned grid[] = {launch.grid.x, launch.grid.y, launch.grid.z};
    const int failed = settings.runner(name_of(launch.kernel), name_of(launch.dtype), grid, launch.threads,
                                       launch.shared_bytes, launch.params, launch.params_bytes);
    require(failed == 0, "the runner failed");
  }

 private:
  Device device_;
};

}  // namespace
}  // namespace wkv

WKV_LIBRARY_IMPL(WKV_NAMESPACE, CPU, m) {
  m.impl("wkv_forward", TORCH_BOX(&wkv::gpu_forward<wkv::HostLauncher>));
  m.impl("_wkv_backward", TORCH_BOX(&wkv::gpu_backward<wkv::HostLauncher>));
  m.impl("wkv_mixing_forward", TORCH_BOX(&wkv::gpu_mixing_forward<wkv::HostLauncher>));
  m.impl("_wkv_mixing_backward", TORCH_BOX(&wkv::gpu_mixing_backward<wkv::HostLauncher>));
  m.impl("_wkv_summary", TORCH_BOX(&wkv::gpu_summary<wkv::HostLauncher>));
  m.impl("_wkv_adjoint_summary", TORCH_BOX(&wkv::gpu_adjoint_summary<wkv::HostLauncher>));
  m.impl("wkv_step", TORCH_BOX(&wkv::gpu_step<wkv::HostLauncher>));
  m.impl("bi_wkv_forward", TORCH_BOX(&wkv::gpu_bi_forward<wkv::HostLauncher>));
  m.impl("_bi_wkv_backward", TORCH_BOX(&wkv::gpu_bi_backward<wkv::HostLauncher>));
}

// All strings belong to the caller and must outlive the setting.
WKV_EXPORTED void set_limits(int64_t multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor,
                             int64_t architecture) {
  wkv::settings.limits = {multiprocessors, shared_per_block, shared_per_multiprocessor, architecture};
}
WKV_EXPORTED void set_emulation(int order, int block_order, uint64_t seed, const char* unsynchronised,
                                int dropped_barrier) {
  wkv::settings.order = order;
  wkv::settings.block_order = block_order;
  wkv::settings.seed = seed;
  wkv::settings.unsynchronised = unsynchronised;
  wkv::settings.dropped_barrier = dropped_barrier;
}
// The barriers of a kernel by its name; -1 for an unknown one.
WKV_EXPORTED int barriers_of_last_block(const char* kernel) {
  for (int i = 0; i < wkv::kKernels; ++i) {
    if (std::strcmp(kernel, name_of(static_cast<wkv::Kernel>(i))) == 0) return wkv::barriers_of_last_block[i];
  }
  return -1;
}
WKV_EXPORTED void set_runner(wkv::Runner runner) { wkv::settings.runner = runner; }

// The memory that calls have allocated since the last `forget_allocations`.
WKV_EXPORTED int64_t allocation_count() { return static_cast<int64_t>(wkv::allocations.size()); }
WKV_EXPORTED void* allocation(int64_t i, int64_t* bytes) {
  *bytes = wkv::allocations[i].bytes();
  return wkv::allocations[i].begin();
}
WKV_EXPORTED int64_t overruns() {
  return std::count_if(wkv::allocations.begin(), wkv::allocations.end(),
                       [](const wkv::Allocation& allocation) { return !guards_hold(allocation); });
}
WKV_EXPORTED void forget_allocations() { wkv::allocations.clear(); }
