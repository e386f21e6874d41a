// The operators' schemas. Kernels register themselves; fakes, autograd, vmap and autocast are in
// rwkv_kernels/autograd.py.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "common/namespace.h"
#include "cpu/isa.h"

WKV_LIBRARY(WKV_NAMESPACE, m) {
  // w, u [C]; k, v [B, T, C]; state [B, 3, C] or None for an empty one -> y [B, T, C], the final state [B, 3, C], and
  // the states that backward replays from, [B, n, 3, C]: n = 0 unless `checkpoint`.
  m.def(
      "wkv_forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool checkpoint) "
      "-> (Tensor y, Tensor state_out, Tensor checkpoints)");

  // gstate_out is None for zero -> gw, gu [C], gk, gv [B, T, C], gstate [B, 3, C].
  m.def(
      "_wkv_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor checkpoints, Tensor gy, "
      "Tensor? gstate_out) -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate)");

  // The same with a gate, for packed sequences or both: with r [B, T, C] y is sigmoid(r) * y. With cu_seqlens [N + 1],
  // rising from 0 to T, sequence n has the steps from cu_seqlens[n] to before cu_seqlens[n + 1] of B = 1, states are
  // [N, 3, C], and checkpoints [1, T / interval + N, 3, C], of which sequence n has the rows from
  // cu_seqlens[n] / interval + n on. gr is [B, 0, C] without r.
  m.def(
      "wkv_mixing_forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? r, Tensor? cu_seqlens, "
      "bool checkpoint) -> (Tensor y, Tensor state_out, Tensor checkpoints)");
  m.def(
      "_wkv_mixing_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? r, Tensor? cu_seqlens, "
      "Tensor checkpoints, Tensor gy, Tensor? gstate_out) "
      "-> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate, Tensor gr)");

  // Summaries, which a slice of a sequence hands to the slices beside it where calls cut time: the state [B, 3, C] that
  // its steps leave behind an empty one, and the adjoint of (num, den) [B, 2, C] before its steps where that after them
  // is zero.
  m.def("_wkv_summary(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor state");
  m.def(
      "_wkv_adjoint_summary(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor? r, Tensor checkpoints, "
      "Tensor gy) -> Tensor adjoint");

  // Bidirectional, with the same gate and packing. log_decay [C] is the log-decay itself, of either sign; checkpoints
  // are the states before and after each interval, [B, n, 6, C].
  m.def(
      "bi_wkv_forward(Tensor log_decay, Tensor u, Tensor k, Tensor v, Tensor? r, Tensor? cu_seqlens, bool checkpoint) "
      "-> (Tensor y, Tensor checkpoints)");
  m.def(
      "_bi_wkv_backward(Tensor log_decay, Tensor u, Tensor k, Tensor v, Tensor? r, Tensor? cu_seqlens, "
      "Tensor checkpoints, Tensor gy) -> (Tensor g_log_decay, Tensor gu, Tensor gk, Tensor gv, Tensor gr)");

  // One token, k, v [B, C]; the state moves on in place. With r [B, C], the result is sigmoid(r) * y.
  m.def("wkv_step(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) state, Tensor? r=None) -> Tensor y");
}

// The build, as JSON. The string belongs to the library.
WKV_EXPORTED const char* rwkv_kernels_build_info() {
  static const std::string info = [] {
    std::string sets, intervals;
    for (const wkv::cpu::Kernels* kernels : wkv::cpu::built_kernels()) {
      if (kernels != nullptr) sets += std::string(sets.empty() ? "\"" : ", \"") + kernels->name + "\"";
    }
    for (const wkv::DType dtype : wkv::kDTypes) {
      intervals += std::string(intervals.empty() ? "\"" : ", \"") + wkv::name_of(dtype) +
                   "\": " + std::to_string(wkv::checkpoint_interval(dtype));
    }
    return std::string("{\"namespace\": \"" WKV_STRING(WKV_NAMESPACE) "\", \"torch\": \"" TORCH_VERSION
                                                                      "\", \"compiler\": \"" WKV_COMPILER
                                                                      "\", \"cpu_instruction_sets\": [") +
           sets + "], \"cpu_instruction_set\": \"" + wkv::cpu::selected_kernels().name +
           "\", \"checkpoint_intervals\": {" + intervals + "}}";
  }();
  return info.c_str();
}
