"""``prune``: one verb for imported models, model files and PyTorch modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from tvm_balanced.errors import InputError
from tvm_balanced.model import Model
from tvm_balanced.pruning.choice import Patterns
from tvm_balanced.pruning.layers import Batch, Progress
from tvm_balanced.pruning.magnitude import prune_model
from tvm_balanced.report import PruningReport

if TYPE_CHECKING:
    import torch


@overload
def prune(
    model: Model | str | os.PathLike[str],
    pattern: Patterns,
    ignore: Iterable[str] = ...,
    *,
    progress: Progress | None = ...,
) -> Model: ...
@overload
def prune(
    model: torch.nn.Module,
    pattern: Patterns,
    ignore: Iterable[str] = ...,
    *,
    calibration: Sequence[Batch],
    method: str = ...,
    progress: Progress | None = ...,
    memory: int | None = ...,
    resume: str | os.PathLike[str] | None = ...,
) -> PruningReport: ...
def prune(
    model: Model | str | os.PathLike[str] | torch.nn.Module,
    pattern: Patterns,
    ignore: Iterable[str] = (),
    *,
    calibration: Sequence[Batch] | None = None,
    method: str | None = None,
    progress: Progress | None = None,
    memory: int | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Model | PruningReport:
    """Prune the dense layers of a model once to a balanced pattern, without retraining.

    An imported model is pruned by magnitude. A PyTorch module is pruned in place from calibration inputs,
    which keeps more of its accuracy, and is imported afterwards.

    Parameters
    ----------
    model : Model or path-like or torch.nn.Module
        What to prune; a ``.pt2`` or ``.onnx`` file is imported first.
    pattern : str or BalancedPattern or Mapping
        ``"4:16"`` for every layer, or a mapping from layer names (or ``re:`` patterns) to patterns.
    ignore : iterable of str
        Layers to leave alone, by exact name or ``re:`` pattern.
    calibration : sequence of tuple, optional
        Positional inputs of the module, a few hundred unlabelled samples in all.
    method : str, optional
        For a module: ``"reconstruct"`` (when left out), which has every layer answer as the dense model's
        does, ``"reconstruct-sparsegpt"``, the same with a mask that takes less time, ``"sparsegpt"``,
        ``"wanda"`` or ``"magnitude"``.
    progress : callable, optional
        Called with the name of each layer before it is pruned, and after reconstruction with its loss.
    memory : int, optional
        Bytes of activations that calibration may hold; what is more lies on disk meanwhile. Two fifths of
        the machine's memory when left out.
    resume : path-like, optional
        Folder of pruned layers: a pruning that was interrupted, of the same model, inputs and settings,
        goes on behind them, to the same result.

    Returns
    -------
    Model or PruningReport
        A new model, what was done in its ``pruned``; of a module, which is changed, the report alone.

    Raises
    ------
    InputError
        For an unknown pattern, method or name, a block larger than the K of a layer that ``pattern`` names
        (under one pattern for all such layers stay dense), NaN or Inf in a weight or an activation,
        calibration that does not go with the model, or when no layer is left to prune.
    OutputError
        When ``resume`` cannot be written.
    """
    if isinstance(model, str | os.PathLike):
        from tvm_balanced.frontend import load_model

        model = load_model(model)
    if isinstance(model, Model):
        if calibration is not None or method not in (None, "magnitude"):
            raise InputError(
                f"{model.name} is imported and pruned by magnitude, but calibration or method "
                f"{method!r} were given; give the PyTorch module, and import it when it is pruned"
            )
        return prune_model(model, pattern, ignore, progress)
    if not hasattr(model, "named_parameters"):
        raise InputError(
            f"a {type(model).__name__} was given, expected an imported model, a .pt2 or .onnx file, or a "
            "PyTorch module; import it with from_torch, from_onnx or from_relax first"
        )
    if calibration is None:
        raise InputError(
            "a PyTorch module was given without calibration inputs; give calibration=[(x,), ...], or "
            "import it with from_torch first and prune by magnitude"
        )
    from tvm_balanced.pruning.calibrated import prune_calibrated

    rows = prune_calibrated(
        model,
        pattern,
        calibration,
        method or "reconstruct",
        ignore,
        progress,
        memory,
        None if resume is None else Path(resume),
    )
    return PruningReport(rows)
