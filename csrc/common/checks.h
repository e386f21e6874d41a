// Checks of everything that kernels rely on, before one starts. rwkv_kernels.functional explains errors to users of the
// public functions; these checks keep a direct call of the operators from touching memory it should not.
#pragma once

#include <optional>
#include <tuple>

#include "params.h"
#include "tensor.h"

namespace wkv {

inline void check_like(const char* name, const Tensor& tensor, const Sizes& shape, DType dtype, const Device& device) {
  const Sizes sizes = sizes_of(tensor);
  require(sizes == shape, name, ": expected shape ", shape, ", got ", sizes);
  require(torch_type_of(tensor) == torch_type(dtype), name, ": expected ", dtype, ", got ", tensor.scalar_type());
  const Device where(tensor);
  require(where == device, name, ": expected device ", device, " as k, got ", where);
}

// The checked arguments that forward, backward and step share, with contiguous channels. k, v and r are [B, T, C], or
// [B, C] for the one token of a step.
struct Arguments {
  DType dtype, w_dtype, u_dtype;
  Device device;
  Tensor w, u, k, v;
  std::optional<Tensor> state, r, cu_seqlens;
  int64_t B, T, C;
  int64_t sequences;              // B, or those that are packed into B = 1
  int64_t checkpoint_height = 3;  // a state of three numbers

  // `dimensions` of k, v and r: 3, or 2 for the one token of a step. `decay` is the name of w.
  Arguments(const Tensor& w_, const Tensor& u_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& state_,
            const std::optional<Tensor>& r_ = std::nullopt, const std::optional<Tensor>& cu_seqlens_ = std::nullopt,
            int64_t dimensions = 3, const char* decay = "w")
      : dtype(dtype_of("k", k_)),
        w_dtype(dtype_of(decay, w_)),
        u_dtype(dtype_of("u", u_)),
        device(k_),
        w(w_),
        u(u_),
        k(k_),
        v(v_) {
    const Sizes sizes = sizes_of(k);
    require(sizes.count == dimensions, "k: expected shape ", dimensions == 3 ? "[B, T, C]" : "[B, C]", ", got ", sizes);
    B = sizes.data[0];
    T = dimensions == 3 ? sizes.data[1] : 1;
    C = sizes.data[sizes.count - 1];
    check_like("v", v, sizes, dtype, device);
    check_like(decay, w, sizes_of({C}), w_dtype, device);
    check_like("u", u, sizes_of({C}), u_dtype, device);
    for (Tensor* tensor : {&w, &u, &k, &v}) make_channels_contiguous(*tensor);
    if (r_.has_value()) {
      check_like("r", *r_, sizes, dtype, device);
      make_channels_contiguous(r.emplace(*r_));
    }
    sequences = B;
    if (cu_seqlens_.has_value()) {
      cu_seqlens = checked_boundaries(*cu_seqlens_);
      sequences = cu_seqlens->size(0) - 1;
    }
    if (state_.has_value()) state = checked_state("state", *state_);
  }

  Tensor checked_state(const char* name, const Tensor& tensor) const {
    check_like(name, tensor, sizes_of({sequences, 3, C}), state_type(dtype), device);
    return as_contiguous(tensor);
  }

  // Reads no element.
  Tensor checked_boundaries(const Tensor& tensor) const {
    const int32_t type = torch_type_of(tensor);
    require(type == aoti_torch_dtype_int32() || type == aoti_torch_dtype_int64(),
            "cu_seqlens: expected int32 or int64, got ", tensor.scalar_type());
    require(tensor.dim() == 1 && tensor.size(0) > 0, "cu_seqlens: expected shape [N + 1], got ", sizes_of(tensor));
    const Device where(tensor);
    require(where == device, "cu_seqlens: expected device ", device, " as k, got ", where);
    require(B == 1, "k: expected shape [1, total, C] with cu_seqlens, got ", sizes_of(k));
    return as_contiguous(tensor);
  }

