"""``tvm-balanced plan``."""

from __future__ import annotations

import shlex

import click

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
    repeated,
    target_option,
    with_output,
)
from tvm_balanced.cli.output import Output


@click.command(name="plan")
@model_argument
@target_option
@pattern_option(False, "What layers would be pruned to; what they follow now where not given.")
@layer_options
@buckets_option
@encoding_option
@dense_option
@with_output
def command(
    output: Output,
    model: str,
    input_shapes: tuple[str, ...],
    target: str,
    pattern: str | None,
    ignore: tuple[str, ...],
    policies: tuple[str, ...],
    buckets: str | None,
    encoding: str,
    dense: str,
) -> None:
    """Which layers of MODEL (.onnx or .pt2) would run sparse; nothing is changed or written.

    \b
    Example:
      tvm-balanced plan model.onnx --target h100 --pattern 4:16
    """
    shapes, sizes = parse_shapes(input_shapes), parse_buckets(buckets)
    policy = parse_policies(policies)
    output.arguments(
        "plan",
        {
            "model": model,
            "input-shape": shapes,
            "target": target,
            "pattern": pattern,
            "ignore": ignore,
            "policy": policy,
            "buckets": sizes,
            "encoding": encoding,
            "dense": dense,
        },
    )
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.frontend import load_model
    from tvm_balanced.targets.resolve import resolve

    form = None if pattern is None else BalancedPattern(pattern)
    spec = resolve(target)
    with output.progress("plan") as tell:
        tell("import the model")
        imported = load_model(model, shapes)
        tell("decide layer by layer")
        report = imported.plan(spec, form, ignore, policy, sizes, encoding, dense)
    sparse = sum(row.decision == "sparse" for row in report)
    output.document(
        {
            "command": "plan",
            "model": model,
            "target": spec.name,
            "pattern": pattern,
            "layers": report.to_json(),
            "sparse_layers": sparse,
            "bytes_dense": sum(row.bytes_dense for row in report),
            "bytes_sparse": sum(row.bytes_sparse for row in report),
        }
    )
    output.show(report)
    name = shlex.quote(model) + repeated("--input-shape", input_shapes)
    by = "" if dense == "dlight" else f" --dense {dense}"
    if pattern is None:
        output.next(f"tvm-balanced compile {name} --target {target}{by} -o model.tvmb")
    else:
        ignored = repeated("--ignore", ignore)
        output.next(f"tvm-balanced prune {name} --pattern {pattern}{ignored} --dry-run")
