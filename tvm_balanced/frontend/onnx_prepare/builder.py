"""Nodes put into a graph in place of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]


class Builder:
    """What stands in place of one node.

    Parameters
    ----------
    model : onnx.ModelProto
        Whose initializers it adds to.
    node : onnx.NodeProto
        The node; names of new tensors start with that of its output.
    """

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        self.model = model
        self.node = node
        self.nodes: list[onnx.NodeProto] = []
        self._stem = node.output[0]

    def op(self, kind: str, *inputs: str, out: str | None = None, **attrs: Any) -> str:
        """Add a node; the name of its output."""
        output = out or f"{self._stem}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attrs))
        return output

    def constant(self, value: Array) -> str:
        """Add an initializer; its name."""
        name = f"{self._stem}/constant_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def input(self, index: int) -> str:
        """Name of an operand, empty where it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node that is replaced."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default


Rule = Callable[[Builder], bool]


def replace(model: onnx.ModelProto, rules: dict[tuple[str, str], Rule]) -> None:
    """Replace nodes, by domain and operator, where their rule does not say that it cannot."""
    out: list[onnx.NodeProto] = []
    changed = False
    for node in model.graph.node:
        rule = rules.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))
        builder = Builder(model, node)
        if rule is not None and rule(builder):
            out += builder.nodes
            changed = True
        else:
            out.append(node)
    if changed:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in out]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


class Initializers:
    """Arrays of a model's initializers, read when asked for."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Array | None:
        """Return the array of that name, if there is one."""
        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def set(self, name: str, array: Array) -> None:
        """Give the initializer ``name`` another value, of any shape and dtype."""
        self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def readers(model: onnx.ModelProto, name: str) -> int:
    """How many operands and outputs of the graph are that tensor."""
    count: int = sum(list(node.input).count(name) for node in model.graph.node)
    return count + sum(bool(output.name == name) for output in model.graph.output)
