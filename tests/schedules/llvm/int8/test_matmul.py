"""The int8 kernels against exact integer sums, for every instruction set that this CPU has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.covering import each_value, grid
from tests.helpers.int8 import CPUS, Problem, run, runs_here, target
from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm.int8 import dense, gather
from tvm_balanced.schedules.llvm.int8.isa import ISAS, choose
from tvm_balanced.schedules.llvm.int8.matmul import Epilogue, Knobs, MatmulSpec, for_threads

# blocks of a lane, of less, of a window, of several tables; odd numbers of slots; whole blocks
PATTERNS = (
    *("1:16", "2:16", "3:16", "4:16", "5:16", "8:16", "16:16", "2:4", "1:2", "3:7", "4:10", "5:13"),
    *("3:24", "8:32", "7:50", "20:64", "9:100", "32:128", "11:160", "40:200", "16:256", None),
)


def check_isa(isa: str) -> None:
    if not runs_here(isa):
        pytest.skip(f"this CPU has not {isa}")


_EACH = {"isa": list(ISAS), "pattern": PATTERNS}


@grid(_EACH, each_value(_EACH))
def test_sums_are_exact(isa: str, pattern: str | None) -> None:
    check_isa(isa)
    problem = Problem(pattern, 37, 300, 6)
    out = run(problem, problem.spec(out_dtype="int32"), isa)
    assert np.array_equal(out, problem.sums)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, Knobs, bool]:
    block = draw(st.one_of(st.just(16), st.integers(2, 256)))
    nnz = draw(st.integers(1, min(block, 24)))
    pattern = draw(st.sampled_from([f"{nnz}:{block}", None]))
    problem = Problem(
        pattern,
        draw(st.integers(1, 70)),
        draw(st.integers(1, 400)),
        draw(st.integers(1, 19)),
        draw(st.integers(0, 99)),
    )
    knobs = Knobs(
        tokens=draw(st.sampled_from([1, 2, 4, 8])),
        groups=tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))),
        sums=tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))),
        threads=draw(st.integers(1, 3)),
        task_bytes=draw(st.sampled_from([1024, 1 << 20])),
        token_parts=draw(st.integers(1, 3)),
    )
    return problem, knobs, draw(st.booleans())


@pytest.mark.parametrize("examples", [4, pytest.param(24, marks=pytest.mark.large)])
@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact_whatever_the_knobs(isa: str, examples: int) -> None:
    check_isa(isa)

    @settings(max_examples=examples, deadline=None)
    @given(cases())
    def each(case: tuple[Problem, Knobs, bool]) -> None:
        problem, knobs, symbolic = case
        out = run(problem, problem.spec(symbolic, out_dtype="int32"), isa, knobs)
        assert np.array_equal(out, problem.sums)

    each()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", ["4:16", None])
def test_results_are_scaled_in_one_order(isa: str, pattern: str | None) -> None:
    check_isa(isa)
    problem = Problem(pattern, 48, 256, 3)
    packed, scales = problem.packed, problem.activations[1]
    want = int8.dequantize(problem.sums, packed.scales[: problem.n], scales)
    assert np.array_equal(run(problem, problem.spec(), isa), want)


_SYMBOLIC = {"isa": list(ISAS), "pattern": ("8:16", None)}


@grid(_SYMBOLIC, each_value(_SYMBOLIC))
def test_one_symbolic_kernel_takes_every_number_of_tokens(isa: str, pattern: str | None) -> None:
    check_isa(isa)
    cpu = target(isa)
    spec = Problem(pattern, 20, 96, 1).spec(symbolic=True, out_dtype="int32")
    rule = dense if pattern is None else gather
    knobs = rule.default_knobs(spec, cpu, ISAS[isa])
    func = rule.kernel(spec, cpu, knobs, isa, name="kernel")
    library = tvm.compile(tvm.IRModule({"kernel": func}), target=cpu)
    layout = spec.format.activations(knobs.tokens, ISAS[isa].signed)
    for m in (1, 2, 3, 5, 7, 8, 9, 15, 16, 30):
        problem = Problem(pattern, 20, 96, m)
        x, scales = problem.activations
        packed = problem.packed
        arrays = (layout.arrange(x), scales, packed.stream, packed.scales, packed.compensation)
        out = tvm.runtime.tensor(np.zeros((m, 20), np.int32))
        library["kernel"](*(tvm.runtime.tensor(array) for array in arrays), out)
        assert np.array_equal(out.numpy(), problem.sums), m


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("pattern", ["4:16", None])
@pytest.mark.parametrize(("n", "m"), [(512, 40), (20, 1100)])
def test_threads_share_rows_and_tokens(pattern: str | None, n: int, m: int, symbolic: bool) -> None:
    isa = next(name for name in ISAS if runs_here(name))
    problem = Problem(pattern, n, 512, m)
    spec = problem.spec(symbolic, out_dtype="int32")
    cpu = target(isa, **{"num-cores": 3})
    rule = dense if pattern is None else gather
    knobs = rule.default_knobs(spec, cpu, ISAS[isa])
    assert (knobs.token_parts > 1) == (n == 20)
    kernel = rule.kernel(spec, cpu, knobs, isa)
    assert "T.parallel" in kernel.script()
    assert np.array_equal(run(problem, spec, isa, knobs, cpu=cpu), problem.sums)


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


_EPILOGUES = {"isa": list(ISAS), "activation": list(ACTIVATIONS), "pattern": ("4:16", None)}


@grid(_EPILOGUES, each_value(_EPILOGUES, times=2))
def test_epilogue(isa: str, activation: str, pattern: str | None) -> None:
    check_isa(isa)
    problem = Problem(pattern, 37, 128, 5)
    rng = np.random.default_rng(3)
    bias = rng.standard_normal(37).astype(np.float32)
    residual = rng.standard_normal((5, 37)).astype(np.float32)
    spec = problem.spec(epilogue=Epilogue(True, activation, True))
    out = run(problem, spec, isa, extra={"bias": bias, "residual": residual})
    scales = problem.packed.scales[:37].astype(np.float64)
    plain = problem.sums * scales * problem.activations[1][:, None].astype(np.float64)
    want = ACTIVATIONS[activation](plain + bias) + residual
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("pattern", ["4:16", None])
def test_nan_reaches_only_its_token(pattern: str | None) -> None:
    isa = next(name for name in ISAS if runs_here(name))
    problem = Problem(pattern, 32, 64, 3)
    values, scales = problem.activations
    scales[1] = np.nan
    out = run(problem, problem.spec(), isa)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    assert values.dtype == np.int8


@pytest.mark.parametrize(
    "knobs", [Knobs(8, (1,), (1,)), Knobs(8, (1, 1, 1, 2), (4, 2, 2, 1)), Knobs(1, (2,), (4,))]
)
def test_largest_sums(knobs: Knobs) -> None:
    """Every product as large as can be, along the most columns that a weight may have."""
    isa = next(name for name in ISAS if runs_here(name))
    k = int8.MOST_COLUMNS
    weight = np.full((2, k), 127, np.int8)
    weight[1] = -127
    packed = int8.pack_dense(weight, np.ones(2, np.float32))
    problem = Problem(None, 2, k, 1)
    x = np.full((1, k), 127, np.int8)
    problem.__dict__.update(packed=packed, activations=(x, np.ones(1, np.float32)))
    out = run(problem, problem.spec(out_dtype="int32"), isa, knobs)
    assert out.tolist() == [[127 * 127 * k, -127 * 127 * k]]


def test_fewer_tasks_than_threads() -> None:
    spec = MatmulSpec(64, 16, 64, BalancedPattern("4:16"))
    knobs = for_threads(Knobs(8, (1,), (1,)), spec, target("avx2", **{"num-cores": 4}))
    assert (knobs.threads, knobs.token_parts) == (4, 4)
    few = for_threads(Knobs(8, (1,), (1,)), MatmulSpec(1, 16, 64), target("plain"))
    assert few.token_parts == 1


def test_bad_input() -> None:
    cpu = target("avx2")
    sparse = MatmulSpec(1, 16, 64, BalancedPattern("4:16"))
    with pytest.raises(InputError, match="use the gather kernel"):
        dense.kernel(sparse, cpu)
    with pytest.raises(InputError, match="use the dense kernel"):
        gather.kernel(MatmulSpec(1, 16, 64), cpu)
    with pytest.raises(InputError, match="has not the instructions of avx512-vbmi"):
        gather.kernel(sparse, cpu, isa="avx512-vbmi")
    with pytest.raises(InputError, match="is not known"):
        choose(cpu, "sse9")
    with pytest.raises(InputError, match="activation"):
        Epilogue(activation="swish9")
    with pytest.raises(InputError, match="at least one"):
        MatmulSpec(0, 16, 64)
    with pytest.raises(InputError, match="out_dtype"):
        MatmulSpec(1, 16, 64, out_dtype="float64")
    with pytest.raises(InputError, match="no epilogue"):
        MatmulSpec(1, 16, 64, epilogue=Epilogue(bias=True), out_dtype="int32")


def test_every_instruction_set_has_a_cpu() -> None:
    assert set(CPUS) == set(ISAS)
    for name in ("avx512-vbmi", "avx512-vnni", "avx2", "neon-dotprod", "plain"):
        assert choose(target(name)).name == name
