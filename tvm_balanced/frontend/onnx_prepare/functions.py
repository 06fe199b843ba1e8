"""Steps on functions: the model's own, and operators that ONNX defines by others."""

from __future__ import annotations

import onnx

# defined by ONNX as functions of simpler operators, and either unknown to TVM or wrong there
_BY_DEFINITION = (
    "Attention Bernoulli BlackmanWindow Celu CenterCropPad HammingWindow HannWindow NegativeLogLikelihoodLoss "
    "RotaryEmbedding SoftmaxCrossEntropyLoss Swish SwiGLU"
).split()


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Calls of functions become the functions' nodes."""
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    wanted = {("", name) for name in _BY_DEFINITION}
    if any((node.domain, node.op_type) in wanted for node in _nodes(model.graph)):
        model = inliner.inline_selected_functions(model, sorted(wanted), False, True)
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
