"""From an imported module to an executable: one order of passes, for every target.

0. import: the frontends leave one function ``main`` over inputs and weights. Indices are bounded
   (``bound_indices``), every weight's variable bears the weight's own name and each is read.
1. operators (:func:`operator_passes`): layers become sparse, and weights take their last form. Legalization
   hides which operator a kernel was, so all that looks at operators comes before it.
2. kernels (:func:`fuse_passes`): operators become kernels, kernels are fused. Tuning records and schedules
   match kernels only after fusion, and fusing again after scheduling breaks both.
3. schedules (:func:`schedule_passes`): by tuning records, then ours for the balanced operator, then the rest.
4. calls (:func:`lower_passes`): memory is planned, calls become instructions of the virtual machine.
5. code: TVM lowers the kernels and compiles them for the target.

The weights' values are packed after phase 1 (:func:`rewrite_model`); phases 2 to 5 are :func:`build`, in a
process of its own for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx

from tvm_balanced.build.dump import device_sources, dump, run_passes
from tvm_balanced.model import Model
from tvm_balanced.operators import WeightFormat
from tvm_balanced.records.lookup import Choice
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32
from tvm_balanced.relay_passes.bucket_functions import bucket_dim, bucket_functions
from tvm_balanced.relay_passes.clean_names import clean_names
from tvm_balanced.relay_passes.dense_cublas import dense_cublas
from tvm_balanced.relay_passes.find_dense import DenseLayer
from tvm_balanced.relay_passes.fold_weights import fold_weights
from tvm_balanced.relay_passes.fuse_transposes import fuse_transposes
from tvm_balanced.relay_passes.keep_axes import keep_axes
from tvm_balanced.relay_passes.leading_slices import leading_slices
from tvm_balanced.relay_passes.lift_workspaces import lift_workspaces, with_signatures_of
from tvm_balanced.relay_passes.merge_dense import merge_dense
from tvm_balanced.relay_passes.module_pass import Pass
from tvm_balanced.relay_passes.pack_weights import pack_weights
from tvm_balanced.relay_passes.rewrite_dense import rewrite_dense
from tvm_balanced.relay_passes.separate_operands import separate_operands
from tvm_balanced.schedules.dispatch import ScheduleBalanced, schedule_rest
from tvm_balanced.schedules.tuned import ScheduleTuned
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Expr
from tvm_balanced.te_operators import KEEP_NAN

if TYPE_CHECKING:
    from tvm_balanced.targets.resolve import TargetSpec

# TVM's lowering of scheduled TensorIR; the schedules need no pass of their own in it
TIR_PIPELINE = "s_tir"

# results of a merged operator are read once more, by the slices; beyond this many bytes that costs
# more than the launches that merging saves (a few microseconds each)
MERGE_LIMIT_BYTES = {"cuda": 4 << 20, "llvm": 256 << 10}

# up to so many rows of activations llvm's dense kernel is a set of dot products
LLVM_DOT_ROWS = 4


def operator_passes(
    layers: Sequence[DenseLayer],
    formats: Mapping[str, WeightFormat],
    target: TargetSpec,
    dense: str = "dlight",
    buckets: tuple[str, Sequence[int]] | None = None,
) -> list[Pass]:
    """Phase 1: layers become sparse, weights take their last form.

    Of the module's ``layers``, those in ``formats`` get that packed format, and the others stay as they are:
    ``"cublas"`` computes them, or ``"dlight"``, the target's own schedules. ``buckets`` are a symbolic
    dimension, and its sizes that get a function of their own.
    """

    def pays(data: Expr, out_features: int) -> bool:
        lead = list(data.ty.shape)[:-1]
        rows = math.prod(int(d) for d in lead if isinstance(d, tirx.IntImm))
        return 4 * rows * out_features <= MERGE_LIMIT_BYTES[target.kind]

    keep_transposed = {layer.name for layer in layers if _likes_rows(layer, target)}
    return [
        # so that what stands behind a layer joins its kernel
        keep_axes,
        rewrite_dense(formats),
        # merges what was rewritten: operators that stay dense are left to the target's libraries
        merge_dense(pays),
        # after both, which read the chains that lead from a weight to its operator
        fold_weights(keep_transposed),
        # takes the transposes that were left, and sums in float32 by itself: before the next one
        *([dense_cublas] if dense == "cublas" else []),
        accumulate_float32,
        # last, so that the passes before see each operator once
        *([bucket_functions(*buckets)] if buckets else []),
    ]


def fuse_passes() -> list[Pass]:
    """Phase 2: operators become kernels, kernels are fused."""
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        # products of a tensor with its own transpose
        separate_operands,
        fuse_transposes,
        # models that hide NaN hide broken inputs
        relax.transform.LegalizeOps(KEEP_NAN),
        relax.transform.AnnotateTIROpPattern(),
        leading_slices,
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        # fusion names the parameters of kernels after the model's tensors
        clean_names,
    ]


def schedule_passes(target: tvm.target.Target) -> list[Pass]:
    """Phase 3: every kernel gets a schedule; on CUDA the memory it allocates is left to phase 4."""
    lift = [lift_workspaces] if target.kind.name == "cuda" else []
    return [ScheduleBalanced(target), schedule_rest(target), *lift]


def lower_passes(target: tvm.target.Target) -> list[Pass]:
    """Phase 4: memory is planned, calls become VM instructions."""
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


def rewrite_model(
    model: Model,
    formats: Mapping[str, WeightFormat],
    target: TargetSpec,
    progress: Callable[[str], None] | None = None,
    dense: str = "dlight",
    buckets: tuple[str | None, Sequence[int]] = (None, ()),
    dump_ir: Path | None = None,
) -> tuple[tvm.IRModule, dict[str, Array]]:
    """Apply phase 1 to a model, and pack its weights.

    Returned are ``main`` over inputs and weights with its buckets, and the weights by name, in the order of
    ``main``. Options are those of :func:`operator_passes`, but None may stand for the first symbolic
    dimension; ``progress`` is called with the name of each weight before it is packed, and the folder
    ``dump_ir`` gets the IR after every pass. Raises InputError when the model has no such dimension.
    """
    dim, sizes = buckets
    chosen = (bucket_dim(model.mod, dim, sizes), sizes) if sizes else None
    if dump_ir is not None:
        dump(dump_ir, "imported.py", model.mod.script())
    passes = operator_passes(model.dense_layers(), formats, target, dense, chosen)
    mod = run_passes(model.mod, passes, dump_ir)
    return mod, pack_weights(mod, model.params, progress)


def build(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    *,
    on_fused: Callable[[tvm.IRModule], None] | None = None,
    cuda_graph: bool = True,
    records: Sequence[Mapping[str, Any]] = (),
    on_scheduled: Callable[[list[dict[str, Any]], list[str]], None] | None = None,
    dump_ir: str | None = None,
) -> relax.VMExecutable:
    """Build a rewritten module whose weights are parameters or bound constants: phases 2 to 5.

    Parameters
    ----------
    mod : tvm.IRModule
        A module of Relax functions only.
    target : tvm.target.Target
        The target the kernels are compiled for.
    on_fused : callable, optional
        Called with the kernels as phase 2 left them, whole and not scheduled, with the parameters that
        phase 3 adds.
    cuda_graph : bool
        Whether, on CUDA, stretches of kernels with static shapes become CUDA graphs, captured at a
        function's first call on a virtual machine. Weights that are parameters (behind the attribute
        ``num_input``) must be the same tensors at every call of that machine.
    records : sequence of mapping
        Fields of :class:`tvm_balanced.records.lookup.Choice`: known schedules of some kernels.
    on_scheduled : callable, optional
        Called with the coverage of the kernels by records (:class:`tvm_balanced.schedules.tuned.Coverage`,
        as dictionaries), and with which records did not fit.
    dump_ir : str, optional
        The folder that gets the IR after every phase, and the text of the device code.
    """
    folder = None if dump_ir is None else Path(dump_ir)
    # other settings of the caller's pass context stay as they are
    context = tvm.transform.PassContext.current()
    config = {**context.config, "relax.backend.use_cuda_graph": cuda_graph}
    settings = {"opt_level": context.opt_level, "instruments": context.instruments}
    with target, tvm.transform.PassContext(config=config, **settings):
        fused = run_passes(mod, [tvm.transform.Sequential(fuse_passes(), name="fuse")], folder)
        by_records = ScheduleTuned(target, {str(r["workload"][0]): Choice(**r) for r in records})
        schedule = [by_records, *schedule_passes(target)]
        mod = run_passes(fused, [tvm.transform.Sequential(schedule, name="schedule")], folder)
        if on_fused is not None:
            on_fused(with_signatures_of(fused, mod))
        by_records.name_defaults(mod)
        if on_scheduled is not None:
            on_scheduled([asdict(kernel) for kernel in by_records.coverage], by_records.problems)
        lower = tvm.transform.Sequential(lower_passes(target), name="lower")
        mod = run_passes(mod, [lower], folder)
        executable = tvm.compile(mod, target, relax_pipeline=None, tir_pipeline=TIR_PIPELINE)
    if folder is not None:
        kind, form = ("cuda", "cu") if target.kind.name == "cuda" else ("llvm", "ll")
        for text in device_sources(executable.mod, kind, "cuda" if kind == "cuda" else "ll"):
            dump(folder, f"device.{form}", text)
    return executable


def _likes_rows(layer: DenseLayer, target: TargetSpec) -> bool:
    """Whether the dense kernel of this layer is faster on ``(N, K)`` than on ``(K, N)``.

    DLight's kernels read along K; on llvm a few rows of activations are dot products along K, while
    register tiles for more of them run along N (see ``schedules/llvm/rest/matmul.py``).
    """
    return target.kind == "cuda" or (layer.rows is not None and layer.rows <= LLVM_DOT_ROWS)
