"""Three repairs of Triton's interpreter, which runs kernels on the CPU where TRITON_INTERPRET=1."""

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    convert, call = interpreter._convert_float, interpreter.InterpretedFunction.__call__
    patch_tensor = interpreter._patch_lang_tensor

    def converting(values: Any, source: Any, target: Any, mode: Any) -> Any:
        """GPUs round float32 to the nearest bfloat16, where the interpreter truncates, and have subnormal numbers."""
        if {source, target} != {tl.float32, tl.bfloat16}:
            return convert(values, source, target, mode)
        given, wanted = (torch.float32, torch.bfloat16) if source == tl.float32 else (torch.bfloat16, torch.float32)
        bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
        numbers = torch.from_numpy(values.view(f"i{given.itemsize}").copy()).view(given)
        return numbers.to(wanted).view(bits[wanted]).numpy().view(f"u{wanted.itemsize}")

    def calling(self: Any, *arguments: Any, **constants: Any) -> Any:
        """The interpreter prepares the language again for every call among our functions, without need."""
        ours = self.fn.__module__.startswith("rwkv_kernels")
        return self.rewrite()(*arguments, **constants) if ours else call(self, *arguments, **constants)

    def patching_tensor(tensor: Any, scope: Any) -> None:
        """A scalar is an array of one element in Triton 3.6, which numpy 2.4 no longer takes for an integer."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float, interpreter.InterpretedFunction.__call__ = converting, calling
    interpreter._patch_lang_tensor = patching_tensor
