"""compat.fla against flash-linear-attention's kernel, which Triton interprets (TRITON_INTERPRET=1)."""

import torch
from fla.ops.rwkv4 import fused_recurrent_rwkv4 as original
from problems import assert_tensor_close, tolerance

from rwkv_kernels.compat import fla

B, T, C = 2, 7, 9


def main() -> None:
    torch.manual_seed(0)
    w, u = torch.randn(2, C)
    k, v, gy = torch.randn(3, B, T, C)
    num, log_den, top = torch.randn(3, B, C)
    state = torch.stack((num, log_den.exp(), top), 1).unsqueeze(2)
    results = []
    for call in (original, fla.fused_recurrent_rwkv4):
        leaves = [x.clone().requires_grad_() for x in (w, u, k, v, state)]
        y, after = call(*leaves)
        assert y.shape == k.shape and after.shape == state.shape
        assert y.dtype == k.dtype and after.dtype == state.dtype
        # A loss that depends on the state up to its gauge, as every consumer of a state does.
        mean = after[:, 0] / after[:, 1]
        loss = (y * gy).sum() + mean.sin().sum() + (after[:, 2] + after[:, 1].log()).sin().sum()
        gradients = torch.autograd.grad(loss, leaves)
        results.append((y, mean, *gradients))
    allowed = 2 * tolerance(torch.float32, T, 10)
    for name, theirs, ours in zip(["wkv", "state", "w", "u", "k", "v", "gstate"], *results, strict=True):
        assert_tensor_close(name, ours, theirs, allowed)
    print("equal")


if __name__ == "__main__":
    main()
