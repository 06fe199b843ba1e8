"""``tvm-balanced compile``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tvm_balanced.cli.coverage import coverage_table, coverage_text
from tvm_balanced.cli.options import Request, overwrite_option, requesting, with_output
from tvm_balanced.cli.output import Output, summary

if TYPE_CHECKING:
    from tvm_balanced.model import Model


def _smoothed(model: Model, path: Path, tell: Callable[[str], None]) -> Model:
    from tvm_balanced.pruning.inputs import read_inputs
    from tvm_balanced.quantization import calls_of, smooth

    return smooth(model, calls_of(model, read_inputs(path), path), tell)


@click.command(name="compile")
@requesting("Prune on the way, once and without retraining.")
@click.option("--weights", metavar="FILE", help="Weights to use: a .safetensors of prune.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Inputs (.npz, .safetensors) by which activations are evened out for int8 and its errors measured.",
)
@click.option("-o", "--output", "destination", metavar="PATH", help="Folder to write (.tvmb).")
@overwrite_option
@with_output
def command(
    output: Output,
    request: Request,
    weights: str | None,
    calibration: str | None,
    destination: str | None,
    overwrite: bool,
) -> None:
    """Compile MODEL (.onnx or .pt2), usually pruned, into a library to deploy.

    \b
    Example:
      tvm-balanced compile sparse.onnx --target h100 --buckets 1,8 -o model.tvmb
    """
    path = Path(destination) if destination else Path(request.model).with_suffix(".tvmb")
    from tvm_balanced.artifact.folder import check_writable
    from tvm_balanced.build.compiler import compile as compile_model
    from tvm_balanced.targets.resolve import resolve

    check_writable(path, overwrite=overwrite)
    spec = resolve(request.target)
    begin = time.monotonic()
    with output.progress("compile") as tell:
        model = request.load_pruned(tell, weights)
        if calibration is not None:
            model = _smoothed(model, Path(calibration), tell)
        library = compile_model(model, spec, options=request.options, progress=tell)
        tell("write")
        library.save(path, overwrite=overwrite)
    report = library.report
    if request.pattern is not None:
        output.note(
            f"warning: pruned to {request.pattern} in one step without retraining; expect lost accuracy, "
            "check it"
        )
    if not report.sparse:
        output.note("warning: no layer runs sparse; the table says why")
    seconds = time.monotonic() - begin
    output.document(
        command="compile",
        model=request.model,
        target=spec.name,
        arch=spec.arch,
        options=request.options.to_json(),
        output=str(path),
        bytes=library.num_bytes,
        seconds=seconds,
        kernels=library.kernels,
        layers=report.to_json(),
        sparse_layers=len(report.sparse),
        coverage=[vars(kernel) for kernel in library.coverage],
    )
    output.show(report)
    if any(kernel.schedule != "default" for kernel in library.coverage):
        output.show(coverage_table(library.coverage))
    rows = {
        "written": path,
        "target": f"{spec.name} ({spec.arch})",
        "size": f"{library.num_bytes / 2**20:.1f} MiB",
        "sparse layers": f"{len(report.sparse)} of {len(report)}",
        "CUDA kernels": len(library.kernels),
        "schedules": coverage_text(library.coverage),
        "took": f"{seconds:.1f} s",
    }
    output.show(summary("library", rows))
    verb, more = ("run", " --random") if spec.kind == "llvm" else ("inspect", "")
    output.next(f"tvm-balanced {verb} {shlex.quote(str(path))}{more}")
