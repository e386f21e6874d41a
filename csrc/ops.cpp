// The operators' schemas. Kernels register themselves; fakes, autograd, vmap and autocast are in
// rwkv_kernels/autograd.py.
#include <torch/library.h>

TORCH_LIBRARY(rwkv_kernels, m) {
  // w, u [C]; k, v [B, T, C]; state [B, 3, C] or None for an empty one -> y [B, T, C], the final state [B, 3, C], and
  // the states that backward replays from, [B, n, 3, C]: n = 0 unless `checkpoint`.
  m.def(
      "wkv_forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool checkpoint) "
      "-> (Tensor y, Tensor state_out, Tensor checkpoints)");

  // gstate_out is None for zero -> gw, gu [C], gk, gv [B, T, C], gstate [B, 3, C].
  m.def(
      "_wkv_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, Tensor checkpoints, Tensor gy, "
      "Tensor? gstate_out) -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate)");

  // One token, k, v [B, C]; the state moves on in place. With r [B, C], the result is sigmoid(r) * y.
  m.def("wkv_step(Tensor w, Tensor u, Tensor k, Tensor v, Tensor(a!) state, Tensor? r=None) -> Tensor y");
}
