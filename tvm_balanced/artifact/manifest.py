"""``manifest.json``: what a library says of itself, written and read back checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tvm_balanced._version import __version__
from tvm_balanced.cuda.cubin import DeviceImage
from tvm_balanced.errors import ArtifactError, InputError
from tvm_balanced.options import CompileOptions
from tvm_balanced.report import LayerRow

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
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)] | str, ...]


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
    kind: Annotated[str, msgspec.Meta(pattern="^(cuda|llvm)$")]
    arch: str
    features: tuple[str, ...]
    machine: str


@dataclass(frozen=True)
class CompilerEntry:
    """What made the cubins of ``kernels/*.cu``, see :func:`tvm_balanced.cuda.nvrtc.compiler`."""

    name: str
    version: str
    options: tuple[str, ...]

    @staticmethod
    def of(compiler: Mapping[str, Any]) -> CompilerEntry:
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
    """The contents of ``manifest.json``.

    Attributes
    ----------
    model : str
        Name of the model.
    options : dict
        The :class:`tvm_balanced.CompileOptions` it was compiled with, as JSON.
    target : TargetEntry
        What the library was compiled for.
    device_code : str
        ``"cubin"`` or ``"none"``.
    functions : tuple of FunctionEntry
        The first is the most general.
    versions : dict of str to str
        Of this package and of those that built the library.
    title : str
        Title of the report.
    layers : tuple of LayerRow
        Rows of the report.
    cubins : tuple of DeviceImage
        Each cubin inside ``lib.so``.
    compiler : CompilerEntry or None
        What made the cubins; None where there are none.
    files : dict of str to str
        SHA-256 of every other file, by path relative to the folder.
    cublas : tuple of CublasCall
        Where there is any, libcublas must be there when the library runs.
    coverage : tuple of KernelEntry
        How each kernel was scheduled; empty where the library does not say.
    """

    model: str
    options: Mapping[str, Any]
    target: TargetEntry
    device_code: Annotated[str, msgspec.Meta(pattern="^(cubin|none)$")]
    functions: tuple[FunctionEntry, ...]
    versions: Mapping[str, str]
    title: str
    layers: tuple[LayerRow, ...]
    cubins: tuple[DeviceImage, ...]
    compiler: CompilerEntry | None
    files: Mapping[str, str]
    cublas: tuple[CublasCall, ...]
    coverage: tuple[KernelEntry, ...]

    def to_json(self) -> dict[str, Any]:
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
