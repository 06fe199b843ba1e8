"""The values of a rewritten model's weights: packs what became sparse, joins what was merged.

Not a Relax pass but the last step of the passes beside it: they change parameters, this computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.format.packing import pack
from tvm_balanced.format.weights import Array
from tvm_balanced.ops import OP_NAME, format_of
from tvm_balanced.relay_passes.find_dense import DenseLayer, main_bindings, split_params
from tvm_balanced.relay_passes.merge_dense import SEPARATOR
from tvm_balanced.relay_passes.rewrite_dense import INDICES, VALUES
from tvm_balanced.relay_passes.weight_chain import apply_chain, call_name


def pack_weights(
    mod: tvm.IRModule,
    names: list[str],
    params: Mapping[str, Array],
    layers: Mapping[str, DenseLayer],
    progress: Callable[[str], None] | None = None,
) -> dict[str, Array]:
    """Compute the weights of ``mod``.

    Parameters
    ----------
    mod : tvm.IRModule
        After ``rewrite_dense`` and perhaps ``merge_dense``.
    names : list of str
        Names of its weight parameters, in order.
    params : Mapping[str, numpy.ndarray]
        Weights of the model before.
    layers : Mapping[str, DenseLayer]
        The layers found in the model before, by name.
    progress : callable, optional
        Told the name of each weight before it is packed.

    Returns
    -------
    dict
        In the order of ``names``.

    Raises
    ------
    InputError
        When a weight does not follow the pattern its operator has.
    """
    formats = _formats(mod, names)
    values: dict[str, Array] = {}
    for name, fmt in formats.items():
        if progress is not None:
            progress(name)
        dense = [dense_weight(params, layers[part]) for part in name.split(SEPARATOR)]
        whole = dense[0] if len(dense) == 1 else np.concatenate(dense)
        packed = pack(whole, fmt.pattern, fmt.layout, fmt.encoding)
        values[name + VALUES], values[name + INDICES] = packed.values, packed.indices
    for name in names:
        if name in values:
            continue
        if name in params:
            values[name] = params[name]
        else:  # biases of merged operators
            values[name] = np.concatenate([params[part] for part in name.split(SEPARATOR)])
    return {name: values[name] for name in names}


def dense_weight(params: Mapping[str, Array], layer: DenseLayer) -> Array:
    """A layer's weight as ``(N, K)``, contiguous where the chain allows."""
    return np.ascontiguousarray(apply_chain(layer.chain, params[layer.name]).T)


def _formats(mod: tvm.IRModule, names: list[str]) -> dict[str, PackedFormat]:
    """Packed weight name to its format, read from the operators."""
    _, weights = split_params(mod)
    name_of: dict[Any, str] = dict(zip(weights, names, strict=True))
    found: dict[str, PackedFormat] = {}
    for _, value in main_bindings(mod["main"]):
        if call_name(value) == OP_NAME and value.args[1] in name_of:
            found[name_of[value.args[1]].removesuffix(VALUES)] = format_of(value)
    return found
