"""What the weights of a module under way are made of: an attribute of ``main``.

A pass that replaces weight parameters writes down what the new ones hold, in terms of the model's own
weights, and :mod:`~tvm_balanced.relay_passes.pack_weights` computes the values once all passes ran::

    R.func_attr({"num_input": 1, "weight_sources": '{"q + k.values": [["q", []], ["k", []]], "w": ...}'})

A packed weight's values are named there with what is packed, its indices are not named; any other weight
that is not named is one of the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TypeAlias

import tvm
from tvm import relax

from tvm_balanced.relay_passes.weight_chain import Chain, Step

_ATTRIBUTE = "weight_sources"


@dataclass(frozen=True)
class Source:
    """A weight of the model and what is computed from it; several are joined along their first axis."""

    weight: str
    chain: Chain = ()


Sources: TypeAlias = Mapping[str, tuple[Source, ...]]


def weight_sources(mod: tvm.IRModule) -> dict[str, tuple[Source, ...]]:
    """Return the sources of those weights of ``main`` that passes replaced."""
    attrs = mod["main"].attrs or {}
    return {
        name: tuple(
            Source(
                weight,
                tuple(Step(k, tuple(a) if isinstance(a, list) else a) for k, a in chain),
            )
            for weight, chain in parts
        )
        for name, parts in json.loads(str(attrs.get(_ATTRIBUTE, "{}"))).items()
    }


def with_sources(func: relax.Function, sources: Sources) -> relax.Function:
    """Return the function with ``sources`` in place of those it had."""
    if not sources:
        return func
    plain = {name: [astuple(part) for part in parts] for name, parts in sources.items()}
    return func.with_attr(_ATTRIBUTE, json.dumps(plain))
