"""Relax pass: a transpose that one matrix product reads becomes part of its kernel.

Before::

    lv = R.permute_dims(w, axes=[1, 0])
    y = R.matmul(x, lv)

After, where nothing else reads ``lv`` and ``x`` is not ``w``::

    y = R.call_tir(NT_matmul, (x, w))

TVM's own pass takes the operands of the others for each other, which is wrong numbers where they are square.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.transform import PatternCheckContext, fuse_transpose_matmul

from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions


@module_pass
def fuse_transposes(mod: tvm.IRModule) -> tvm.IRModule:
    """Fuse the transposes of all functions."""
    product, annotations, is_transpose = fuse_transpose_matmul._pattern()

    def is_own(context: PatternCheckContext) -> bool:
        transpose = context.annotated_expr["wT"]
        var = context.value_to_bound_var[transpose]
        apart = not context.annotated_expr["x"].same_as(transpose.args[0])
        return apart and len(context.var_usages[var]) == 1 and bool(is_transpose(context))

    pattern = ("transpose_matmul_fuse", product, annotations, is_own)
    mod = relax.transform.FuseOpsByPattern([pattern], bind_constants=False)(mod)
    fuser = fuse_transpose_matmul._TransposeMatmulFuser(mod)
    for gvar, func in relax_functions(mod).items():
        fuser.builder_.update_func(gvar, fuser.visit_expr(func))
    return fuser.builder_.get()
