"""How a dense operator's weight comes from a parameter: a chain of casts, reshapes and transposes.

Not a pass: the vocabulary that the passes beside it share. A chain is applied to a NumPy array, so that
what the graph would compute from a weight at run time is computed once, at compile time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx

from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr

_CHAIN_OPS = (
    "relax.permute_dims",
    "relax.reshape",
    "relax.astype",
    "relax.squeeze",
    "relax.expand_dims",
)


@dataclass(frozen=True)
class Step:
    """One link: ``("permute_dims", axes)``, ``("reshape", shape)`` or ``("astype", dtype)``."""

    kind: str
    argument: tuple[int, ...] | str

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what the step makes of an array of shape ``before``."""
        if isinstance(self.argument, str):
            return before
        if self.kind == "permute_dims":
            return tuple(before[axis] for axis in self.argument)
        return self.argument

    def apply(self, array: Array) -> Array:
        """Return what the step makes of ``array``."""
        if self.kind == "permute_dims":
            assert isinstance(self.argument, tuple)
            return array.transpose(self.argument)
        if self.kind == "reshape":
            assert isinstance(self.argument, tuple)
            return array.reshape(self.argument)
        assert isinstance(self.argument, str)
        return array.astype(numpy_dtype(self.argument))


Chain = tuple[Step, ...]
TRANSPOSE = Step("permute_dims", (1, 0))


def apply_chain(chain: Chain, array: Array) -> Array:
    """Return what the graph computes from the parameter's value."""
    for step in chain:
        array = step.apply(array)
    return array


def scatter_mask(chain: Chain, shape: tuple[int, ...], mask: Array) -> Array:
    """Carry a mask of the chain's result back to the parameter of shape ``shape``.

    Every step moves elements one to one, so each is undone in turn.
    """
    shapes = [shape]
    for step in chain:
        shapes.append(step.shape(shapes[-1]))
    for step, before in zip(reversed(chain), reversed(shapes[:-1]), strict=True):
        if step.kind == "permute_dims":
            mask = mask.transpose(np.argsort(step.argument))
        elif step.kind == "reshape":
            mask = mask.reshape(before)
    return mask


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """Return the shape of a tensor expression, or None when any dimension is not a constant."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return None
    dims = list(ty.shape)
    if not all(isinstance(d, tirx.IntImm) for d in dims):
        return None
    return tuple(int(d) for d in dims)


def call_name(expr: Expr) -> str | None:
    """Name of the operator that ``expr`` calls, if it calls one."""
    if isinstance(expr, relax.Call) and hasattr(expr.op, "name"):
        return str(expr.op.name)
    return None


def step_of(call: Expr) -> Step | None:
    """Return the link that ``call`` is, or None when it is not a movement of elements or a cast."""
    name = call_name(call)
    if name not in _CHAIN_OPS:
        return None
    source, result = static_shape(call.args[0]), static_shape(call)
    if source is None or result is None:
        return None
    if name == "relax.permute_dims":
        axes = call.attrs.axes
        order = tuple(int(a) for a in axes) if axes is not None else tuple(range(len(source)))[::-1]
        return Step("permute_dims", tuple(a % len(source) for a in order))
    if name == "relax.astype":
        dtype = str(call.ty.dtype)
        return Step("astype", dtype) if "float" in dtype else None
    return Step("reshape", result)


def trace(expr: Expr, bindings: dict[Expr, Expr], weights: set[Expr]) -> tuple[Expr, Chain] | None:
    """Follow ``expr``, usually the second operand of a ``matmul``, back to a weight parameter.

    ``bindings`` lead from the function's variables to their values. Returned are the parameter, one of
    ``weights``, and the steps from it to ``expr``; None when ``expr`` is computed from anything else.
    """
    steps: list[Step] = []
    while True:
        if isinstance(expr, relax.Var):
            if expr in weights:
                return expr, tuple(reversed(steps))
            if expr not in bindings:
                return None
            expr = bindings[expr]
            continue
        step = step_of(expr)
        if step is None:
            return None
        steps.append(step)
        expr = expr.args[0]
