"""Steps on functions: the model's own, and operators that ONNX defines by others."""

from __future__ import annotations

import onnx

from tvm_balanced.errors import InputError
from tvm_balanced.support.optional import first_line

# defined by ONNX as functions of simpler operators, and either unknown to TVM or wrong there
_BY_DEFINITION = [
    "Attention",
    "Bernoulli",
    "Celu",
    "CenterCropPad",
    "NegativeLogLikelihoodLoss",
    "RotaryEmbedding",
    "SoftmaxCrossEntropyLoss",
    "Swish",
    "SwiGLU",
]


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of functions by the functions' nodes."""
    from onnx import inliner, shape_inference

    if model.functions:
        model = inliner.inline_local_functions(model)
    wanted = {("", name) for name in _BY_DEFINITION}
    if any((node.domain, node.op_type) in wanted for node in _nodes(model.graph)):
        # some are defined by the types of their operands
        typed = shape_inference.infer_shapes(model)
        try:
            model = inliner.inline_selected_functions(typed, sorted(wanted), False, True)
        except RuntimeError as error:
            used = sorted({n.op_type for n in _nodes(model.graph)} & set(_BY_DEFINITION))
            raise InputError(
                f"ONNX's definition of {', '.join(used)} cannot be used here ({first_line(error)}); export "
                "the model with another opset"
            ) from error
    return model


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    out = []
    for node in graph.node:
        out.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                out += _nodes(attribute.g)
    return out