  bool nothing_to_do() const { return B == 0 || T == 0 || C == 0; }

  // Outputs, uninitialised, from a device or a launcher.
  Tensor empty_sequence(const auto& from) const { return from.empty({B, T, C}, dtype); }
  // gr, without steps where there is no r.
  Tensor empty_gate_gradient(const auto& from) const { return from.empty({B, r.has_value() ? T : 0, C}, dtype); }
  Tensor empty_state(const auto& from) const { return from.empty({sequences, 3, C}, state_type(dtype)); }
  // Of a packed sequence n the rows from cu_seqlens[n] / interval + n on, as many as it would have alone.
  int64_t checkpoint_rows() const {
    return cu_seqlens.has_value() ? T / checkpoint_interval(dtype) + sequences : checkpoint_count(dtype, T);
  }
  Tensor empty_checkpoints(const auto& from, bool wanted) const {
    return from.empty({B, wanted ? checkpoint_rows() : 0, checkpoint_height, C}, state_type(dtype));
  }
};

// The arguments of the bidirectional operators, whose checkpoints are the states before and after each interval.
struct BiArguments : Arguments {
  BiArguments(const Tensor& log_decay, const Tensor& u, const Tensor& k, const Tensor& v,
              const std::optional<Tensor>& r, const std::optional<Tensor>& cu_seqlens)
      : Arguments(log_decay, u, k, v, std::nullopt, r, cu_seqlens, 3, "log_decay") {
    checkpoint_height = 6;
  }
};

// The steps of a [B, T, C] tensor, or the one of a [B, C] tensor.
inline Sequence sequence_of(const Tensor& tensor) {
  return {data_of(tensor), tensor.stride(0), tensor.dim() == 3 ? tensor.stride(1) : 0};
}

// A step's arguments: one token, k, v and optionally r [B, C], and the state that it updates, of any strides.
struct TokenArguments : Arguments {
  TokenArguments(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& moved,
                 const std::optional<Tensor>& r_)
      : Arguments(w, u, k, v, std::nullopt, r_, std::nullopt, 2) {
    check_like("state", moved, sizes_of({B, 3, C}), state_type(dtype), device);
    for (int64_t i = 0; i < 3; ++i) {
      require(moved.stride(i) != 0 || moved.size(i) <= 1, "state: expected elements of their own, got an expanded ",
              "tensor, with stride 0 in dimension ", i, "; its clone() does");
    }
  }

  Tensor empty_token(const auto& from) const { return from.empty({B, C}, dtype); }
};

// Backward's further arguments.
struct GradientArguments {
  Tensor checkpoints, gy;
  std::optional<Tensor> gstate_out;

  GradientArguments(const Arguments& arguments, const Tensor& checkpoints_, const Tensor& gy_,
                    const std::optional<Tensor>& gstate_out_)
      : checkpoints(checkpoints_), gy(gy_) {
    const auto& [dtype, B, T, C] = std::tie(arguments.dtype, arguments.B, arguments.T, arguments.C);
    check_like("gy", gy, sizes_of({B, T, C}), dtype, arguments.device);
    check_like("checkpoints", checkpoints, sizes_of({B, arguments.checkpoint_rows(), arguments.checkpoint_height, C}),
               state_type(dtype), arguments.device);
    checkpoints = as_contiguous(checkpoints);
    make_channels_contiguous(gy);
    if (gstate_out_.has_value()) gstate_out = arguments.checked_state("gstate_out", *gstate_out_);
  }

  // The gradients where there are no steps.
  void after_no_steps(const Tensor& gw, const Tensor& gu, const Tensor& gstate) const {
    for (const Tensor* gradient : {&gw, &gu, &gstate}) set_zero(*gradient);
    if (gstate_out.has_value()) copy(*gstate_out, gstate);
  }
};

}  // namespace wkv
