"""Lays out build/hub, which Hugging Face's `kernels` loads: this package, in a separate operator namespace.

    build/hub/build/<variant>/metadata.json
                              __init__.py      hub/__init__.py
                              rwkv_kernels/    the package and its libraries
    build/hub/                build.toml, csrc/, torch-ext/: the same as a project for kernel-builder, by hub/build.toml

A variant is named by the ABI that it needs, its backend, processor and system, as `kernels` parses it. The one for the
CPU is always made, and one for CUDA beside it where setup.py builds CUDA kernels.

The namespace is the variant's id, under which `kernels` also imports it, so that several copies can be loaded by one
process, an installed package among them. It is a digest of the content. Only the sources
that register operators are compiled with it; the objects of the others are those of the ordinary build.
"""

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import cuda_toolkit
import setuptools
import tomllib
import torch

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "hub"
HUB = ROOT / "hub"
METADATA = "metadata.json"


def package_files() -> list[Path]:
    package = ROOT / "rwkv_kernels"
    return [package / "py.typed", *sorted(package.rglob("*.py"))]


def native_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def identifier(name: str, backend: str) -> str:
    """As kernel-builder makes one: unique among kernels, their versions and backends, and a name in Python and C++."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted(HUB.glob("*.*")), *package_files(), *native_files()]:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"_{name}_{backend}_{digest.hexdigest()[:8]}"


def variant(configuration: dict[str, Any], backend: str, compute: str) -> str:
    abi = configuration["torch"]["stable-abi"][backend].replace(".", "")
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi{abi}-{compute}-{machine}-{platform.system().lower()}"


def setup(build_lib: Path, *arguments: str) -> setuptools.Distribution:
    """The project's setup.py with a build_ext that is yet to run."""
    script = ["--quiet", "build_ext", f"--build-lib={build_lib}", *arguments]
    # setuptools' distutils, which need not be the one that `import distutils` finds.
    return setuptools.distutils.core.run_setup(str(ROOT / "setup.py"), script, stop_after="commandline")


def registers(source: str) -> bool:
    return "WKV_NAMESPACE" in (ROOT / source).read_text()


def ordinary_objects() -> Path:
    """The folder of the ordinary build's objects, after running that build."""
    distribution = setup(OUT / "ordinary")
    distribution.run_commands()
    return Path(distribution.get_command_obj("build_ext").build_temp)


def build(folder: Path, namespace: str, backend: str, objects: Path) -> None:
    """The backend's libraries, into `folder`/rwkv_kernels."""
    distribution = setup(folder, f"--build-temp={OUT / 'objects' / backend}")
    if backend == "cpu":
        distribution.ext_modules = [x for x in distribution.ext_modules if "_cuda" not in x.name]
    for extension in distribution.ext_modules:
        shared = [source for source in extension.sources if not registers(source)]
        extension.sources = [source for source in extension.sources if registers(source)]
        library = extension.name.split(".")[-1]
        extension.extra_objects = [str(objects / library / Path(source).with_suffix(".o")) for source in shared]
        extension.define_macros.append(("WKV_NAMESPACE", namespace))
    distribution.run_commands()


def copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def copy_python(folder: Path) -> None:
    copy(HUB / "__init__.py", folder / "__init__.py")
    for path in package_files():
        copy(path, folder / path.relative_to(ROOT))


def lay_out_project(name: str) -> None:
    """Lays out the sources for kernel-builder; the macros that setup.py would give are at the head of namespace.h."""
    for folder in ("csrc", "torch-ext"):
        shutil.rmtree(OUT / folder, ignore_errors=True)
    copy(HUB / "build.toml", OUT / "build.toml")
    copy(HUB / "torch_binding.cpp", OUT / "torch-ext" / "torch_binding.cpp")
    copy_python(OUT / "torch-ext" / name)
    for path in native_files():
        copy(path, OUT / path.relative_to(ROOT))
    header = "csrc/common/namespace.h"
    (OUT / header).write_text((HUB / "namespace.h").read_text() + "\n" + (ROOT / header).read_text())


def lay_out(folder: Path, metadata: dict[str, Any], objects: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    build(folder, metadata["id"], metadata["backend"]["type"], objects)
    copy_python(folder)
    # Last: a folder that has it is complete.
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    os.chdir(ROOT)  # setup.py names its sources from here
    configuration = tomllib.loads((HUB / "build.toml").read_text())
    lay_out_project(configuration["general"]["name"])
    toolkit = cuda_toolkit.to_build_with(torch.version.cuda)
    computes: dict[str, tuple[str, dict[str, Any]]] = {"cpu": ("cpu", {})}
    if toolkit is not None:
        computes["cuda"] = f"cu{toolkit.version.replace('.', '')}", {"archs": toolkit.architectures()}
    objects = None
    for backend, (compute, details) in computes.items():
        folder = OUT / "build" / variant(configuration, backend, compute)
        metadata = {key: configuration["general"][key] for key in ("name", "version", "license")}
        metadata |= {"id": identifier(metadata["name"], backend), "python-depends": []}
        metadata |= {"backend": {"type": backend} | details}
        if not (folder / METADATA).exists() or json.loads((folder / METADATA).read_text()) != metadata:
            objects = objects or ordinary_objects()
            lay_out(folder, metadata, objects)
        print(folder.relative_to(ROOT))


if __name__ == "__main__":
    main()
