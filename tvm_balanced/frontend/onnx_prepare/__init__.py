"""An ONNX file made ready for import: one step a function, in order, each doing nothing the second time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from tvm_balanced.frontend.onnx_prepare import (
    control_flow,
    folding,
    functions,
    initializers,
    quantized,
    shapes,
)


def prepare(model: onnx.ModelProto, values: Mapping[str, Any], name: str) -> onnx.ModelProto:
    """Apply all steps.

    Parameters
    ----------
    model : onnx.ModelProto
        May be changed.
    values : Mapping[str, array]
        Inputs that are given here, once and for all.
    name : str
        The model's, for messages.

    Returns
    -------
    onnx.ModelProto
        Of operators that :class:`~tvm_balanced.frontend.onnx_importer.Importer` may know.
    """
    model = functions.inline(model)
    initializers.densify(model)
    initializers.lift_constants(model)
    initializers.fix_inputs(model, dict(values))
    control_flow.resolve(model, name)
    initializers.lift_constants(model)
    folding.fold_constants(model, shapes.static_shapes(model) if _asks_shapes(model) else {})
    quantized.lower_quantized(model)
    folding.fold_constants(model, {})
    return model


def _asks_shapes(model: onnx.ModelProto) -> bool:
    """Whether shapes of computed tensors may help to fold; the importer knows them anyway."""
    return any(node.op_type in ("Shape", "Size") for node in model.graph.node)
