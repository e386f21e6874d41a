"""tools/ptx on small programs: the results of instructions, and the mistakes that it detects."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy
import ptx
import pytest
import torch

pytestmark = pytest.mark.skipif(ptx.unavailable() is not None, reason=str(ptx.unavailable()))

Array = numpy.ndarray[Any, Any]


def kernel(body: str, parameters: str = "", outside: str = "", counted: bool = False) -> ptx.Kernel:
    """A kernel of parameters such as "u64 x, u32 n": the body has registers of these names, and its thread in %i."""
    given = [parameter.split() for parameter in parameters.split(",") if parameter]
    text = f"""
.version 8.0
.target sm_80
.address_size 64
{outside}
.visible .entry kernel({", ".join(f".param .{type} {name}_param" for type, name in given)})
{{
    .reg .b32 %i, %r<10>; .reg .b64 %d<10>; .reg .f32 %f<10>; .reg .pred %p<10>;
    {" ".join(f".reg .{type} {name}; ld.param.{type} {name}, [{name}_param];" for type, name in given)}
    mov.u32 %i, %tid.x;
    {body}
    ret;
}}
"""
    return ptx.Kernel(text, "kernel", counted)


# ---- results of instructions ----

DTYPES = {
    **{f"{kind}{bits}": numpy.dtype(f"u{bits // 8}") for kind in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": numpy.dtype(f"i{bits // 8}") for bits in (16, 32, 64)},
    **{"f16": numpy.dtype("f2"), "f32": numpy.dtype("f4"), "f64": numpy.dtype("f8")},
}


@dataclass
class Case:
    """Code that sets d from a, b and c; the result of integers is that of unlimited ones, truncated."""

    code: str
    inputs: tuple[str, ...]
    output: str
    expected: Callable[..., Any]
    tolerance: float = 0.0


def case(opcode: str, expected: Callable[..., Any], inputs: str = "", output: str = "", tolerance: float = 0.0) -> Case:
    """One instruction, whose operands have its type unless `inputs` and `output` differ."""
    own = opcode.split(".")[-1]
    types = inputs.split() or [own] * expected.__code__.co_argcount
    return Case(f"{opcode} d, {', '.join('abc'[: len(types)])};", tuple(types), output or own, expected, tolerance)


def flushed(x: Array) -> Array:
    return numpy.where(abs(x) < numpy.finfo("f4").tiny, numpy.copysign(0, x), x)


def _rounded(exact: Fraction, down: bool) -> float:
    """Rounded to float32, down or to the nearest, without ties here."""
    below = numpy.float32(float(exact))
    while Fraction(float(below)) > exact:
        below = numpy.nextafter(below, numpy.float32(-numpy.inf))
    above = numpy.nextafter(below, numpy.float32(numpy.inf))
    return float(below if down or 2 * exact < Fraction(float(below)) + Fraction(float(above)) else above)


def fused(down: bool) -> Callable[..., Any]:
    def expected(a: Array, b: Array, c: Array) -> Array:
        exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
        return numpy.array([_rounded(x, down) for x in exact], "f4")

    return expected


def _divided(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _field(a: int, position: int, count: int) -> int:
    return a >> position % 256 & (1 << count % 256) - 1


def _shifted(a: int, places: int) -> int:
    return a << places if places < 64 else 0


def _inserted(a: int, b: int) -> int:
    return b & ~(0xFF << 4) | (a & 0xFF) << 4


def _converted(x: Array) -> Array:
    """Converted to s32: saturated, and NaN becomes 0."""
    whole = numpy.clip(numpy.trunc(numpy.nan_to_num(x.astype("f8"), nan=0.0)), -(2.0**31), 2.0**31 - 1)
    return whole.astype("i4")


def _bfloat16(x: Array) -> Array:
    rounded = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view("u2")
    return numpy.where(numpy.isnan(x), numpy.uint16(0x7FFF), rounded)


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(numpy.isnan(a) | numpy.isnan(b)),
    "nan": lambda a, b: numpy.isnan(a) | numpy.isnan(b),
}
FLOATS = [
    *(
        case(f"{opcode}.{type}", expected)
        for type in ("f32", "f64")
        for opcode, expected in {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul.rn": lambda a, b: a * b,
            "div.rn": lambda a, b: a / b,
            "min": lambda a, b: numpy.fmin(a, b),
            "max": lambda a, b: numpy.fmax(a, b),
            "abs": lambda a: abs(a),
            "neg": lambda a: -a,
            "sqrt.rn": lambda a: numpy.sqrt(a),
        }.items()
    ),
    case("add.ftz.f32", lambda a, b: flushed(flushed(a) + flushed(b))),
    case("add.sat.f32", lambda a, b: numpy.nan_to_num((a + b).clip(0, 1), nan=0.0) + 0),
    case("rcp.approx.ftz.f32", lambda a: flushed(1 / flushed(a)), tolerance=1e-6),
    case("rsqrt.approx.ftz.f32", lambda a: flushed(1 / numpy.sqrt(flushed(a))), tolerance=1e-6),
    case("ex2.approx.ftz.f32", lambda a: flushed(numpy.exp2(flushed(a))), tolerance=1e-6),
    case("lg2.approx.ftz.f32", lambda a: flushed(numpy.log2(flushed(a))), tolerance=1e-6),
    *(
        Case(
            f"mov.b32 %r1, {{a, b}}; mov.b32 %r2, {{b, c}}; {opcode}.f16x2 %r1, %r1, %r2; mov.b32 {target}, %r1;",
            ("f16", "f16", "f16"),
            "f16",
            expected,
        )
        for target, opcode, expected in (
            ("{d, _}", "min", lambda a, b, c: numpy.fmin(a, b)),
            ("{_, d}", "max", lambda a, b, c: numpy.fmax(b, c)),
            ("{d, _}", "mul", lambda a, b, c: a * b),
        )
    ),
    *(
        Case(f"setp.{name}.{type} p, a, b; selp.u32 d, 1, 0, p;", (type, type), "u32", lambda a, b, f=f: f(a, b))
        for name, f in COMPARISONS.items()
        for type in ("f32", "f16")
    ),
    Case(
        "setp.lt.and.f32 p|q, a, b, !p; selp.u32 d, 2, 0, p; @q add.u32 d, d, 1;",  # p is false before
        ("f32", "f32"),
        "u32",
        lambda a, b: numpy.where(a < b, 2, 1),
    ),
    Case(
        "setp.eq.f16x2 p|q, a, b; selp.u32 d, 1, 0, p; @q add.u32 d, d, 2;",
        ("b32", "b32"),
        "u32",
        lambda a, b: (a.view("f2") == b.view("f2")).reshape(-1, 2) @ [1, 2],
    ),
]
FINITE = [
    case("fma.rn.f32", fused(down=False)),
    case("fma.rm.f32", fused(down=True)),
    case("cvt.rpi.f32.f32", lambda a: numpy.ceil(a)),
    case("cvt.rni.f32.f32", lambda a: numpy.rint(a)),
]
CONVERSIONS = [
    case("cvt.f64.f32", lambda a: a.astype("f8"), output="f64"),
    case("cvt.rn.f32.f64", lambda a: a.astype("f4"), output="f32"),
    case("cvt.rn.f16.f32", lambda a: a.astype("f2"), output="f16"),
    case("cvt.f32.f16", lambda a: a.astype("f4"), output="f32"),
    case("cvt.sat.f32.f32", lambda a: numpy.nan_to_num(a.clip(0, 1), nan=0.0) + 0),
    case("cvt.rzi.s32.f32", _converted, output="s32"),
    case("cvt.rn.f32.s32", lambda a: a.astype("f4"), output="f32"),
    case("cvt.rn.f32.u64", lambda a: a.astype("f4"), output="f32"),
    Case("cvt.rn.bf16.f32 d, a;", ("f32",), "b16", _bfloat16),
    Case(
        "cvt.rn.bf16x2.f32 d, a, b;", ("f32", "f32"), "b32", lambda a, b: _bfloat16(a).astype("u4") << 16 | _bfloat16(b)
    ),
    Case("cvt.f32.bf16 d, a;", ("b16",), "f32", lambda a: (a.astype("u4") << 16).view("f4")),
    Case("mov.b64 {b, c}, a; mov.b64 d, {c, b};", ("b64", "b32", "b32"), "b64", lambda a, b, c: a >> 32 | a << 32),
    Case("mov.b32 d, a;", ("f32",), "b32", lambda a: a.view("u4")),
]
INTEGERS = [
    *(case(f"add.{type}", lambda a, b: a + b) for type in ("s16", "s32", "u64")),
    *(case(f"sub.{type}", lambda a, b: a - b) for type in ("s32", "u32", "s64")),
    *(case(f"mul.lo.{type}", lambda a, b: a * b) for type in ("u16", "s32", "s64")),
    *(case(f"mul.hi.{type}", lambda a, b: a * b >> 32) for type in ("s32", "u32")),
    case("mul.hi.u64", lambda a, b: a * b >> 64),
    case("mul.wide.s32", lambda a, b: a * b, output="s64"),
    case("mul.wide.u16", lambda a, b: a * b, output="u32"),
    case("mad.lo.s32", lambda a, b, c: a * b + c),
    case("mad.wide.u32", lambda a, b, c: a * b + c, "u32 u32 u64", "u64"),
    *(case(f"div.{type}", _divided) for type in ("s32", "u32", "s64")),
    *(case(f"rem.{type}", lambda a, b: a if b == 0 else a - b * _divided(a, b)) for type in ("s32", "u64")),
    *(case(f"min.{type}", lambda a, b: min(a, b)) for type in ("s32", "u32", "s64")),
    *(case(f"max.{type}", lambda a, b: max(a, b)) for type in ("s32", "u32")),
    case("abs.s32", lambda a: abs(a)),
    case("neg.s64", lambda a: -a),
    case("and.b32", lambda a, b: a & b),
    case("or.b64", lambda a, b: a | b),
    case("xor.b16", lambda a, b: a ^ b),
    case("not.b32", lambda a: ~a),
    case("shl.b32", _shifted, "b32 u32"),
    case("shl.b64", _shifted, "b64 u32"),
    case("shr.u32", lambda a, b: a >> b, "u32 u32"),
    case("shr.s64", lambda a, b: a >> b, "s64 u32"),
    case("bfe.u32", _field, "u32 u32 u32"),
    Case("bfe.s32 d, a, 4, 8;", ("s32",), "s32", lambda a: ((a >> 4) + 128) % 256 - 128),
    Case("bfe.s32 d, a, 28, 8;", ("s32",), "s32", lambda a: a >> 28),
    Case("bfi.b64 d, a, b, 4, 8;", ("b64", "b64"), "b64", _inserted),
    case("cvt.s64.s32", lambda a: a, output="s64"),
    case("cvt.u64.u32", lambda a: a, output="u64"),
    case("cvt.u16.u32", lambda a: a, output="u16"),
    Case("cvt.s64.s16 d, a;", ("s16",), "s64", lambda a: a),
    *(
        Case(f"setp.{name}.{type} p, a, b; selp.u32 d, 1, 0, p;", (type, type), "u32", lambda a, b, f=f: int(f(a, b)))
        for name, f in list(COMPARISONS.items())[:6]
        for type in ("s32", "u64")
    ),
]

COUNT = 256


def _inputs(type: str, finite: bool, generator: numpy.random.Generator) -> Array:
    """Three rows: all pairs of special values, then random ones."""
    dtype = DTYPES[type]
    specials: list[Any] = [0, 1, 2, 3, 31, 32, 33, 64, 255]
    if dtype.kind == "f":
        numbers = generator.normal(size=(3, COUNT)) * 2.0 ** generator.integers(-9, 9, (3, COUNT))
        specials = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 2.0**-133, -(2.0**-20), 3e38, 1e-300]
    else:
        limits = numpy.iinfo(dtype)
        numbers = generator.integers(limits.min, limits.max, (3, COUNT), dtype, endpoint=True)
        specials += [limits.max, limits.max - 1, limits.min, limits.min + 1]
    with numpy.errstate(over="ignore"):
        result: Array = numpy.array(numbers).astype(dtype)
        if not finite:
            pairs = numpy.array([(x, y, x) for x in specials for y in specials], dtype)[:COUNT]
            result[:, : len(pairs)] = pairs.T
    return result


def _results(cases: list[Case], finite: bool) -> list[tuple[Case, Array, Array]]:
    """The results of every case, by one program whose thread i computes element i, and the expected ones."""
    generator = numpy.random.default_rng(0)
    inputs = {type: _inputs(type, finite, generator) for type in DTYPES}
    types = list(DTYPES)
    slots = numpy.zeros((len(types), 3, COUNT), "u8")
    for slot, type in zip(slots, types, strict=True):
        slot.view(DTYPES[type]).reshape(3, COUNT, -1)[..., 0] = inputs[type]
    body = "mul.wide.u32 %d1, %i, 8; add.u64 x, x, %d1; add.u64 y, y, %d1;\n"
    for number, item in enumerate(cases):
        declared = "".join(f".reg .{type} {name}; " for name, type in zip("abc", item.inputs, strict=False))
        loads = "".join(
            f"ld.global.{type} {name}, [x+{8 * COUNT * (3 * types.index(type) + row)}]; "
            for row, (name, type) in enumerate(zip("abc", item.inputs, strict=False))
        )
        store = f"st.global.{item.output} [y+{8 * COUNT * number}], d;"
        body += f"{{ .reg .pred p, q; .reg .{item.output} d; {declared}{loads}"
        body += f"setp.ne.u32 p, 0, 0; {item.code} {store} }}\n"
    outputs = numpy.zeros((len(cases), COUNT), "u8")
    kernel(body, "u64 x, u64 y").run([slots, outputs], grid=1, threads=COUNT)
    results = []
    for item, output in zip(cases, outputs, strict=True):
        dtype = DTYPES[item.output]
        values = [inputs[type][row] for row, type in enumerate(item.inputs)]
        if cases is INTEGERS:
            exact = [item.expected(*map(int, x)) for x in zip(*values, strict=True)]
            expected = numpy.array([x % 2 ** (8 * dtype.itemsize) for x in exact], "u8").astype(f"u{dtype.itemsize}")
            expected = expected.view(dtype)
        else:
            with numpy.errstate(all="ignore"):
                expected = numpy.asarray(item.expected(*values)).astype(dtype)
        results.append((item, output.view(dtype).reshape(COUNT, -1)[:, 0], expected))
    return results


@pytest.mark.parametrize(
    "cases", [FLOATS, FINITE, CONVERSIONS, INTEGERS], ids=["floats", "finite", "conversions", "integers"]
)
def test_instructions_compute_what_numpy_computes(cases: list[Case]) -> None:
    for item, found, expected in _results(cases, cases is FINITE):
        if item.tolerance:
            numpy.testing.assert_allclose(found, expected, item.tolerance, err_msg=item.code)
        elif expected.dtype.kind == "f":
            numpy.testing.assert_array_equal(found, expected, item.code)
            numbers = ~numpy.isnan(expected)
            # Of equal zeros, the smaller is the negative one, which numpy leaves open.
            if not re.search("min|max", item.code):
                numpy.testing.assert_array_equal(
                    numpy.signbit(found[numbers]), numpy.signbit(expected[numbers]), item.code
                )
        else:
            numpy.testing.assert_array_equal(found, expected, item.code)


# ---- warps ----


def test_lanes_exchange_values() -> None:
    body = """
    mul.wide.u32 %d1, %i, 4; add.u64 y, y, %d1;
    and.b32 %r1, %i, 31;
    shfl.sync.up.b32 %r2|%p1, %i, 3, 0, -1;
    st.global.u32 [y], %r2;
    selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [y+256], %r2;
    shfl.sync.down.b32 %r2, %i, 3, 0x181f, -1;
    st.global.u32 [y+512], %r2;
    shfl.sync.bfly.b32 %r2, %i, 5, 31, -1;
    st.global.u32 [y+768], %r2;
    shfl.sync.idx.b32 %r2, %i, 7, 31, -1;
    st.global.u32 [y+1024], %r2;
    setp.lt.u32 %p2, %r1, 5;
    vote.sync.ballot.b32 %r2, %p2, -1;
    st.global.u32 [y+1280], %r2;
    vote.sync.all.pred %p3, %p2, -1;
    vote.sync.any.pred %p4, %p2, -1;
    vote.sync.uni.pred %p5, %p2, -1;
    selp.u32 %r2, 4, 0, %p3; @%p4 add.u32 %r2, %r2, 2; @%p5 add.u32 %r2, %r2, 1;
    st.global.u32 [y+1536], %r2;
    setp.ge.u32 %p6, %r1, 16;
    @%p6 bra END;
    // Half of the lanes, of which some have exited by the time that the others look.
    setp.lt.u32 %p2, %r1, 16;
    vote.sync.all.pred %p3, %p2, 0xffff;
    selp.u32 %r2, 4, 0, %p3;
    st.global.u32 [y+1792], %r2;
    END:
    """
    i = numpy.arange(64)
    lane = i % 32
    expected = numpy.zeros((8, 64), "u4")
    expected[0] = numpy.where(lane >= 3, i - 3, i)
    expected[1] = lane >= 3
    expected[2] = numpy.where(lane % 8 < 5, i + 3, i)  # in segments of 8
    expected[3] = i ^ 5
    expected[4] = i - lane + 7
    expected[5] = 0b11111
    expected[6] = 2
    expected[7] = numpy.where(lane < 16, 4, 0)
    for order in ("forward", "reversed", "shuffled"):
        found = numpy.zeros_like(expected)
        kernel(body, "u64 y").run([found], grid=1, threads=64, order=order)
        numpy.testing.assert_array_equal(found, expected)


def test_lanes_that_meet_at_different_instructions_are_reported() -> None:
    body = """
    setp.lt.u32 %p1, %i, 7;
    @%p1 bra OTHER;
    bar.warp.sync -1;
    ret;
    OTHER:
    vote.sync.any.pred %p2, %p1, -1;
    """
    with pytest.raises(ptx.PtxError, match=r"lanes of one warp meet at PTX lines \d+ and \d+"):
        kernel(body).run([], grid=1, threads=32)


# ---- memory ----


def test_every_kind_of_memory_holds_what_was_stored() -> None:
    body = """
    .shared .align 16 .b8 declared[24];
    .local .align 8 .b8 own[16];
    mov.u64 %d1, own; cvta.local.u64 %d1, %d1;
    st.local.v2.u32 [%d1+8], {%i, 7};
    ld.v2.u32 {%r1, %r2}, [%d1+8];                // generic
    mov.u32 %r3, declared; mad.lo.u32 %r3, %i, 4, %r3;
    st.shared.u32 [%r3], %r1;
    mov.u32 %r4, added; mad.lo.u32 %r4, %i, 4, %r4;
    st.shared.u32 [%r4], %r2;
    bar.sync 0;
    xor.b32 %r5, %i, 1; shl.b32 %r5, %r5, 2;
    mov.u32 %r6, declared; add.u32 %r6, %r6, %r5;
    cvt.u64.u32 %d2, %r6; cvta.shared.u64 %d2, %d2;
    ld.u32 %r7, [%d2];                            // generic, of the neighbour
    ld.shared.u32 %r8, [%r4];
    ld.param.u64 %d3, [structure+8];
    ld.param.f32 %f1, [structure+4];
    mul.wide.u32 %d4, %i, 16; cvta.to.global.u64 %d3, %d3; add.u64 %d4, %d3, %d4;
    mov.b32 %r9, %f1;
    st.global.v4.u32 [%d4], {%r7, %r8, %r9, %i};
    """
    text = f"""
