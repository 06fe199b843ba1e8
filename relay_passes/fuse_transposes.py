"""Relax pass: a transpose that one matrix product reads becomes part of its kernel.

Before::

    lv = R.permute_dims(w, axes=[1, 0])
    y = R.matmul(x, lv)

After, where nothing else reads ``lv`` and ``x`` is not ``w``::

    y = R.call_tir(NT_matmul, (x, w))

TVM's own pass takes the operands of the others for each other, which is wrong numbers where they are square.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.transform import fuse_transpose_matmul


@tvm.transform.module_pass(opt_level=0, name="FuseTransposes")
class FuseTransposes:
    """The pass, for ``tvm.transform.Sequential``."""

    def transform_module(
        self, mod: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Fuse in all functions of ``mod``."""
        product, annotations, is_transpose = fuse_transpose_matmul._pattern()

        def is_own(context: Any) -> bool:
            transpose = context.annotated_expr["wT"]
            var = context.value_to_bound_var[transpose]
            apart = not context.annotated_expr["x"].same_as(transpose.args[0])
            return apart and len(context.var_usages[var]) == 1 and bool(is_transpose(context))

        pattern = ("transpose_matmul_fuse", product, annotations, is_own)
        mod = relax.transform.FuseOpsByPattern([pattern], bind_constants=False)(mod)
        fuser = fuse_transpose_matmul._TransposeMatmulFuser(mod)
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                fuser.builder_.update_func(variable, fuser.visit_expr(function))
        return fuser.builder_.get()
