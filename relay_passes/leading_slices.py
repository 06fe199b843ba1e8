"""Relax pass: a slice that begins at 0 is not taken for element-wise work.

TVM sees that such a kernel reads every element from where it writes it, and fuses it behind a matrix product
as if both had one shape::

    lv = R.call_tir(cls.balanced_sparse_dense, (x, ...), out_ty=R.Tensor((2, 192)))
    y = R.call_tir(cls.strided_slice, (lv,), out_ty=R.Tensor((2, 128)))     # lv[:, 0:128]

Schedules of the fused kernel would then write 192 columns into 128. To follow ``AnnotateTIROpPattern``, which
marks ``strided_slice`` by the attribute ``op_pattern``: element-wise becomes injective.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx

from tvm_balanced.relay_passes.module_pass import Pass, module_pass
from tvm_balanced.schedules.rules import replaced
from tvm_balanced.support.tvm_types import Expr

_PATTERN = "op_pattern"
# values of TVM's OpPatternKind
_ELEMENT_WISE, _INJECTIVE = 0, 2


def _leading_slices(mod: tvm.IRModule) -> tvm.IRModule:
    updated = {
        gvar: func.with_attr(_PATTERN, _INJECTIVE)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
        and int((func.attrs or {}).get(_PATTERN, _INJECTIVE)) == _ELEMENT_WISE
        and _shrinks(func)
    }
    return replaced(mod, updated) if updated else mod


def _shrinks(func: tirx.PrimFunc) -> bool:
    """Whether an input of the rank of the result is longer along some axis."""
    *inputs, out = [p.shape for p in func.params if tirx.is_buffer_var(p)]
    pairs = [pair for one in inputs if len(one) == len(out) for pair in zip(one, out, strict=True)]
    # an input's axis of 1 is broadcast
    return any(not tvm_ffi.structural_equal(a, b) and not _is_one(a) for a, b in pairs)


def _is_one(extent: Expr) -> bool:
    return isinstance(extent, tirx.IntImm) and int(extent) == 1


leading_slices: Pass = module_pass(_leading_slices, "leading_slices")
