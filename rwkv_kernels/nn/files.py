"""Tensors by name, from and into files. Reading executes nothing that a file contains."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SAFETENSORS = ".safetensors"


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, known by its suffix, or of one that torch.save wrote; on the CPU.

    Each has memory of its own, also where the file's entries are views of one another.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is broken, or holds anything but tensors by name.
        ImportError: it is a safetensors file, and safetensors is not installed.
    """
    return _read_safetensors(path) if Path(path).suffix == SAFETENSORS else read_torch(path)


def read_torch(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The same for a file that torch.save wrote."""
    with open(path, "rb") as file:  # outside, because torch raises an OSError for some broken files, too
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on the place where the file is broken
            raise _unreadable(path, error) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        content = sorted(map(str, found))[:5] if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path}: expected tensors by name, got {content}")
    return apart(found)


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        return safetensors.load_file(path)  # type: ignore[no-any-return]
    except OSError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(
        f"{path}: broken, or more than tensors, which is refused because reading it could execute code: {reason}"
    )


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, copied where they share memory with one another or are a part of more."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        found[name] = tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
    return found


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file where the path has that suffix, else one for torch.load; shared memory for each."""
    tensors = apart({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    if path.suffix == SAFETENSORS:
        # transformers asks for this entry.
        _safetensors().save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install 'rwkv_kernels[safetensors]'") from error
    return safetensors.torch
