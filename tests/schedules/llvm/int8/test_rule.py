"""``relax.nn.int8_dense`` from the operator to a fused kernel, against the reference."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tests.helpers.covering import grid
from tests.helpers.int8 import Problem, runs_here, target
from tvm_balanced import ops_int8 as int8_ops
from tvm_balanced.build import pipeline
from tvm_balanced.format import int8
from tvm_balanced.schedules.llvm.int8 import rule
from tvm_balanced.schedules.llvm.int8.isa import ISAS
from tvm_balanced.schedules.rules import SCHEDULED, replaced


def _module(problem: Problem, lead: tuple[int | str, ...], fused: bool, dtype: str) -> Any:
    """The operator, and where ``fused`` relu in front of it, bias, gelu and a residual behind."""
    axes = [tirx.Var(a, "int64") if isinstance(a, str) else a for a in lead]
    fmt = problem.packed.format
    variables = {"x": relax.TensorType([*axes, problem.k], dtype)}
    variables |= int8_ops.operand_types(fmt)
    if fused:
        variables["bias"] = relax.TensorType((problem.n,), dtype)
        variables["residual"] = relax.TensorType([*axes, problem.n], dtype)
    builder = relax.BlockBuilder()
    v = {name: relax.Var(name, ty) for name, ty in variables.items()}
    with builder.function("main", list(v.values())):
        with builder.dataflow():
            x = builder.emit(relax.op.nn.relu(v["x"])) if fused else v["x"]
            y = builder.emit(
                int8_ops.int8_dense(x, v["stream"], v["scales"], v["compensation"], fmt, dtype)
            )
            if fused:
                y = builder.emit(relax.op.add(y, v["bias"]))
                y = builder.emit(relax.op.nn.gelu(y))
                y = builder.emit(relax.op.add(y, v["residual"]))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def _scheduled(mod: tvm.IRModule, cpu: tvm.target.Target) -> tvm.IRModule:
    with cpu:
        mod = tvm.transform.Sequential(pipeline.fuse_passes())(mod)
        updated = {}
        for var, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and rule.has_int8_block(func):
                sch = rule.apply(func, cpu)
                assert sch is not None
                updated[var] = sch.mod["main"].with_attr(SCHEDULED, True)
        assert len(updated) == 1
        return replaced(mod, updated)


def _run(mod: tvm.IRModule, cpu: tvm.target.Target, arrays: list[Any]) -> Any:
    with cpu:
        passes = [*pipeline.schedule_passes(cpu), *pipeline.lower_passes(cpu)]
        mod = tvm.transform.Sequential(passes)(mod)
        built = tvm.compile(mod, cpu, relax_pipeline=None, tir_pipeline=pipeline.TIR_PIPELINE)
    return relax.VirtualMachine(built, tvm.cpu())["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def _want(problem: Problem, x: Any) -> Any:
    values, scales = int8.quantize_tokens(x)
    packed = problem.packed
    sums = int8.integer_sums(values, int8.unpack(packed))
    return int8.dequantize(sums, packed.scales[: problem.n], scales)


def _operands(problem: Problem) -> list[Any]:
    return list(int8_ops.packed_arrays(problem.packed))


@grid(
    {
        "isa": ["avx512-vbmi", "avx2", "plain"],
        "pattern": ["4:16", "3:24", None],
        "lead": [(), (5,), (2, 3), ("b", 7)],
        "fused": [False, True],
    }
)
def test_results(isa: str, pattern: str | None, lead: tuple[int | str, ...], fused: bool) -> None:
    if not runs_here(isa):
        pytest.skip(f"this CPU has not {isa}")
    problem = Problem(pattern, 37, 100, 1)
    shape = tuple(2 if isinstance(a, str) else a for a in lead)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((*shape, 100)).astype(np.float32)
    bias = rng.standard_normal(37).astype(np.float32)
    residual = rng.standard_normal((*shape, 37)).astype(np.float32)
    mod = _scheduled(_module(problem, lead, fused, "float32"), target(isa))
    extra = [bias, residual] if fused else []
    out = _run(mod, target(isa), [x, *_operands(problem), *extra])
    _check(problem, out, x, bias, residual, fused)


def _check(problem: Problem, out: Any, x: Any, bias: Any, residual: Any, fused: bool) -> None:
    """Compare a result of :func:`_module` with the reference."""
    flat = x.reshape(-1, problem.k)
    want = _want(problem, np.maximum(flat, 0) if fused else flat)
    if fused:
        want = want + bias
        want = want * 0.5 * (1 + np.vectorize(math.erf)(want / math.sqrt(2)))
        want = want + residual.reshape(want.shape)
    # a quotient in the middle of two whole numbers may be rounded to either, here one in some 1e5
    step = np.abs(_want(problem, flat)).max() / 127 / 10
    differs = np.abs(out.reshape(want.shape) - want)
    assert (differs > 2e-5 * np.abs(want).max()).mean() <= 0.02 and differs.max() <= step


@pytest.mark.skipif(not runs_here("avx512-vbmi"), reason="this CPU has no AVX-512 VBMI")
@grid(
    {
        "pattern": ["4:16", "3:7", None],
        "lead": [(55,), (2, 3), ("b", 7)],
        "fused": [False, True],
    }
)
def test_results_by_tiles(
    emulated_amx: tvm.target.Target, pattern: str | None, lead: tuple[int | str, ...], fused: bool
) -> None:
    problem = Problem(pattern, 37, 100, 1, tiles=True)
    shape = tuple(9 if isinstance(a, str) else a for a in lead)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((*shape, 100)).astype(np.float32)
    bias = rng.standard_normal(37).astype(np.float32)
    residual = rng.standard_normal((*shape, 37)).astype(np.float32)
    mod = _scheduled(_module(problem, lead, fused, "float32"), emulated_amx)
    assert "emulated_tdpbusd" in mod.script()
    extra = [bias, residual] if fused else []
    out = _run(mod, emulated_amx, [x, *_operands(problem), *extra])
    _check(problem, out, x, bias, residual, fused)


@pytest.mark.skipif(not runs_here("avx512-vbmi"), reason="this CPU has no AVX-512 VBMI")
def test_knobs_of_tiles(emulated_amx: tvm.target.Target) -> None:
    problem = Problem("4:16", 64, 128, 1, tiles=True)
    with emulated_amx:
        mod = tvm.transform.Sequential(pipeline.fuse_passes())(
            _module(problem, (40,), False, "float32")
        )
    (func,) = (f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc))
    (space,) = rule.spaces(func, emulated_amx)
    assert space.choices["tokens"] == (1, 2, 4, 8, 16, 32)
    assert space.choices["groups"] == (1, 2) and space.choices["sums"] == (1,)
    for point in space.points()[::7]:
        assert space.build(point) is not None


def test_what_stands_behind_joins_the_kernel() -> None:
    cpu = target("avx512-vbmi")
    mod = _scheduled(_module(Problem("4:16", 64, 128, 1), ("b", 4), True, "float32"), cpu)
    kernels = {
        var.name_hint: func.script()
        for var, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    # TVM fuses nothing in front of a reduction
    assert sorted(kernels) == ["fused_int8_dense_add_gelu_add1", "relu"]
    text = kernels["fused_int8_dense_add_gelu_add1"]
    assert "permvar.qi.512" in text and "vpdpbusd" in text and "residual" in text
    assert re.findall(r"T\.sblock\(\"(\w+)\"", text) == ["root", "int8_dense"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_floats(dtype: str) -> None:
    import ml_dtypes

    isa = next(name for name in ISAS if runs_here(name))
    problem = Problem("4:16", 32, 64, 1)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(kind)
    mod = _scheduled(_module(problem, (3,), False, dtype), target(isa))
    out = _run(mod, target(isa), [x, *_operands(problem)]).astype(np.float32)
    want = _want(problem, x.astype(np.float32))
    assert np.abs(out - want).max() <= 0.01 * np.abs(want).max()


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("pattern", ["4:16", "2:4", "3:24", "5:100", None])
def test_meaning_without_a_schedule(pattern: str | None, tiles: bool) -> None:
    """What ``verify`` compares kernels with: the operator's TensorIR as it stands."""
    problem = Problem(pattern, 20, 130, 1, tiles=tiles)
    x = np.random.default_rng(2).standard_normal((4, 130)).astype(np.float32)
    cpu = tvm.target.Target("llvm")
    built = tvm.compile(_module(problem, (4,), False, "float32"), target=cpu)
    arrays = map(tvm.runtime.tensor, [x, *_operands(problem)])
    out = relax.VirtualMachine(built, tvm.cpu())["main"](*arrays).numpy()
    want = _want(problem, x)
    assert np.abs(out - want).max() <= 2e-5 * np.abs(want).max()


def test_format_text() -> None:
    for pattern, tiles in (("4:16", False), ("4:16", True), (None, False)):
        fmt = Problem(pattern, 20, 130, 1, tiles=tiles).packed.format
        assert int8_ops.parse_format(int8_ops.format_text(fmt)) == fmt


def test_operator_survives_json_and_checks_its_operands() -> None:
    problem = Problem("4:16", 20, 130, 1)
    mod = _module(problem, ("b",), False, "float32")
    tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(mod)), mod)
    fmt = problem.packed.format
    types = int8_ops.operand_types(fmt)
    packed = [relax.Var(name, ty) for name, ty in types.items()]
    wide = relax.Var("x", relax.TensorType((3, 131), "float32"))
    builder = relax.BlockBuilder()
    # TVM makes its own error of one that crosses it
    with pytest.raises(RuntimeError, match="131 features"):
        builder.normalize(int8_ops.int8_dense(wide, *packed, fmt))
    x = relax.Var("x", relax.TensorType((3, 130), "float32"))
    short = relax.Var("scales", relax.TensorType((20,), "float32"))
    with pytest.raises(RuntimeError, match="scales has shape"):
        builder.normalize(int8_ops.int8_dense(x, packed[0], short, packed[2], fmt))
