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

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from tvm_balanced.relay_passes.module_pass import module_pass, relax_functions
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.schedules.rules import ROWS_FROM
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt


@module_pass
def lift_workspaces(mod: tvm.IRModule) -> tvm.IRModule:
    """Apply the rewrite to every scheduled kernel and its calls."""
    kept = _other_references(mod)
    lifted = {
        gvar: (_with_parameters(func, workspaces), workspaces)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
        and gvar not in kept
        and (workspaces := _workspaces(func))
    }
    if not lifted:
        return mod
    # without the old kernels, so that the new ones get their names
    rest = {gvar: func for gvar, func in mod.functions_items() if gvar not in lifted}
    rewriter = _Rewriter(tvm.IRModule(rest, attrs=mod.attrs))
    for gvar, (func, workspaces) in lifted.items():
        new = rewriter.builder_.add_func(func, gvar.name_hint)
        types = [relax.TensorType(buffer.ty.shape, buffer.ty.dtype) for buffer in workspaces]
        rewriter.lifted[gvar] = new, types
    for gvar, func in relax_functions(mod).items():
        rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
    return rewriter.builder_.get()


def with_signatures_of(mod: tvm.IRModule, scheduled: tvm.IRModule) -> tvm.IRModule:
    """Give unscheduled kernels the parameters that the pass gave their scheduled forms.

    What a scheduled kernel has more parameters of, the unscheduled one has too, and does not use. Where M
    decides what is launched, they say by which.
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


def _workspaces(func: tirx.PrimFunc) -> list[Buffer]:
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


def _with_parameters(func: tirx.PrimFunc, workspaces: list[Buffer]) -> tirx.PrimFunc:
    """Turn allocations into parameters of a kernel, behind its results."""
    root = func.body.block
    block = s_tir.SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        root.body,
        root.init,
        [b for b in root.alloc_buffers if not any(b.same_as(other) for other in workspaces)],
        root.match_buffers,
        root.annotations,
    )
    realize = s_tir.SBlockRealize(func.body.iter_values, func.body.predicate, block)
    return _insert(func, workspaces, realize)


def _insert(func: tirx.PrimFunc, buffers: list[Buffer], body: Stmt) -> tirx.PrimFunc:
    at = _end_of_buffers(func)
    params = [*func.params[:at], *buffers, *func.params[at:]]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)


def _end_of_buffers(func: tirx.PrimFunc) -> int:
    """Where the results end: ``call_tir`` passes numbers of symbolic shapes after them."""
    places = [i for i, param in enumerate(func.params) if tirx.is_buffer_var(param)]
    return places[-1] + 1 if places else 0


def _other_references(mod: tvm.IRModule) -> set[Expr]:
    """Functions that are referred to in any other way than by ``call_tir``."""
    references = _References()
    for func in relax_functions(mod).values():
        references.visit_expr(func)
    return references.referred


@visitor
class _References(PyExprVisitor):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.referred: set[Expr] = set()

    def visit_call_(self, call: Expr) -> None:
        called = call_name(call) == "relax.call_tir"
        for arg in list(call.args)[1:] if called else [call.op, *call.args]:
            self.visit_expr(arg)

    def visit_global_var_(self, var: Expr) -> None:
        self.referred.add(var)


@mutator
class _Rewriter(PyExprMutator):  # type: ignore[misc]
    """Calls with more results, of which the program sees those it knows."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.lifted: dict[Expr, tuple[Expr, list[Expr]]] = {}

    def visit_call_(self, call: Expr) -> Expr:
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
