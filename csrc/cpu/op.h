// The common part of the CPU operators around their kernels: memory of a call, threads, the tables of channels, the
// work.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>
#include <new>

#include "../common/checks.h"
#include "../common/namespace.h"
#include "joins.h"

namespace wkv::cpu {

// Uninitialised memory of one call, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count > 0) data_.reset(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlignment)));
  }
  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

enum class Order { ascending, descending };  // of a thread's items in memory

template <class Function>
void for_each(const Work& work, Order order, const Function& function) {
  const auto shares = [&](int64_t first, int64_t last) {
    const int64_t begin = work.share(first), end = work.share(last);
    for (int64_t i = begin; i < end; ++i) function(work[order == Order::ascending ? i : begin + end - 1 - i]);
    selected_kernels().finish();
  };
  if (work.plan.threads == 1) return shares(0, 1);
  torch::stable::parallel_for(0, work.plan.threads, 1, shares);
}

// Leaves out the channels.
inline Params params_of(const Arguments& arguments) {
  return {.dtype = arguments.dtype,
          .B = arguments.B,
          .T = arguments.T,
          .C = arguments.C,
          .N = arguments.sequences,
          .k = sequence_of(arguments.k),
          .v = sequence_of(arguments.v),
          .r = arguments.r.has_value() ? sequence_of(*arguments.r) : Sequence{}};
}

inline Boundaries boundaries_of(const Arguments& arguments) {
  return {data_of(*arguments.cu_seqlens), torch_type_of(*arguments.cu_seqlens) == aoti_torch_dtype_int64()};
}

// Where a sequence lies decides what is read and written, so boundaries are checked before anything is.
inline void check_boundaries(const Arguments& arguments) {
  if (!arguments.cu_seqlens.has_value()) return;
  const Boundaries boundaries = boundaries_of(arguments);
  const int64_t N = arguments.sequences;
  require(boundaries[0] == 0, "cu_seqlens: expected to start at 0, got ", boundaries[0]);
  require(boundaries[N] == arguments.T, "cu_seqlens: expected to end at ", arguments.T,
          ", the number of steps of k, got ", boundaries[N]);
  for (int64_t n = 0; n < N; ++n) {
    require(boundaries[n] <= boundaries[n + 1], "cu_seqlens: expected to rise, got ", boundaries[n + 1], " after ",
            boundaries[n], " at ", n + 1);
  }
}

inline Work work_of(const Arguments& arguments, Cuts cuts = {}) {
  const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
  const int64_t threads = torch::stable::get_num_threads();
  if (!arguments.cu_seqlens.has_value()) return make_work(dtype, B, T, C, threads, cuts);
  return make_packed_work(dtype, boundaries_of(arguments), arguments.sequences, T, C, threads, cuts);
}

// A contiguous [C] tensor of any type as Real.
template <class Real>
void convert(const Tensor& channels, DType dtype, Real* to) {
  with_dtype(dtype, [&](auto type) {
    using Element = ElementOf<type.value, torch::headeronly::Half, torch::headeronly::BFloat16>;
    std::copy_n(static_cast<const Element*>(data_of(channels)), channels.size(0), to);
  });
}

// The rows of Channels, computed from w and u.
template <class Real>
struct ChannelTable {
  Scratch<Real> table;
  Channels rows;

  // `is_raw`: w is the raw decay, and not the log-decay itself.
  ChannelTable(const Arguments& arguments, bool is_raw) : table(4 * arguments.C) {
    const int64_t C = arguments.C;
    Real* const row = table.data();
    convert(arguments.w, arguments.w_dtype, row);
    convert(arguments.u, arguments.u_dtype, row + C);
    prepare_parameters(row, C, is_raw);
    selected_kernels().exponentiate(arguments.dtype, C, row);
    rows = {row, row + C, row + 2 * C, row + 3 * C};
  }
};

inline Tensor as_type_of(const Tensor& parameter, const Tensor& gradient) {
  return torch_type_of(parameter) == torch_type_of(gradient) ? gradient
                                                             : torch::stable::to(gradient, parameter.scalar_type());
}

}  // namespace wkv::cpu
