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
from tvm_balanced.report import PrunedLayer, PruningReport
from tvm_balanced.selection import per_layer, select
from tvm_balanced.support.tensors import Array


def balanced_mask(weight: Array, pattern: BalancedPattern | str) -> Array:
    """Keep the ``nnz`` largest magnitudes of every block; of equal ones the leftmost.

    Parameters
    ----------
    weight : (N, K) float32, float16 or bfloat16
        Not changed.
    pattern : BalancedPattern or str
        What to keep.

    Returns
    -------
    mask : (N, K) bool
        True where a weight is kept.

    Raises
    ------
    InputError
        For a wrong rank or dtype, NaN or Inf, or a block larger than K.

    Notes
    -----
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
    mask = balanced_mask(weight, pattern)
    return np.where(mask, weight, weight.dtype.type(0))


def kept_energy(dense: Array, pruned: Array) -> float:
    """Share of the squared norm that pruning kept, 0 to 1 (1 for an all-zero weight)."""
    total = kept = 0.0
    for rows in row_chunks(dense):
        total += float(np.square(dense[rows], dtype=np.float32).sum(dtype=np.float64))
        kept += float(np.square(pruned[rows], dtype=np.float32).sum(dtype=np.float64))
    return kept / total if total else 1.0


def prune_model(
    model: Model,
    pattern: str | BalancedPattern | Mapping[str, str],
    ignore: Iterable[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Prune the dense layers of an imported model; see :func:`tvm_balanced.prune`."""
    from tvm_balanced.relay_passes.pack_weights import dense_weight
    from tvm_balanced.relay_passes.weight_chain import scatter_mask

    if isinstance(pattern, BalancedPattern):
        pattern = str(pattern)
    layers = {layer.name: layer for layer in model.dense_layers()}
    names = list(layers)
    ignored = select(ignore, names)
    forms = {n: BalancedPattern(p) for n, p in per_layer(pattern, names, "pattern").items()}
    skipped = {
        name: layer.blocked or ("ignored by name" if name in ignored else "no pattern given")
        for name, layer in layers.items()
        if layer.blocked or name in ignored or name not in forms
    }
    if len(skipped) == len(names):
        raise InputError(
            f"every dense layer of {model.name} is ignored or cannot be sparse; ignore fewer layers"
        )

    def weight(name: str) -> Array:
        return dense_weight(model.params, layers[name])

    changed: dict[str, Array] = {}
    rows = []
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    for row, mask in _prune(shapes, weight, forms, skipped, progress):
        rows.append(row)
        if mask is not None:
            source = model.params[row.name]
            keep = scatter_mask(layers[row.name].chain, source.shape, mask.T)
            changed[row.name] = np.where(keep, source, source.dtype.type(0))
    patterns = {**model.patterns, **{n: form for n, form in forms.items() if n not in skipped}}
    return model.with_params(changed, patterns=patterns, pruned=PruningReport(rows))


def _prune(
    shapes: Mapping[str, tuple[int, int]],
    weight_of: Callable[[str], Array],
    forms: Mapping[str, BalancedPattern],
    skipped: Mapping[str, str],
    progress: Callable[[str], None] | None,
) -> Iterator[tuple[PrunedLayer, Array | None]]:
    """Return what becomes of each layer, and its mask where its weight has to change."""
    # everything is checked before anything is pruned: a long run must not fail at its end
    for name, (_, columns) in shapes.items():
        if name in skipped:
            continue
        if forms[name].block > columns:
            raise InputError(
                f"pattern {forms[name]} has blocks of {forms[name].block}, but layer {name} has only "
                f"K={columns} columns; choose a smaller block or ignore this layer"
            )
        check_weight(weight_of(name), f"the weight of layer {name}")
    for name, shape in shapes.items():
        if name in skipped:
            yield PrunedLayer(name, shape, None, 1.0, skipped[name]), None
            continue
        if progress is not None:
            progress(name)
        weight, form = weight_of(name), forms[name]
        if is_balanced(weight, form):
            yield PrunedLayer(name, shape, str(form), 1.0, "already balanced"), None
            continue
        mask = balanced_mask(weight, form)
        energy = kept_energy(weight, np.where(mask, weight, weight.dtype.type(0)))
        yield PrunedLayer(name, shape, str(form), energy, None), mask


# tables that are looked up, not multiplied by: pruning one only costs accuracy
_TABLES = ("embed", "wte", "wpe")


def prune_tensors(
    tensors: Mapping[str, Array],
    pattern: str,
    ignore: Iterable[str],
    progress: Callable[[str], None],
) -> tuple[dict[str, Array], dict[str, BalancedPattern], PruningReport]:
    """Prune the matrices of a checkpoint, rows being outputs as in ``nn.Linear``.

    Without the model nobody can know which matrices are multiplied by: those whose name ends in
    ``weight`` are taken, embedding tables (by name) are not.

    Raises
    ------
    InputError
        For a pattern that does not fit, NaN or Inf, or when there is nothing to prune.
    """
    form = BalancedPattern(pattern)
    names = [
        name
        for name, array in tensors.items()
        if array.ndim == 2 and array.dtype.name in VALUE_DTYPES and name.endswith("weight")
    ]
    if not names:
        raise InputError(
            "the checkpoint has no matrix named ...weight, so nothing in it can become sparse; "
            "give one with linear layers"
        )
    ignored = select(ignore, names)
    skipped = {
        name: "ignored by name"
        if name in ignored
        else "looks like an embedding table (by its name)"
        for name in names
        if name in ignored or any(word in name.lower() for word in _TABLES)
    }
    chosen = [name for name in names if name not in skipped]
    if not chosen:
        raise InputError(
            "every matrix of the checkpoint is ignored or an embedding table; ignore fewer layers"
        )
    shapes = {name: (tensors[name].shape[0], tensors[name].shape[1]) for name in names}
    patterns = dict.fromkeys(chosen, form)
    changed: dict[str, Array] = {}
    rows = []
    for row, mask in _prune(shapes, tensors.__getitem__, patterns, skipped, progress):
        rows.append(row)
        if mask is not None:
            weight = tensors[row.name]
            changed[row.name] = np.where(mask, weight, weight.dtype.type(0))
    return changed, patterns, PruningReport(rows)
