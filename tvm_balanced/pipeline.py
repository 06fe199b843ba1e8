"""From a rewritten Relax module to an executable: one order of passes, for every target.

Tuning records and schedules match kernels only after fusion, and fusing again after scheduling breaks
both, so the order is fixed: legalize, fuse, schedule the balanced operator, schedule the rest, lower.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest
from tvm_balanced.schedules.lowering import tir_pipeline


def relax_pipeline(target: tvm.target.Target) -> Any:
    """The Relax passes for ``target``, from operators to VM instructions.

    Parameters
    ----------
    target : tvm.target.Target
        ``llvm`` or ``cuda``.

    Returns
    -------
    tvm.transform.Pass
    """
    cuda = target.kind.name == "cuda"

    @tvm.transform.module_pass(opt_level=0, name="tvm_balanced_pipeline")
    def _run(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        with target:
            return tvm.transform.Sequential(
                [
                    # phase 1: operators become kernels, kernels are fused
                    relax.backend.DispatchSampling(),
                    relax.backend.DispatchSortScan(),
                    relax.transform.FuseTransposeMatmul(),
                    relax.transform.LegalizeOps(),
                    relax.transform.AnnotateTIROpPattern(),
                    relax.transform.FoldConstant(),
                    relax.transform.FuseOps(),
                    relax.transform.FuseTIR(),
                    relax.transform.DeadCodeElimination(),
                    # phase 2: every kernel gets a schedule
                    ScheduleBalanced(target),
                    schedule_rest(target),
                    # phase 3: memory and calls
                    relax.transform.RewriteDataflowReshape(),
                    relax.transform.ToNonDataflow(),
                    relax.transform.RemovePurityChecking(),
                    relax.transform.CallTIRRewrite(),
                    relax.transform.StaticPlanBlockMemory(),
                    *([relax.transform.RewriteCUDAGraph()] if cuda else []),
                    relax.transform.LowerAllocTensor(),
                    relax.transform.KillAfterLastUse(),
                    relax.transform.LowerRuntimeBuiltin(),
                    relax.transform.ComputePrimValue(),
                    relax.transform.VMShapeLower(),
                    relax.transform.AttachGlobalSymbol(),
                ]
            )(mod)

    return _run


def build(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Build a rewritten module whose weights are parameters or bound constants.

    Parameters
    ----------
    mod : tvm.IRModule
        Relax functions only.
    target : tvm.target.Target
        Where the kernels run.

    Returns
    -------
    tvm.relax.VMExecutable
    """
    return tvm.compile(
        mod, target, relax_pipeline=relax_pipeline(target), tir_pipeline=tir_pipeline(target)
    )
