"""``manifest.json``: what a library says of itself, written and read back checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_balanced._version import __version__
from tvm_balanced.errors import ArtifactError

FORMAT = "tvmb"


# raised whenever what is written or read changes; a release reads its own version only
FORMAT_VERSION = 3


LIBRARY = "lib.so"


MANIFEST = "manifest.json"


PARAMETERS = "params.safetensors"


REFERENCE = "reference.json.gz"


REPORT = "report.txt"


KERNELS = "kernels"


# who computes the matrix products that stay dense: cuBLAS, kernels by DLight, or our schedules for llvm
DENSE = ("dlight", "cublas", "llvm")


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
        A string is a symbolic extent: a name, equal wherever it recurs, or an expression of names.
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
        As in :class:`tvm_balanced.targets.resolve.TargetSpec`.
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
        :func:`tvm_balanced.cuda.nvrtc.compiler`; empty where there are none.
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
