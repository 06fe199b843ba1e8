"""The folder ``model.tvmb/``: what a compiled model is on disk.

====================== =====================================================================
``lib.so``             host code, device code, VM program and the embedded parameters; plain
                       TVM loads it without this package
``params.safetensors`` the parameters, only where they exceed 256 MiB
``kernels/*.cu``       the CUDA source the cubins were made from, kernel by kernel; joined by
                       :func:`tvm_balanced.cuda_source.join_kernels` it is that, byte by byte
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
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tvm_balanced._tensors import write_tensors
from tvm_balanced._version import __version__
from tvm_balanced.cuda_source import file_stem, split_kernels
from tvm_balanced.errors import ArtifactError, InputError, OutputError
from tvm_balanced.targets import TargetSpec
from tvm_balanced.toolchain import ExportedLibrary

FORMAT = "tvmb"
# raised whenever what is written or read changes; a release reads its own version only
FORMAT_VERSION = 3
EMBED_LIMIT = 256 * 1024 * 1024

LIBRARY = "lib.so"
MANIFEST = "manifest.json"
PARAMETERS = "params.safetensors"
REFERENCE = "reference.json.gz"
REPORT = "report.txt"
KERNELS = "kernels"

# who computes the matrix products that stay dense: cuBLAS, kernels by DLight, or our schedules for llvm
DENSE = ("dlight", "cublas", "llvm")

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy")


@dataclass(frozen=True)
class TensorEntry:
    """An input or output.

    Attributes
    ----------
    name : str
        The model's own name.
    dtype : str
        ``"float32"``, ``"bfloat16"``, ...
    shape : tuple of int or str
        A string is a symbolic extent: a name, equal wherever it recurs, an expression of names, or ``"?"``
        where it depends on the data.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FunctionEntry:
    """A function of the library: the generic one, or one for a bucket.

    Attributes
    ----------
    name : str
        ``"main"``, ``"main_b8"``.
    inputs, outputs : tuple of TensorEntry
        What the caller passes and gets, in order.
    params : tuple of str
        Arrays of ``params.safetensors`` that are passed after the inputs.
    bindings : dict of str to int
        Symbolic extents of the generic function that are fixed here.
    returns_tuple : bool
        Whether the model returned a tuple, be it of one; ``outputs`` are its leaves.
    limits : dict of str to int
        Largest values of symbolic extents: memory was planned for these and no more.
    """

    name: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    params: tuple[str, ...] = ()
    bindings: Mapping[str, int] = field(default_factory=dict)
    returns_tuple: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetEntry:
    """What the library was compiled for.

    Attributes
    ----------
    name, kind, arch : str
        As in :class:`tvm_balanced.targets.TargetSpec`.
    features : tuple of str
        CPU features, by LLVM's names, that the code may use.
    machine : str
        Instruction set of the host code, ``"x86_64"``.
    """

    name: str
    kind: str
    arch: str
    features: tuple[str, ...]
    machine: str


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes
    ----------
    target : TargetEntry
        What the library was compiled for.
    device_code : str
        ``"cubin"`` or ``"none"``.
    functions : tuple of FunctionEntry
        The first is the most general.
    versions : dict of str to str
        Of this package and of those that built the library.
    layers : tuple of dict
        Rows of the report.
    cubins : tuple of dict
        ``arch``, ``num_bytes`` and ``sha256`` of each cubin inside ``lib.so``.
    compiler : dict
        ``name``, ``version`` and ``options`` of what made the cubins of ``kernels/*.cu``, see
        :func:`tvm_balanced.nvrtc.compiler`; empty where there are none.
    files : dict of str to str
        SHA-256 of every other file, by path relative to the folder.
    dense : str
        Who computes the matrix products that stay dense, one of :data:`DENSE`.
    cublas : tuple of dict
        Each call of cuBLAS, see :func:`tvm_balanced.relay_passes.dense_cublas.cublas_calls`. Where there is
        any, libcublas must be there when the library runs.
    coverage : tuple of dict
        How each kernel was scheduled, by a tuning record or by default, see
        :class:`tvm_balanced.schedules.tuned.Coverage`; empty where the library does not say.
    """

    target: TargetEntry
    device_code: str
    functions: tuple[FunctionEntry, ...]
    versions: Mapping[str, str]
    layers: tuple[Mapping[str, Any], ...]
    cubins: tuple[Mapping[str, Any], ...]
    compiler: Mapping[str, Any]
    files: Mapping[str, str]
    dense: str
    cublas: tuple[Mapping[str, Any], ...]
    coverage: tuple[Mapping[str, Any], ...] = ()


def describe_functions(
    mod: Any, *, embedded: Sequence[str] = (), beside: Sequence[str] = ()
) -> tuple[FunctionEntry, ...]:
    """Describe the Relax functions of a module, the one with the most symbolic extents first.

    Parameters
    ----------
    mod : tvm.IRModule
        The module before its parameters are bound.
    embedded, beside : sequence of str
        Function parameters that become constants, and those that the library file does not hold.

    Returns
    -------
    tuple of FunctionEntry

    Raises
    ------
    ArtifactError
        If a parameter stored beside the library stands before an input.
    """
    from tvm import relax

    functions = []
    for variable, function in mod.functions.items():
        # functions without a global symbol are the private parts of others
        if not isinstance(function, relax.Function) or not function.attrs.get("global_symbol"):
            continue
        name = str(variable.name_hint)
        params = [param for param in function.params if param.name not in embedded]
        names = [str(param.name) for param in params]
        stored = [name for name in names if name in beside]
        if stored and names[-len(stored) :] != stored:
            raise ArtifactError(
                f"function {name} takes its parameters {', '.join(stored)} before an input: "
                f"parameters stored beside the library come last"
            )
        inputs = tuple(
            _tensor_entry(str(param.name), param.ty) for param in params if param.name not in beside
        )
        functions.append(
            FunctionEntry(
                name,
                inputs,
                _output_entries(function),
                tuple(stored),
                returns_tuple=isinstance(function.ret_ty, relax.TupleType),
                limits=_limits(function),
            )
        )
    functions.sort(key=lambda entry: -_num_symbols(entry))
    return tuple(_with_bindings(entry, functions[0]) for entry in functions)


def _tensor_entry(name: str, ty: Any) -> TensorEntry:
    from tvm import tirx

    if ty.shape is None:
        if ty.ndim < 0:
            raise InputError(
                f"even the number of dimensions of {name} depends on the data, which a library cannot "
                "state; leave this output out of the model"
            )
        return TensorEntry(name, str(ty.dtype), ("?",) * ty.ndim)
    shape = tuple(
        int(extent)
        if isinstance(extent, tirx.IntImm)
        # as people write it: 2 for T.int64(2)
        else re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(extent))
        for extent in ty.shape
    )
    return TensorEntry(name, str(ty.dtype), shape)


def _output_entries(function: Any) -> tuple[TensorEntry, ...]:
    leaves = _leaves(function.ret_ty)
    names = function.attrs.get("output_names") or [f"output_{i}" for i in range(len(leaves))]
    return tuple(_tensor_entry(str(n), leaf) for n, leaf in zip(names, leaves, strict=True))


def _limits(function: Any) -> dict[str, int]:
    # by this attribute TVM's memory planner makes buffers of a fixed size for symbolic shapes
    bounds = function.attrs.get("tir_var_upper_bound") or {}
    return {str(symbol): int(limit) for symbol, limit in bounds.items()}


def _leaves(ty: Any) -> list[Any]:
    from tvm import relax

    if isinstance(ty, relax.TupleType):
        return [leaf for field in ty.fields for leaf in _leaves(field)]
    return [ty]


def _num_symbols(entry: FunctionEntry) -> int:
    return sum(isinstance(extent, str) for tensor in entry.inputs for extent in tensor.shape)


def _with_bindings(entry: FunctionEntry, generic: FunctionEntry) -> FunctionEntry:
    bindings: dict[str, int] = {}
    for general, special in zip(generic.inputs, entry.inputs, strict=False):
        for symbol, extent in zip(general.shape, special.shape, strict=False):
            if isinstance(symbol, str) and isinstance(extent, int):
                bindings[symbol] = extent
    return replace(entry, bindings=bindings)


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


def save(
    path: Path | str,
    library: ExportedLibrary,
    spec: TargetSpec,
    functions: Sequence[FunctionEntry],
    *,
    params: Mapping[str, npt.NDArray[Any]] | None = None,
    layers: Sequence[Mapping[str, Any]] = (),
    report: str = "",
    dense: str = "dlight",
    cublas: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
) -> Path:
    """Write ``model.tvmb/`` whole or not at all.

    Parameters
    ----------
    path : path-like
        The folder to make.
    library : ExportedLibrary
        What :func:`tvm_balanced.toolchain.export_library` made.
    spec : TargetSpec
        What it was made for.
    functions : sequence of FunctionEntry
        From :func:`describe_functions`.
    params : mapping of str to ndarray, optional
        Parameters that the library does not hold.
    layers : sequence of mapping
        Rows of the report, JSON values.
    report : str
        The report as text.
    dense : str
        Who computes the matrix products that stay dense on a GPU, ``"dlight"`` or ``"cublas"``.
    cublas : sequence of mapping
        The calls of cuBLAS, JSON values.
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
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    try:
        # a sibling: only within one file system is a rename atomic
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        work.chmod(0o755)
        _write(work, library, spec, functions, params or {}, layers, report, dense, cublas)
        _replace(work, path)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def check_writable(path: Path | str, *, overwrite: bool = False) -> None:
    """Refuse a path that :func:`save` could not write, before hours of work.

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


def _write(
    work: Path,
    library: ExportedLibrary,
    spec: TargetSpec,
    functions: Sequence[FunctionEntry],
    params: Mapping[str, npt.NDArray[Any]],
    layers: Sequence[Mapping[str, Any]],
    report: str,
    dense: str,
    cublas: Sequence[Mapping[str, Any]],
) -> None:
    _copy(library.path, work / LIBRARY)
    if params:
        write_tensors(work / PARAMETERS, params)
    if library.cuda_source:
        (work / KERNELS).mkdir()
        for name, text in split_kernels(library.cuda_source).items():
            _write_text(work / KERNELS / f"{file_stem(name)}.cu", text)
    if library.reference:
        _write_bytes(work / REFERENCE, library.reference)
    _write_text(work / REPORT, report)
    manifest = Manifest(
        target=TargetEntry(
            spec.name, spec.kind, spec.arch, tuple(spec.features), os.uname().machine
        ),
        device_code="cubin" if library.images else "none",
        functions=tuple(functions),
        versions={"tvm-balanced": __version__, **_versions()},
        layers=tuple(layers),
        cubins=tuple(asdict(image) for image in library.images),
        compiler=dict(library.compiler),
        files={name: sha256(work / name) for name in _contents(work)},
        dense=dense if spec.kind == "cuda" else spec.kind,
        cublas=tuple(cublas),
        coverage=tuple(library.coverage),
    )
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    _write_text(work / MANIFEST, json.dumps(document, indent=2) + "\n")
    _sync_folder(work)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _contents(work: Path) -> list[str]:
    return sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())


def _copy(source: Path, destination: Path) -> None:
    with source.open("rb") as reader, destination.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    destination.chmod(0o755)


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


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


def read_manifest(path: Path | str) -> Manifest:
    """Read and check ``manifest.json``.

    Parameters
    ----------
    path : path-like
        A ``model.tvmb`` folder.

    Returns
    -------
    Manifest

    Raises
    ------
    ArtifactError
        If the folder is no ``.tvmb``, its manifest is damaged, or its format is another version.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise ArtifactError(f"{path} {what}: expected a .tvmb folder")
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} has no {MANIFEST}: expected a .tvmb folder")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}): copy or build it again") from error
    reader = _Reader(file)
    fields = reader.mapping(document, "the manifest")
    if fields.get("format") != FORMAT:
        raise ArtifactError(f"{file} says format {fields.get('format')!r}: expected {FORMAT!r}")
    if fields.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {fields.get('format_version')!r}, this tvm-balanced "
            f"{__version__} reads {FORMAT_VERSION}: compile the model again or use the release "
            f"that wrote it"
        )
    return reader.manifest(fields)


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
            found = sha256(file)
        except OSError as error:
            raise ArtifactError(
                f"{file} cannot be read ({error.strerror}): copy or build {path} again"
            ) from error
        if found != expected:
            raise ArtifactError(
                f"{file} has changed since it was built (SHA-256 {found[:12]}, expected "
                f"{expected[:12]}): copy or build {path} again"
            )


class _Reader:
    """Turns JSON into a :class:`Manifest`, saying where it is not as expected."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def manifest(self, fields: Mapping[str, Any]) -> Manifest:
        target = self.mapping(self.get(fields, "target"), "target")
        functions = tuple(
            self._function(entry, f"functions[{i}]")
            for i, entry in enumerate(self.sequence(self.get(fields, "functions"), "functions"))
        )
        if not functions:
            self.fail("functions", [], "at least one")
        files = self.mapping(self.get(fields, "files"), "files")
        for name, digest in files.items():
            pure = Path(name)
            # the names are opened: none may lead out of the folder
            if pure.is_absolute() or ".." in pure.parts:
                self.fail("files", name, "a path inside the folder")
            self.text(digest, f"files[{name}]")
        if LIBRARY not in files:
            self.fail("files", sorted(files), f"{LIBRARY} among them")
        if any(entry.params for entry in functions) and PARAMETERS not in files:
            self.fail("files", sorted(files), f"{PARAMETERS} among them")
        device_code = self.text(self.get(fields, "device_code"), "device_code")
        if device_code not in ("cubin", "none"):
            self.fail("device_code", device_code, "'cubin' or 'none'")
        kind = self.text(self.get(target, "kind"), "target.kind")
        if kind not in ("cuda", "llvm"):
            self.fail("target.kind", kind, "'cuda' or 'llvm'")
        dense = self.text(self.get(fields, "dense"), "dense")
        if dense not in DENSE:
            self.fail("dense", dense, " or ".join(map(repr, DENSE)))
        versions = self.mapping(self.get(fields, "versions"), "versions")
        return Manifest(
            target=TargetEntry(
                name=self.text(self.get(target, "name"), "target.name"),
                kind=kind,
                arch=self.text(self.get(target, "arch"), "target.arch"),
                features=self._texts(self.get(target, "features"), "target.features"),
                machine=self.text(self.get(target, "machine"), "target.machine"),
            ),
            device_code=device_code,
            functions=functions,
            versions={name: self.text(v, f"versions[{name}]") for name, v in versions.items()},
            layers=self._mappings(self.get(fields, "layers"), "layers"),
            cubins=self._mappings(self.get(fields, "cubins"), "cubins"),
            compiler=self._compiler(self.get(fields, "compiler"), device_code),
            files=dict(files),
            dense=dense,
            cublas=self._calls(self.get(fields, "cublas")),
            coverage=self._coverage(fields.get("coverage", [])),
        )

    def _coverage(self, value: Any) -> tuple[Mapping[str, Any], ...]:
        kernels = self._mappings(value, "coverage")
        for i, kernel in enumerate(kernels):
            for key in ("kernel", "schedule", "note"):
                self.text(self.get(kernel, key), f"coverage[{i}].{key}")
        return kernels

    def _calls(self, value: Any) -> tuple[Mapping[str, Any], ...]:
        calls = self._mappings(value, "cublas")
        for i, call in enumerate(calls):
            for key in ("function", "name", "product"):
                self.text(self.get(call, key), f"cublas[{i}].{key}")
        return calls

    def _compiler(self, value: Any, device_code: str) -> Mapping[str, Any]:
        fields = self.mapping(value, "compiler")
        if device_code != "none" or fields:
            self.text(self.get(fields, "name"), "compiler.name")
            self.text(self.get(fields, "version"), "compiler.version")
            self._texts(self.get(fields, "options"), "compiler.options")
        return fields

    def _function(self, value: Any, where: str) -> FunctionEntry:
        fields = self.mapping(value, where)
        bindings = self.mapping(self.get(fields, "bindings"), f"{where}.bindings")
        for symbol, extent in bindings.items():
            if type(extent) is not int:
                self.fail(f"{where}.bindings[{symbol}]", extent, "an integer")
        limits = self.mapping(self.get(fields, "limits"), f"{where}.limits")
        for symbol, limit in limits.items():
            if type(limit) is not int:
                self.fail(f"{where}.limits[{symbol}]", limit, "an integer")
        return FunctionEntry(
            name=self.text(self.get(fields, "name"), f"{where}.name"),
            inputs=self._tensors(self.get(fields, "inputs"), f"{where}.inputs"),
            outputs=self._tensors(self.get(fields, "outputs"), f"{where}.outputs"),
            params=self._texts(self.get(fields, "params"), f"{where}.params"),
            bindings=dict(bindings),
            returns_tuple=self._flag(self.get(fields, "returns_tuple"), f"{where}.returns_tuple"),
            limits=dict(limits),
        )

    def _flag(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            self.fail(where, value, "true or false")
        return bool(value)

    def _tensors(self, value: Any, where: str) -> tuple[TensorEntry, ...]:
        return tuple(
            self._tensor(entry, f"{where}[{i}]")
            for i, entry in enumerate(self.sequence(value, where))
        )

    def _tensor(self, value: Any, where: str) -> TensorEntry:
        fields = self.mapping(value, where)
        shape = self.sequence(self.get(fields, "shape"), f"{where}.shape")
        for extent in shape:
            if not (isinstance(extent, str) or (type(extent) is int and extent >= 0)):
                self.fail(f"{where}.shape", extent, "extents or their names")
        return TensorEntry(
            name=self.text(self.get(fields, "name"), f"{where}.name"),
            dtype=self.text(self.get(fields, "dtype"), f"{where}.dtype"),
            shape=tuple(shape),
        )

    def _texts(self, value: Any, where: str) -> tuple[str, ...]:
        return tuple(self.text(item, where) for item in self.sequence(value, where))

    def _mappings(self, value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.mapping(item, where) for item in self.sequence(value, where))

    def get(self, fields: Mapping[str, Any], name: str) -> Any:
        if name not in fields:
            raise ArtifactError(f"{self._file} lacks {name!r}: copy or build it again")
        return fields[name]

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.fail(where, value, "an object")
        return dict(value)

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list):
            self.fail(where, value, "a list")
        return list(value)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self.fail(where, value, "a string")
        return str(value)

    def fail(self, where: str, value: Any, expected: str) -> None:
        raise ArtifactError(
            f"{self._file}: {where} is {value!r:.80}, expected {expected}; copy or build it again"
        )
