"""Calibration inputs in files, and how an exported program takes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.model import Model
from tvm_balanced.pruning.layers import Batch, Progress, agreement
from tvm_balanced.pruning.neighbours import embedding_scores
from tvm_balanced.report import PruningReport
from tvm_balanced.support.tensors import Array, read_tensors, to_numpy, to_torch

if TYPE_CHECKING:
    import torch

    from tvm_balanced.pruning.sensitivity import Selection
    from tvm_balanced.targets.resolve import TargetSpec


# samples a call where the program's batch is symbolic
SYMBOLIC_BATCH = 16


def read_inputs(path: Path) -> dict[str, Array]:
    """Named arrays of a ``.safetensors`` or ``.npz`` file, the samples along the first dimension.

    Raises InputError for a file of another kind, arrays of Python objects, or arrays of different
    lengths.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; give calibration inputs as .safetensors or .npz")
    if path.suffix == ".safetensors":
        arrays = read_tensors(path)
    elif path.suffix == ".npz":
        try:
            # arrays of objects would be pickles
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:
            raise InputError(
                f"{path} cannot be read as .npz without unpickling ({error}); "
                "write it with numpy.savez from arrays of numbers"
            ) from None
    else:
        raise InputError(
            f"{path} holds no calibration inputs that can be read, expected .safetensors or .npz"
        )
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or min(lengths.values()) == 0 or len(set(lengths.values())) > 1:
        raise InputError(
            f"{path} holds arrays of {lengths or 'no'} samples; give every input the same number of "
            "samples along its first dimension, at least one"
        )
    return arrays


def by_name(arrays: Mapping[str, Array], names: Sequence[str], path: Path) -> dict[str, Array]:
    """Find a model's inputs among arrays; a single input takes a single array of any name.

    ``path`` is where they were read, for messages. Raises InputError when one is missing.
    """
    if len(names) == 1 == len(arrays):
        return {names[0]: next(iter(arrays.values()))}
    for name in names:
        if name not in arrays:
            raise InputError(
                f"{path} lacks the input {name}; it holds {', '.join(arrays)}, and the model takes "
                f"{', '.join(names)}"
            )
    return {name: arrays[name] for name in names}


def batches_for(
    program: torch.export.ExportedProgram, arrays: Mapping[str, Array], path: Path
) -> list[Batch]:
    """Cut the samples into calls of an exported program, each a tuple of tensors by position.

    The program's inputs are found among ``arrays`` by name; a single one takes a single array of any
    name. ``path`` is where they were read, for messages. Raises InputError when an input is missing or
    is not of the program's shape and dtype, or the samples do not fill the program's batches.
    """
    signature = program.graph_signature
    names = [name for name in signature.user_inputs if isinstance(name, str)]
    if len(names) != len(signature.user_inputs) or program.call_spec.in_spec.child(1).num_leaves:
        raise InputError(
            "the program takes keyword inputs or constants, and calibration gives tensors by position; "
            "export it with positional tensors"
        )
    arrays = by_name(arrays, names, path)
    values = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
    }
    tensors = {name: to_torch(arrays[name]) for name in names}
    for name, tensor in tensors.items():
        _check_input(name, values[name], tensor, path)
    sizes = {values[n].shape[0] for n in names if isinstance(values[n].shape[0], int)}
    if len(sizes) > 1:
        raise InputError(
            f"the model's inputs have first dimensions {sorted(sizes)}, so its samples cannot be told; "
            "prune it from Python with tvm_balanced.pruning.calibrated"
        )
    size = sizes.pop() if sizes else SYMBOLIC_BATCH
    count = len(tensors[names[0]])
    if values[names[0]].shape[0] == size and count % size:
        raise InputError(
            f"{path} holds {count} samples, and the model takes {size} a call; give a multiple of {size}"
        )
    return [
        tuple(tensor[start : start + size] for tensor in tensors.values())
        for start in range(0, count, size)
    ]


