"""``manifest.json``: what a library says of itself, written and read back checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from tvm_balanced._version import __version__
from tvm_balanced.cuda.cubin import DeviceImage
from tvm_balanced.errors import ArtifactError, InputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import JsonObject, LayerRow

FORMAT = "tvmb"

# raised whenever what is written or read changes; a release reads its own version only
FORMAT_VERSION = 4
LIBRARY = "lib.so"
MANIFEST = "manifest.json"
PARAMETERS = "params.safetensors"
REFERENCE = "reference.json.gz"
REPORT = "report.txt"
KERNELS = "kernels"


@dataclass(frozen=True)
class TensorEntry:
    """An input or output."""

    name: str  # the model's own
    dtype: str  # "float32", "bfloat16", ...
    # a string is a symbolic extent: a name, equal wherever it recurs, an expression of names, or "?" where
    # it depends on the data
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)] | str, ...]


@dataclass(frozen=True)
class FunctionEntry:
    """A function of the library: the generic one, or one for a bucket."""

    name: str  # "main", "main_b8"
    inputs: tuple[TensorEntry, ...]  # what the caller passes, in order
    outputs: tuple[TensorEntry, ...]  # the leaves of what it gets
    params: tuple[str, ...] = ()  # arrays of params.safetensors, passed after the inputs
    # symbolic extents of the generic function that are fixed here
    bindings: Mapping[str, int] = field(default_factory=dict)
    returns_tuple: bool = False  # also for a tuple of one
    # largest values of symbolic extents: memory was planned for these and no more
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetEntry:
    """What the library was compiled for: fields of :class:`tvm_balanced.targets.resolve.TargetSpec`."""

    name: str
    kind: Annotated[str, msgspec.Meta(pattern="^(cuda|llvm)$")]
    arch: str
    features: tuple[str, ...]
    machine: str  # instruction set of the host code, "x86_64"


@dataclass(frozen=True)
class CompilerEntry:
    """What made the cubins of ``kernels/*.cu``, see :func:`tvm_balanced.cuda.nvrtc.compiler`."""

    name: str
    version: str
    options: tuple[str, ...]

    @staticmethod
    def of(compiler: Mapping[str, object]) -> CompilerEntry:
        """Return what :func:`tvm_balanced.cuda.nvrtc.compiler` says."""
        return msgspec.convert(compiler, CompilerEntry)


@dataclass(frozen=True)
class CublasCall:
    """A call of cuBLAS, see :func:`tvm_balanced.relay_passes.dense_cublas.cublas_calls`."""

    function: str
    name: str
    product: str


@dataclass(frozen=True)
class KernelEntry:
    """How a kernel was scheduled, see :class:`tvm_balanced.schedules.tuned.Coverage`."""

    kernel: str
    schedule: Annotated[str, msgspec.Meta(pattern="^(tuned|estimated|default)$")]
    balanced: bool
    note: str


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    model: str  # its name
    options: JsonObject  # the CompileOptions it was compiled with, as JSON
    target: TargetEntry
    device_code: Annotated[str, msgspec.Meta(pattern="^(cubin|none)$")]
    functions: tuple[FunctionEntry, ...]  # the first is the most general
    versions: Mapping[str, str]  # of this package and of those that built the library
    title: str  # of the report
    layers: tuple[LayerRow, ...]
    cubins: tuple[DeviceImage, ...]  # inside lib.so
    compiler: CompilerEntry | None  # None where there are no cubins
    files: Mapping[str, str]  # SHA-256 of every other file, by path relative to the folder
    cublas: tuple[CublasCall, ...]  # where there is any, running needs libcublas
    coverage: tuple[KernelEntry, ...]  # empty where the library does not say

    def to_json(self) -> JsonObject:
        """Plain values, as they stand in the file."""
        # TVM's strings are strings, but not to msgspec
        values = msgspec.to_builtins(self, enc_hook=str)
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    def problems(self) -> Iterator[tuple[str, object, str]]:
        """Return what types do not say: field, value and what was expected of it."""
        if not self.functions:
            yield "functions", [], "at least one"
        for name in self.files:
            pure = Path(name)
            # the names are opened: none may lead out of the folder
            if pure.is_absolute() or ".." in pure.parts:
                yield "files", name, "a path inside the folder"
        needed = [LIBRARY] + [PARAMETERS] * any(entry.params for entry in self.functions)
        for name in needed:
            if name not in self.files:
                yield "files", sorted(self.files), f"{name} among them"
        if self.device_code == "cubin" and self.compiler is None:
            yield "compiler", None, "what made the cubins"
        try:
            CompileOptions.from_json(self.options)
        except (InputError, TypeError) as error:
            yield "options", self.options, f"options of this release ({error})"


def read_manifest(path: Path | str) -> Manifest:
    """Read and check ``manifest.json`` of a ``model.tvmb`` folder.

    ArtifactError if the folder is none, its manifest is damaged, or its format is another version.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise ArtifactError(f"{path} {what}: expected a .tvmb folder")
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} has no {MANIFEST}: expected a .tvmb folder")
    try:
        document = msgspec.json.decode(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}): copy or build it again") from error
    fields = document if isinstance(document, dict) else {}
    if fields and fields.get("format") != FORMAT:
        raise ArtifactError(f"{file} says format {fields.get('format')!r}: expected {FORMAT!r}")
    if fields and fields.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {fields.get('format_version')!r}, this tvm-balanced "
            f"{__version__} reads {FORMAT_VERSION}: compile the model again or use the release "
            f"that wrote it"
        )
    try:
        manifest = msgspec.convert(document, Manifest)
    except msgspec.ValidationError as error:
        raise ArtifactError(
            f"{file}: {_explain(str(error), document)}; copy or build it again"
        ) from error
    for where, value, expected in manifest.problems():
        raise ArtifactError(
            f"{file}: {where} is {value!r:.80}, expected {expected}; copy or build it again"
        )
    return manifest


_KINDS = {
    "str": "a string",
    "int": "an integer",
    "bool": "true or false",
    "float": "a number",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _explain(message: str, document: object) -> str:
    """``target.kind is 3, expected a string``, of what msgspec says of a document."""
    complaint, _, where = message.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    lacking = re.fullmatch(r"Object missing required field `(\w+)`", complaint)
    if lacking:
        return f"{where or 'the manifest'} lacks {lacking[1]!r}"
    value = document
    for key, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]", where):
        if index == "...":
            # msgspec does not say which entry of a mapping it is
            break
        assert isinstance(value, dict | list)
        value = value[key if key else int(index)]
    words = re.search(r"matching regex '\^\((.*)\)\$'", complaint)
    expected = re.match(r"Expected `([^`]+)`( >= \d+)?", complaint)
    if words:
        wanted = "expected " + " or ".join(map(repr, words[1].split("|")))
    elif expected:
        kinds = (_KINDS.get(kind, kind) for kind in expected[1].split(" | "))
        wanted = f"expected {' or '.join(kinds)}{expected[2] or ''}"
    else:
        wanted = complaint[:1].lower() + complaint[1:]
    return f"{where or 'the manifest'} is {value!r:.80}, {wanted}"
