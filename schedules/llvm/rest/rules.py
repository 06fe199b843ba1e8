"""Default schedules for llvm: the rules in order and the pass that applies them."""

from __future__ import annotations

import tvm

from tvm_balanced.schedules.llvm.rest import conv2d, elementwise, fallback, half, math, matmul, rows
from tvm_balanced.schedules.rules import Rule, first_match, replaced, unscheduled

RULES: tuple[Rule, ...] = (elementwise, matmul, conv2d, rows, fallback)


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

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule the kernels of a module."""
        updated = {}
        for gvar, func in unscheduled(mod):
            target = (func.attrs or {}).get("target")
            if target is None:
                target = tvm.target.Target.current(allow_none=False)
            if target.kind.name != "llvm":
                continue
            scheduled = first_match(half.rewrite(math.rewrite(func)), target, RULES)
            if scheduled is not None:
                updated[gvar] = math.rename_lets(scheduled)
        return replaced(mod, updated)
