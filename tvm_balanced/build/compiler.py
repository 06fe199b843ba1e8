"""``compile``: plan, rewrite, pack, build. Never tunes."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from tvm_balanced.records import lookup as records_lookup
from tvm_balanced.artifact.manifest import FunctionEntry
from tvm_balanced.artifact.functions import describe_functions
from tvm_balanced.artifact.folder import save
from tvm_balanced.cuda.source import kernel_source
from tvm_balanced.cuda.source import split_kernels
from tvm_balanced.errors import InputError
from tvm_balanced.errors import OutputError
from tvm_balanced.model import Array
from tvm_balanced.model import Model
from tvm_balanced.report import Report
from tvm_balanced.targets.resolve import TargetSpec
from tvm_balanced.build.export import CUBLAS_SOURCE
from tvm_balanced.build.export import export_library
from tvm_balanced.artifact.exported import ExportedLibrary
from typing import TYPE_CHECKING
from tvm_balanced.build.prepare import prepare
if TYPE_CHECKING:
    import tvm
    from tvm_balanced.runtime.library import Library


# code without weights: object files and libraries of models of some hundred operators
_OBJECT_BYTES = 8 << 20


_LOG = logging.getLogger("tvm_balanced")


class CompiledLibrary:
    """What :func:`compile` made, not yet on disk under a name of its own.

    Attributes
    ----------
    report : Report
        Every dense layer with decision and reason.
    target : TargetSpec
        What it was compiled for.
    """

    def __init__(
        self,
        exported: ExportedLibrary,
        folder: tempfile.TemporaryDirectory[str],
        report: Report,
        target: TargetSpec,
        functions: Sequence[FunctionEntry],
        beside: Mapping[str, Array],
        dense: str = "dlight",
        cublas: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.report = report
        self.target = target
        self._exported = exported
        self._folder = folder  # the exported file lives as long as this object
        self._functions = functions
        self._beside = beside
        self._dense, self._cublas = dense, cublas
        self._loaded: dict[str | None, Library] = {}

    def __repr__(self) -> str:
        names = ", ".join(entry.name for entry in self._functions)
        return f"CompiledLibrary(target={self.target.name} {self.target.arch}, functions={names})"

    @property
    def coverage(self) -> tuple[Mapping[str, Any], ...]:
        """Per kernel: ``schedule`` (``"tuned"``, ``"estimated"``, ``"default"``), ``balanced``, ``note``."""
        return self._exported.coverage

    @property
    def kernels(self) -> list[str]:
        """Names of the CUDA kernels; empty on llvm."""
        return list(split_kernels(self._exported.cuda_source))

    def source(self, name: str | None = None) -> str:
        """CUDA source of one kernel, or of all.

        Raises
        ------
        InputError
            When there is no kernel of that name.
        """
        return kernel_source(self._exported.cuda_source, name)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write ``model.tvmb/``, whole or not at all.

        Raises
        ------
        OutputError
            When ``path`` exists or cannot be written.
        """
        return save(
            path,
            self._exported,
            self.target,
            self._functions,
            params=self._beside,
            layers=self.report.to_json(),
            report=self.report.text(),
            dense=self._dense,
            cublas=self._cublas,
            overwrite=overwrite,
        )

    def load(self, device: str | None = None) -> Library:
        """Load it in this process, as :func:`tvm_balanced.load` would after :meth:`save`."""
        from tvm_balanced.runtime.library import load

        if device not in self._loaded:
            path = Path(self._folder.name) / "model.tvmb"
            if not path.exists():
                self.save(path)
            self._loaded[device] = load(path, device)
        return self._loaded[device]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run it on this machine; see :meth:`tvm_balanced.runtime.library.Library.__call__`."""
        return self.load()(*inputs, **named)


def compile(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    *,
    policy: str | Mapping[str, str] = "auto",
    ignore: Iterable[str] = (),
    buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    encoding: str = "auto",
    dense: str = "dlight",
    cuda_graph: bool = True,
    logs: str | Path | bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompiledLibrary:
    """Compile a model whose weights follow balanced patterns.

    Parameters
    ----------
    model : Model
        Usually pruned: layers that follow no balanced pattern stay dense.
    target : str or tvm.target.Target or TargetSpec
        ``"h100"``, ``"cuda-sm_90"``, ``"llvm"``, ...: see :func:`tvm_balanced.targets.resolve.resolve`.
    policy : str or Mapping
        ``"auto"`` (sparse where predicted faster), ``"always"``, ``"never"``, or one of these per layer.
    ignore : iterable of str
        Layers that stay dense, by exact name or ``re:`` pattern.
    buckets : sequence of int or mapping, optional
        Sizes of a symbolic dimension that get a function with static shapes beside the generic one: of the
        first symbolic dimension, or ``{"batch": [1, 8]}``.
    encoding : str
        How indices are stored: ``"auto"`` (the fewest bits that the target's schedules like), or ``"u8"``,
        ``"u4"``, ``"u3"``, ``"u2"`` for blocks up to 256, 16, 8, 4.
    dense : str
        What runs the matrix products that stay dense on a GPU: ``"dlight"``, kernels that TVM generates, or
        ``"cublas"``, which then must be installed where the library runs (``pip install nvidia-cublas``).
    cuda_graph : bool
        Whether kernels with static shapes are captured into CUDA graphs at a thread's first call, and
        replayed from then on; does nothing on llvm.
    logs : path-like or False, optional
        A folder of tuning records to look at first, before ``$TVM_BALANCED_LOGS``, the user's and those
        shipped; False for none of them.
    progress : callable, optional
        Told in a few words what is done next.

    Returns
    -------
    CompiledLibrary

    Raises
    ------
    InputError
        For a model, target, policy, bucket or encoding that does not fit.
    ToolchainError
        When a compiler is missing.
    OutputError
        When there is no room for temporary files.
    """
    if logs is True:
        raise InputError("logs is True; give a folder, or leave it out")
    where = [] if logs is False else records_lookup.places(logs)
    prepared = prepare(model, target, policy, ignore, buckets, encoding, dense, progress)
    plan, mod = prepared.plan, prepared.mod
    embedded, beside = prepared.embedded, prepared.beside
    functions = describe_functions(mod, embedded=list(embedded), beside=list(beside))
    folder = _temporary_folder(sum(array.nbytes for array in embedded.values()))
    lookup = records_lookup.find(plan.target, where, _target_json(plan.target))
    (progress or (lambda _: None))("build")
    exported = export_library(
        mod,
        plan.target,
        Path(folder.name) / "lib.so",
        params=embedded,
        options={
            "cuda_graph": cuda_graph,
            "records": [asdict(choice) for choice in lookup.choices.values()],
        },
        sources=[CUBLAS_SOURCE] if prepared.cublas else [],
    )
    lookup.problems += exported.problems
    warning = lookup.warning()
    if warning is not None:
        _LOG.warning("%s; these kernels get the default schedule", warning)
    return CompiledLibrary(
        exported, folder, plan.report, plan.target, functions, beside, dense, prepared.cublas
    )


def _target_json(spec: TargetSpec) -> dict[str, Any]:
    """The target as plain values, as tuning records hold it."""
    exported = spec.target.export()
    return {
        str(name): value if isinstance(value, str | int | float) else [str(v) for v in value]
        for name, value in exported.items()
    }


def _temporary_folder(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with room for a library that embeds ``num_bytes``.

    Asked beforehand, as LLVM ends the whole process when it cannot write an object file.
    """
    # the weights are at least in an object file and in the library linked from it
    needed = 2 * num_bytes + _OBJECT_BYTES
    way_out = "free space there, or set TMPDIR to another folder"
    try:
        place = tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if free >= needed:
            return tempfile.TemporaryDirectory(prefix="tvm-balanced-")
    except OSError as error:
        raise OutputError(
            f"no folder for temporary files can be used ({error.strerror or error}); {way_out}"
        ) from error
    raise OutputError(
        f"{place} has {free / 2**20:.0f} MiB left for temporary files, and building needs at least "
        f"{needed / 2**20:.0f} MiB; {way_out}"
    )
