"""Relax pass: parameters of kernels get names that C accepts.

Before (kernels take over the names of the model's tensors)::

    def fused_matmul(x: T.Buffer(...), jax2tf/Const_24_0: T.Buffer(...), "q + k.values": T.Buffer(...)): ...

After::

    def fused_matmul(x: T.Buffer(...), jax2tf_Const_24_0: T.Buffer(...), q_k_values: T.Buffer(...)): ...

TVM's CUDA code generator replaces dots in names, but prints slashes, blanks and plus signs as they are.
"""

from __future__ import annotations

import re

import tvm
import tvm_ffi
from tvm import tirx

from tvm_balanced.relay_passes.module_pass import module_pass
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr


@module_pass
def clean_names(mod: tvm.IRModule) -> tvm.IRModule:
    """Rename in every kernel; a second run changes nothing."""
    updated = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            names = {param: re.sub(r"[^A-Za-z0-9_.]+", "_", param.name) for param in func.params}
            renamed = {p: tvm.ir.Var(new, p.ty) for p, new in names.items() if new != p.name}
            if renamed:
                updated[gvar] = _with_params(func, renamed)
    return replaced(mod, updated) if updated else mod


def _with_params(func: tirx.PrimFunc, renamed: dict[Expr, Expr]) -> tirx.PrimFunc:
    body = tvm_ffi.structural_map(func.body, (tvm.ir.Var, lambda var: renamed.get(var, var)))
    params = [renamed.get(param, param) for param in func.params]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)
