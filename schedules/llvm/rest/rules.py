"""Default schedules for llvm: the rules in order and the pass that applies them."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from tvm_balanced.schedules.llvm.rest import conv2d as cpu_conv2d
from tvm_balanced.schedules.llvm.rest import elementwise as cpu_elementwise
from tvm_balanced.schedules.llvm.rest import fallback as cpu_fallback
from tvm_balanced.schedules.llvm.rest import half as cpu_half
from tvm_balanced.schedules.llvm.rest import math as cpu_math
from tvm_balanced.schedules.llvm.rest import matmul as cpu_matmul
from tvm_balanced.schedules.llvm.rest import rows as cpu_rows
from tvm_balanced.schedules.rules import SCHEDULED, first_match, replaced

RULES = (cpu_elementwise, cpu_matmul, cpu_conv2d, cpu_rows, cpu_fallback)


@tvm.transform.module_pass(opt_level=0, name="ScheduleForCpu")
class ScheduleForCpu:
    """Give every kernel of an llvm target that has no schedule yet the first rule's that takes it.

    Before::

        @T.prim_func(private=True, s_tir=True)
        def relu(A, B):
            for i, j in T.grid(512, 512):
                with T.sblock("compute"): ...

    After::

        @T.prim_func(private=True, s_tir=True)
        def relu(A, B):
            T.func_attr({"tirx.is_scheduled": True, "tvm_balanced.schedule": "cpu_elementwise"})
            for i in T.parallel(512):
                for j_0 in range(32):
                    for j_1 in T.vectorized(16):
                        with T.sblock("compute"): ...

    Kernels marked ``tirx.is_scheduled`` are left as they are, so a second run changes nothing.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            attrs = func.attrs or {}
            if SCHEDULED in attrs:
                continue
            target = attrs.get("target")
            if target is None:
                target = tvm.target.Target.current(allow_none=False)
            if target.kind.name != "llvm":
                continue
            plain = cpu_half.rewrite(cpu_math.rewrite(func))
            scheduled = first_match(plain, target, RULES)
            if scheduled is not None:
                updated[gvar] = scheduled
        return replaced(mod, updated)
