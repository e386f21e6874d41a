"""How the Triton kernels are laid over a problem: a table and a pure function of sizes. Knows no Triton and no GPU."""

from dataclasses import dataclass

__all__ = [
    "BI_BACKWARD_PARKED",
    "BI_FORWARD_PARKED",
    "CARRIED_CHANNELS",
    "CHECKPOINT_INTERVAL",
    "LOADED_STEPS",
    "PARKED_STATES",
    "REGISTERS",
    "REPLAYED_STEPS",
    "Plan",
    "ceil_div",
    "make_packed_plan",
    "make_plan",
    "widths",
]

# Steps from one saved state to the next, as in the other backends (csrc/common/params.h).
CHECKPOINT_INTERVAL = 64

# Steps whose rows are loaded together, and steps that backward keeps in registers on its way forward to have them on
# its way back: eight of these would take more than the 128 registers that let sixteen warps onto a multiprocessor.
LOADED_STEPS = 8
REPLAYED_STEPS = 4

# The states that backward parks within an interval: before each of its replayed groups, and before each step that is
# left over where the sequence ends.
PARKED_STATES = CHECKPOINT_INTERVAL // REPLAYED_STEPS + LOADED_STEPS - 1

# Numbers that the bidirectional kernels park for each group of replayed steps, and for each step that is left over
# where a sequence ends: the state after it; in backward also the state before it, and the adjoint of that after it.
BI_FORWARD_PARKED = 3
BI_BACKWARD_PARKED = 8

# Channels of a thread. Four take an eighth fewer instructions each than two; two make twice the programs.
NARROW, WIDE = 2, 4

# Programs, of one warp each, that a multiprocessor should have: as many as the registers of backward let in. With
# SERIAL_PROGRAMS of the wide ones already, a second pass over the inputs costs more than idle warps do.
PROGRAMS = 12
SERIAL_PROGRAMS = 3

# Channels of a program that carries. It waits for memory at every eighth chunk, so that more of them, each with fewer
# registers, take less time.
CARRIED_CHANNELS = 64

# Registers of a thread that NVIDIA's compiler may use for the backward of a gate, by the channels of a program: of 64K,
# for as many programs as above, and all that a thread can have. Left to itself it aims at fewer, and spills.
REGISTERS = {NARROW * 32: 168, WIDE * 32: 255}

# Below so many steps two more launches take longer than the steps. States are carried from chunk to chunk one after the
# other, which for more chunks than this would take longer than the steps within them.
LEAST_CHUNKED_STEPS = 256
MOST_CHUNKS = 256

# Packed sequences as long as this many mean ones are not cut where there are enough of them for the GPU.
UNCUT_MEANS = 2


@dataclass(frozen=True)
class Plan:
    """The cut of a call: the tile of channels of a program, and the chunk of steps that it takes."""

    channels: int
    chunk_len: int  # a multiple of CHECKPOINT_INTERVAL
    chunks: int  # of an element of the batch


def widths(warp: int) -> tuple[int, int]:
    """The channels of a narrow and of a wide program; AMD's warps of 64 threads spill registers with four each."""
    return NARROW * warp, (WIDE if warp == 32 else NARROW) * warp


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def make_plan(B: int, T: int, C: int, multiprocessors: int, warp: int) -> Plan:
    """The plan for B, T, C of at least 1 on a device of so many multiprocessors and threads of a warp."""
    intervals = ceil_div(T, CHECKPOINT_INTERVAL)
    narrow, wide = widths(warp)
    wide_programs = B * ceil_div(C, wide)
    enough = PROGRAMS * multiprocessors
    channels = wide if wide_programs * min(intervals, MOST_CHUNKS) >= enough else narrow
    if wide_programs >= SERIAL_PROGRAMS * multiprocessors or T < LEAST_CHUNKED_STEPS:
        chunks = 1
    else:
        chunks = min(ceil_div(enough, B * ceil_div(C, channels)), MOST_CHUNKS)
    chunk_len = ceil_div(intervals, chunks) * CHECKPOINT_INTERVAL
    return Plan(channels, chunk_len, ceil_div(T, chunk_len))


def make_packed_plan(sequences: int, total: int, C: int, multiprocessors: int, warp: int) -> Plan:
    """The plan for so many sequences with `total` steps together, each at least 1; it does not know their lengths.

    Chunks as for one sequence of all the steps are enough programs, whatever the lengths are. Only a sequence that is
    longer than a chunk is read twice.
    """
    plan = make_plan(1, total, C, multiprocessors, warp)
    chunk_len = plan.chunk_len
    if sequences * ceil_div(C, widths(warp)[1]) >= SERIAL_PROGRAMS * multiprocessors:
        uncut = ceil_div(UNCUT_MEANS * total, sequences)
        chunk_len = max(chunk_len, ceil_div(uncut, CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL)
    return Plan(plan.channels, chunk_len, total // chunk_len + sequences)