.extern .shared .align 16 .b8 added[];
.entry structured(.param .align 8 .b8 structure[16])
{{ .reg .b32 %i, %r<10>; .reg .b64 %d<10>; .reg .f32 %f<10>; mov.u32 %i, %tid.x; {body} ret; }}
.entry other() {{ .shared .align 4 .b8 more[4096]; ret; }}
"""
    y = numpy.zeros((6, 4), "u4")
    structure = numpy.array([(0, 1.5, y.ctypes.data)], "u4, f4, u8").tobytes()
    program = ptx.Kernel(text, "structured")
    program.run([structure], grid=1, threads=6, shared_bytes=24, memory=[y])
    assert y.tolist() == [[i ^ 1, 7, 0x3FC00000, i] for i in range(6)]
    with pytest.raises(ptx.PtxError, match=r"thread \(5, 0, 0\): store of 4 bytes at 52 of 52 in shared memory is out"):
        program.run([structure], grid=1, threads=6, shared_bytes=20, memory=[y])


def test_atomics_return_what_was_there() -> None:
    operations = {"add.u32": 3, "min.s32": -4, "max.u32": 9, "and.b32": 6, "or.b32": 8, "xor.b32": 5, "exch.b32": 1}
    body = "".join(
        f"atom.global.{opcode} %r1, [x+{4 * place}], {value}; st.global.u32 [y+{4 * place}], %r1;"
        for place, (opcode, value) in enumerate(operations.items())
    )
    body += "atom.global.cas.b32 %r1, [x+28], 7, 20; atom.global.cas.b32 _, [x+28], 7, 21;"
    body += "atom.global.add.f32 %f1, [x+32], 0f3F800000; red.global.add.u32 [x+36], 2;"
    x, y = numpy.full(10, 7, "i4"), numpy.zeros(10, "i4")
    x[8] = numpy.array([0.5], "f4").view("i4")[0]
    kernel(body, "u64 x, u64 y").run([x, y], grid=1, threads=1)
    assert x.tolist() == [10, -4, 9, 6, 15, 2, 1, 20, numpy.array([1.5], "f4").view("i4")[0], 9]
    assert y.tolist() == [7] * 7 + [0] * 3


FAULTS = {
    "load_after": ("ld.global.u32 %r1, [x+64];", "load of 4 bytes at 0x.* is out of bounds"),
    "load_before": ("ld.global.u32 %r1, [x+-4];", "load of 4 bytes at 0x.* is out of bounds"),
    "store_across": ("st.global.v4.u32 [x+64], {%i, %i, %i, %i};", "store of 16 bytes at 0x.* is out of bounds"),
    "parameter": ("ld.param.u32 %r1, [x_param+12];", "load of 4 bytes at 12 of the parameters is out of bounds"),
    "generic": ("mov.u64 %d1, 64; ld.u8 %r1, [%d1];", "load of 1 bytes at 0x40 is out of bounds"),
    "atomic": ("atom.global.add.u32 %r1, [x+64], 1;", "atomic access of 4 bytes at 0x.* is out of bounds"),
    "shared": (
        "mov.u32 %r1, 8190; st.shared.u16 [%r1+2], 0;",
        "store of 2 bytes at 8192 of 32 in shared memory",
    ),
    "copy": ("cp.async.ca.shared.global [0], [x+64], 16;", "load of 16 bytes at 0x.* is out of bounds"),
    "misaligned": ("ld.global.u32 %r1, [x+2];", "load of 4 bytes at 0x.* is misaligned"),
    "misaligned_vector": ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [x+8];", "load of 16 bytes at 0x.* is misaligned"),
    "misaligned_shared": ("ld.shared.f32 %f1, [6];", "load of 4 bytes at 0x6 is misaligned"),
    "trap": ("trap;", "trap"),
}


def test_a_faulty_access_is_reported_with_its_place() -> None:
    body = "".join(
        f"setp.eq.u32 %p1, fault, {number}; setp.eq.and.u32 %p1, %i, 3, %p1; @!%p1 bra AFTER{number};\n"
        f"{code}\nAFTER{number}:\n"
        for number, (code, _) in enumerate(FAULTS.values())
    )
    program = kernel(body, "u64 x, u32 fault")
    memory = numpy.zeros(32, "u4")
    x = memory[-(memory.ctypes.data // 4) % 4 :][:16]  # aligned to 16 bytes
    program.run([x, len(FAULTS)], grid=2, threads=4, shared_bytes=32)
    lines = []
    for number, (_, message) in enumerate(FAULTS.values()):
        place = r"block \(1, 0, 0\), thread \(3, 0, 0\): "
        with pytest.raises(ptx.PtxError, match=rf"{place}{message}.*\(PTX line (\d+)\)") as caught:
            program.run([x, number], grid=2, threads=4, shared_bytes=32, order="reversed")
        lines.append(int(str(caught.value).split()[-1].strip(")")))
    assert [line - lines[0] for line in lines] == [3 * number for number in range(len(FAULTS))]


# ---- mistakes in time ----

# Every thread takes its neighbour's value from shared memory.
NEIGHBOUR = """
    mul.wide.u32 %d1, %i, 4; add.u64 x, x, %d1; add.u64 y, y, %d1;
    shl.b32 %r1, %i, 2;
    {store}
    setp.ne.u32 %p1, synchronised, 0;
    @%p1 {synchronisation}
    xor.b32 %r2, %r1, 4;
    ld.shared.f32 %f2, [%r2];
    st.global.f32 [y], %f2;
