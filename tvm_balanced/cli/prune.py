"""``tvm-balanced prune``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from tvm_balanced.cli.options import (
    ignore_option,
    model_argument,
    parse_shapes,
    pattern_option,
    repeated,
    target_option,
    with_output,
)
from tvm_balanced.cli.output import Output
from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    from tvm_balanced.model import PrunedLayer
    from tvm_balanced.pruning.inputs import Goal
    from tvm_balanced.pruning.sensitivity import Selection


# those of calibration.METHODS, which --help must not import
METHODS = ("magnitude", "wanda", "sparsegpt")


@click.command(name="prune")
@model_argument
@pattern_option(
    False,
    'What to keep: "4:16" keeps 4 of every 16 weights of a row; with a goal, what to choose from: '
    '"8:16,4:16".',
)
@click.option(
    "--target-speedup",
    "speedup",
    type=float,
    metavar="X",
    help="Goal: this predicted speedup of the dense layers together, at the least loss.",
)
@click.option(
    "--max-loss",
    metavar="1%",
    help="Goal: the most speedup with 1 - cosine of the first output within this, on the inputs.",
)
@target_option
@ignore_option
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="magnitude",
    show_default=True,
    help="How weights are chosen; wanda and sparsegpt need --calibration and a .pt2.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Unlabelled inputs, .safetensors or .npz: an array per input, samples along the first dimension.",
)
@click.option(
    "--distill",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="Steps of distillation from the dense model on the calibration inputs.",
)
@click.option("-o", "--output", "destination", metavar="PATH", help="File to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@with_output
def command(
    output: Output,
    model: str,
    input_shapes: tuple[str, ...],
    pattern: str | None,
    speedup: float | None,
    max_loss: str | None,
    target: str,
    ignore: tuple[str, ...],
    method: str,
    calibration: str | None,
    distill: int,
    destination: str | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Prune the dense layers of MODEL once to a balanced pattern.

    An .onnx file becomes an .onnx file with other weights; of a .pt2 or a .safetensors checkpoint the
    weights are written as .safetensors. Without retraining a model loses accuracy: check it. A few hundred
    inputs (--calibration) save much of it, and distillation on them (--distill) more; both take a .pt2.

    \b
    Example:
      tvm-balanced prune model.onnx --pattern 4:16 --ignore lm_head -o sparse.onnx
    """
    shapes = parse_shapes(input_shapes)
    source = Path(model)
    suffix = source.suffix if source.suffix in (".onnx", ".safetensors") else ".safetensors"
    path = Path(destination) if destination else source.with_name(f"{source.stem}-pruned{suffix}")
    output.arguments(
        "prune",
        {
            "model": model,
            "input-shape": shapes,
            "pattern": pattern,
            "target-speedup": speedup,
            "max-loss": max_loss,
            "target": target,
            "ignore": ignore,
            "method": method,
            "calibration": calibration,
            "distill": distill,
            "output": "none (dry run)" if dry_run else path,
            "overwrite": overwrite,
        },
    )
    from tvm_balanced.format.pattern import BalancedPattern
    from tvm_balanced.frontend import checkpoint
    from tvm_balanced.pruning import magnitude
    from tvm_balanced.pruning.inputs import prune_program
    from tvm_balanced.support import files

    goal: Goal | None = None
    if speedup is not None or max_loss is not None:
        goal = _goal(speedup, max_loss, target, pattern)
    elif pattern is None:
        raise InputError(
            "there is neither a pattern nor a goal; give --pattern 4:16, or --target-speedup or --max-loss"
        )
    form = None if goal or pattern is None else BalancedPattern(pattern)
    if path.suffix != suffix:
        raise InputError(
            f"the pruned weights of {model} are written as {suffix}, but the output is {path}; "
            f"name it {path.with_suffix(suffix)}"
        )
    calibrated = method != "magnitude" or distill > 0 or goal is not None
    if calibrated and calibration is None:
        raise InputError(
            "a method other than magnitude, --distill and a goal need inputs to look at; give "
            "--calibration FILE"
        )
    if calibration is not None and not calibrated:
        raise InputError(
            "--calibration was given, but pruning by magnitude without --distill looks at no input; "
            "add --method sparsegpt, or leave it out"
        )
    if calibrated and source.suffix in (".onnx", ".safetensors"):
        raise InputError(
            f"calibration runs the model in PyTorch, and {model} is no .pt2; export it with torch.export, "
            "or prune it by magnitude"
        )
    if not dry_run:
        files.check_output(path, overwrite)
    cosine: float | None = None
    selection: Selection | None = None
    wanted = goal or form
    if calibrated:
        assert calibration is not None and wanted is not None
        with output.progress("prune") as tell:
            pruned, cosine, selection = prune_program(
                source, wanted, Path(calibration), method, ignore, distill, tell
            )
        rows = list(pruned.pruned)
        if not dry_run:
            checkpoint.write_checkpoint(path, pruned.params, {}, pruned.patterns, overwrite)
    elif source.suffix == ".safetensors":
        assert form is not None
        tensors, metadata = checkpoint.read_checkpoint(source)
        with output.progress("prune") as tell:
            changed, patterns, rows = magnitude.prune_tensors(tensors, str(form), ignore, tell)
        # what was noted before holds for the weights that stay
        patterns = {**checkpoint.read_patterns(metadata, source), **patterns}
        if not dry_run:
            checkpoint.write_checkpoint(path, {**tensors, **changed}, metadata, patterns, overwrite)
    else:
        from tvm_balanced.frontend import load_model

        assert form is not None
        with output.progress("prune") as tell:
            tell("import the model")
            imported = load_model(source, shapes)
            pruned = imported.prune(form, ignore, tell)
        rows = list(pruned.pruned)
        if not dry_run and source.suffix == ".onnx":
            new = {n: a for n, a in pruned.params.items() if a is not imported.params[n]}
            checkpoint.write_onnx(source, path, new, overwrite)
        elif not dry_run:
            checkpoint.write_checkpoint(path, pruned.params, {}, pruned.patterns, overwrite)
    if selection is not None:
        from tvm_balanced.pruning.sensitivity import selection_json
    output.document(
        {
            "command": "prune",
            "model": model,
            "pattern": None if form is None else str(form),
            "choice": None if selection is None else selection_json(selection),
            "speedup": None if selection is None else selection.speedup,
            "output": None if dry_run else str(path),
            "layers": [{**asdict(row), "shape": list(row.shape)} for row in rows],
            "method": method,
            "cosine": cosine,
            "pruned_layers": sum(row.skipped is None for row in rows),
        }
    )
    output.show(_table(rows, "nothing written (dry run)" if dry_run else f"written: {path}"))
    if selection is not None:
        output.show(_choice(selection, target))
    if cosine is not None:
        output.show(
            f"mean cosine of the first output to the dense model's: {cosine:.4f}, on the calibration inputs "
            "themselves; expect less on others"
        )
    if dry_run:
        again = repeated("--input-shape", input_shapes) + repeated("--ignore", ignore)
        if calibrated:
            again += f" --method {method} --calibration {shlex.quote(str(calibration))}"
            again += f" --distill {distill}" if distill else ""
        if goal is not None:
            again += f" --target {shlex.quote(target)}"
            again += f" --target-speedup {speedup:g}" if speedup is not None else ""
            again += f" --max-loss {max_loss}" if max_loss is not None else ""
        output.next(
            f"tvm-balanced prune {shlex.quote(model)}"
            f"{'' if pattern is None else f' --pattern {pattern}'}{again} "
            f"-o {shlex.quote(str(path))}"
        )
    elif suffix == ".onnx":
        again = repeated("--input-shape", input_shapes)
        output.next(f"tvm-balanced compile {shlex.quote(str(path))}{again} -o model.tvmb")
    else:
        graph = "MODEL.pt2" if source.suffix == ".safetensors" else shlex.quote(model)
        weights = shlex.quote(str(path))
        output.next(f"tvm-balanced compile {graph} --weights {weights} -o model.tvmb")


