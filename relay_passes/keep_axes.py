"""Relax pass: products of flattened activations, and element-wise work behind them, keep their axes.

Before (what PyTorch makes of a linear layer behind three axes)::

    lv = R.reshape(x, (32, 384))  # x: (1, 32, 384)
    lv1 = R.matmul(lv, w)
    lv2 = R.add(lv1, bias)
    lv3 = R.reshape(lv2, (1, 32, 1536))
    y = R.nn.gelu(lv3)

After::

    lv1 = R.matmul(x, w)
    lv2 = R.add(lv1, bias)
    y = R.nn.gelu(lv2)

Between the two reshapes nothing but the product's own bias fuses into its kernel. Reshapes sink below what
keeps the last axis apart, and where two of them meet, one of them or none is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr

_UNARY = frozenset(
    f"relax.{name}"
    for name in (
        *("abs", "clip", "cos", "erf", "exp", "log", "negative", "rsqrt", "sigmoid", "sin", "sqrt"),
        *(
            "square",
            "tanh",
            "astype",
            "nn.gelu",
            "nn.gelu_tanh",
            "nn.leakyrelu",
            "nn.relu",
            "nn.silu",
        ),
    )
)
_BINARY = frozenset(
    f"relax.{name}"
    for name in ("add", "divide", "maximum", "minimum", "multiply", "power", "subtract")
)


@module_pass
def keep_axes(mod: tvm.IRModule) -> tvm.IRModule:
    """Sink the reshapes of all functions below products and element-wise operators."""
    functions = relax_functions(mod)
    changed = {gvar: _Sinker(mod).visit_expr(func) for gvar, func in functions.items()}
    # fusion stops at a second name of a variable; of the reshapes, what nobody reads any more goes
    clean = (relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination())
    return tvm.transform.Sequential(clean)(replaced(mod, changed))


@mutator
class _Sinker(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.analyzer = tvm.sym.Analyzer()

    def visit_call_(self, call: Expr) -> Expr:
        call = super().visit_call_(call)
        name = call_name(call)
        if name == "relax.reshape":
            return self._joined(call)
        if name in ("relax.matmul", *_UNARY):
            return self._below(call, call.args[:1])
        if name in _BINARY:
            return self._below(call, call.args[:2])
        return call

    def _joined(self, call: Expr) -> Expr:
        """Return no reshape for two where the first shape is there again."""
        source = self._source(call.args[0])
        if source is None or not self._same(_shape(source), list(call.args[1].values)):
            return call
        return source

    def _below(self, call: Expr, data: Sequence[Expr]) -> Expr:
        """Return a call on what was reshaped, with the reshape behind it."""
        sources = [self._flattened(arg) for arg in data]
        reshaped = [source for source in sources if source is not None]
        if not reshaped:
            return call
        shape = _shape(reshaped[0])
        for arg, source in zip(data, sources, strict=True):
            if source is None and not self._is_row(arg, shape):
                return call
            if source is not None and not self._same(_shape(source), shape):
                return call
        if call_name(call) == "relax.matmul" and call.args[1].ty.ndim != 2:
            return call
        arguments = [
            arg if source is None else source for arg, source in zip(data, sources, strict=True)
        ]
        moved = relax.Call(call.op, [*arguments, *call.args[len(data) :]], call.attrs, call.ty_args)
        result = self.builder_.emit(moved)
        return relax.op.reshape(result, list(self._type_shape(call)))

    def _type_shape(self, call: Expr) -> Sequence[Expr]:
        values: Sequence[Expr] = self.builder_.normalize(call).ty.shape.values
        return values

    def _source(self, var: Expr) -> Expr | None:
        """Return what ``var`` is a reshape of."""
        value: Expr = self.lookup_binding(var) if isinstance(var, relax.Var) else None
        if call_name(value) != "relax.reshape" or not _known(value.args[0]):
            return None
        return value.args[0]

    def _flattened(self, var: Expr) -> Expr | None:
        """Return what ``var`` is a reshape of, where that has the same last axis."""
        source = self._source(var)
        if source is None or not _known(var):
            return None
        shape, before = _shape(var), _shape(source)
        if not shape or not before or not self._same(shape[-1:], before[-1:]):
            return None
        return source

    def _is_row(self, arg: Expr, shape: Sequence[Expr]) -> bool:
        """Whether ``arg`` is broadcast over all axes but the last."""
        if not _known(arg):
            return False
        own = _shape(arg)
        return not own or (len(own) == 1 and self._same(own, shape[-1:]))

    def _same(self, one: Sequence[Expr], other: Sequence[Expr]) -> bool:
        return len(one) == len(other) and all(
            self.analyzer.can_prove_equal(a, b) for a, b in zip(one, other, strict=True)
        )


def _known(expr: Expr) -> bool:
    ty = expr.ty
    return isinstance(ty, relax.TensorType) and ty.shape is not None and hasattr(ty.shape, "values")


def _shape(expr: Expr) -> list[Expr]:
    return list(expr.ty.shape.values)
