"""Loads the compiled extension, or says why it cannot and what would help. Nothing is ever compiled here."""

import importlib
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Extension:
    """Either `module` is there, or `why_missing` says why not."""

    module: ModuleType | None
    why_missing: str | None


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]


def _hidden(package: Path) -> Path | None:
    """Another copy of the package, further down sys.path, that has a library for this Python."""
    copies = [Path(entry).resolve() / "rwkv_kernels" for entry in sys.path]
    spec = PathFinder.find_spec("rwkv_kernels._C", [str(copy) for copy in copies if copy != package])
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _what_helps(package: Path) -> str:
    tree = package.parent
    if not (tree / "setup.py").exists():
        return "run `pip install --no-build-isolation .` in the source tree with this Python"
    # An installed copy is no help to whoever imports the tree, as a Python does that is started in it.
    in_place = f"run `python setup.py build_ext --inplace` in {tree} with this Python"
    hidden = _hidden(package)
    if hidden is None:
        return in_place
    return (
        f"this is the source tree {tree}, which hides the package that is installed in {hidden}: start Python in "
        f"another folder (`cd ..`) and without the tree on PYTHONPATH, or {in_place}"
    )


def _load() -> Extension:
    record = PACKAGE / "_built_for.txt"
    if record.exists():
        built_for = record.read_text().strip()
        # A library made for another torch may crash while it loads, so it is not given the chance.
        if _minor_version(built_for) != _minor_version(torch.__version__):
            why = f"the extension was built for torch {built_for}, and this is torch {torch.__version__}"
            return Extension(None, f"{why}: {_what_helps(PACKAGE)}")
    try:
        return Extension(importlib.import_module("rwkv_kernels._C"), None)
    except ModuleNotFoundError:
        return Extension(None, f"the extension is not built for this Python: {_what_helps(PACKAGE)}")
    except ImportError as error:
        return Extension(None, f"the extension does not load ({error}): {_what_helps(PACKAGE)}")


extension = _load()
