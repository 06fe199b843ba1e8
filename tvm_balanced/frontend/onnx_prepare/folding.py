"""Step: what depends on parameters alone is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_balanced.frontend.onnx_prepare.builder import Array
from tvm_balanced.frontend.onnx_values import evaluate

# they only move elements or change their dtype: a weight behind them stays where it is
_MOVES = frozenset(
    [
        "Identity",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Cast",
        "CastLike",
        "Expand",
        "Tile",
    ]
)
# what they make has the weight's elements in their places: it is the weight
_KEEPS_PLACES = frozenset(
    ["DequantizeLinear", "Mul", "Div", "Cast", "Where", "Identity", "Add", "Sub"]
)
_NEVER = frozenset(
    [
        "If",
        "Loop",
        "Scan",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Constant",
        "Dropout",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "LSTM",
        "GRU",
        "RNN",
        "Optional",
        "SequenceEmpty",
    ]
)


def fold_constants(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Nodes whose operands are all constants become initializers.

    A weight that is computed from one initializer, element by element, takes its name where nothing else
    reads it; casts, transposes and reshapes of weights stay.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place.
    shapes : Mapping[str, tuple of int]
        Shapes of tensors that are known; for ``Shape`` and ``Size``.
    """
    folder = Folder(model, shapes)
    kept = [node for node in model.graph.node if not folder.fold(node)]
    if len(kept) < len(model.graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    folder.finish()


class Folder:
    """Constants of a graph, as its nodes are walked in order."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model = model
        self.shapes = shapes
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, Array] = {}
        self._later: dict[str, Callable[[], Array | None]] = {}
        self._source: dict[str, str] = {name: name for name in self._stored}
        self._folded: list[str] = []

    def value(self, name: str) -> Array | None:
        """Return the value of a tensor, where it is constant."""
        if name not in self._arrays:
            if name in self._stored:
                self._arrays[name] = numpy_helper.to_array(self._stored[name])
            elif name in self._later:
                result = self._later.pop(name)()
                if result is None:
                    return None
                self._arrays[name] = result
        return self._arrays.get(name)

    def add(self, name: str, array: Array) -> None:
        """Add a constant."""
        self._arrays[name] = array
        self._folded.append(name)

    def fold(self, node: onnx.NodeProto) -> bool:
        """Whether the node's outputs are constants from now on, so that it can go."""
        if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER:
            return False
        if node.op_type in ("Shape", "Size") and node.input[0] in self.shapes:
            # an array of that shape that holds nothing
            array = np.broadcast_to(np.float32(0), self.shapes[node.input[0]])
            return self._fold(node, [array])
        if not all(self._constant(name) for name in node.input if name):
            return False
        if node.op_type in _MOVES and self._is_weight(node.input[0]):
            self._later[node.output[0]] = lambda: self._moved(node)
            self._trace(node)
            return False
        arrays = [self.value(name) if name else None for name in node.input]
        if any(array is None for array, name in zip(arrays, node.input, strict=True) if name):
            return False
        return self._fold(node, arrays)

    def _constant(self, name: str) -> bool:
        return name in self._stored or name in self._arrays or name in self._later

    def _is_weight(self, name: str) -> bool:
        if name in self._later:
            return True
        array = self.value(name)
        return array is not None and array.dtype.kind not in "biu" and array.ndim > 1

    def _moved(self, node: onnx.NodeProto) -> Array | None:
        results = evaluate(node, [self.value(n) if n else None for n in node.input], self.opset)
        return None if results is None else results[0]

    def _fold(self, node: onnx.NodeProto, arrays: list[Array | None]) -> bool:
        results = evaluate(node, arrays, self.opset)
        if results is None:
            return False
        for name, result in zip(node.output, results, strict=True):
            if name:
                self.add(name, result)
        self._trace(node)
        return True

    def _trace(self, node: onnx.NodeProto) -> None:
        """Which initializer the output is, changed element by element."""
        if node.op_type not in _KEEPS_PLACES:
            return
        result = self._arrays.get(node.output[0])
        if result is None or result.ndim < 2:
            return
        values = [(name, self.value(name)) for name in node.input if name in self._source]
        whole = [
            (n, array) for n, array in values if array is not None and array.shape == result.shape
        ]
        # beside a mask the weight
        whole.sort(key=lambda pair: bool(np.isin(pair[1], (0, 1)).all()))
        if whole:
            self._source[node.output[0]] = self._source[whole[0][0]]

    def finish(self) -> None:
        """Write the constants that the graph reads; drop nodes and initializers that nothing reads."""
        graph = self.model.graph
        _drop_dead_nodes(graph)
        read = _read(graph)
        names: dict[str, str] = {}
        for name in dict.fromkeys(self._folded):
            source = self._source.get(name, name)
            if name in read and source not in read and source not in names.values():
                names[name] = source
        dropped = (set(self._stored) - read) | set(names.values())
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name in dropped:
                del graph.initializer[i]
        present = {tensor.name for tensor in graph.initializer}
        for name in dict.fromkeys(self._folded):
            if name in read and name not in present:
                array = np.asarray(self._arrays[name])
                graph.initializer.append(numpy_helper.from_array(array, names.get(name, name)))
        for node in graph.node:
            for i, name in enumerate(node.input):
                if names.get(name, name) != name:
                    node.input[i] = names[name]
        outputs = {output.name for output in graph.output} & set(names)
        for name in outputs:
            if names[name] != name:
                graph.node.append(helper.make_node("Identity", [names[name]], [name]))


def _drop_dead_nodes(graph: onnx.GraphProto) -> None:
    read = {output.name for output in graph.output}
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if read.isdisjoint(node.output):
            del graph.node[i]
        else:
            read |= _operands(node)


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes and outputs read."""
    names = {output.name for output in graph.output}
    for node in graph.node:
        names |= _operands(node)
    return names


def _operands(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, its subgraphs included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= _read(attribute.g)
    return names
