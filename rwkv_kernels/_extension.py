"""Loads the compiled extension, or says why it cannot and what would help. Nothing is ever compiled here."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "run `pip install --no-build-isolation .` in the source tree with this Python"


@dataclass(frozen=True)
class Extension:
    """Either `module` is there, or `why_missing` says why not."""

    module: ModuleType | None
    why_missing: str | None


def _minor_version(version: str) -> list[str]:
    return version.split(".")[:2]


def _load() -> Extension:
    record = Path(__file__).with_name("_built_for.txt")
    if record.exists():
        built_for = record.read_text().strip()
        # A library made for another torch may crash while it loads, so it is not given the chance.
        if _minor_version(built_for) != _minor_version(torch.__version__):
            return Extension(
                None, f"the extension was built for torch {built_for}, and this is torch {torch.__version__}: {REBUILD}"
            )
    try:
        return Extension(importlib.import_module("rwkv_kernels._C"), None)
    except ModuleNotFoundError:
        return Extension(None, f"the extension is not built for this Python: {REBUILD}")
    except ImportError as error:
        return Extension(None, f"the extension does not load ({error}): {REBUILD}")


extension = _load()
