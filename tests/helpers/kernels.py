"""The distinct balanced-sparse kernels of a model, before and after scheduling."""

from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from tvm_balanced.build.pipeline import fuse_passes, rewrite_model
from tvm_balanced.options import CompileOptions
from tvm_balanced.planning.plan import make_plan
from tvm_balanced.schedules.balanced_block import has_balanced_block
from tvm_balanced.schedules.dispatch import ScheduleBalanced
from tvm_balanced.verification.arguments import seeded_arguments


@dataclass
class Kernel:
    """A fused kernel around the operator; ``plain`` is unscheduled and serves as the reference."""

    name: str
    plain: tirx.PrimFunc
    scheduled: tirx.PrimFunc


def fused_kernels(model, target):
    """Unscheduled kernels of a model with every eligible layer sparse, by name, without duplicates."""
    plan = make_plan(model, target, CompileOptions(policy="always"))
    mod, _ = rewrite_model(model, plan.formats, plan.target)
    with plan.target.target:
        mod = tvm.transform.Sequential(fuse_passes())(mod)
    seen = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            seen.setdefault(tvm_ffi.structural_hash(func), (gvar.name_hint, func))
    return dict(seen.values())


def distinct_kernels(model, target):
    """Kernels around the operator that differ in more than their name."""
    got = []
    for name, func in fused_kernels(model, target).items():
        if has_balanced_block(func):
            with target.target:
                scheduled = ScheduleBalanced(target.target)(tvm.IRModule({name: func}))[name]
            got.append(Kernel(name, func, scheduled))
    return got


def arguments(func, seed=0, symbol=3):
    """Seeded arrays for every parameter and the positions of the outputs, which hold NaN."""
    made = seeded_arguments(func, seed, symbol)
    return made.arrays, made.outputs


def run_plain(func, arrays):
    """Run the unscheduled kernel on the CPU with TVM's own lowering; all its arguments, after."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    lib = tvm.compile(mod, tvm.target.Target({"kind": "llvm"}))
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arrays]
    lib["main"](*tensors)
    return [
        t.numpy() if isinstance(a, np.ndarray) else a for t, a in zip(tensors, arrays, strict=True)
    ]
