"""Relax analysis: find the dense operators whose weight is a parameter.

Forms found, all as importers leave them::

    lv = R.permute_dims(w, axes=[1, 0]);  y = R.matmul(x, lv)      # torch nn.Linear, ONNX Gemm(transB=1)
    y = R.matmul(x, w)                                             # ONNX MatMul, transformers' Conv1D
    lv = R.astype(R.reshape(w, ...), ...); y = R.matmul(x, lv)     # weights behind casts and reshapes

Weights used by several operators (an LSTM unrolled over time) are one layer with several uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import tvm
from tvm import relax, tirx

from tvm_balanced.format.layout import VALUE_DTYPES
from tvm_balanced.relay_passes.weight_chain import Chain, call_name, static_shape, trace
from tvm_balanced.support.tvm_types import Expr


@dataclass(frozen=True)
class DenseUse:
    """One ``matmul`` that reads a layer's weight."""

    var: Expr  # relax.Var the result is bound to
    data: Expr  # relax.Var of the activations
    rows: int | None  # product of the leading dimensions, None when symbolic
    rows_text: str  # the same, readable: "32" or "batch*32"


@dataclass
class DenseLayer:
    """A weight and the dense operators that multiply by it.

    ``name`` is the parameter's; ``chain`` leads from the parameter to the matmul's right operand, which is
    ``(K, N)``. ``blocked`` says why the layer cannot be made sparse, when it cannot.
    """

    name: str
    param: Expr
    chain: Chain
    out_features: int
    in_features: int
    dtype: str
    uses: list[DenseUse] = field(default_factory=list)
    blocked: str | None = None

    @property
    def rows(self) -> int | None:
        """Rows of activations of the largest use; None when any is symbolic."""
        counts = [use.rows for use in self.uses]
        return None if None in counts else max(c for c in counts if c is not None)

    @property
    def rows_text(self) -> str:
        """Readable rows of activations, the distinct ones of all uses."""
        return ", ".join(dict.fromkeys(use.rows_text for use in self.uses))


def main_bindings(func: relax.Function) -> list[tuple[Expr, Expr]]:
    """All ``(var, value)`` of a function without control flow, in order."""
    return [
        (binding.var, binding.value)
        for block in func.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
    ]


def split_params(mod: tvm.IRModule) -> tuple[list[Expr], list[Expr]]:
    """Parameters of ``main``: the inputs, then the weights (function attribute ``num_input``)."""
    func = mod["main"]
    attrs = func.attrs
    count = int(attrs["num_input"]) if attrs and "num_input" in attrs else len(func.params)
    return list(func.params[:count]), list(func.params[count:])


def find_dense(mod: tvm.IRModule) -> list[DenseLayer]:
    """Dense layers of an imported model's ``main``, in the order of their first use."""
    pairs = main_bindings(mod["main"])
    bindings = dict(pairs)
    weights = set(split_params(mod)[1])
    layers: dict[tuple[Expr, Chain], DenseLayer] = {}
    chain_vars: dict[Expr, Expr] = {}  # variable on a chain to its parameter
    for var, value in pairs:
        traced = trace(var, bindings, weights)
        if traced is not None:
            chain_vars[var] = traced[0]
        if call_name(value) != "relax.matmul":
            continue
        traced = trace(value.args[1], bindings, weights)
        if traced is None:
            continue
        param, chain = traced
        shape = static_shape(value.args[1])
        rows, text = _rows(value.args[0])
        if shape is None or rows == 0:
            continue
        layer = layers.get((param, chain))
        if layer is None:
            layer = DenseLayer(
                name=param.name,
                param=param,
                chain=chain,
                out_features=shape[-1],
                in_features=shape[-2] if len(shape) > 1 else shape[0],
                dtype=str(value.args[1].ty.dtype),
            )
            if len(shape) != 2:
                layer.blocked = f"its weight has shape {shape}, not (K, N)"
            elif layer.dtype not in VALUE_DTYPES:
                layer.blocked = f"its weight is {layer.dtype}"
            layers[param, chain] = layer
        layer.uses.append(DenseUse(var, value.args[0], rows, text))
    _block_shared(pairs, list(layers.values()), chain_vars)
    return list(layers.values())


def _rows(data: Expr) -> tuple[int | None, str]:
    """Rows of activations as a number (None when symbolic) and as text."""
    shape = data.ty.shape
    if shape is None:
        return None, "?"
    lead = list(shape)[:-1]
    fixed = math.prod(int(d) for d in lead if isinstance(d, tirx.IntImm))
    symbols = [str(d) for d in lead if not isinstance(d, tirx.IntImm)]
    if not symbols:
        return fixed, str(fixed)
    return None, "*".join([str(fixed)] * (fixed != 1) + symbols)


def _block_shared(
    pairs: list[tuple[Expr, Expr]], layers: list[DenseLayer], chain_vars: dict[Expr, Expr]
) -> None:
    """Mark layers whose parameter something else reads too: pruning would change that as well."""
    dense_vars = {use.var for layer in layers for use in layer.uses}
    others: dict[Expr, str] = {}
    for var, value in pairs:
        if var in dense_vars or var in chain_vars:
            continue
        for used in relax.analysis.free_vars(value):
            param = chain_vars.get(used, used)
            others.setdefault(param, call_name(value) or "another expression")
    seen: dict[Expr, DenseLayer] = {}
    for layer in layers:
        if layer.param in others and layer.blocked is None:
            layer.blocked = (
                f"its weight is also read by {others[layer.param].removeprefix('relax.')} "
                "(a tied embedding, for example), which pruning would change"
            )
        first = seen.setdefault(layer.param, layer)
        if first is not layer:
            for one in (first, layer):
                one.blocked = "its weight is used in two different orders of its elements"
