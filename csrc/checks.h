// What a kernel may rely on, checked before one starts. rwkv_kernels.functional explains errors to users of the public
// functions; these checks keep a direct call of the operators from touching memory it should not.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "wkv_problem.h"

namespace wkv {

inline DType dtype_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kDouble:
      return DType::float64;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected float32, float16, bfloat16 or float64, got ", tensor.scalar_type());
  }
}

inline at::ScalarType state_type(const at::Tensor& k) {
  return k.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_like(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype,
                       const at::Tensor& k) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": expected ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == k.device(), name, ": expected device ", k.device(), " as k, got ",
                    tensor.device());
}

// A per-channel parameter, of a dtype of its own.
inline at::Tensor channel_parameter(const char* name, const at::Tensor& parameter, const at::Tensor& k) {
  check_like(name, parameter, {k.size(-1)}, parameter.scalar_type(), k);
  return parameter.contiguous();
}

// [B, T, C] with contiguous channels: as it is where it can be, else a copy.
inline at::Tensor with_contiguous_channels(const at::Tensor& sequence) {
  return sequence.stride(2) == 1 || sequence.size(2) <= 1 ? sequence : sequence.contiguous();
}

inline Sequence sequence_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// The arguments that forward, backward and step share, checked and in the layout that the kernels take.
struct Arguments {
  DType dtype, w_dtype, u_dtype;
  at::Tensor w, u, k, v;
  std::optional<at::Tensor> state;

  Arguments(const at::Tensor& w_, const at::Tensor& u_, const at::Tensor& k_, const at::Tensor& v_,
            const std::optional<at::Tensor>& state_)
      : dtype(dtype_of("k", k_)), w_dtype(dtype_of("w", w_)), u_dtype(dtype_of("u", u_)) {
    TORCH_CHECK_VALUE(k_.dim() == 3, "k: expected shape [B, T, C], got ", k_.sizes());
    check_like("v", v_, k_.sizes(), k_.scalar_type(), k_);
    w = channel_parameter("w", w_, k_);
    u = channel_parameter("u", u_, k_);
    k = with_contiguous_channels(k_);
    v = with_contiguous_channels(v_);
    if (state_.has_value()) state = checked_state("state", *state_);
  }

  at::Tensor checked_state(const char* name, const at::Tensor& tensor) const {
    check_like(name, tensor, {B(), 3, C()}, state_type(k), k);
    return tensor.contiguous();
  }

  int64_t B() const { return k.size(0); }
  int64_t T() const { return k.size(1); }
  int64_t C() const { return k.size(2); }

  at::Tensor empty_sequence() const { return at::empty({B(), T(), C()}, k.options()); }
  at::Tensor empty_state() const { return at::empty({B(), 3, C()}, k.options().dtype(state_type(k))); }
  at::Tensor empty_checkpoints(bool wanted) const {
    return at::empty({B(), wanted ? checkpoint_count(dtype, T()) : 0, 3, C()}, k.options().dtype(state_type(k)));
  }
};

// What a step gets: one token, k, v and maybe r [B, C], here as sequences of one step.
struct TokenArguments : Arguments {
  std::optional<at::Tensor> r;

  TokenArguments(const at::Tensor& w_, const at::Tensor& u_, const at::Tensor& k_, const at::Tensor& v_,
                 const std::optional<at::Tensor>& state_, const std::optional<at::Tensor>& r_)
      : Arguments(w_, u_, one_step("k", k_), one_step("v", v_), state_) {
    if (!r_.has_value()) return;
    check_like("r", *r_, {B(), C()}, k.scalar_type(), k);
    r = with_contiguous_channels(r_->unsqueeze(1));
  }

  at::Tensor empty_token() const { return at::empty({B(), C()}, k.options()); }

 private:
  static at::Tensor one_step(const char* name, const at::Tensor& token) {
    TORCH_CHECK_VALUE(token.dim() == 2, name, ": expected shape [B, C], got ", token.sizes());
    return token.unsqueeze(1);
  }
};

// What backward gets besides.
struct GradientArguments {
  at::Tensor checkpoints, gy;
  std::optional<at::Tensor> gstate_out;

  GradientArguments(const Arguments& arguments, const at::Tensor& checkpoints_, const at::Tensor& gy_,
                    const std::optional<at::Tensor>& gstate_out_) {
    const at::Tensor& k = arguments.k;
    check_like("gy", gy_, k.sizes(), k.scalar_type(), k);
    check_like("checkpoints", checkpoints_,
               {arguments.B(), checkpoint_count(arguments.dtype, arguments.T()), 3, arguments.C()}, state_type(k), k);
    checkpoints = checkpoints_.contiguous();
    gy = with_contiguous_channels(gy_);
    if (gstate_out_.has_value()) gstate_out = arguments.checked_state("gstate_out", *gstate_out_);
  }
};

}  // namespace wkv
