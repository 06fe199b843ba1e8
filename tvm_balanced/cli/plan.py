"""``tvm-balanced plan``."""

from __future__ import annotations

import shlex

import click

from tvm_balanced.cli.options import Request, repeated, requesting, with_output
from tvm_balanced.cli.output import Output


@click.command(name="plan")
@requesting("What layers would be pruned to; what they follow now where not given.")
@with_output
def command(output: Output, request: Request) -> None:
    """Which layers of MODEL (.onnx or .pt2) would run sparse; nothing is changed or written.

    \b
    Example:
      tvm-balanced plan model.onnx --target h100 --pattern 4:16
    """
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.planning.plan import plan
    from tvm_balanced.targets.resolve import resolve

    form = None if request.pattern is None else BalancedPattern(request.pattern)
    spec = resolve(request.target)
    with output.progress("plan") as tell:
        model = request.load(tell)
        tell("decide layer by layer")
        report = plan(model, spec, form, options=request.options)
    output.document(
        command="plan",
        model=request.model,
        target=spec.name,
        pattern=request.pattern,
        options=request.options.to_json(),
        layers=report.to_json(),
        sparse_layers=len(report.sparse),
        bytes_dense=sum(row.bytes_dense for row in report),
        bytes_sparse=sum(row.bytes_sparse for row in report),
    )
    output.show(report)
    if request.pattern is None:
        output.next(request.command("compile", "-o", "model.tvmb"))
        return
    words = [request.model, *repeated("--input-shape", request.input_shapes)]
    words += ["--pattern", request.pattern, *repeated("--ignore", tuple(request.options.ignore))]
    output.next(shlex.join(["tvm-balanced", "prune", *words, "--dry-run"]))