def _check_input(name: str, expected: torch.Tensor, given: torch.Tensor, path: Path) -> None:
    """Refuse samples of other shapes, but for the first dimension, or of another dtype than expected."""
    fits = given.ndim == expected.ndim and all(
        not isinstance(want, int) or want == got
        for want, got in zip(expected.shape[1:], given.shape[1:], strict=False)
    )
    if not fits or given.dtype != expected.dtype or not expected.ndim:
        raise InputError(
            f"{name} is {given.dtype} {list(given.shape)} in {path}, but the model takes "
            f"{expected.dtype} {[str(extent) for extent in expected.shape]} with the samples along "
            "the first dimension"
        )


@dataclass(frozen=True)
class Goal:
    """What to reach instead of one pattern for all: a predicted speedup, or a bound of the loss."""

    target: TargetSpec
    candidates: tuple[str, ...]
    speedup: float | None = None
    max_loss: float | None = None


@dataclass(frozen=True)
class ProgramPruning:
    """How a program is pruned: as :func:`tvm_balanced.prune` and :func:`tvm_balanced.distill` have it.

    ``steps`` are those of the distillation, or its time, 0 for none, and ``quantize`` what it rounds to;
    ``metric`` is ``"cosine"``, or ``"recall"`` for scores of embeddings beside it.
    """

    method: str
    ignore: tuple[str, ...] = ()
    steps: int | str = 0
    quantize: str = "none"
    memory: int | None = None
    resume: Path | None = None
    metric: str = "cosine"


def prune_program(
    path: Path,
    pattern: BalancedPattern | Goal,
    inputs: Path,
    settings: ProgramPruning,
    progress: Progress,
) -> tuple[Model, dict[str, float], Selection | None]:
    """Prune a ``.pt2`` from calibration inputs, and distil it where the settings say so.

    Returned are the imported model with the new weights, how near its first output is to the dense model's
    on the calibration inputs, and what was chosen per layer where a goal was given. Raises
    InputError as :func:`tvm_balanced.pruning.calibrated.prune_calibrated`, for files that cannot be used,
    and for a goal that cannot be reached.
    """
    from tvm_balanced.frontend import from_torch
    from tvm_balanced.frontend.archive import load_exported
    from tvm_balanced.pruning import sensitivity
    from tvm_balanced.pruning.calibrated import prune_calibrated
    from tvm_balanced.pruning.distillation import Distillation, distill

    arrays = read_inputs(inputs)
    progress("import the model")
    program = load_exported(path)
    imported = from_torch(program, name=path.stem)
    batches = batches_for(program, arrays, inputs)
    module = program.module()
    teacher = copy.deepcopy(module)
    method, ignore = settings.method, settings.ignore
    selection: Selection | None = None
    patterns: BalancedPattern | dict[str, str]
    if isinstance(pattern, Goal):
        scanned = sensitivity.scan(
            module, imported, batches, pattern.target, pattern.candidates, method, ignore, progress
        )
        if pattern.speedup is not None:
            selection = sensitivity.choose(scanned, pattern.speedup)
        else:
            assert pattern.max_loss is not None
            selection = sensitivity.choose_by_loss(
                scanned, module, batches, pattern.max_loss, method, progress
            )
        patterns = selection.patterns
        if not patterns:
            raise InputError(
                "no layer can be pruned for that goal: dense is predicted faster, or the loss is too large; "
                "ask for another, or give other candidates"
            )
    else:
        patterns = pattern
    rows = prune_calibrated(
        module, patterns, batches, method, ignore, progress, settings.memory, settings.resume
    )
    if settings.steps:
        trained = Distillation(quantize=settings.quantize)
        distill(module, teacher, batches, settings.steps, None, ignore, progress, trained)
    state = module.state_dict()
    changed = {n: to_numpy(state[n]).copy() for n in imported.params if n in state}
    noted = {row.name: BalancedPattern(row.pattern) for row in rows if row.pattern is not None}
    scores = {"cosine": agreement(module, teacher, batches)}
    if settings.metric == "recall":
        scores |= embedding_scores(module, teacher, batches)
    pruned = imported.with_params(changed, patterns=noted, pruned=PruningReport(rows))
    return pruned, scores, selection
