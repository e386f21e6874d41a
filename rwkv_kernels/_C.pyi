from typing import TypedDict

class Build(TypedDict):
    torch: str
    compiler: str
    openmp: bool
    cpu_instruction_sets: tuple[str, ...]
    cpu_instruction_set: str
    cuda: str | None

class CpuPlan(TypedDict):
    threads: int
    channel_tile: int
    tiles: int
    span_steps: int
    spans: int

def build_info() -> Build: ...
def plan_cpu(dtype: str, B: int, T: int, C: int, threads: int) -> CpuPlan: ...
def checkpoint_interval(dtype: str) -> int: ...
