"""Whether a library can run here: versions, CPU features, the GPU."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from tvm_balanced.artifact.manifest import Manifest
from tvm_balanced.errors import ArtifactError, ToolchainError
from tvm_balanced.support.provenance import package_version
from tvm_balanced.targets.driver import detect_driver
from tvm_balanced.targets.host import usable_flags

_PINNED = ("apache-tvm", "apache-tvm-ffi")


def check_versions(path: Path, versions: Mapping[str, str]) -> None:
    """Whether the TVM here is the one that the library was compiled with."""
    for package in _PINNED:
        here, built = package_version(package), versions.get(package)
        if here is None:
            raise ToolchainError(
                f"{path} needs {package} {built}, which is not installed; pip install tvm-balanced"
            )
        if built != here:
            raise ArtifactError(
                f"{path} was compiled with {package} {built or 'of unknown version'}, but {here} is "
                f"installed; compile it again, or pip install {package}=={built or here}"
            )


def check_host(path: Path, manifest: Manifest) -> None:
    """Whether the host code can run here."""
    target = manifest.target
    machine = platform.machine()
    if target.machine != machine:
        raise ArtifactError(
            f"{path} was compiled for {target.machine} processors, but this machine is {machine}; "
            "compile it here"
        )
    if target.kind == "llvm":
        here = usable_flags()
        missing = sorted(set(target.features) - here)
        # where the system does not say what its CPU can do there is nothing to compare with
        if here and missing:
            raise ArtifactError(
                f"{path} was compiled for {target.arch} and uses {', '.join(missing)}, which this CPU "
                "does not have; compile it for llvm on this machine, or for llvm-x86-64-v3"
            )


def check_device(path: Path, manifest: Manifest) -> None:
    """Whether the GPU that the library was compiled for is here."""
    target = manifest.target
    driver = detect_driver()
    if not driver.gpus:
        raise ToolchainError(
            f"{path} was compiled for an NVIDIA GPU ({target.arch}), but {driver.problem}; run it on a "
            "machine with one, or compile for llvm"
        )
    if manifest.device_code != "cubin":
        raise ArtifactError(f"{path} holds no machine code for {target.arch}; compile it again")
    gpu_ordinal(target.arch, path)


def gpu_ordinal(arch: str, path: Path | str = "the library") -> int:
    """Return the number of the first GPU here that runs code for ``arch``."""
    gpus = detect_driver().gpus
    for ordinal, gpu in enumerate(gpus):
        # "a" and "f" code runs on the very architecture; so does plain code, compared as strictly:
        # limits of shared memory differ within a family
        if gpu.arch == arch.rstrip("af"):
            return ordinal
    present = ", ".join(sorted({f"{gpu.name} ({gpu.arch})" for gpu in gpus})) or "none"
    here = gpus[0].arch if gpus else arch
    raise ArtifactError(
        f"{path} was compiled for {arch}, but the GPU here is {present}; compile it for cuda-{here}"
    )
