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

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

from tvm_balanced._version import __version__
from tvm_balanced.artifact.exported import ExportedLibrary
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
from tvm_balanced.cuda.source import file_stem, split_kernels
from tvm_balanced.errors import ArtifactError, OutputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import Report
from tvm_balanced.support.tensors import write_tensors
from tvm_balanced.targets.resolve import TargetSpec

EMBED_LIMIT = 256 * 1024 * 1024
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy")


def split_parameters(
    params: Mapping[str, npt.NDArray[Any]],
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """Decide where parameters go: all into the library up to 256 MiB, else all beside it.

    Parameters
    ----------
    params : mapping of str to ndarray
        All parameters.

    Returns
    -------
    embedded, beside : dict of str to ndarray
        One of them is empty.
    """
    if sum(array.nbytes for array in params.values()) <= EMBED_LIMIT:
        return dict(params), {}
    return {}, dict(params)


@dataclass(frozen=True)
class Contents:
    """What a ``model.tvmb`` is written from.

    Parameters
    ----------
    exported : ExportedLibrary
        What :func:`tvm_balanced.build.export.export_library` made.
    target : TargetSpec
        What it was made for.
    functions : sequence of FunctionEntry
        From :func:`tvm_balanced.artifact.functions.describe_functions`.
    model : str
        Name of the model.
    options : CompileOptions
        What it was compiled with.
    report : Report
        Every dense layer with decision and reason.
    params : mapping of str to ndarray
        Parameters that the library does not hold.
    cublas : sequence of mapping
        The calls of cuBLAS, fields of :class:`tvm_balanced.artifact.manifest.CublasCall`.
    """

    exported: ExportedLibrary
    target: TargetSpec
    functions: Sequence[FunctionEntry]
    model: str = "model"
    options: CompileOptions = field(default_factory=CompileOptions)
    report: Report = field(default_factory=Report)
    params: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    cublas: Sequence[Mapping[str, str]] = ()

    def write(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write the folder whole or not at all.

        Parameters
        ----------
        path : path-like
            The folder to make.
        overwrite : bool
            Replace a ``model.tvmb`` that is there; nothing else is ever replaced.

        Returns
        -------
        pathlib.Path
            The folder.

        Raises
        ------
        OutputError
            If the path exists or cannot be written; nothing is left behind.
        """
        return _whole(Path(path), self._fill, overwrite)

    def _fill(self, work: Path) -> None:
        exported, spec = self.exported, self.target
        _link(exported.path, work / LIBRARY)
        if self.params:
            write_tensors(work / PARAMETERS, self.params)
        if exported.cuda_source:
            (work / KERNELS).mkdir()
            for name, text in split_kernels(exported.cuda_source).items():
                _write_bytes(work / KERNELS / f"{file_stem(name)}.cu", text.encode())
        if exported.reference:
            _write_bytes(work / REFERENCE, exported.reference)
        _write_bytes(work / REPORT, self.report.text().encode())
        features = tuple(spec.features)
        manifest = Manifest(
            model=self.model,
            options=self.options.to_json(),
            target=TargetEntry(spec.name, spec.kind, spec.arch, features, os.uname().machine),
            device_code="cubin" if exported.images else "none",
            functions=tuple(self.functions),
            versions={"tvm-balanced": __version__, **_versions()},
            title=self.report.title,
            layers=tuple(self.report),
            cubins=tuple(exported.images),
            compiler=CompilerEntry.of(exported.compiler) if exported.compiler else None,
            files={name: sha256(work / name) for name in _contents(work)},
            cublas=tuple(msgspec.convert(call, CublasCall) for call in self.cublas),
            coverage=tuple(msgspec.convert(kernel, KernelEntry) for kernel in exported.coverage),
        )
        _write_bytes(work / MANIFEST, (json.dumps(manifest.to_json(), indent=2) + "\n").encode())


def copy_library(source: Path, path: Path | str, *, overwrite: bool = False) -> Path:
    """Copy a ``model.tvmb`` whole or not at all; see :meth:`Contents.write` for the errors."""

    def fill(work: Path) -> None:
        for name in _contents(source):
            (work / name).parent.mkdir(exist_ok=True)
            _copy(source / name, work / name)

    return _whole(Path(path), fill, overwrite)


def move_library(source: Path, path: Path | str, *, overwrite: bool = False) -> Path:
    """Move a ``model.tvmb``; see :meth:`Contents.write` for the errors."""
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    try:
        _replace(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise _output_error(path, error) from error
        copy_library(source, path, overwrite=overwrite)
        shutil.rmtree(source, ignore_errors=True)
    return path


def _whole(path: Path, fill: Callable[[Path], None], overwrite: bool) -> Path:
    check_writable(path, overwrite=overwrite)
    try:
        # a sibling: only within one file system is a rename atomic
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        work.chmod(0o755)
        fill(work)
        _sync_folder(work)
        _replace(work, path)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def check_writable(path: Path | str, *, overwrite: bool = False) -> None:
    """Refuse a path that no library could be written to, before hours of work.

    Parameters
    ----------
    path : path-like
        The folder to make.
    overwrite : bool
        Whether a ``model.tvmb`` may be replaced.

    Raises
    ------
    OutputError
        If the path exists, or its parent is missing or not writable.
    """
    path = Path(path)
    parent = path.parent
    if os.path.lexists(path):
        if not overwrite:
            raise OutputError(f"{path} exists: choose another path or ask for it to be overwritten")
        if not (path / MANIFEST).is_file():
            raise OutputError(
                f"{path} exists and is not a .tvmb folder, so it is not overwritten: choose another"
            )
    if not parent.is_dir():
        way_out = "choose another place" if os.path.lexists(parent) else "make it first"
        raise OutputError(f"{parent} is not a folder, so {path} cannot be made: {way_out}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable, so {path} cannot be made: choose another")


def _output_error(path: Path, error: OSError) -> OutputError:
    reason, way_out = error.strerror or str(error), "choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason, way_out = "the disk is full", "free space or choose another place"
    return OutputError(
        f"{path} could not be written ({reason}) and nothing was left there: {way_out}"
    )


def _versions() -> dict[str, str]:
    known = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            known[package] = version(package)
    return known


def _contents(work: Path) -> list[str]:
    return sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())


def _link(source: Path, destination: Path) -> None:
    """Give a file another name where the file system can, else copy it."""
    try:
        os.link(source, destination)
    except OSError:
        _copy(source, destination)
    with destination.open("rb") as file:
        os.fsync(file.fileno())
    destination.chmod(0o755)


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)
    shutil.copymode(source, destination)
    with destination.open("rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
    else:
        # folders cannot be exchanged in one step by portable means: the old one steps aside first
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        try:
            path.rename(aside / path.name)
            try:
                work.rename(path)
            except OSError:
                (aside / path.name).rename(path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_hashes(path: Path | str, manifest: Manifest | None = None) -> None:
    """Check that every file is as it was written.

    Parameters
    ----------
    path : path-like
        A ``model.tvmb`` folder.
    manifest : Manifest, optional
        Its manifest, where it was read already.

    Raises
    ------
    ArtifactError
        If a file is missing or changed.
    """
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
