"""Runs the Relax passes in order: an imported model and a plan become a module and its packed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import tirx

from tvm_balanced.model import Array, Model
from tvm_balanced.packing import PackedFormat
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32
from tvm_balanced.relay_passes.dense_cublas import dense_cublas
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.fold_weights import fold_weights
from tvm_balanced.relay_passes.merge_dense import merge_dense
from tvm_balanced.relay_passes.pack_weights import pack_weights
from tvm_balanced.relay_passes.rewrite_dense import rewrite_dense

if TYPE_CHECKING:
    from tvm_balanced.targets import TargetSpec

# results of a merged operator are read once more, by the slices; beyond this many bytes that costs
# more than the launches that merging saves (a few microseconds each)
MERGE_LIMIT_BYTES = {"cuda": 4 << 20, "llvm": 256 << 10}

# up to so many rows of activations llvm's dense kernel is a set of dot products
LLVM_DOT_ROWS = 4


def rewrite_model(
    model: Model,
    formats: Mapping[str, PackedFormat],
    target: TargetSpec,
    progress: Callable[[str], None] | None = None,
    dense: str = "dlight",
) -> tuple[tvm.IRModule, dict[str, Array]]:
    """Apply the passes of ``relay_passes`` to a model.

    Parameters
    ----------
    model : Model
        With weights that follow the patterns of ``formats``.
    formats : Mapping[str, PackedFormat]
        Layer name to the packed format it gets; layers not named stay dense.
    target : TargetSpec
        Where the result will run.
    progress : callable, optional
        Told the name of each weight before it is packed.
    dense : str
        What computes the matrix products that stay dense: ``"cublas"``, or ``"dlight"`` for the target's
        own schedules.

    Returns
    -------
    (tvm.IRModule, dict)
        ``main`` over inputs and weights, and the weights in the order of its parameters.
    """
    layers = {layer.name: layer for layer in model.dense_layers()}
    mod, names = rewrite_dense(model.mod, list(model.params), formats)
    limit = MERGE_LIMIT_BYTES[target.kind]

    def pays(data: Any, out_features: int) -> bool:
        lead = list(data.ty.shape)[:-1]
        rows = math.prod(int(d) for d in lead if isinstance(d, tirx.IntImm))
        return 4 * rows * out_features <= limit

    mod, names = merge_dense(mod, names, pays)
    params = pack_weights(mod, names, model.params, layers, progress)
    likes_rows = {layer.name for layer in layers.values() if _likes_rows(layer, target)}
    mod, params = fold_weights(mod, params, likes_rows)
    if dense == "cublas":
        mod = dense_cublas(mod)
    return accumulate_float32(mod), params


def _likes_rows(layer: DenseLayer, target: TargetSpec) -> bool:
    """Whether the dense kernel of this layer is faster on ``(N, K)`` than on ``(K, N)``.

    DLight's kernels read along K; on llvm a few rows of activations are dot products along K, while
    register tiles for more of them run along N (see ``schedules/cpu_matmul.py``).
    """
    return target.kind == "cuda" or (layer.rows is not None and layer.rows <= LLVM_DOT_ROWS)
