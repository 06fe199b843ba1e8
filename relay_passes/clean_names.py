"""Relax module pass: parameters of kernels get names that C accepts.

Before (kernels take over the names of the model's tensors)::

    def fused_matmul(x: T.Buffer(...), jax2tf/Const_24_0: T.Buffer(...), "q + k.values": T.Buffer(...)): ...

After::

    def fused_matmul(x: T.Buffer(...), jax2tf_Const_24_0: T.Buffer(...), q_k_values: T.Buffer(...)): ...

TVM's CUDA code generator replaces dots in names, but prints slashes, blanks and plus signs as they are.
"""

from __future__ import annotations

import re
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from tvm_balanced.schedules.rules import replaced


@tvm.transform.module_pass(opt_level=0, name="CleanKernelNames")
class CleanKernelNames:
    """Apply the rewrite to every kernel; a second run changes nothing."""

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        updated = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                renamed = {p: _clean(p) for p in func.params if clean_name(p.name) != p.name}
                if renamed:
                    updated[gvar] = _with_params(func, renamed)
        return replaced(mod, updated) if updated else mod


def clean_name(name: str) -> str:
    """``name`` with every run of characters that C does not accept replaced by one underscore."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)


def _clean(param: Any) -> Any:
    return tvm.ir.Var(clean_name(param.name), param.ty)


def _with_params(func: tirx.PrimFunc, renamed: dict[Any, Any]) -> tirx.PrimFunc:
    body = tvm_ffi.structural_map(func.body, (tvm.ir.Var, lambda var: renamed.get(var, var)))
    params = [renamed.get(param, param) for param in func.params]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)
