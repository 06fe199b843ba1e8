"""Which kernels a model has to be tuned: those that ``compile`` would build, each once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from tvm_balanced.model import Model
from tvm_balanced.ops import format_text
from tvm_balanced.options import CompileOptions
from tvm_balanced.schedules import workload
from tvm_balanced.schedules.balanced_block import find
from tvm_balanced.targets.resolve import TargetSpec

# element operations below which a kernel is not worth a trial; its time is that of calling it
_LITTLE_WORK = 1 << 14


@dataclass(frozen=True)
class Task:
    """One kernel to tune.

    Parameters
    ----------
    name : str
        Of the kernel in the module.
    mod : tvm.IRModule
        What its records are found by, see :func:`tvm_balanced.schedules.workload.workload`.
    key : str
        Its structural hash.
    uses : int
        Calls of it in one run of the model (all buckets together).
    detail : str
        The packed format and rows of activations of the balanced operator; empty for other kernels.
    index_bound : int
        What stored indices must stay below; 0 for other kernels.
    weights : tuple of int
        Which of its arguments are weights, by position.
    between : int
        Bytes of weights that a run of the model reads from one call of the kernel to the next, its own
        among them; 0 for a kernel without weights.
    """

    name: str
    mod: tvm.IRModule
    key: str
    uses: int
    detail: str
    index_bound: int
    weights: tuple[int, ...] = ()
    between: int = 0

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
    """Return the module with whole, unscheduled kernels that :func:`tvm_balanced.compile` would schedule.

    Parameters
    ----------
    model, options, progress
        As for :func:`tvm_balanced.compile`.
    spec : TargetSpec
        Where it will run.
    """
    from tvm_balanced.build.export import bind_parameters
    from tvm_balanced.build.pipeline import fuse_passes
    from tvm_balanced.build.prepare import prepare

    prepared = prepare(model, spec, replace(options, dump_ir=None), progress)
    mod = bind_parameters(prepared.mod, prepared.embedded)
    with spec.target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(fuse_passes())(mod)


def find_tasks(mod: tvm.IRModule, target: tvm.target.Target, kernels: str = "all") -> list[Task]:
    """Return the kernels of a fused module, each workload once, the balanced ones first.

    Parameters
    ----------
    mod : tvm.IRModule
        From :func:`fused_module`.
    target : tvm.target.Target
        Where it will run.
    kernels : str
        ``"balanced"``: only those that hold the operator; ``"all"``: every kernel with static shapes
        that does more than a little work.
    """
    sites = _call_sites(mod)
    total = max((_weight_bytes(mod, func) for func in _functions(mod)), default=0)
    tasks: dict[str, Task] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = str(gvar.name_hint)
        block = find(func)
        if block is None and (kernels == "balanced" or (_work(func) or 0) < _LITTLE_WORK):
            continue
        plain = workload.workload(func, target)
        if plain is None:
            continue
        key = workload.workload_hash(plain)
        calls = sites.get(name, [])
        count = max(len(calls), 1) + (tasks[key].uses if key in tasks else 0)
        weights = calls[0] if calls else ()
        detail = "" if block is None else f"{format_text(block.fmt)} M={block.rows}"
        bound = 0
        if block is not None:
            bound = block.fmt.pattern.block if block.fmt.encoding == "u8" else 256
        tasks[key] = Task(
            name=tasks[key].name if key in tasks else name,
            mod=plain,
            key=key,
            uses=count,
            detail=detail,
            index_bound=bound,
            weights=weights,
            between=total if weights else 0,
        )
    return sorted(tasks.values(), key=lambda task: not task.balanced)


def _work(func: tirx.PrimFunc) -> int | None:
    """Element operations of a kernel; None where their number is symbolic."""
    blocks: list[Any] = []
    tvm_ffi.structural_walk(func.body, (tvm.s_tir.SBlock, blocks.append), order="post")
    work = 0
    for block in blocks:
        size = 1
        for axis in block.iter_vars:
            extent = axis.dom.extent
            if not isinstance(extent, tirx.IntImm):
                return None
            size *= int(extent)
        work += size if block.iter_vars else 0
    return work


def _functions(mod: tvm.IRModule) -> list[relax.Function]:
    return [func for _, func in mod.functions_items() if isinstance(func, relax.Function)]


def _calls(func: relax.Function) -> list[tuple[str, list[Any]]]:
    """Return the kernels that a function calls, each with what it is given."""
    calls: list[tuple[str, list[Any]]] = []

    def visit(call: Any) -> None:
        if (
            isinstance(call, relax.Call)
            and call.args
            and isinstance(call.args[0], tvm.ir.GlobalVar)
        ):
            given = call.args[1] if len(call.args) > 1 else ()
            calls.append((str(call.args[0].name_hint), list(getattr(given, "fields", ()))))

    relax.analysis.post_order_visit(func, visit)
    return calls


def _parameters(func: relax.Function) -> set[Any]:
    """Return a function's parameters that hold weights: those that follow its inputs."""
    inputs = func.attrs["num_input"] if func.attrs and "num_input" in func.attrs else None
    return set() if inputs is None else set(func.params[int(inputs) :])


def _call_sites(mod: tvm.IRModule) -> dict[str, list[tuple[int, ...]]]:
    """For every call of a kernel, which of its arguments are weights."""
    sites: dict[str, list[tuple[int, ...]]] = {}
    for func in _functions(mod):
        parameters = _parameters(func)
        for name, given in _calls(func):
            weights = tuple(i for i, value in enumerate(given) if _is_weight(value, parameters))
            sites.setdefault(name, []).append(weights)
    return sites


def _weight_bytes(mod: tvm.IRModule, func: relax.Function) -> int:
    """Bytes of weights that one call of a function reads."""
    parameters = _parameters(func)
    read: dict[Any, int] = {}
    for name, given in _calls(func):
        # of a table that rows are taken from only these are read
        most = _work(mod[name]) if isinstance(mod[name], tirx.PrimFunc) else None
        for value in given:
            if _is_weight(value, parameters):
                count = _elements(value)
                count = count if most is None else min(count, most)
                read[value] = max(read.get(value, 0), count * _width(value))
    return sum(read.values())


def _is_weight(value: Any, parameters: set[Any]) -> bool:
    return isinstance(value, GenericConst) or value in parameters


def _elements(value: Any) -> int:
    shape = value.ty.shape or ()
    return math.prod(int(extent) for extent in shape if isinstance(extent, int | tirx.IntImm))


def _width(value: Any) -> int:
    return (int(tvm.DataType(str(value.ty.dtype)).bits) + 7) // 8
