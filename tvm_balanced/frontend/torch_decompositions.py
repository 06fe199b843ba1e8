"""Which operators PyTorch itself takes apart before they are converted.

PyTorch's own definitions are exact by construction; converters remain for what they are made of, and for
operators that run faster whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.export import default_decompositions

from tvm_balanced.frontend.torch_ops import TABLE


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions into core operators, and of those that have no converter."""
    table: dict[Any, Callable[..., Any]] = dict(default_decompositions().items())
    for operator, decompose in decomposition_table.items():
        if isinstance(operator, torch._ops.OpOverload) and operator.namespace == "aten":
            table.setdefault(operator, decompose)
    for operator in [o for o in table if _name(o) in TABLE]:
        del table[operator]
    return table


def _name(operator: Any) -> str:
    namespace = getattr(operator, "namespace", "")
    return str(operator.__name__) if namespace == "aten" else ""
