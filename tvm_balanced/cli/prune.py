"""``tvm-balanced prune``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tvm_balanced.cli.options import (
    ignore_option,
    overwrite_option,
    parse_shapes,
    repeated,
    shapes_option,
    target_option,
    with_default,
    with_output,
)
from tvm_balanced.cli.output import Output
from tvm_balanced.errors import InputError
from tvm_balanced.options import QUANTIZATIONS
from tvm_balanced.report import JsonObject, table_of

if TYPE_CHECKING:
    from tvm_balanced.pruning.files import FilePruning
    from tvm_balanced.pruning.inputs import Goal
    from tvm_balanced.pruning.sensitivity import Selection


# those of calibration.METHODS, which --help must not import
METHODS = ("magnitude", "wanda", "sparsegpt", "reconstruct", "reconstruct-sparsegpt")


@click.command(name="prune")
@click.argument("model", type=click.Path())
@shapes_option
@click.option(
    "--pattern",
    metavar="NNZ:BLOCK",
    help='What to keep: "4:16" keeps 4 of every 16 weights of a row; with a goal, what to choose from: '
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
    help="How weights are chosen: reconstruct with --calibration, else magnitude; all others need "
    "--calibration and a .pt2.",
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
@click.option(
    "--budget",
    metavar="TIME",
    help="Time of distillation instead of --distill: 10m, 30m or 2h; the steps are planned from theirs.",
)
@with_default(
    "--quantize",
    "none",
    click.Choice(QUANTIZATIONS),
    "What the model will be compiled with: the last third of a distillation rounds to it.",
)
@with_default(
    "--metric",
    "cosine",
    click.Choice(("cosine", "recall")),
    "Score of the first output against the dense model's; recall is for embeddings: whether the ten nearest "
    "samples are the same, and the ranks of all similarities.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Activations that may be held in memory, such as 4G; the rest lies on disk.  "
    "[default: two fifths of the machine's]",
)
@click.option(
    "--resume",
    metavar="FOLDER",
    help="Keep pruned layers here; the same command, when interrupted, goes on behind them.",
)
@click.option("-o", "--output", "destination", metavar="PATH", help="File to write.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@with_output
def command(
    output: Output,
    model: str,
    input_shapes: tuple[str, ...],
    pattern: str | None,
    calibration: str | None,
    destination: str | None,
    **given: Any,
) -> None:
    """Prune the dense layers of MODEL once to a balanced pattern.

    An .onnx file becomes an .onnx file with other weights; of a .pt2 or a .safetensors checkpoint the
    weights are written as .safetensors. Without retraining a model loses accuracy: check it. A few hundred
    inputs (--calibration) save much of it, and distillation on them (--budget 30m) more; both take a .pt2.

    \b
    Example:
      tvm-balanced prune model.onnx --pattern 4:16 --ignore lm_head -o sparse.onnx
    """
    shapes = parse_shapes(input_shapes)
    from tvm_balanced.pruning.files import FilePruning

    wanted = {name: given.pop(name) for name in ("speedup", "max_loss", "target")}
    goal = _goal(**wanted, pattern=pattern)
    memory, resume = given.pop("memory"), given.pop("resume")
    job = FilePruning(
        Path(model),
        goal or pattern,
        output=Path(destination) if destination else None,
        shapes=shapes,
        calibration=Path(calibration) if calibration else None,
        memory=None if memory is None else _size(memory),
        resume=None if resume is None else Path(resume),
        **given,
    )
    with output.progress("prune") as tell:
        done = job.run(tell)
    report, selection, choice = done.report, done.selection, None
    if selection is not None:
        # with it TVM is imported, which plain pruning does not need
        from tvm_balanced.pruning.sensitivity import selection_json

        choice = selection_json(selection)
    output.document(
        command="prune",
        model=model,
        pattern=None if goal else pattern,
        choice=choice,
        speedup=None if selection is None else selection.speedup,
        output=None if job.dry_run else str(job.path),
        layers=report.to_json(),
        method=job.method_used,
        cosine=done.scores.get("cosine"),
        scores=dict(done.scores),
        pruned_layers=len(report.changed),
    )
    output.show(report)
    output.show("nothing written (dry run)" if job.dry_run else f"written: {job.path}")
    if selection is not None:
        output.show(_choice(selection, wanted["target"]))
    if done.scores:
        names = {
            "cosine": "mean cosine",
            "recall": "overlap of the 10 nearest",
            "rank": "rank correlation of similarities",
        }
        text = ", ".join(f"{names[name]} {value:.4f}" for name, value in done.scores.items())
        output.show(
            f"first output against the dense model's: {text}, on the calibration inputs themselves; expect "
            "less on others"
        )
    output.next(_next(job, pattern, input_shapes, wanted if goal else {}))


def _next(
    job: FilePruning, pattern: str | None, input_shapes: tuple[str, ...], goal: JsonObject
) -> str:
    """Return the same without ``--dry-run``, or the compilation of what was written."""
    words = ["tvm-balanced"]
    budget = [] if job.budget is None else ["--budget", job.budget]
    shapes = repeated("--input-shape", input_shapes)
    if job.dry_run:
        words += ["prune", str(job.source)]
        words += [] if pattern is None else ["--pattern", pattern]
        words += shapes + repeated("--ignore", job.ignore)
        if job.calibrated:
            words += ["--method", job.method_used, "--calibration", str(job.calibration)]
            words += (["--distill", str(job.distill)] if job.distill else []) + budget
            words += [] if job.quantize == "none" else ["--quantize", job.quantize]
            words += [] if job.metric == "cosine" else ["--metric", job.metric]
        flags = {"target": "--target", "speedup": "--target-speedup", "max_loss": "--max-loss"}
        for name, flag in flags.items():
            words += [flag, str(goal[name])] if goal.get(name) is not None else []
        words += ["-o", str(job.path)]
    elif job.suffix == ".onnx":
        words += ["compile", str(job.path), *shapes, "-o", "model.tvmb"]
    else:
        graph = "MODEL.pt2" if job.source.suffix == ".safetensors" else str(job.source)
        words += ["compile", graph, "--weights", str(job.path), "-o", "model.tvmb"]
    return shlex.join(words)


def _size(text: str) -> int:
    """Return bytes of a size such as 512M or 4G."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 0)
    try:
        size = int(float(text[:-1]) * unit) if unit else int(text)
    except ValueError:
        size = -1
    if size < 0:
        raise InputError(f'--memory "{text}" is no size; write for example 512M or 4G') from None
    return size


def _goal(
    speedup: float | None, max_loss: str | None, target: str, pattern: str | None
) -> Goal | None:
    from tvm_balanced.pruning.inputs import Goal
    from tvm_balanced.pruning.sensitivity import CANDIDATES
    from tvm_balanced.targets.resolve import resolve

    if speedup is None and max_loss is None:
        return None
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
    """Return what each layer costs and gains, dense and under every candidate."""
    title = f"choice for {target}, times predicted"
    table = table_of(title, ("layer",), overflow="fold", min_width=12)
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
