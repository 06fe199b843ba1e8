"""The folder ``model.tvmb/``: what a compiled model is on disk.

====================== =====================================================================
``lib.so``             host code, device code, VM program and the embedded parameters; plain
                       TVM loads it without this package
``params.safetensors`` the parameters, only where they exceed 256 MiB
``kernels/*.cu``       the CUDA source the cubins were made from, kernel by kernel; joined by
                       :func:`tvm_balanced.cuda.source.join_kernels` it is that, byte by byte
``reference.json.gz``  every kernel before its schedule, which ``verify`` compares it with
``report.txt``         per layer what was done and why
``manifest.json``      everything else, and the SHA-256 of every other file
====================== =====================================================================

Constants in a shared library are copied several times while it is built and loaded (2.5 GiB took
12.9 GiB of memory): hence the limit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tvm_balanced._version import __version__
from tvm_balanced.artifact.manifest import (
    KERNELS,
    LIBRARY,
    MANIFEST,
    PARAMETERS,
    REFERENCE,
    REPORT,
    CompilerEntry,
    CublasCall,
    FunctionEntry,
    KernelEntry,
    Manifest,
    TargetEntry,
    read_manifest,
)
from tvm_balanced.cuda.cubin import DeviceImage
from tvm_balanced.cuda.source import file_stem, split_kernels
from tvm_balanced.errors import ArtifactError, OutputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import Report
from tvm_balanced.support.files import (
    as_output_error,
    check_parent,
    replace_folder,
    sync,
    write_synced,
    write_whole_folder,
)
from tvm_balanced.support.provenance import package_versions
from tvm_balanced.support.tensors import Array, write_tensors
from tvm_balanced.targets.resolve import TargetSpec

EMBED_LIMIT = 256 * 1024 * 1024


def split_parameters(params: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Decide where parameters go: all into the library up to 256 MiB, else all beside it."""
    if sum(array.nbytes for array in params.values()) <= EMBED_LIMIT:
        return dict(params), {}
    return {}, dict(params)


@dataclass(frozen=True)
class ExportedLibrary:
    """What :func:`tvm_balanced.build.export.export_library` leaves for an artifact."""

    path: Path  # of the shared library
    cuda_source: str  # the translation unit that NVRTC compiled; empty for llvm
    images: tuple[DeviceImage, ...]  # the cubins in the library; empty for llvm
    # what compiled them, see cuda.nvrtc.compiler; empty for llvm
    compiler: Mapping[str, object] = field(default_factory=dict)
    # the kernels before any schedule, which say what the compiled ones should compute: PrimFuncs as TVM's
    # JSON, compressed by gzip; empty where another function than this package's built the library
    reference: bytes = b""
    # how each kernel was scheduled, see schedules.tuned.Coverage
    coverage: tuple[Mapping[str, object], ...] = ()
    problems: tuple[str, ...] = ()  # tuning records that did not fit their kernel


@dataclass(frozen=True)
class Contents:
    """What a ``model.tvmb`` is written from."""

    exported: ExportedLibrary
    target: TargetSpec
    functions: Sequence[FunctionEntry]  # from artifact.functions.describe_functions
    model: str = "model"
    options: CompileOptions = field(default_factory=CompileOptions)
    report: Report = field(default_factory=Report)
    params: Mapping[str, Array] = field(default_factory=dict)  # those that the library lacks
    cublas: Sequence[Mapping[str, str]] = ()  # fields of CublasCall

    def write(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder whole or not at all; ``overwrite`` replaces a ``model.tvmb`` and nothing else.

        OutputError if the path exists or cannot be written; nothing is left behind.
        """
        return _whole(path, self._fill, overwrite)

    def _fill(self, work: Path) -> None:
        exported, spec = self.exported, self.target
        _link(exported.path, work / LIBRARY)
        if self.params:
            write_tensors(work / PARAMETERS, self.params)
        if exported.cuda_source:
            (work / KERNELS).mkdir()
            for name, text in split_kernels(exported.cuda_source).items():
                write_synced(work / KERNELS / f"{file_stem(name)}.cu", text.encode())
        if exported.reference:
            write_synced(work / REFERENCE, exported.reference)
        write_synced(work / REPORT, self.report.text().encode())
        features = tuple(spec.features)
        versions = package_versions(("apache-tvm", "apache-tvm-ffi", "numpy"))
        manifest = Manifest(
            model=self.model,
            options=self.options.to_json(),
            target=TargetEntry(spec.name, spec.kind, spec.arch, features, os.uname().machine),
            device_code="cubin" if exported.images else "none",
            functions=tuple(self.functions),
            versions={"tvm-balanced": __version__, **versions},
            title=self.report.title,
            layers=tuple(self.report),
            cubins=tuple(exported.images),
            compiler=CompilerEntry.of(exported.compiler) if exported.compiler else None,
            files={name: sha256(work / name) for name in _contents(work)},
            cublas=tuple(msgspec.convert(call, CublasCall) for call in self.cublas),
            coverage=tuple(msgspec.convert(kernel, KernelEntry) for kernel in exported.coverage),
        )
        write_synced(work / MANIFEST, (json.dumps(manifest.to_json(), indent=2) + "\n").encode())


def copy_library(source: Path, path: Path | str, *, overwrite: bool = False) -> Path:
    """Copy a ``model.tvmb`` whole or not at all; see :meth:`Contents.write` for the errors."""

    def fill(work: Path) -> None:
        for name in _contents(source):
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copy(source / name, work / name)
            sync(work / name)

    return _whole(path, fill, overwrite)


def move_library(source: Path, path: Path | str, *, overwrite: bool = False) -> Path:
    """Move a ``model.tvmb``; see :meth:`Contents.write` for the errors."""
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    with as_output_error(path):
        try:
            replace_folder(source, path)
            return path
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    copy_library(source, path, overwrite=overwrite)
    shutil.rmtree(source, ignore_errors=True)
    return path


def _whole(path: Path | str, fill: Callable[[Path], None], overwrite: bool) -> Path:
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    write_whole_folder(path, fill)
    return path


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that no library could be written to, before hours of work.

    OutputError if it exists and is no ``model.tvmb`` to overwrite, or its parent is missing or not writable.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise OutputError(f"{path} exists: choose another path or ask for it to be overwritten")
        if not (path / MANIFEST).is_file():
            raise OutputError(
                f"{path} exists and is not a .tvmb folder, so it is not overwritten: choose another"
            )
    check_parent(path)


def _contents(work: Path) -> list[str]:
    return sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())


def _link(source: Path, destination: Path) -> None:
    """Give a file another name where the file system can, else copy it."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
    sync(destination)
    destination.chmod(0o755)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_hashes(path: Path | str, manifest: Manifest | None = None) -> None:
    """Check that every file of a ``model.tvmb`` is as it was written and there, else ArtifactError."""
    path = Path(path)
    manifest = read_manifest(path) if manifest is None else manifest
    for name, expected in manifest.files.items():
        file = path / name
        try:
            digest = sha256(file)
        except OSError as error:
            raise ArtifactError(
                f"{file} cannot be read ({error.strerror}): copy or build {path} again"
            ) from error
        if digest != expected:
            raise ArtifactError(
                f"{file} has changed since it was built (SHA-256 {digest[:12]}, expected "
                f"{expected[:12]}): copy or build {path} again"
            )
