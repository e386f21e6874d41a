"""Runs CUDA kernels on the CPU from their PTX, as nvcc or Triton make it: for correct results, not for speed.

A kernel is translated to C++, compiled by g++ once (build/ptx keeps it), and run with every CUDA thread as a fiber, so
that barriers, shuffles and blocks that wait for each other behave as on a GPU:

    kernel = ptx.Kernel(Path("scale.ptx").read_text(), "scale", counted=True)
    executed = kernel.run([x, y, 512, 2.5], grid=4, threads=128)  # writes to the array y; executed["mul.f32"] is 512

It reports with the line of the PTX, the block and the thread: an access outside the arrays, one that is not aligned, a
deadlock at barriers, lanes of a warp that meet at different instructions. Mistakes that depend on time show in the
results: shared memory starts as NaN, asynchronous copies arrive only when they are waited for, and `order`
changes which thread is first.

It cannot detect: a missing fence, because memory is sequentially consistent; the errors of approximate functions, which
are those of the C library here; a loop that waits on ordinary loads, which does not end. Functions, tensor cores,
clusters, TMA and mbarrier are not translated.
"""

from .kernel import Kernel, unavailable
from .parser import PtxError

__all__ = ["Kernel", "PtxError", "unavailable"]
