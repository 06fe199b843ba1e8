"""One-shot magnitude pruning to a balanced pattern, and recognising patterns, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import VALUE_DTYPES
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import (
    check_weight,
    into_blocks,
    is_balanced,
    magnitude_bits,
    row_chunks,
)
from tvm_balanced.model import Model
from tvm_balanced.pruning.choice import Patterns, choose_layers, leave_narrow
from tvm_balanced.pruning.layers import Progress
from tvm_balanced.report import PrunedLayer, PruningReport
from tvm_balanced.support.tensors import Array

# tables that are looked up, not multiplied by: pruning one only costs accuracy
_TABLES = ("embed", "wte", "wpe")


def balanced_mask(weight: Array, pattern: BalancedPattern | str) -> Array:
    """Return a mask, (N, K) bool, of the ``nnz`` largest magnitudes of every block.

    Of equal ones the leftmost is kept. ``weight`` (N, K) is float32, float16 or bfloat16. Raises InputError
    for a wrong rank or dtype, NaN or Inf, or a block larger than K.

    Source: Algorithm 1 of Yao et al., AAAI 2019 (one step of it, without fine-tuning).
    """
    pattern = BalancedPattern(pattern)
    check_weight(weight)
    if pattern.block > weight.shape[1]:
        raise InputError(
            f"pattern {pattern} has blocks of {pattern.block}, but the weight has only "
            f"K={weight.shape[1]} columns; choose a block of at most {weight.shape[1]}"
        )
    mask = np.empty(weight.shape, bool)
    position = np.arange(pattern.block - 1, -1, -1, dtype=np.uint64)
    for rows in row_chunks(weight):
        blocks = into_blocks(weight[rows], pattern.block)
        # one unique sortable key a weight: magnitude first, then the place, so that ties are fixed
        key = magnitude_bits(blocks).astype(np.uint64)
        key <<= np.uint64(8)
        key |= position
        place = pattern.block - pattern.nnz
        threshold = np.partition(key, place, axis=-1)[..., place : place + 1]
        mask[rows] = (key >= threshold).reshape(blocks.shape[0], -1)[:, : weight.shape[1]]
    return mask


def prune_weight(weight: Array, pattern: BalancedPattern | str) -> Array:
    """Return a copy of ``weight`` with the smallest magnitudes of each block set to zero.

    Weights that are balanced already come back equal. See :func:`balanced_mask` for parameters and errors.
    """
    return _masked(weight, balanced_mask(weight, pattern))


def kept_energy(dense: Array, pruned: Array) -> float:
    """Share of the squared norm that pruning kept, 0 to 1 (1 for an all-zero weight)."""
    total = kept = 0.0
    for rows in row_chunks(dense):
        total += float(np.square(dense[rows], dtype=np.float32).sum(dtype=np.float64))
        kept += float(np.square(pruned[rows], dtype=np.float32).sum(dtype=np.float64))
    return kept / total if total else 1.0


def prune_model(
    model: Model, pattern: Patterns, ignore: Iterable[str] = (), progress: Progress | None = None
) -> Model:
    """Prune the dense layers of an imported model; see :func:`tvm_balanced.prune`."""
    from tvm_balanced.relay_passes.pack_weights import dense_weight
    from tvm_balanced.relay_passes.weight_chain import scatter_mask

    layers = {layer.name: layer for layer in model.dense_layers()}
    if not layers:
        raise InputError(
            f"{model.name} has no dense layer with a constant weight, so nothing in it can become "
            "sparse; give a model with linear layers (matmul, Gemm, nn.Linear)"
        )
    blocked = {name: layer.blocked for name, layer in layers.items()}
    patterns, skipped = choose_layers(pattern, blocked, ignore, BalancedPattern)
    if not patterns:
        raise InputError(
            f"every dense layer of {model.name} is ignored or cannot be sparse; ignore fewer layers"
        )
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    skipped |= leave_narrow(pattern, patterns, {name: k for name, (_, k) in shapes.items()})

    def weight(name: str) -> Array:
        return dense_weight(model.params, layers[name])

    changed: dict[str, Array] = {}
    rows = []
    for row, mask in _prune(shapes, weight, patterns, skipped, progress):
        rows.append(row)
        if mask is not None:
            source = model.params[row.name]
            changed[row.name] = _masked(
                source, scatter_mask(layers[row.name].chain, source.shape, mask.T)
            )
    return model.with_params(
        changed, patterns={**model.patterns, **patterns}, pruned=PruningReport(rows)
    )


def prune_tensors(
    tensors: Mapping[str, Array], pattern: str, ignore: Iterable[str], progress: Progress
) -> tuple[dict[str, Array], dict[str, BalancedPattern], PruningReport]:
    """Prune the matrices of a checkpoint, rows being outputs as in ``nn.Linear``.

    Without the model nobody can know which matrices are multiplied by: those whose name ends in
    ``weight`` are taken, embedding tables (by name) are not. Returned are the weights that change, the
    patterns by name, and what was done. Raises InputError for a pattern that does not fit, NaN or Inf, or
    when there is nothing to prune.
    """
    shapes = {
        name: (array.shape[0], array.shape[1])
        for name, array in tensors.items()
        if array.ndim == 2 and array.dtype.name in VALUE_DTYPES and name.endswith("weight")
    }
    if not shapes:
        raise InputError(
            "the checkpoint has no matrix named ...weight, so nothing in it can become sparse; "
            "give one with linear layers"
        )
    blocked = {
        name: "looks like an embedding table (by its name)"
        if any(word in name.lower() for word in _TABLES)
        else None
        for name in shapes
    }
    patterns, skipped = choose_layers(pattern, blocked, ignore, BalancedPattern)
    if not patterns:
        raise InputError(
            "every matrix of the checkpoint is ignored or an embedding table; ignore fewer layers"
        )
    skipped |= leave_narrow(pattern, patterns, {name: k for name, (_, k) in shapes.items()})
    changed: dict[str, Array] = {}
    rows = []
    for row, mask in _prune(shapes, tensors.__getitem__, patterns, skipped, progress):
        rows.append(row)
        if mask is not None:
            changed[row.name] = _masked(tensors[row.name], mask)
    return changed, patterns, PruningReport(rows)


def _prune(
    shapes: Mapping[str, tuple[int, int]],
    weight_of: Callable[[str], Array],
    patterns: Mapping[str, BalancedPattern],
    skipped: Mapping[str, str],
    progress: Progress | None,
) -> Iterator[tuple[PrunedLayer, Array | None]]:
    """Yield what becomes of each layer, and its mask where its weight has to change."""
    # everything is checked before anything is pruned: a long run must not fail at its end
    for name in patterns:
        check_weight(weight_of(name), f"the weight of layer {name}")
    for name, shape in shapes.items():
        if name in skipped:
            yield PrunedLayer(name, shape, None, 1.0, skipped[name]), None
            continue
        if progress is not None:
            progress(name)
        weight, pattern = weight_of(name), patterns[name]
        if is_balanced(weight, pattern):
            yield PrunedLayer(name, shape, str(pattern), 1.0, "already balanced"), None
            continue
        mask = balanced_mask(weight, pattern)
        energy = kept_energy(weight, _masked(weight, mask))
        yield PrunedLayer(name, shape, str(pattern), energy, None), mask


def _masked(weight: Array, mask: Array) -> Array:
    return np.where(mask, weight, weight.dtype.type(0))
