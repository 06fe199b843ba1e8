"""The values of a rewritten module's weights: packs what became sparse, joins what was merged.

No pass but the step behind them: they change parameters, this computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm

from tvm_balanced.operators import format_of, operator_for
from tvm_balanced.relay_passes.find_dense import DenseLayer, main_bindings, split_params
from tvm_balanced.relay_passes.weight_chain import apply_chain
from tvm_balanced.relay_passes.weight_sources import Source, weight_sources
from tvm_balanced.support.tensors import Array


def pack_weights(
    mod: tvm.IRModule,
    params: Mapping[str, Array],
    progress: Callable[[str], None] | None = None,
) -> dict[str, Array]:
    """Compute the weights of ``main``, by name and in its order, after the passes on operators.

    ``params`` are the weights of the model as it was imported; ``progress`` is called with the name of each
    weight before it is packed. Raises InputError when a weight does not follow its operator's pattern.
    """
    sources = weight_sources(mod)
    values: dict[str, Array] = {}
    for _, call in main_bindings(mod["main"]):
        fmt = format_of(call)
        if fmt is None:
            continue
        first, operator = str(call.args[1].name), operator_for(fmt)
        if first in values or first not in sources:
            continue  # several uses of one weight, or one that was packed before the import
        name = operator.weight_name(call)
        if progress is not None:
            progress(name)
        packed = operator.pack(_joined(sources[first], params), fmt)
        values |= {name + end: array for end, array in zip(operator.suffixes, packed, strict=True)}
    names = [str(var.name) for var in split_params(mod)[1]]
    for name in names:
        if name not in values:
            values[name] = _joined(sources[name], params) if name in sources else params[name]
    return {name: values[name] for name in names}


def dense_weight(params: Mapping[str, Array], layer: DenseLayer) -> Array:
    """Return a layer's weight as ``(N, K)``, contiguous where the chain allows."""
    return np.ascontiguousarray(apply_chain(layer.chain, params[layer.name]).T)


def _joined(parts: tuple[Source, ...], params: Mapping[str, Array]) -> Array:
    arrays = [np.ascontiguousarray(apply_chain(p.chain, params[p.weight])) for p in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
