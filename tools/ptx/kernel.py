"""Compiles a translated kernel and launches it on numpy arrays."""

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from .parser import Parameter, PtxError
from .translator import translate

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / "ptx"
# Integers wrap, rounding modes change, and nothing is fused that PTX does not fuse.
FLAGS = ["-std=gnu++17", "-O1", "-shared", "-fPIC", "-fwrapv", "-frounding-math", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-fno-stack-protector", f"-I{HERE}"]
# Instructions that the C library has functions for, which are slower.
FASTER = {"fma": "-mfma", "f16c": "-mf16c"}
ORDERS = ("forward", "reversed", "shuffled")

Array = numpy.ndarray[Any, Any]
Size = int | Sequence[int]


def unavailable() -> str | None:
    """The reason that no kernel can run here, or None."""
    if platform.machine() != "x86_64":
        return f"PTX runs on x86-64 only, whose stacks tools/ptx/machine.h can switch, and this is {platform.machine()}"
    return None if shutil.which("g++") else "PTX is compiled by g++, which is not on the PATH"


class _Launch(ctypes.Structure):
    """As machine.h has it."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("resident", ctypes.c_uint32),
        ("ranges", ctypes.c_uint32),
        ("memory", ctypes.c_void_p),
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
    )


class Kernel:
    """The only kernel of the PTX whose name contains `name`, ready to run; with `counted` it counts instructions."""

    def __init__(self, text: str, name: str, counted: bool = False) -> None:
        reason = unavailable()
        if reason is not None:
            raise PtxError(reason)
        self._translation = translate(text, name, counted)
        self._library = ctypes.CDLL(str(_compiled(self._translation.code)))
        self._library.run.restype = ctypes.c_char_p
        self._library.executed.restype = ctypes.POINTER(ctypes.c_uint64 * len(self._translation.blocks))

    def run(
        self,
        arguments: Sequence[Array | bytes | float | None],
        grid: Size,
        threads: Size,
        shared_bytes: int = 0,
        memory: Iterable[Array] = (),
        order: str = "forward",
        seed: int = 1,
        resident: int = 0,
        timeout: float = 120.0,
    ) -> Counter[str]:
        """Runs the kernel; returns how often all threads together executed each opcode, if it is counted.

        An argument is an array, contiguous, whose memory the kernel gets; a number, encoded as the parameter's type
        is; the bytes of a structure; or None for a null pointer. A kernel may access the arrays and those of `memory`,
        which structures point to. `shared_bytes` are those that the launch adds to what the kernel declares.

        `order` ("forward", "reversed" or "shuffled", by `seed`) is that in which blocks start and threads take turns;
        `resident` blocks run at a time, of which 0 means as many as have 512 threads, two at least. Raises PtxError for
        a fault, which leaves the arrays as they are by then, and after `timeout` seconds.
        """
        parameters = self._translation.source.parameters
        if len(arguments) != len(parameters):
            raise PtxError(f"{len(parameters)} arguments are expected, and {len(arguments)} given")
        arrays = [*(x for x in arguments if isinstance(x, numpy.ndarray)), *memory]
        if not all(array.flags.c_contiguous for array in arrays):
            raise PtxError("arrays have to be contiguous")
        encoded = b""
        for argument, parameter in zip(arguments, parameters, strict=True):
            encoded = encoded.ljust(parameter.offset, b"\0") + _encoded(argument, parameter)
        # Aligned for any type, in an array's memory.
        block = numpy.frombuffer(encoded.ljust(8, b"\0"), numpy.uint8).copy()
        ranges = numpy.array([(x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays], numpy.uint64)
        launch = _Launch(
            _three(grid),
            _three(threads),
            self._translation.shared_bytes + shared_bytes,
            ORDERS.index(order),
            resident,
            len(arrays),
            ranges.ctypes.data,
            ctypes.cast(block.ctypes.data, ctypes.c_char_p),
            len(encoded),
            2**16 + -(-self._translation.local_bytes // 4096) * 4096,
            seed,
            timeout,
        )
        counts = self._library.executed().contents
        ctypes.memset(counts, 0, ctypes.sizeof(counts))
        error = self._library.run(ctypes.byref(launch))
        if error:
            raise PtxError(error.decode())
        executed = Counter[str]()
        for opcodes, times in zip(self._translation.blocks, counts, strict=True):
            if times:
                executed.update({opcode: times * count for opcode, count in opcodes.items()})
        return executed


def _compiled(code: str) -> Path:
    """The library, named by a digest of sources, flags and compiler: several processes may build it at once."""
    processor = Path("/proc/cpuinfo").read_text().split()
    flags = [*FLAGS, *(flag for name, flag in FASTER.items() if name in processor)]
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    content = hashlib.sha256(repr((code, flags)).encode() + compiler)
    for header in ("machine.h", "values.h"):
        content.update((HERE / header).read_bytes())
    library = CACHE / f"{content.hexdigest()[:24]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(unfinished)]
        result = subprocess.run(command, input=code, capture_output=True, text=True)
        if result.returncode:
            raise PtxError(f"g++ failed on the translation:\n{result.stderr[:3000]}")
        unfinished.rename(library)
    return library


def _encoded(argument: Array | bytes | float | None, parameter: Parameter) -> bytes:
    if argument is None:
        return bytes(parameter.bytes)
    if isinstance(argument, numpy.ndarray):
        return struct.pack("<Q", argument.ctypes.data)
    if isinstance(argument, bytes):
        if len(argument) != parameter.bytes:
            raise PtxError(f"{parameter.name} has {parameter.bytes} bytes, and {len(argument)} are given")
        return argument
    if parameter.type in ("f32", "f64") or isinstance(argument, float):
        return struct.pack("<f" if parameter.bytes == 4 else "<d", argument)
    return (int(argument) % 2 ** (8 * parameter.bytes)).to_bytes(parameter.bytes, "little")


def _three(size: Size) -> Any:
    sizes = [size] if isinstance(size, int) else [*size]
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))