"""
EXCHANGES = {
    "barrier": NEIGHBOUR.format(
        store="ld.global.f32 %f1, [x]; st.shared.f32 [%r1], %f1;", synchronisation="bar.sync 0;"
    ),
    "warp": NEIGHBOUR.format(
        store="ld.global.f32 %f1, [x]; st.shared.f32 [%r1], %f1;", synchronisation="bar.warp.sync -1;"
    ),
    "wait": NEIGHBOUR.format(
        store="cp.async.ca.shared.global [%r1], [x], 4; cp.async.commit_group;",
        synchronisation="cp.async.wait_group 0;\nbar.sync 0;",
    ),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_missing_synchronisation_shows_as_nan(name: str) -> None:
    program = kernel(EXCHANGES[name], "u64 x, u64 y, u32 synchronised")
    for order in ("forward", "reversed", "shuffled"):
        for synchronised in (True, False):
            x = numpy.arange(32, dtype="f4")
            y = numpy.zeros_like(x)
            program.run([x, y, synchronised], grid=1, threads=32, shared_bytes=128, order=order)
            if synchronised:
                assert y.tolist() == [i ^ 1 for i in range(32)]
            else:
                assert numpy.isnan(y).any()


def test_copies_arrive_with_their_group_and_not_before() -> None:
    body = """
    cp.async.ca.shared.global [0], [x], 4; cp.async.commit_group;
    cp.async.ca.shared.global [4], [x+4], 4; cp.async.commit_group;
    cp.async.ca.shared.global [8], [x+8], 4;
    cp.async.wait_group 1;
    ld.shared.f32 %f1, [0]; ld.shared.f32 %f2, [4]; ld.shared.f32 %f3, [8]; st.global.v2.f32 [y], {%f1, %f2};
    st.global.f32 [y+8], %f3;
    cp.async.wait_all;
    ld.shared.f32 %f1, [8]; st.global.f32 [y+12], %f1;
    """
    x, y = numpy.array([1, 2, 3], "f4"), numpy.zeros(4, "f4")
    kernel(body, "u64 x, u64 y").run([x, y], grid=1, threads=1, shared_bytes=12)
    numpy.testing.assert_array_equal(y, [1, numpy.nan, numpy.nan, 3])


def test_a_deadlock_is_reported() -> None:
    body = """
    setp.lt.u32 %p1, %i, 40;
    selp.u32 %r1, 0, other, %p1;
    bar.sync %r1;
    setp.ge.u32 %p1, %i, waiting;
    @%p1 ret;
    bar.sync 1, 64;
    """
    program = kernel(body, "u32 other, u32 waiting")
    program.run([0, 64], grid=3, threads=64)
    for arguments in ([1, 64], [0, 63]):
        with pytest.raises(ptx.PtxError, match=r"deadlock: block \(0, 0, 0\), thread \(0, 0, 0\) and all others wait"):
            program.run(arguments, grid=3, threads=64)


def test_barriers_count_the_threads_that_say_yes() -> None:
    body = """
    setp.lt.u32 %p1, %i, few;
    bar.red.popc.u32 %r1, 0, %p1;
    bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1;
    @%p2 add.u32 %r1, %r1, 1000;
    @%p3 add.u32 %r1, %r1, 2000;
    st.global.u32 [y], %r1;
    """
    y = numpy.zeros(1, "u4")
    program = kernel(body, "u32 few, u64 y")
    for few, expected in {0: 0, 1: 2001, 48: 3048}.items():
        program.run([few, y], grid=1, threads=48)
        assert y[0] == expected


def test_only_a_race_depends_on_the_order() -> None:
    body = """
    mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 16, %i;
    st.global.u32 [x], %r1;
    red.global.add.u32 [x+4], %r1;
    """
    program = kernel(body, "u64 x")
    last, sums = [], set()
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2), ("shuffled", 1)):
        x = numpy.zeros(2, "u4")
        program.run([x], grid=10, threads=16, order=order, seed=seed)
        last.append(int(x[0]))
        sums.add(int(x[1]))
    assert sums == {sum(range(160))}
    assert last[:2] == [159, 0]
    assert last[2] == last[4] != last[3]


def test_a_block_waits_for_one_that_has_a_place_only() -> None:
    """The first block for the last one."""
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra ARRIVE;
    WAIT:
    ld.acquire.gpu.global.u32 %r2, [x];
    setp.eq.u32 %p2, %r2, 3;
    @%p2 ret;
    nanosleep.u32 20;
    bra WAIT;
    ARRIVE:
    red.release.gpu.global.add.u32 [x], 1;
    """
    program = kernel(body, "u64 x")
    for order, resident in (("forward", 2), ("reversed", 1), ("shuffled", 2)):
        program.run([numpy.zeros(1, "u4")], grid=4, threads=1, order=order, resident=resident)
    with pytest.raises(ptx.PtxError, match="not done after 0 s; 1 of 4 blocks have started"):
        program.run([numpy.zeros(1, "u4")], grid=4, threads=1, resident=1, timeout=0.1)


