"""``tvm-balanced compile``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from tvm_balanced.cli.coverage import coverage_table, coverage_text
from tvm_balanced.cli.options import (
    buckets_option,
    dense_option,
    encoding_option,
    layer_options,
    model_argument,
    parse_buckets,
    parse_policies,
    parse_shapes,
    pattern_option,
    target_option,
    with_output,
)
from tvm_balanced.cli.output import Output, summary


@click.command(name="compile")
@model_argument
@target_option
@click.option("--weights", metavar="FILE", help="Weights to use: a .safetensors of prune.")
@pattern_option(False, "Prune on the way, once and without retraining.")
@layer_options
@buckets_option
@encoding_option
@dense_option
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=True,
    show_default=True,
    help="Replay kernels of static shapes as CUDA graphs.",
)
@click.option("--logs", metavar="DIR", help="Tuning records to look at first.")
@click.option("-o", "--output", "destination", metavar="PATH", help="Folder to write (.tvmb).")
@click.option("--overwrite", is_flag=True, help="Replace the .tvmb if it exists.")
@with_output
def command(
    output: Output,
    model: str,
    input_shapes: tuple[str, ...],
    target: str,
    weights: str | None,
    pattern: str | None,
    ignore: tuple[str, ...],
    policies: tuple[str, ...],
    buckets: str | None,
    encoding: str,
    dense: str,
    cuda_graph: bool,
    logs: str | None,
    destination: str | None,
    overwrite: bool,
) -> None:
    """Compile MODEL (.onnx or .pt2), usually pruned, into a library to deploy.

    \b
    Example:
      tvm-balanced compile sparse.onnx --target h100 --buckets 1,8 -o model.tvmb
    """
    shapes, sizes = parse_shapes(input_shapes), parse_buckets(buckets)
    policy = parse_policies(policies)
    path = Path(destination) if destination else Path(model).with_suffix(".tvmb")
    output.arguments(
        "compile",
        {
            "model": model,
            "input-shape": shapes,
            "target": target,
            "weights": weights,
            "pattern": pattern,
            "ignore": ignore,
            "policy": policy,
            "buckets": sizes,
            "encoding": encoding,
            "dense": dense,
            "cuda-graph": cuda_graph,
            "logs": logs,
            "output": path,
            "overwrite": overwrite,
        },
    )
    from tvm_balanced.artifact.folder import check_writable
    from tvm_balanced.build.compiler import compile as compile_model
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.frontend import load_model
    from tvm_balanced.frontend.checkpoint import with_weights
    from tvm_balanced.targets.resolve import resolve

    form = None if pattern is None else BalancedPattern(pattern)
    check_writable(path, overwrite=overwrite)
    spec = resolve(target)
    begin = time.monotonic()
    with output.progress("compile") as tell:
        tell("import the model")
        ready = load_model(model, shapes)
        if weights is not None:
            tell("read the weights")
            ready = with_weights(ready, Path(weights))
        if form is not None:
            ready = ready.prune(form, ignore, lambda name: tell(f"prune {name}"))
        library = compile_model(
            ready,
            spec,
            policy=policy,
            ignore=ignore,
            buckets=sizes,
            encoding=encoding,
            dense=dense,
            cuda_graph=cuda_graph,
            logs=logs,
            progress=tell,
        )
        tell("write")
        library.save(path, overwrite=overwrite)
    if form is not None:
        output.note(
            f"warning: pruned to {form} in one step without retraining; expect lost accuracy, check it"
        )
    if not any(row.decision == "sparse" for row in library.report):
        output.note("warning: no layer runs sparse; the table says why")
    seconds = time.monotonic() - begin
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    sparse = sum(row.decision == "sparse" for row in library.report)
    output.document(
        {
            "command": "compile",
            "model": model,
            "target": spec.name,
            "arch": spec.arch,
            "output": str(path),
            "bytes": size,
            "seconds": seconds,
            "kernels": library.kernels,
            "layers": library.report.to_json(),
            "sparse_layers": sparse,
            "coverage": [dict(kernel) for kernel in library.coverage],
        }
    )
    output.show(library.report)
    if any(kernel["schedule"] != "default" for kernel in library.coverage):
        output.show(coverage_table(library.coverage))
    rows = {
        "written": path,
        "target": f"{spec.name} ({spec.arch})",
        "size": f"{size / 2**20:.1f} MiB",
        "sparse layers": f"{sparse} of {len(library.report)}",
        "CUDA kernels": len(library.kernels),
        "schedules": coverage_text(library.coverage),
        "took": f"{seconds:.1f} s",
    }
    output.show(summary("library", rows))
    verb = "run" if spec.kind == "llvm" else "inspect"
    output.next(
        f"tvm-balanced {verb} {shlex.quote(str(path))}" + (" --random" if verb == "run" else "")
    )
