"""Which kernels a model has to be tuned: those that ``compile`` would build, each once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir.expr import GenericConst
from tvm.s_tir import meta_schedule as ms

from tvm_balanced import operators
from tvm_balanced.format.int8 import DenseFormat, ExpandFormat, GatherFormat
from tvm_balanced.model import Model
from tvm_balanced.options import CompileOptions
from tvm_balanced.schedules import workload
from tvm_balanced.schedules.balanced_block import main_block
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.tvm_types import Block, Expr
from tvm_balanced.targets.resolve import TargetSpec
from tvm_balanced.tuning.measure import Feed, Signature, signature

# element operations below which a kernel is not worth a trial; its time is that of calling it
_LITTLE_WORK = 1 << 14


@dataclass(frozen=True)
class Task:
    """One kernel to tune.

    Parameters
    ----------
    name : str
        Name of the kernel in the module.
    mod : tvm.IRModule
        The workload that its records are of: see :func:`tvm_balanced.schedules.workload.workload`.
    key : str
        Structural hash of the workload.
    uses : int
        Calls of it in one run of the model (all buckets together).
    detail : str
        The packed format and rows of activations of the balanced operator; empty for other kernels.
    feed : Feed
        What its arguments must be like.
    """

    name: str
    mod: tvm.IRModule
    key: str
    uses: int
    detail: str
    feed: Feed

    @property
    def balanced(self) -> bool:
        """Whether it holds the balanced operator."""
        return bool(self.detail)


def fused_module(
    model: Model,
    spec: TargetSpec,
    options: CompileOptions,
    progress: Callable[[str], None] | None = None,
) -> tvm.IRModule:
    """Return the module with whole, unscheduled kernels that :func:`tvm_balanced.compile` would schedule."""
    from tvm_balanced.build.export import bind_parameters
    from tvm_balanced.build.pipeline import fuse_passes
    from tvm_balanced.build.prepare import prepare

    prepared = prepare(model, spec, replace(options, dump_ir=None), progress)
    mod = bind_parameters(prepared.mod, prepared.embedded)
    with spec.target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(fuse_passes())(mod)


def find_tasks(mod: tvm.IRModule, target: tvm.target.Target, kernels: str = "all") -> list[Task]:
    """Return the kernels of a module that :func:`fused_module` gave, each workload once, balanced ones first.

    With ``kernels="balanced"`` only those that hold the operator; with ``"all"`` every kernel with static
    shapes that does more than a little work.
    """
    functions = [_calls(f) for _, f in mod.functions_items() if isinstance(f, relax.Function)]
    total = max((_weight_bytes(mod, calls) for calls in functions), default=0)
    sites = grouped(itertools.chain.from_iterable(functions), lambda call: call.kernel)
    tasks: dict[str, Task] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        block = main_block(func)
        if block is None and (kernels == "balanced" or (_work(func) or 0) < _LITTLE_WORK):
            continue
        plain = workload.workload(func, target)
        if plain is None:
            continue
        key = workload.workload_hash(plain)
        name = str(gvar.name_hint)
        calls = sites.get(name, [])
        weights = tuple(calls[0].weights) if calls else ()
        detail, bound = "", 0
        if block is not None:
            detail, bound = f"{operators.format_text(block.fmt)} M={block.rows}", _bound(block.fmt)
        earlier = tasks.get(key)
        tasks[key] = Task(
            name=earlier.name if earlier else name,
            mod=plain,
            key=key,
            uses=max(len(calls), 1) + (earlier.uses if earlier else 0),
            detail=detail,
            feed=Feed(bound, weights, total if weights else 0),
        )
    return sorted(tasks.values(), key=lambda task: not task.balanced)


def feeds_of(tasks: Iterable[Task]) -> dict[Signature, Feed]:
    """Return what is known of the arguments of kernels, by these."""
    infos = ((ms.arg_info.ArgInfo.from_prim_func(task.mod["main"]), task) for task in tasks)
    return {signature([one.as_json() for one in info]): task.feed for info, task in infos}


def _bound(fmt: operators.WeightFormat) -> int:
    """Above what no byte of a weight's indices may be."""
    if isinstance(fmt, ExpandFormat):
        # random bits would ask for more values than a tile holds
        return 1
    if isinstance(fmt, DenseFormat) or fmt.encoding != "u8":
        return 256
    return fmt.columns if isinstance(fmt, GatherFormat) else fmt.pattern.block


def _work(func: tirx.PrimFunc) -> int | None:
    """Element operations of a kernel; None where their number is symbolic."""
    blocks: list[Block] = []
    tvm_ffi.structural_walk(func.body, (tvm.s_tir.SBlock, blocks.append), order="post")
    work = 0
    for block in blocks:
        extents = [axis.dom.extent for axis in block.iter_vars]
        if not all(isinstance(extent, tirx.IntImm) for extent in extents):
            return None
        work += math.prod(map(int, extents)) if extents else 0
    return work


class _Call(NamedTuple):
    """A call of a kernel, with those of its arguments that are weights, by position."""

    kernel: str
    weights: dict[int, Expr]


def _calls(func: relax.Function) -> list[_Call]:
    """Return the calls of kernels in a function; its parameters that follow its inputs are weights."""
    inputs = func.attrs["num_input"] if func.attrs and "num_input" in func.attrs else None
    parameters = set() if inputs is None else set(func.params[int(inputs) :])
    calls: list[_Call] = []

    def visit(call: Expr) -> None:
        if not isinstance(call, relax.Call) or not call.args:
            return
        kernel, *given = call.args
        if isinstance(kernel, tvm.ir.GlobalVar):
            fields = getattr(given[0], "fields", ()) if given else ()
            weights = {
                position: value
                for position, value in enumerate(fields)
                if isinstance(value, GenericConst) or value in parameters
            }
            calls.append(_Call(str(kernel.name_hint), weights))

    relax.analysis.post_order_visit(func, visit)
    return calls


def _weight_bytes(mod: tvm.IRModule, calls: Iterable[_Call]) -> int:
    """Bytes of weights that the calls of one function read."""
    read: dict[Expr, int] = {}
    for name, weights in calls:
        # of a table that rows are taken from only these are read
        most = _work(mod[name]) if isinstance(mod[name], tirx.PrimFunc) else None
        for value in weights.values():
            count = _elements(value)
            count = count if most is None else min(count, most)
            read[value] = max(read.get(value, 0), count * _width(value))
    return sum(read.values())


def _elements(value: Expr) -> int:
    shape = value.ty.shape or ()
    return math.prod(int(extent) for extent in shape if isinstance(extent, int | tirx.IntImm))


def _width(value: Expr) -> int:
    return (int(tvm.DataType(str(value.ty.dtype)).bits) + 7) // 8