# ---- counts, and refused programs ----


def test_instructions_are_counted_for_all_threads() -> None:
    body = """
    mov.u32 %r1, 0;
    LOOP:
    add.u32 %r1, %r1, 1;
    setp.le.u32 %p1, %r1, %i;
    @%p1 bra LOOP;
    setp.eq.u32 %p2, %i, 0;
    @%p2 st.global.u32 [x], %r1;
    @%p2 bra END;
    mul.lo.u32 %r2, %r1, %r1;
    END:
    """
    counts = []
    for order in ("forward", "shuffled"):
        program = kernel(body, "u64 x", counted=True)
        counts.append(program.run([numpy.zeros(1, "u4")], grid=3, threads=10, order=order))
    assert (
        counts[0]
        == counts[1]
        == {
            "ld.param.u64": 30,
            "mov.u32": 60,
            "add.u32": 3 * 55,
            "setp.le.u32": 3 * 55,
            "bra": 3 * 55 + 30,
            "setp.eq.u32": 30,
            "st.global.u32": 30,  # under a predicate, whether it is true or not
            "mul.lo.u32": 3 * 9,
            "ret": 30,
        }
    )
    assert kernel(body, "u64 x").run([numpy.zeros(1, "u4")], grid=1, threads=1) == {}


def test_arguments_are_encoded_as_the_parameters_are() -> None:
    body = """
    st.global.u32 [x], a; st.global.f32 [x+4], b; st.global.f64 [x+8], c; st.global.u64 [x+16], d;
    st.global.u64 [x+24], e;
    """
    program = kernel(body, "u64 x, u32 a, f32 b, f64 c, s64 d, u64 e")
    x = numpy.full(32, 1, "u1")
    program.run([x, -2, 1, numpy.float32(0.5), numpy.int32(-3), None], grid=1, threads=1)
    assert x[:4].view("i4")[0] == -2
    assert x[4:8].view("f4")[0] == 1
    assert x[8:16].view("f8")[0] == 0.5
    assert x[16:].view("i8").tolist() == [-3, 0]
    with pytest.raises(ptx.PtxError, match="6 arguments are expected, and 1 given"):
        program.run([x], grid=1, threads=1)


def test_what_is_not_translated_is_named_with_its_line() -> None:
    for code in ("fma.rn.bf16x2 %r1, %r1, %r1, %r1;", "add.cc.u32 %r1, %r1, %r1;", "wgmma.fence.sync.aligned;"):
        with pytest.raises(ptx.PtxError, match=rf"line 11: '{code.strip(';')} ?' cannot be translated"):
            kernel(code)
    with pytest.raises(ptx.PtxError, match=r"line 11: .* cannot be translated: KeyError\('%none'\)"):
        kernel("mov.u32 %r1, %none;")
    with pytest.raises(ptx.PtxError, match=r"names contain 'k': \['k1', 'k2'\]"):
        ptx.Kernel(".entry k1() { ret; } .entry k2() { ret; }", "k")


def test_other_processors_get_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert str(ptx.unavailable()).startswith("PTX runs on x86-64 only")
    with pytest.raises(ptx.PtxError, match="this is aarch64"):
        kernel("")
