"""The values of a rewritten module's weights: packs what became sparse, joins what was merged.

No pass but the step behind them: they change parameters, this computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm

from tvm_balanced.format.packing import pack
from tvm_balanced.ops import OP_NAME, format_of
from tvm_balanced.relay_passes.find_dense import DenseLayer, main_bindings, split_params
from tvm_balanced.relay_passes.rewrite_dense import INDICES, VALUES
from tvm_balanced.relay_passes.weight_chain import apply_chain, call_name
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
        if call_name(call) != OP_NAME:
            continue
        name, fmt = str(call.args[1].name), format_of(call)
        if name in values or name not in sources:
            continue  # several uses of one weight, or one that was packed before the import
        if progress is not None:
            progress(name.removesuffix(VALUES))
        packed = pack(_joined(sources[name], params), fmt.pattern, fmt.layout, fmt.encoding)
        values[name], values[name.removesuffix(VALUES) + INDICES] = packed.values, packed.indices
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
