"""From a rewritten Relax module to an executable: one order of passes, for every target.

Tuning records and schedules match kernels only after fusion, and fusing again after scheduling breaks
both, so the order is fixed: legalize, fuse, schedule the balanced operator, schedule the rest, lower.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
import tvm
from tvm import relax
from tvm_balanced.records.lookup import Choice
from tvm_balanced.relay_passes.clean_names import CleanKernelNames
from tvm_balanced.relay_passes.lift_workspaces import LiftWorkspaces
from tvm_balanced.relay_passes.lift_workspaces import with_signatures_of
from tvm_balanced.schedules.dispatch import ScheduleBalanced
from tvm_balanced.schedules.dispatch import schedule_rest
from tvm_balanced.schedules.tuned import ScheduleTuned
import math
from tvm import tirx
from tvm_balanced.model import Array
from tvm_balanced.model import Model
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32
from tvm_balanced.relay_passes.dense_cublas import dense_cublas
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.fold_weights import fold_weights
from tvm_balanced.relay_passes.merge_dense import merge_dense
from tvm_balanced.relay_passes.pack_weights import pack_weights
from tvm_balanced.relay_passes.rewrite_dense import rewrite_dense
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from tvm_balanced.targets.resolve import TargetSpec


# TVM's lowering of scheduled TensorIR; the schedules need no pass of their own in it
TIR_PIPELINE = "s_tir"


def fuse_passes() -> list[Any]:
    """Phase 1: operators become kernels, kernels are fused."""
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.FuseTransposeMatmul(),
        relax.transform.LegalizeOps(),
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
        Fields of :class:`tvm_balanced.records.lookup.Choice`: known schedules of some kernels.
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


# results of a merged operator are read once more, by the slices; beyond this many bytes that costs
# more than the launches that merging saves (a few microseconds each)
MERGE_LIMIT_BYTES = {"cuda": 4 << 20, "llvm": 256 << 10}


# up to so many rows of activations llvm's dense kernel is a set of dot products
LLVM_DOT_ROWS = 4


def rewrite_model(
    model: Model,
    formats: Mapping[str, PackedFormat],
    target: TargetSpec,
    progress: Callable[[str], None] | None = None,
    dense: str = "dlight",
) -> tuple[tvm.IRModule, dict[str, Array]]:
    """Apply the passes of ``relay_passes`` to a model.

    Parameters
    ----------
    model : Model
        With weights that follow the patterns of ``formats``.
    formats : Mapping[str, PackedFormat]
        Layer name to the packed format it gets; layers not named stay dense.
    target : TargetSpec
        Where the result will run.
    progress : callable, optional
        Told the name of each weight before it is packed.
    dense : str
        What computes the matrix products that stay dense: ``"cublas"``, or ``"dlight"`` for the target's
        own schedules.

    Returns
    -------
    (tvm.IRModule, dict)
        ``main`` over inputs and weights, and the weights in the order of its parameters.
    """
    layers = {layer.name: layer for layer in model.dense_layers()}
    mod, names = rewrite_dense(model.mod, list(model.params), formats)
    limit = MERGE_LIMIT_BYTES[target.kind]

    def pays(data: Any, out_features: int) -> bool:
        lead = list(data.ty.shape)[:-1]
        rows = math.prod(int(d) for d in lead if isinstance(d, tirx.IntImm))
        return 4 * rows * out_features <= limit

    mod, names = merge_dense(mod, names, pays)
    params = pack_weights(mod, names, model.params, layers, progress)
    likes_rows = {layer.name for layer in layers.values() if _likes_rows(layer, target)}
    mod, params = fold_weights(mod, params, likes_rows)
    if dense == "cublas":
        mod = dense_cublas(mod)
    return accumulate_float32(mod), params


def _likes_rows(layer: DenseLayer, target: TargetSpec) -> bool:
    """Whether the dense kernel of this layer is faster on ``(N, K)`` than on ``(K, N)``.

    DLight's kernels read along K; on llvm a few rows of activations are dot products along K, while
    register tiles for more of them run along N (see ``schedules/llvm/rest/matmul.py``).
    """
    return target.kind == "cuda" or (layer.rows is not None and layer.rows <= LLVM_DOT_ROWS)
