"""Kernels of the operator as the pipeline makes them, their data, and NVRTC for what they become."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from tvm_balanced import ops
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format import layout, packing, reference
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning import magnitude as pruning
from tvm_balanced.schedules.balanced_block import find
from tvm_balanced.schedules.cuda import gather as cuda_gather
from tvm_balanced.schedules.cuda import gather_model, machine
from tvm_balanced.schedules.cuda.gather_tile import GatherTile
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.targets.gpus import GPUS

# of the largest result: rounding of the result's dtype, and of float32 sums in another order
TOLERANCE = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}


@dataclass(frozen=True)
class Case:
    """A fused kernel: shapes, dtypes, and what follows the operator.

    ``lead`` holds the batch axes, a name where symbolic; ``at`` their extents when run.
    """

    lead: tuple[int | str, ...]
    n: int
    k: int
    pattern: str
    dtype: str = "float16"
    out_dtype: str = "float16"
    epilogue: tuple[str, ...] = ("bias",)
    at: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        lead = "x".join(str(extent) for extent in self.lead) or "vector"
        ends = "+".join(self.epilogue) or "plain"
        shape = f"M{lead}-N{self.n}-K{self.k}-{self.pattern.replace(':', 'of')}"
        return f"{shape}-{self.dtype}-{self.out_dtype}-{ends}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Batch extents to run at."""
        return self.at or (tuple(extent for extent in self.lead if isinstance(extent, int)),)


_EPILOGUES: dict[str, Callable[[Any], Any]] = {
    "relu": relax.op.nn.relu,
    "gelu": relax.op.nn.gelu,
    "silu": relax.op.nn.silu,
}
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))),
    "silu": lambda y: y / (1 + np.exp(-y)),
}


def target(arch: str = "sm_90") -> tvm.target.Target:
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
        }
    )


def packed_format(case: Case, encoding: str | None = None) -> PackedFormat:
    fmt = preferred_format(
        BalancedPattern(case.pattern), case.n, case.k, None, case.dtype, target()
    )
    if encoding is None:
        return fmt
    return PackedFormat(fmt.out_features, fmt.in_features, fmt.pattern, fmt.layout, encoding)


def fused_kernel(case: Case, fmt: PackedFormat) -> tirx.PrimFunc:
    """The case's PrimFunc after legalization and fusion."""
    names: dict[str, Any] = {}
    lead = [
        extent if isinstance(extent, int) else names.setdefault(extent, tirx.Var(extent, "int64"))
        for extent in case.lead
    ]
    result = [*lead, fmt.out_features]
    types = {
        "x": relax.TensorType([*lead, fmt.in_features], case.dtype),
        "values": relax.TensorType(fmt.values_shape, case.dtype),
        "indices": relax.TensorType(fmt.indices_shape, "uint8"),
        "bias": relax.TensorType((fmt.out_features,), case.out_dtype),
        "residual": relax.TensorType(result, case.out_dtype),
    }
    wanted = [name for name in types if name not in ("bias", "residual") or name in case.epilogue]
    params = {name: relax.Var(name, types[name]) for name in wanted}
    bb = relax.BlockBuilder()
    with bb.function("main", list(params.values())):
        with bb.dataflow():
            y = ops.balanced_sparse_dense(
                params["x"], params["values"], params["indices"], fmt, case.out_dtype
            )
            for step in case.epilogue:
                y = bb.emit(y)
                y = _EPILOGUES[step](y) if step in _EPILOGUES else relax.op.add(y, params[step])
            y = bb.emit_output(y)
        bb.emit_func_output(y)
    mod = bb.get()
    for fuse in (
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ):
        mod = fuse(mod)
    kernels = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert len(kernels) == 1, "the epilogue was not fused into the operator"
    return kernels[0].with_attr("global_symbol", "main")


def chosen_tile(
    fmt: PackedFormat, rows: int | None, dtype: str, multiprocessors: int | None = None
) -> GatherTile:
    """The gather's tile on an H100, or on as many of its multiprocessors."""
    gpu = machine.machine(GPUS["h100"], multiprocessors)
    return gather_model.choose(fmt, rows, dtype, 48 << 10, gpu)


def gather_kernel(case: Case, fmt: PackedFormat) -> cudaemu.TVMKernel:
    """With the tile of a large N, which the small N of a test would not be given."""
    func = fused_kernel(case, fmt)
    answer = find(func)
    assert answer is not None
    tile = chosen_tile(fmt, answer.rows, case.dtype, multiprocessors=1)
    sch = cuda_gather.apply(func, target(), tile)
    assert sch is not None
    return cudaemu.from_tvm(sch.mod, target())


def arguments(
    case: Case, fmt: PackedFormat, lead: tuple[int, ...], seed: int = 0
) -> tuple[list[Any], Any]:
    """Arguments in the kernel's order, the output poisoned with NaN, and the float64 result."""
    rng = np.random.default_rng(seed)
    dtype, out_dtype = layout.numpy_dtype(case.dtype), layout.numpy_dtype(case.out_dtype)
    dense = rng.standard_normal((fmt.out_features, fmt.in_features)).astype("f4")
    weight = pruning.prune_weight(dense, fmt.pattern).astype(dtype)
    packed = packing.pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    x = rng.standard_normal((*lead, fmt.in_features)).astype(dtype)
    given = [x, packed.values, packed.indices]
    expected = reference.balanced_sparse_dense(x, packed)
    extra = {}
    for name, shape in (
        ("bias", (fmt.out_features,)),
        ("residual", (*lead, fmt.out_features)),
    ):
        if name in case.epilogue:
            extra[name] = rng.standard_normal(shape).astype(out_dtype)
            given.append(extra[name])
    for step in case.epilogue:
        if step in _ACTIVATIONS:
            expected = _ACTIVATIONS[step](expected)
        else:
            expected = expected + extra[step].astype("f8")
    out = np.full((*lead, fmt.out_features), np.nan, out_dtype)
    return [*given, out], expected


def check_close(case: Case, out: Any, expected: Any) -> None:
    __tracebackhide__ = True
    got = out.astype("f8")
    assert np.isfinite(got).all(), "an output was not written, or is not a number"
    scale = max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(got - expected).max()) / scale
    # a two-byte result is rounded after each step that the epilogue takes in its dtype
    limit = TOLERANCE[case.out_dtype] * (1 + len(case.epilogue)) / 2 + TOLERANCE["float32"]
    assert error <= limit, f"largest error {error:.2e} of the output's scale, limit {limit:.2e}"
