"""Relax pass: a product of a tensor with its own transpose reads a copy of it.

Before::

    lv = R.permute_dims(x, axes=[1, 0])
    y = R.matmul(x, lv)

After::

    lv = R.permute_dims(x, axes=[1, 0])
    lv1 = R.astype(x, "float32")  # as it is
    y = R.matmul(lv1, lv)

TVM 0.27's ``FuseTransposeMatmul`` makes a function of two parameters of the product, of which there is only
one where both operands are the same variable, and fails (``x @ x.T``, attention with shared query and key).
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr


@module_pass
def separate_operands(mod: tvm.IRModule) -> tvm.IRModule:
    """Copy the left operand of every product with its own transpose."""
    functions = relax_functions(mod).items()
    return replaced(mod, {gvar: _Separator(mod).visit_expr(func) for gvar, func in functions})


@mutator
class _Separator(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Expr) -> Expr:
        call = super().visit_call_(call)
        if call_name(call) != "relax.matmul":
            return call
        data, other = call.args
        turned: Expr = self.lookup_binding(other) if isinstance(other, relax.Var) else None
        if call_name(turned) != "relax.permute_dims" or not turned.args[0].same_as(data):
            return call
        copy = self.builder_.emit(relax.op.astype(data, str(data.ty.dtype)))
        return relax.Call(call.op, [copy, other], call.attrs, call.ty_args)
