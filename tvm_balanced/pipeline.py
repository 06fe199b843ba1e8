"""From a rewritten Relax module to an executable: one order of passes, for every target.

Tuning records and schedules match kernels only after fusion, and fusing again after scheduling breaks
both, so the order is fixed: legalize, fuse, schedule the balanced operator, schedule the rest, lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import tvm
from tvm import relax

from tvm_balanced.records import Choice
from tvm_balanced.relay_passes.clean_names import CleanKernelNames
from tvm_balanced.relay_passes.lift_workspaces import LiftWorkspaces, with_signatures_of
from tvm_balanced.relay_passes.separate_operands import SeparateOperands
from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest
from tvm_balanced.schedules.tuned import ScheduleTuned
from tvm_balanced.te_operators import KEEP_NAN

# TVM's lowering of scheduled TensorIR; the schedules need no pass of their own in it
TIR_PIPELINE = "s_tir"


def fuse_passes() -> list[Any]:
    """Phase 1: operators become kernels, kernels are fused."""
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        SeparateOperands(),
        relax.transform.FuseTransposeMatmul(),
        relax.transform.LegalizeOps(KEEP_NAN),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        CleanKernelNames(),
    ]


def schedule_passes(target: tvm.target.Target) -> list[Any]:
    """Phase 2: every kernel gets a schedule; on CUDA the memory it allocates is left to phase 3."""
    lift = [LiftWorkspaces()] if target.kind.name == "cuda" else []
    return [ScheduleBalanced(target), schedule_rest(target), *lift]


def lower_passes(target: tvm.target.Target) -> list[Any]:
    """Phase 3: memory is planned, calls become VM instructions."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        # does something only where build asks for CUDA graphs
        *([relax.transform.RewriteCUDAGraph()] if target.kind.name == "cuda" else []),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]


def build(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    *,
    on_fused: Callable[[tvm.IRModule], None] | None = None,
    cuda_graph: bool = True,
    records: Sequence[Mapping[str, Any]] = (),
    on_scheduled: Callable[[list[dict[str, Any]], list[str]], None] | None = None,
) -> Any:
    """Build a rewritten module whose weights are parameters or bound constants.

    Parameters
    ----------
    mod : tvm.IRModule
        Relax functions only.
    target : tvm.target.Target
        Where the kernels run.
    on_fused : callable, optional
        Told the kernels as the first phase left them, whole and not scheduled, with the parameters that
        the second one adds.
    cuda_graph : bool
        Whether, on CUDA, stretches of kernels with static shapes become CUDA graphs, captured at a
        function's first call on a virtual machine. Weights that are parameters (behind the attribute
        ``num_input``) must be the same tensors at every call of that machine.
    records : sequence of mapping
        Fields of :class:`tvm_balanced.records.Choice`: known schedules of some kernels.
    on_scheduled : callable, optional
        Told the coverage of the kernels by records (:class:`tvm_balanced.schedules.tuned.Coverage`, as
        dictionaries), and which records did not fit.

    Returns
    -------
    tvm.relax.VMExecutable
    """
    # other settings of the caller's pass context stay as they are
    context = tvm.transform.PassContext.current()
    config = {**context.config, "relax.backend.use_cuda_graph": cuda_graph}
    with target, tvm.transform.PassContext(opt_level=context.opt_level, config=config):
        fused = tvm.transform.Sequential(fuse_passes())(mod)
        by_records = ScheduleTuned(target, {str(r["workload"][0]): Choice(**r) for r in records})
        mod = tvm.transform.Sequential([by_records, *schedule_passes(target)])(fused)
        if on_fused is not None:
            on_fused(with_signatures_of(fused, mod))
        by_records.name_defaults(mod)
        if on_scheduled is not None:
            on_scheduled([asdict(kernel) for kernel in by_records.coverage], by_records.problems)
        mod = tvm.transform.Sequential(lower_passes(target))(mod)
        return tvm.compile(mod, target, relax_pipeline=None, tir_pipeline=TIR_PIPELINE)
