"""Which kernels a model has to be tuned: those that ``compile`` would build, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from tvm_balanced.model import Model
from tvm_balanced.ops import format_text
from tvm_balanced.schedules import tuned
from tvm_balanced.schedules.balanced_block import find
from tvm_balanced.targets import TargetSpec

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
        What its records are found by, see :func:`tvm_balanced.schedules.tuned.workload`.
    key : str
        Its structural hash.
    uses : int
        Calls of it in one run of the model (all buckets together).
    detail : str
        The packed format and rows of activations of the balanced operator; empty for other kernels.
    index_bound : int
        What stored indices must stay below; 0 for other kernels.
    """

    name: str
    mod: tvm.IRModule
    key: str
    uses: int
    detail: str
    index_bound: int

    @property
    def balanced(self) -> bool:
        """Whether it holds the balanced operator."""
        return bool(self.detail)


def fused_module(
    model: Model,
    spec: TargetSpec,
    *,
    policy: str | Mapping[str, str] = "auto",
    ignore: Iterable[str] = (),
    buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    encoding: str = "auto",
    dense: str = "dlight",
    progress: Callable[[str], None] | None = None,
) -> tvm.IRModule:
    """The module with whole, unscheduled kernels that :func:`tvm_balanced.compile` would schedule.

    Parameters
    ----------
    model, policy, ignore, buckets, encoding, dense, progress
        As for :func:`tvm_balanced.compile`.
    spec : TargetSpec
        Where it will run.
    """
    from tvm_balanced.compiler import prepare
    from tvm_balanced.pipeline import fuse_passes
    from tvm_balanced.toolchain import bind_parameters

    prepared = prepare(model, spec, policy, ignore, buckets, encoding, dense, progress)
    mod = bind_parameters(prepared.mod, prepared.embedded)
    with spec.target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(fuse_passes())(mod)


def find_tasks(mod: tvm.IRModule, target: tvm.target.Target, kernels: str = "all") -> list[Task]:
    """The kernels of a fused module, each workload once, the balanced ones first.

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
    uses = _uses(mod)
    found: dict[str, Task] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = str(gvar.name_hint)
        block = find(func)
        if block is None and (kernels == "balanced" or not _worth(func)):
            continue
        plain = tuned.workload(func, target)
        if plain is None:
            continue
        key = tuned.workload_hash(plain)
        count = uses.get(name, 1) + (found[key].uses if key in found else 0)
        detail = "" if block is None else f"{format_text(block.fmt)} M={block.rows}"
        bound = 0
        if block is not None:
            bound = block.fmt.pattern.block if block.fmt.encoding == "u8" else 256
        found[key] = Task(
            found[key].name if key in found else name, plain, key, count, detail, bound
        )
    return sorted(found.values(), key=lambda task: not task.balanced)


def _worth(func: tirx.PrimFunc) -> bool:
    blocks: list[Any] = []
    tvm_ffi.structural_walk(func.body, (tvm.s_tir.SBlock, blocks.append), order="post")
    work = 0
    for block in blocks:
        size = 1
        for axis in block.iter_vars:
            extent = axis.dom.extent
            if not isinstance(extent, tirx.IntImm):
                return False
            size *= int(extent)
        work += size if block.iter_vars else 0
    return work >= _LITTLE_WORK


def _uses(mod: tvm.IRModule) -> Counter[str]:
    counts: Counter[str] = Counter()

    def visit(call: Any) -> None:
        if (
            isinstance(call, relax.Call)
            and call.args
            and isinstance(call.args[0], tvm.ir.GlobalVar)
        ):
            counts[str(call.args[0].name_hint)] += 1

    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return counts
