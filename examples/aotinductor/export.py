"""Packages a model with AOTInductor, for programs without Python: main.cpp, beside this file, runs the result.

python examples/aotinductor/export.py FOLDER
torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
cmake -S examples/aotinductor -B FOLDER/build -DCMAKE_PREFIX_PATH=$torch && cmake --build FOLDER/build
FOLDER/build/run rwkv_kernels/librwkv_kernels.so FOLDER/model.pt2 FOLDER/example.pt

The package is machine code for this processor and this torch's version; the operators are called by their names, from
the library that the program loads.
"""

import argparse
from pathlib import Path

import torch

from rwkv_kernels.nn import RWKV, RWKVState

T = 200  # of the example; the package takes any number of tokens


def package(folder: Path) -> None:
    """Writes model.pt2, and example.pt with some tokens and the model's outputs here."""
    torch.manual_seed(0)
    model = RWKV(vocab_size=256, channels=64, layers=2).eval()
    tokens = torch.randint(256, (1, T))
    state = model.empty_state(1)
    steps = {1: torch.export.Dim("T", min=2, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(model, (tokens, state), dynamic_shapes=(steps, RWKVState(None, None, None)))
        logits, final = model(tokens, state)
    torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
    torch.save({"inputs": [tokens, *state], "outputs": [logits, *final]}, folder / "example.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    package(arguments.folder)