def _goal(speedup: float | None, max_loss: str | None, target: str, pattern: str | None) -> Goal:
    from tvm_balanced.pruning.inputs import Goal
    from tvm_balanced.pruning.sensitivity import CANDIDATES
    from tvm_balanced.targets.resolve import resolve

    if speedup is not None and max_loss is not None:
        raise InputError("--target-speedup and --max-loss are two goals; give one of them")
    bound: float | None = None
    if max_loss is not None:
        try:
            bound = float(max_loss.removesuffix("%")) / (100 if max_loss.endswith("%") else 1)
        except ValueError:
            raise InputError(
                f'--max-loss "{max_loss}" is no share; write for example 1% or 0.01'
            ) from None
    forms = CANDIDATES if pattern is None else tuple(pattern.split(","))
    return Goal(resolve(target), forms, speedup, bound)


def _choice(selection: Selection, target: str) -> Table:
    """What each layer costs and gains, dense and under every candidate."""
    table = Table(title=f"choice for {target}, times predicted", title_justify="left")
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("chosen", "dense us", "us", "loss alone"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("could be (us, loss)", overflow="fold")
    for layer in selection.layers:
        others = [x for x in layer.options if x.pattern not in (None, layer.chosen.pattern)]
        table.add_row(
            layer.name,
            layer.chosen.pattern or "dense",
            f"{layer.dense_us:.2f}",
            f"{layer.chosen.us:.2f}",
            f"{layer.chosen.loss:.3%}",
            "; ".join(f"{x.pattern} ({x.us:.2f}, {x.loss:.3%})" for x in others),
        )
    table.caption = f"dense layers together: {selection.speedup:.2f}x predicted"
    return table


def _table(rows: Sequence[PrunedLayer], caption: str) -> Table:
    table = Table(title="pruned layers", title_justify="left")
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("N x K", "pattern", "energy kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("left alone because", overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            row.pattern or "-",
            f"{row.kept_energy:.1%}",
            row.skipped or "",
        )
    done = sum(row.skipped is None for row in rows)
    table.caption = f"{done} of {len(rows)} dense layers pruned; {caption}"
    return table
