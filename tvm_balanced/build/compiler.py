"""``compile``: plan, rewrite, pack, build. Never tunes."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced.artifact.folder import Contents
from tvm_balanced.artifact.functions import describe_functions
from tvm_balanced.build.export import CUBLAS_SOURCE, export_library
from tvm_balanced.build.prepare import prepare
from tvm_balanced.errors import OutputError
from tvm_balanced.model import Model
from tvm_balanced.options import CompileKeywords, CompileOptions, make_options
from tvm_balanced.records import lookup as records_lookup
from tvm_balanced.runtime.library import Library
from tvm_balanced.support.tensors import Array
from tvm_balanced.targets.resolve import TargetSpec

if TYPE_CHECKING:
    import tvm
    from typing_extensions import Unpack

# code without weights: object files and libraries of models of some hundred operators
_OBJECT_BYTES = 8 << 20
_LOG = logging.getLogger("tvm_balanced")


def compile(
    model: Model,
    target: str | tvm.target.Target | TargetSpec,
    *,
    options: CompileOptions | None = None,
    progress: Callable[[str], None] | None = None,
    **keywords: Unpack[CompileKeywords],
) -> Library:
    """Compile a model, usually pruned, for a target; the result runs and can be saved.

    Parameters
    ----------
    model : Model
        From :func:`tvm_balanced.from_torch` and the like.
    target : str or tvm.target.Target or TargetSpec
        ``"h100"``, ``"cuda-sm_90"``, ``"llvm"``, ...: see :func:`tvm_balanced.targets.resolve.resolve`.
    options : CompileOptions, optional
        What it is compiled with.
    progress : callable, optional
        Called with a few words on what is done next.
    **keywords
        Fields of :class:`CompileOptions`, in place of ``options``.

    Returns
    -------
    Library
        In a temporary folder until it is saved; its code is loaded when it is first called, so a library
        for another machine can be looked at and saved too.

    Raises
    ------
    InputError
        For a model, target or option that does not fit.
    ToolchainError
        When a compiler is missing.
    OutputError
        When there is no room for temporary files.
    """
    chosen = make_options(options, **keywords)
    prepared = prepare(model, target, chosen, progress)
    spec = prepared.plan.target
    functions = describe_functions(
        prepared.mod, embedded=list(prepared.embedded), beside=list(prepared.beside)
    )
    folder = _temporary_folder(prepared.embedded, prepared.beside)
    where = [] if chosen.logs is False else records_lookup.places(chosen.record_folder)
    lookup = records_lookup.find(spec, where, _target_json(spec))
    (progress or (lambda _: None))("build")
    place = Path(folder.name)
    exported = export_library(
        prepared.mod,
        spec,
        place / "lib.so",
        params=prepared.embedded,
        options={
            "cuda_graph": chosen.cuda_graph,
            "records": [asdict(choice) for choice in lookup.choices.values()],
            # the build may run in another process
            "dump_ir": chosen.dump_ir and str(Path(chosen.dump_ir).resolve()),
        },
        sources=[CUBLAS_SOURCE] if prepared.cublas else [],
    )
    lookup.problems += exported.problems
    warning = lookup.warning()
    if warning is not None:
        _LOG.warning("%s; these kernels get the default schedule", warning)
    contents = Contents(
        exported,
        spec,
        functions,
        model.name,
        chosen,
        prepared.plan.report,
        prepared.beside,
        prepared.cublas,
    )
    path = contents.write(place / "model.tvmb")
    exported.path.unlink()
    return Library(path, fresh=folder)


def _target_json(spec: TargetSpec) -> dict[str, Any]:
    """Return the target as plain values, as tuning records hold it."""
    exported = spec.target.export()
    return {
        str(name): value if isinstance(value, str | int | float) else [str(v) for v in value]
        for name, value in exported.items()
    }


def _temporary_folder(
    embedded: Mapping[str, Array], beside: Mapping[str, Array]
) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with room for a library that embeds some weights and has others beside it.

    Asked beforehand, as LLVM ends the whole process when it cannot write an object file.
    """
    # embedded weights are at least in an object file and in the library linked from it
    copies = 2 * sum(array.nbytes for array in embedded.values())
    needed = copies + sum(array.nbytes for array in beside.values()) + _OBJECT_BYTES
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
