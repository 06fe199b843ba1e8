"""Relax pass: half precision sums are accumulated in float32, as PyTorch and cuBLAS do.

TVM adds up in the dtype of the result, so that a float16 product of a few thousand terms loses its last
digits, and a float16 softmax over a long row stops growing. Before::

    y = R.matmul(x, w)                       # float16 in, float16 out
    p = R.nn.softmax(y)

After::

    lv = R.matmul(x, w, out_dtype="float32")
    y = R.astype(lv, "float16")
    lv1 = R.astype(y, "float32")
    lv2 = R.nn.softmax(lv1)
    p = R.astype(lv2, "float16")

Every value that the model can see keeps its dtype; the casts are fused into the kernels around them. To be
run after the dense operators have been rewritten (``relax.nn.balanced_sparse_dense`` accumulates in float32
by itself) and before legalization. What is float32 already stays as it is, so running the pass twice
changes nothing.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr

_HALF = ("float16", "bfloat16")

# accumulate into a result of another dtype by themselves
_PRODUCTS = (
    "relax.matmul",
    "relax.nn.conv1d",
    "relax.nn.conv2d",
    "relax.nn.conv3d",
    "relax.nn.conv1d_transpose",
    "relax.nn.conv2d_transpose",
)

# sum up in the dtype of their operands
_REDUCTIONS = (
    "relax.sum",
    "relax.mean",
    "relax.variance",
    "relax.std",
    "relax.prod",
    "relax.cumsum",
    "relax.nn.softmax",
    "relax.nn.log_softmax",
    "relax.nn.layer_norm",
    "relax.nn.group_norm",
    "relax.nn.instance_norm",
    "relax.nn.rms_norm",
    *(f"relax.nn.{kind}avg_pool{axes}d" for kind in ("", "adaptive_") for axes in (1, 2, 3)),
)


@module_pass
def accumulate_float32(mod: tvm.IRModule) -> tvm.IRModule:
    """Accumulate products, convolutions, reductions and normalisations of half precision in float32."""
    functions = relax_functions(mod).items()
    return replaced(mod, {gvar: _Rewriter(mod).visit_expr(func) for gvar, func in functions})


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Expr) -> Expr:
        call = self.visit_expr_post_order(call)
        name = call_name(call)
        if name in _PRODUCTS and _all_half(call):
            return self._widened(_with_attrs(call, out_dtype="float32"), call)
        if name in _REDUCTIONS and _all_half(call):
            wide = [
                self.builder_.emit(relax.op.astype(arg, "float32")) if _half(arg) else arg
                for arg in call.args
            ]
            changed = relax.Call(call.op, wide, call.attrs, call.ty_args)
            if name in ("relax.cumsum", "relax.prod") and "dtype" in _fields(call):
                changed = _with_attrs(changed, dtype="float32")
            return self._widened(changed, call)
        return call

    def _widened(self, changed: Expr, before: Expr) -> Expr:
        return relax.op.astype(self.builder_.emit(changed), before.ty.dtype)


def _half(expr: Expr) -> bool:
    return isinstance(expr.ty, relax.TensorType) and str(expr.ty.dtype) in _HALF


def _all_half(call: Expr) -> bool:
    """Whether the result and every tensor operand are half precision."""
    tensors = [arg for arg in call.args if isinstance(arg.ty, relax.TensorType)]
    return _half(call) and all(_half(arg) for arg in tensors)


def _fields(call: Expr) -> list[str]:
    return [field.name for field in type(call.attrs).__tvm_ffi_type_info__.fields]


def _with_attrs(call: Expr, **changed: Expr) -> Expr:
    """Return the same call with some attributes replaced."""
    fields = {name: getattr(call.attrs, name) for name in _fields(call)}
    key = type(call.attrs).__tvm_ffi_type_info__.type_key
    return relax.Call(
        call.op, call.args, tvm.ir.make_node(key, **{**fields, **changed}), call.ty_args
    )
