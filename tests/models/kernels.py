"""The distinct balanced-sparse kernels of a model, before and after scheduling."""

from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced.packing import numpy_dtype, pack
from tvm_balanced.pipeline import fuse_passes
from tvm_balanced.plan import make_plan
from tvm_balanced.pruning import prune_weight
from tvm_balanced.rewrite import rewrite_model
from tvm_balanced.schedules.balanced_block import find, has_balanced_block
from tvm_balanced.schedules.dispatch import ScheduleBalanced


@dataclass
class Kernel:
    """A fused kernel around the operator; ``plain`` is unscheduled and serves as the reference."""

    name: str
    plain: tirx.PrimFunc
    scheduled: tirx.PrimFunc


def distinct_kernels(model, target):
    """Kernels of a model with every eligible layer sparse that differ in more than their name."""
    plan = make_plan(model, target, policy="always")
    mod, _ = rewrite_model(model, plan.formats, plan.target)
    with plan.target.target:
        mod = tvm.transform.Sequential(fuse_passes())(mod)
    seen = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and has_balanced_block(func):
            seen.setdefault(tvm_ffi.structural_hash(func), (gvar.name_hint, func))
    found = []
    for name, func in seen.values():
        with plan.target.target:
            scheduled = ScheduleBalanced(plan.target.target)(tvm.IRModule({name: func}))[name]
        found.append(Kernel(name, func, scheduled))
    return found


def arguments(func, seed=0, symbol=3):
    """Seeded arrays for every parameter and the positions of the outputs, which hold NaN.

    Packed weights are packed from pruned ones; symbolic extents are ``symbol``.
    """
    rng = np.random.default_rng(seed)
    fmt = find(func).fmt
    value_dtype = find(func).value_dtype
    weight = rng.standard_normal((fmt.out_features, fmt.in_features)) / fmt.in_features**0.5
    weight = prune_weight(weight.astype(numpy_dtype(value_dtype)), fmt.pattern)
    packed = pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    blocks = []
    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, blocks.append), order="post")
    written = [region.source for block in blocks for region in block.writes]
    arrays, outputs = [], []
    for position, param in enumerate(func.params):
        if not tirx.is_buffer_var(param):  # a symbolic extent handed over as a number
            arrays.append(symbol)
            continue
        shape = tuple(_extent(d, symbol) for d in param.ty.shape)
        dtype = numpy_dtype(str(param.ty.dtype))
        if any(param.same_as(buffer) for buffer in written):
            outputs.append(position)
            arrays.append(np.full(shape, np.nan, dtype))
        elif dtype == np.uint8 and shape == fmt.indices_shape:
            arrays.append(packed.indices)
        elif shape == fmt.values_shape:
            arrays.append(packed.values)
        else:
            arrays.append(rng.standard_normal(shape).astype(dtype))
    return arrays, outputs


def _extent(extent, symbol):
    """Value of an extent when every symbol in it is ``symbol``."""
    if isinstance(extent, tirx.IntImm):
        return int(extent)
    value = tvm_ffi.structural_map(
        extent, (tirx.Var, lambda var: tirx.const(symbol, str(var.ty.dtype)))
    )
    return int(tvm.sym.Analyzer().simplify(value))


def run_plain(func, arrays):
    """Run the unscheduled kernel on the CPU with TVM's own lowering; all its arguments, after."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    lib = tvm.compile(mod, tvm.target.Target({"kind": "llvm"}))
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arrays]
    lib["main"](*tensors)
    return [
        t.numpy() if isinstance(a, np.ndarray) else a for t, a in zip(tensors, arrays, strict=True)
    ]
