"""Relax pass: global memory that a scheduled kernel allocates for itself becomes a result of its call.

Before (thread blocks that share K leave their sums for a second kernel; DLight's kernels do the like)::

    @T.prim_func
    def dense(x: T.Buffer((1, 8192)), ..., y: T.Buffer((1, 64))):
        sums = T.alloc_buffer((2, 1, 1, 1, 2, 32))
        ...

    y = R.call_tir(dense, (x, ...), R.Tensor((1, 64)))

After::

    @T.prim_func
    def dense(x: T.Buffer((1, 8192)), ..., y: T.Buffer((1, 64)), sums: T.Buffer((2, 1, 1, 1, 2, 32))):
        ...

    lv = R.call_tir(dense, (x, ...), [R.Tensor((1, 64)), R.Tensor((2, 1, 1, 1, 2, 32))])
    y = lv[0]

Inside a kernel such memory comes from a pool of TVM's CUDA runtime, whose pages move as soon as a kernel asks
for a larger one, while CUDA graphs keep the addresses they were captured with. As a result of the call it is
planned with all other memory of the function: it stays where it is, and what runs later uses it again.

Only memory of a fixed size is lifted: nothing of symbolic shape is captured, so there the kernel's own
allocation is right, and its size could not be planned. Kernels that something other than ``call_tir`` refers
to keep their signature. A second run finds nothing to lift.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import ROWS_FROM


@tvm.transform.module_pass(opt_level=0, name="LiftWorkspaces")
class LiftWorkspaces:
    """Apply the rewrite to every scheduled kernel and its calls."""

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        kept = _other_references(mod)
        lifted, rest = {}, {}
        for gvar, func in mod.functions_items():
            found = (
                _workspaces(func) if isinstance(func, tirx.PrimFunc) and gvar not in kept else []
            )
            if found:
                lifted[gvar] = _with_parameters(func, found), found
            else:
                rest[gvar] = func
        if not lifted:
            return mod
        # without the old kernels, so that the new ones get their names
        rewriter = _Rewriter(tvm.IRModule(rest, attrs=mod.attrs))
        for gvar, (func, found) in lifted.items():
            new = rewriter.builder_.add_func(func, gvar.name_hint)
            rewriter.lifted[gvar] = new, [relax.TensorType(w.ty.shape, w.ty.dtype) for w in found]
        for gvar, func in rest.items():
            if isinstance(func, relax.Function):
                rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
        return rewriter.builder_.get()


def with_signatures_of(mod: tvm.IRModule, scheduled: tvm.IRModule) -> tvm.IRModule:
    """Unscheduled kernels with the workspaces that the pass gave their scheduled forms.

    Parameters
    ----------
    mod : tvm.IRModule
        Kernels before their schedule.
    scheduled : tvm.IRModule
        Kernels of the same names after the pass.

    Returns
    -------
    tvm.IRModule
        The kernels of ``mod`` alone; what a scheduled one has more parameters of, the unscheduled one
        has too, and does not use. Where M decides what is launched, they say by which.
    """
    kernels = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            at, count = _end_of_buffers(func), len(func.params)
            more = list(scheduled[gvar.name_hint].params[at:])
            fresh = [tvm.ir.Var(var.name, var.ty) for var in more[: len(more) - (count - at)]]
            kernel = _insert(func, fresh, func.body) if fresh else func
            attrs = scheduled[gvar.name_hint].attrs
            if attrs is not None and ROWS_FROM in attrs:
                kernel = kernel.with_attr(ROWS_FROM, attrs[ROWS_FROM])
            kernels[gvar] = kernel
    return tvm.IRModule(kernels)


def _workspaces(func: tirx.PrimFunc) -> list[Any]:
    """Buffers of fixed size in global memory that the root block of a kernel allocates."""
    root = func.body.block if isinstance(func.body, s_tir.SBlockRealize) else None
    if root is None:
        return []
    return [
        buffer
        for buffer in root.alloc_buffers
        if buffer.ty.storage_scope in ("", "global")
        and all(isinstance(extent, tirx.IntImm) for extent in buffer.ty.shape)
    ]


def _with_parameters(func: tirx.PrimFunc, found: list[Any]) -> tirx.PrimFunc:
    """The kernel with ``found`` as parameters behind its results instead of allocations."""
    root = func.body.block
    block = s_tir.SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        root.body,
        root.init,
        [b for b in root.alloc_buffers if not any(b.same_as(other) for other in found)],
        root.match_buffers,
        root.annotations,
    )
    realize = s_tir.SBlockRealize(func.body.iter_values, func.body.predicate, block)
    return _insert(func, found, realize)


def _insert(func: tirx.PrimFunc, buffers: list[Any], body: Any) -> tirx.PrimFunc:
    at = _end_of_buffers(func)
    params = [*func.params[:at], *buffers, *func.params[at:]]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)


def _end_of_buffers(func: tirx.PrimFunc) -> int:
    """Where the results end: ``call_tir`` passes numbers of symbolic shapes after them."""
    places = [i for i, param in enumerate(func.params) if tirx.is_buffer_var(param)]
    return places[-1] + 1 if places else 0


def _other_references(mod: tvm.IRModule) -> set[Any]:
    """Functions that are referred to in any other way than by ``call_tir``."""
    seen = _References()
    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            seen.visit_expr(func)
    return seen.found


@visitor
class _References(PyExprVisitor):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.found: set[Any] = set()

    def visit_call_(self, call: Any) -> None:
        called = call_name(call) == "relax.call_tir"
        for arg in list(call.args)[1:] if called else [call.op, *call.args]:
            self.visit_expr(arg)

    def visit_global_var_(self, var: Any) -> None:
        self.found.add(var)


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Calls with more results, of which the program sees those it knows."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.lifted: dict[Any, tuple[Any, list[Any]]] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if call_name(call) != "relax.call_tir" or call.args[0] not in self.lifted:
            return call
        kernel, workspaces = self.lifted[call.args[0]]
        before = call.ty_args[0]
        several = isinstance(before, relax.TupleType)
        results = [*(before.fields if several else [before]), *workspaces]
        args = [kernel, *call.args[1:]]
        made = self.builder_.emit(relax.Call(call.op, args, call.attrs, [relax.TupleType(results)]))
        items = [relax.TupleGetItem(made, i) for i in range(len(results) - len(workspaces))]
        return relax.Tuple(items) if several else items[0]
