"""The llvm kernels of the operator against a float64 reference."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tvm_balanced import ops
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.format import layout as format_layout
from tvm_balanced.format import packing, reference, weights
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning import magnitude as pruning
from tvm_balanced.schedules import balanced_block
from tvm_balanced.schedules.dispatch import preferred_format
from tvm_balanced.schedules.llvm import batch_lanes as llvm_batch_lanes
from tvm_balanced.schedules.llvm import fallback as llvm_fallback
from tvm_balanced.schedules.llvm import nest as llvm_nest
from tvm_balanced.schedules.llvm import permute as llvm_permute

TARGETS = {
    "avx512": {"kind": "llvm", "mcpu": "x86-64-v4"},
    "haswell": {"kind": "llvm", "mcpu": "haswell"},
    "generic": {"kind": "llvm"},
}


def _runs_here(name: str) -> bool:
    needs = {"avx512": "avx512f", "haswell": "avx2", "generic": None}[name]
    system = tvm.target.codegen.llvm_get_system_cpu()
    host = tvm.target.Target({"kind": "llvm", "mcpu": str(system)})
    return needs is None or bool(tvm.target.codegen.target_has_features(needs, host))


def _target(name: str) -> tvm.target.Target:
    if not _runs_here(name):
        pytest.skip(f"this CPU does not run code for {name}")
    return tvm.target.Target(TARGETS[name])


# float32 sums of at most a few hundred products of standard normals; half floats are converted exactly,
# so only a half-float result adds its own rounding
TOLERANCE = {"float32": 5e-5, "float16": 2e-2, "bfloat16": 2e-1}


SLICES = {"columns": (2, 19), "rows": (1, 3)}  # axis of (2, 5, 50), and end


@dataclass(frozen=True)
class Case:
    """A kernel to check; a name in ``lead`` is a symbolic axis."""

    fmt: format_layout.PackedFormat
    lead: tuple[int | str, ...]
    epilogue: str = "none"
    dtype: str = "float32"
    out_dtype: str = "float32"


def _module(case: Case) -> tvm.IRModule:
    fmt, lead = case.fmt, [tirx.Var(e, "int64") if isinstance(e, str) else e for e in case.lead]
    x = relax.Var("x", relax.TensorType((*lead, fmt.in_features), case.dtype))
    values = relax.Var("values", relax.TensorType(fmt.values_shape, case.dtype))
    indices = relax.Var("indices", relax.TensorType(fmt.indices_shape, "uint8"))
    bias = relax.Var("bias", relax.TensorType((fmt.out_features,), case.out_dtype))
    residual = relax.Var("residual", relax.TensorType((*lead, fmt.out_features), case.out_dtype))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, values, indices, bias, residual]):
        with bb.dataflow():
            y = bb.emit(ops.balanced_sparse_dense(x, values, indices, fmt, case.out_dtype))
            if case.epilogue != "none":
                y = bb.emit(relax.op.add(y, bias))
            if case.epilogue == "residual":
                y = bb.emit(relax.op.add(y, residual))
            elif case.epilogue in ("relu", "gelu", "silu"):
                y = bb.emit(getattr(relax.op.nn, case.epilogue)(y))
            elif case.epilogue in SLICES:
                axis, end = SLICES[case.epilogue]
                y = bb.emit(relax.op.strided_slice(y, [axis], [0], [end]))
                y = bb.emit(relax.op.nn.silu(y))
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    mod = bb.get()
    for step in (
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ):
        mod = step(mod)
    return mod


def _kernel(mod: tvm.IRModule) -> tuple[Any, Any]:
    got = [
        (gvar, func)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and balanced_block.has_balanced_block(func)
    ]
    assert len(got) == 1
    return got[0]


def _error(case: Case, rule: Any, target: tvm.target.Target, batch: int = 5) -> float:
    """Largest absolute difference from the reference, symbolic axes being ``batch``."""
    mod = _module(case)
    gvar, func = _kernel(mod)
    sch = rule(func, target)
    assert sch is not None
    mod[gvar] = sch.mod["main"].with_attr("tirx.is_scheduled", True)
    vm = relax.VirtualMachine(tvm.compile(mod, target, tir_pipeline=TIR_PIPELINE), tvm.cpu())
    return _run(vm, case, batch)


def _run(vm: Any, case: Case, batch: int) -> float:
    fmt = case.fmt
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: str) -> weights.Array:
        drawn = rng.standard_normal(shape).astype(np.float32)
        return drawn.astype(format_layout.numpy_dtype(dtype))

    dense = rng.standard_normal((fmt.out_features, fmt.in_features)).astype(np.float32)
    weight = pruning.prune_weight(dense, fmt.pattern).astype(format_layout.numpy_dtype(case.dtype))
    packed = packing.pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    lead = [batch if isinstance(e, str) else e for e in case.lead]
    x = normal(*lead, fmt.in_features, dtype=case.dtype)
    bias = normal(fmt.out_features, dtype=case.out_dtype)
    residual = normal(*lead, fmt.out_features, dtype=case.out_dtype)
    args = (x, packed.values, packed.indices, bias, residual)
    out = vm["main"](*[tvm.runtime.tensor(a) for a in args]).numpy().astype(np.float64)
    expected = reference.balanced_sparse_dense(x, packed, None if case.epilogue == "none" else bias)
    if case.epilogue == "residual":
        expected = expected + residual.astype(np.float64)
    elif case.epilogue == "relu":
        expected = np.maximum(expected, 0)
    elif case.epilogue == "gelu":
        expected = expected * 0.5 * (1 + np.vectorize(math.erf)(expected / math.sqrt(2)))
    elif case.epilogue == "silu":
        expected = expected / (1 + np.exp(-expected))
    elif case.epilogue in SLICES:
        axis, end = SLICES[case.epilogue]
        expected = np.take(expected, range(end), axis)
        expected = expected / (1 + np.exp(-expected))
    assert out.shape == expected.shape
    return float(np.abs(out - expected).max())


def _format(
    pattern: str, n: int, k: int, layout: str = "r16v1", encoding: str | None = None
) -> format_layout.PackedFormat:
    parsed = BalancedPattern(pattern)
    if encoding is None:
        encoding = "u4" if parsed.block <= 16 else "u8"
    return format_layout.PackedFormat(n, k, parsed, format_layout.Layout.parse(layout), encoding)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "pattern", ["1:4", "4:8", "2:16", "4:16", "3:16", "8:32", "4:64", "16:256", "5:10", "16:16"]
)
def test_preferred_format_of_every_pattern(pattern: str, name: str) -> None:
    target = _target(name)
    fmt = preferred_format(BalancedPattern(pattern), 50, 300, None, "float32", target)
    small_blocks = name == "avx512" or (name == "haswell" and fmt.pattern.block <= 64)
    _, func = _kernel(_module(Case(fmt, (2,))))
    assert (llvm_permute.apply(func, target) is not None) == small_blocks
    rule = llvm_permute.apply if small_blocks else llvm_batch_lanes.apply
    assert _error(Case(fmt, (2,)), rule, target) < TOLERANCE["float32"]


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13, 33])
@pytest.mark.parametrize("n", [1, 17, 64])
def test_batches_and_rows(rows: int, n: int) -> None:
    case = Case(_format("4:16", n, 64), (rows,), "relu")
    assert _error(case, llvm_permute.apply, _target("avx512")) < TOLERANCE["float32"]


@pytest.mark.parametrize("k", [16, 70, 16 * 13], ids=["one-block", "padded", "prime-blocks"])
@pytest.mark.parametrize("encoding", ["u4", "u8"])
@pytest.mark.parametrize("pattern", ["2:16", "3:16"])
def test_reductions(k: int, encoding: str, pattern: str) -> None:
    case = Case(_format(pattern, 32, k, encoding=encoding), (9,))
    assert _error(case, llvm_permute.apply, _target("avx512")) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["avx512", "haswell"])
def test_symbolic_batch_has_an_exact_tail(name: str) -> None:
    target = _target(name)
    layout = "r16v1" if name == "avx512" else "r8v1"
    case = Case(_format("4:16", 50, 64, layout), ("b", 3), "residual")
    mod = _module(case)
    gvar, func = _kernel(mod)
    sch = llvm_permute.apply(func, target)
    assert sch is not None
    mod[gvar] = sch.mod["main"].with_attr("tirx.is_scheduled", True)
    vm = relax.VirtualMachine(tvm.compile(mod, target, tir_pipeline=TIR_PIPELINE), tvm.cpu())
    for batch in (1, 2, 3, 6, 11):
        assert _run(vm, case, batch) < TOLERANCE["float32"]


@pytest.mark.parametrize("rule", [llvm_permute, llvm_batch_lanes], ids=lambda r: r.__name__[26:])
@pytest.mark.parametrize("epilogue", ["residual", "gelu", "silu", "columns"])
def test_epilogues(epilogue: str, rule: Any) -> None:
    case = Case(_format("4:16", 50, 96), (2, 5), epilogue)
    assert _error(case, rule.apply, _target("avx512")) < TOLERANCE["float32"]


def test_fewer_rows_than_the_product_has() -> None:
    case, target = Case(_format("4:16", 50, 96), (2, 5), "rows"), _target("generic")
    _, func = _kernel(_module(case))
    assert llvm_permute.apply(func, target) is None and llvm_batch_lanes.apply(func, target) is None
    assert _error(case, llvm_fallback.apply, target) < TOLERANCE["float32"]


@pytest.mark.parametrize("rule", [llvm_permute, llvm_batch_lanes], ids=lambda r: r.__name__[26:])
@pytest.mark.parametrize("out_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_floats(dtype: str, out_dtype: str, rule: Any) -> None:
    out = dtype if out_dtype == "same" else out_dtype
    case = Case(_format("4:16", 50, 96), (5,), "relu", dtype, out)
    assert _error(case, rule.apply, _target("avx512")) < TOLERANCE[out]


@pytest.mark.parametrize("name", ["avx512", "generic"])
@pytest.mark.parametrize(
    ("pattern", "layout", "lead"),
    [
        ("4:16", "r1v8", (1,)),
        ("3:16", "r4v2", ("b",)),
        ("16:256", "r1v1", (13,)),
        ("5:10", "r3v1", (33,)),
    ],
    ids=["r1v8-M1", "r4v2-Mb", "r1v1-M13", "r3v1-M33"],
)
def test_batch_lanes_take_every_layout(
    pattern: str, layout: str, lead: tuple[int | str, ...], name: str
) -> None:
    case = Case(_format(pattern, 17, 300, layout), lead, "relu")
    assert _error(case, llvm_batch_lanes.apply, _target(name)) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("pattern", "layout", "lanes", "lead", "knobs"),
    [
        ("4:16", "r8v1", 8, (13,), llvm_batch_lanes.BatchLanesKnobs(chunk=4096)),
        ("3:16", "r8v1", 8, ("b",), llvm_batch_lanes.BatchLanesKnobs(batch_tile=2, chunk=1)),
        ("1:16", "r16v1", 16, (40,), llvm_batch_lanes.BatchLanesKnobs(chunk=8192, group=32)),
        ("16:256", "r8v1", 8, (70,), llvm_batch_lanes.BatchLanesKnobs(sums=4, chunk=1)),
        ("12:16", "r1v8", 4, (9,), llvm_batch_lanes.BatchLanesKnobs(batch_tile=8)),
    ],
    ids=["M13", "symbolic-odd", "L16-odd", "M70-block256", "L4-r1v8"],
)
def test_batch_lanes_in_chunks(
    pattern: str,
    layout: str,
    lanes: int,
    lead: tuple[int | str, ...],
    knobs: llvm_batch_lanes.BatchLanesKnobs,
) -> None:
    def rule(func: Any, _target: Any) -> Any:
        parts = llvm_nest.take_apart(func)
        assert parts is not None
        return llvm_batch_lanes.schedule(parts, lanes, knobs)

    case = Case(_format(pattern, 84, 600, layout), lead, "relu")
    assert _error(case, rule, _target("generic"), batch=45) < TOLERANCE["float32"]


def test_fallback_takes_what_has_other_layouts() -> None:
    case = Case(_format("4:16", 17, 70, "r1v8"), ("b", 2), "gelu")
    assert _error(case, llvm_fallback.apply, _target("generic")) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("pattern", "layout", "encoding"),
    [("2:8", "r16v1", "u3"), ("1:4", "r16v4", "u2"), ("4:16", "r32v2s8", "u4")],
)
def test_only_the_fallback_takes_formats_of_cuda(pattern: str, layout: str, encoding: str) -> None:
    case = Case(_format(pattern, 17, 70, layout, encoding), (3,), "relu")
    _, func = _kernel(_module(case))
    for rule in (llvm_permute, llvm_batch_lanes):
        assert rule.apply(func, tvm.target.Target(TARGETS["avx512"])) is None
    assert _error(case, llvm_fallback.apply, _target("generic")) < TOLERANCE["float32"]


def test_permute_leaves_other_targets_and_layouts_alone() -> None:
    _, func = _kernel(_module(Case(_format("4:16", 32, 64, "r1v8"), (4,))))
    assert llvm_permute.apply(func, tvm.target.Target(TARGETS["avx512"])) is None
    _, func = _kernel(_module(Case(_format("4:16", 32, 64), (4,))))
    assert llvm_permute.apply(func, tvm.target.Target(TARGETS["generic"])) is None


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [
        (llvm_permute.PermuteKnobs(4, (1,), 1), 9),
        (llvm_permute.PermuteKnobs(8, (4, 2), 3), 11),
        (llvm_permute.PermuteKnobs(2, (3, 3), 5), 5),
    ],
    ids=["4x1", "8x2-in-3", "2x3-in-5"],
)
def test_every_tile_size_is_right(knobs: llvm_permute.PermuteKnobs, rows: int) -> None:
    target = _target("avx512")

    def rule(func: Any, _target: Any) -> Any:
        parts = llvm_nest.take_apart(func)
        assert parts is not None
        return llvm_permute.schedule(parts, 16, knobs)

    case = Case(_format("2:16", 16 * 7 + 3, 64), (rows,), "relu")
    assert _error(case, rule, target) < TOLERANCE["float32"]


def test_kernels_hold_permutes_and_vector_conversions() -> None:
    target = tvm.target.Target(TARGETS["avx512"])
    for dtype, convert in (("float32", None), ("float16", "vcvtph2ps")):
        case = Case(_format("4:16", 64, 64), (8,), dtype=dtype)
        _, func = _kernel(_module(case))
        sch = llvm_permute.apply(func, target)
        assert sch is not None
        lib = tvm.tirx.build(
            tvm.IRModule({"main": sch.mod["main"].with_attr("global_symbol", "main")}),
            target=target,
            pipeline=TIR_PIPELINE,
        )
        assembly = lib.inspect_source("asm")
        # LLVM writes the same permute as vpermps or vpermd
        assert re.search(r"\bvperm(ps|d)\b", assembly) and "vfmadd" in assembly
        assert not re.search(r"call\w*\s+\S*(hfsf|h2f)", assembly)
        assert convert is None or convert in assembly


def test_small_kernels_run_on_one_thread() -> None:
    target = tvm.target.Target(TARGETS["avx512"])
    for k, parallel in ((64, False), (4096, True)):
        _, func = _kernel(_module(Case(_format("4:16", 1024, k), (8,))))
        sch = llvm_permute.apply(func, target)
        assert sch is not None
        assert ("T.parallel" in sch.mod["main"].script()) == parallel
