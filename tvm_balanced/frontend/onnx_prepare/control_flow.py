"""Steps on ``If``, ``Loop`` and ``Scan``: known branches are taken, known turns unrolled."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tvm_balanced.errors import InputError
from tvm_balanced.frontend.onnx_prepare.builder import Array
from tvm_balanced.frontend.onnx_prepare.folding import Folder
from tvm_balanced.frontend.onnx_prepare.shapes import static_shapes

MOST_TURNS = 4096
MOST_NODES = 100_000


def resolve(model: onnx.ModelProto, name: str) -> None:
    """Take known branches and unroll known loops, as long as one makes another known.

    Raises
    ------
    InputError
        When a loop has more than ``MOST_TURNS`` turns, or all together more than ``MOST_NODES`` nodes.
    """
    while any(node.op_type in ("If", "Loop", "Scan") for node in model.graph.node):
        if not _Resolver(model, name).run():
            return


@dataclass
class _Loop:
    """A loop in the middle of being unrolled."""

    node: onnx.NodeProto
    body: onnx.GraphProto
    turns: int | None
    turn: int
    condition: str
    carried: list[str]
    collected: list[list[str]] = field(default_factory=list)


class _Resolver:
    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self.model, self.name = model, name
        self.shapes = static_shapes(model)
        self.folder = Folder(model, self.shapes)
        self.todo: deque[onnx.NodeProto | _Loop] = deque(model.graph.node)
        self.out: list[onnx.NodeProto] = []
        self.changed = False

    def run(self) -> bool:
        """Whether anything could be resolved."""
        while self.todo:
            if len(self.out) + len(self.todo) > MOST_NODES:
                raise InputError(
                    f"the loops of {self.name} unroll to more than {MOST_NODES} nodes; export it with "
                    "fewer turns"
                )
            item = self.todo.popleft()
            if isinstance(item, _Loop):
                self._turn(item)
            elif not self._resolve(item) and not self.folder.fold(item):
                self.out.append(item)
        if self.changed:
            nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.out]
            del self.model.graph.node[:]
            self.model.graph.node.extend(nodes)
            self.folder.finish()
        return self.changed

    def _resolve(self, node: onnx.NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "If":
            condition = self.folder.value(node.input[0])
            if condition is None or condition.size != 1:
                return False
            branch = attrs["then_branch" if condition.reshape(-1)[0] else "else_branch"]
            nodes, outputs = self._copy(branch, f"{node.output[0]}/", {})
            names = [
                helper.make_node("Identity", [inner], [outer])
                for inner, outer in zip(outputs, node.output, strict=False)
                if outer
            ]
            self.todo.extendleft(reversed([*nodes, *names]))
            self.changed = True
            return True
        if node.op_type == "Loop":
            return self._start(node, attrs["body"])
        if node.op_type == "Scan":
            return self._scan(node, attrs)
        return False

    def _start(self, node: onnx.NodeProto, body: onnx.GraphProto) -> bool:
        given = [*node.input, "", ""]
        limit = self.folder.value(given[0]) if given[0] else None
        condition = self.folder.value(given[1]) if given[1] else np.array(True)
        if condition is None or (given[0] and limit is None):
            return False
        turns = None if limit is None else int(limit.reshape(-1)[0])
        if turns is not None and turns > MOST_TURNS:
            raise InputError(
                f"the loop {node.name or node.output[0]} of {self.name} has {turns} turns, and at most "
                f"{MOST_TURNS} are unrolled; export it with fewer"
            )
        carried = list(node.input[2:])
        scans = len(body.output) - 1 - len(carried)
        start = self._constant(node, "condition", np.asarray(condition).reshape(()))
        loop = _Loop(node, body, turns, 0, start, carried, [[] for _ in range(scans)])
        self.todo.appendleft(loop)
        self.changed = True
        return True

    def _turn(self, loop: _Loop) -> None:
        condition = self.folder.value(loop.condition)
        if condition is None:
            raise InputError(
                f"the loop {loop.node.name or loop.node.output[0]} of {self.name} ends depending on data, "
                "which is not supported; export it with a fixed number of turns"
            )
        over = loop.turns is not None and loop.turn >= loop.turns
        if over or not condition.reshape(-1)[0]:
            self._finish(loop)
            return
        if loop.turn >= MOST_TURNS:
            raise InputError(
                f"the loop {loop.node.name or loop.node.output[0]} of {self.name} has more than "
                f"{MOST_TURNS} turns; export it with fewer"
            )
        number = self._constant(loop.node, f"turn_{loop.turn}", np.array(loop.turn))
        names = [value.name for value in loop.body.input]
        bound = dict(zip(names, [number, loop.condition, *loop.carried], strict=True))
        loop.turn += 1
        nodes, outputs = self._copy(loop.body, f"{loop.node.output[0]}/{loop.turn}/", bound)
        self.todo.extendleft(reversed([*nodes, loop]))
        count = len(loop.carried)
        loop.condition, loop.carried = outputs[0], outputs[1 : 1 + count]
        for collected, output in zip(loop.collected, outputs[1 + count :], strict=True):
            collected.append(output)

    def _finish(self, loop: _Loop) -> None:
        count = len(loop.carried)
        stem = loop.node.output[0]
        nodes = []
        for name, output in zip(loop.carried, loop.node.output, strict=False):
            if output:
                nodes.append(helper.make_node("Identity", [name], [output]))
        axes = self._constant(loop.node, "axis", np.array([0]))
        for i, (parts, output) in enumerate(
            zip(loop.collected, loop.node.output[count:], strict=False)
        ):
            if not output:
                continue
            if not parts:
                raise InputError(
                    f"the loop {loop.node.name or stem} of {self.name} has no turn, so that its output "
                    f"{output} is empty, which is not supported; export the model without it"
                )
            wide = []
            for j, part in enumerate(parts):
                wide.append(f"{stem}/collect_{i}_{j}")
                nodes.append(self._unsqueeze(part, axes, wide[-1]))
            nodes.append(helper.make_node("Concat", wide, [output], axis=0))
        self.todo.extendleft(reversed(nodes))

    def _unsqueeze(self, name: str, axes: str, output: str) -> onnx.NodeProto:
        if self.folder.opset >= 13:
            return helper.make_node("Unsqueeze", [name, axes], [output])
        return helper.make_node("Unsqueeze", [name], [output], axes=[0])

    def _scan(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> bool:
        """``Scan`` along the first axis, forwards, as a loop over slices."""
        if self.folder.opset < 9 or any(
            any(attrs.get(key, ()) or ())
            for key in (
                "scan_input_axes",
                "scan_input_directions",
                "scan_output_axes",
                "scan_output_directions",
            )
        ):
            return False
        body = attrs["body"]
        assert isinstance(body, onnx.GraphProto)
        scanned = int(str(attrs["num_scan_inputs"]))
        states, sources = list(node.input[:-scanned]), list(node.input[-scanned:])
        shape = self.shapes.get(sources[0])
        if shape is None or shape[0] > MOST_TURNS:
            return False
        collected: list[list[str]] = [[] for _ in range(len(body.output) - len(states))]
        turns = []
        for turn in range(shape[0]):
            at = self._constant(node, f"turn_{turn}", np.array(turn))
            parts = [f"{node.output[0]}/{turn}/{source}" for source in sources]
            turns += [
                helper.make_node("Gather", [source, at], [part], axis=0)
                for source, part in zip(sources, parts, strict=True)
            ]
            bound = dict(zip((v.name for v in body.input), [*states, *parts], strict=True))
            nodes, outputs = self._copy(body, f"{node.output[0]}/{turn}/", bound)
            turns += nodes
            states = outputs[: len(states)]
            for one, output in zip(collected, outputs[len(states) :], strict=True):
                one.append(output)
        loop = _Loop(
            node, body, 0, 0, self._constant(node, "over", np.array(False)), states, collected
        )
        self.todo.extendleft(reversed([*turns, loop]))
        self.changed = True
        return True

    def _constant(self, node: onnx.NodeProto, label: str, array: Array) -> str:
        name = f"{node.output[0]}/{label}"
        self.folder.add(name, array)
        return name

    def _copy(
        self, graph: onnx.GraphProto, prefix: str, bound: Mapping[str, str]
    ) -> tuple[list[onnx.NodeProto], list[str]]:
        nodes, outputs, constants = copy_graph(graph, prefix, bound)
        for name, array in constants.items():
            self.folder.add(name, array)
        return nodes, outputs


def copy_graph(
    graph: onnx.GraphProto, prefix: str, bound: Mapping[str, str]
) -> tuple[list[onnx.NodeProto], list[str], dict[str, Array]]:
    """Return a subgraph's nodes under names of their own.

    Parameters
    ----------
    graph : onnx.GraphProto
        The body of a loop, or a branch.
    prefix : str
        What the new names start with.
    bound : Mapping[str, str]
        The body's inputs and what they are outside.

    Returns
    -------
    nodes : list of onnx.NodeProto
    outputs : list of str
        What the subgraph's outputs are called now.
    constants : dict of str to numpy.ndarray
        Its initializers.
    """
    names = dict(bound)
    constants = {}
    for tensor in graph.initializer:
        names[tensor.name] = prefix + tensor.name
        constants[names[tensor.name]] = numpy_helper.to_array(tensor)
    nodes = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for output in node.output:
            if output:
                names[output] = prefix + output
        _rename_all(copy, names)
        copy.name = prefix + node.name if node.name else ""
        nodes.append(copy)
    return nodes, [names.get(output.name, output.name) for output in graph.output], constants


def _rename_all(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename what a node reads and makes; in its subgraphs what they read from outside."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for i, name in enumerate(node.output):
        node.output[i] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.type != onnx.AttributeProto.GRAPH:
            continue
        own = {v.name for v in attribute.g.input} | {t.name for t in attribute.g.initializer}
        own |= {out for inner in attribute.g.node for out in inner.output}
        outer = {old: new for old, new in names.items() if old not in own}
        for inner in attribute.g.node:
            _rename_all(inner, outer)
        for output in attribute.g.output:
            output.name = outer.get(output.name, output.name)
