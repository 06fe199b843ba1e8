"""Weights that a model computes from its parameters alone are computed at import.

``weight_orig * weight_mask`` (``torch.nn.utils.prune``), weight norm and parametrizations hide a dense
layer's weight behind arithmetic. PyTorch evaluates it, and the result stands under the name that the layer's
weight has for its user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

# operands of these are weights: the position of the operand
_READERS = {
    "mm.default": (1,),
    "bmm.default": (1,),
    "addmm.default": (2,),
    "baddbmm.default": (2,),
    "convolution.default": (1, 2),
    "embedding.default": (0,),
}
# what only moves or casts elements: later passes see through it, and pruning reaches the parameter behind it
_MOVES = frozenset(
    [
        "permute.default",
        "view.default",
        "unsqueeze.default",
        "squeeze.dims",
        "expand.default",
        "clone.default",
        "_to_copy.default",
        "alias.default",
    ]
)


def computed_weights(
    program: torch.export.ExportedProgram,
) -> dict[fx.Node, tuple[str, torch.Tensor]]:
    """Nodes whose value depends on parameters alone and serves as a weight, with name and value.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        After ``run_decompositions``.

    Returns
    -------
    dict[torch.fx.Node, (str, torch.Tensor)]
        Each stands behind whatever moves or casts its elements on the way to the product.
    """
    tensors: Mapping[str, torch.Tensor] = {**program.constants, **program.state_dict}
    sources: dict[fx.Node, frozenset[str]] = {}
    names: dict[str, str] = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            sources[node] = frozenset([names[node.name]])
        elif node.op == "call_function" and all(i in sources for i in node.all_input_nodes):
            if (
                isinstance(node.target, torch._ops.OpOverload)
                and torch.Tag.nondeterministic_seeded in node.target.tags
            ):
                continue
            known = [sources[i] for i in node.all_input_nodes]
            sources[node] = frozenset().union(*known)
    roots = dict.fromkeys(_roots(program, sources))
    taken = set(names.values())
    values: dict[fx.Node, Any] = {}
    result: dict[fx.Node, tuple[str, torch.Tensor]] = {}
    for root in roots:
        with torch.no_grad():
            value = _value(root, values, names, tensors)
        if not isinstance(value, torch.Tensor):
            continue
        name = _weight_name(sources[root], tensors, value)
        name = name if name not in taken else f"{name}.{root.name}"
        taken.add(name)
        result[root] = (name, value)
    return result


def _roots(
    program: torch.export.ExportedProgram, sources: Mapping[fx.Node, frozenset[str]]
) -> list[fx.Node]:
    roots = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node in sources:
            continue
        for place in _READERS.get(getattr(node.target, "__name__", ""), ()):
            weight = node.args[place] if place < len(node.args) else None
            while (
                isinstance(weight, fx.Node)
                and weight.op == "call_function"
                and weight.target.__name__ in _MOVES
            ):
                weight = weight.args[0]
            if isinstance(weight, fx.Node) and weight.op == "call_function" and sources.get(weight):
                roots.append(weight)
    return roots


def _value(
    node: fx.Node,
    values: dict[fx.Node, Any],
    names: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
) -> Any:
    pending = [node]
    while pending:
        one = pending[-1]
        missing = [i for i in one.all_input_nodes if i not in values]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if one in values:
            continue
        if one.op == "placeholder":
            values[one] = tensors[names[one.name]].detach()
        else:
            args, kwargs = fx.node.map_arg((one.args, dict(one.kwargs)), values.__getitem__)
            values[one] = one.target(*args, **kwargs)
    return values[node]


def _weight_name(
    sources: frozenset[str], tensors: Mapping[str, torch.Tensor], value: torch.Tensor
) -> str:
    """Return the user's name: ``fc.weight`` for ``fc.weight_orig`` or a parametrization's original."""
    like = [name for name in sorted(sources) if tensors[name].numel() == value.numel()]
    name = (like or sorted(sources))[0]
    name = re.sub(r"parametrizations\.(\w+)\.\S*$", r"\1", name)
    return re.sub(r"_(orig|mask|g|v)$", "", name)
