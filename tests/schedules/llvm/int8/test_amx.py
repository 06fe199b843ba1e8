"""The AMX kernels: exact on emulated tiles, and real instructions in what is compiled for a CPU with AMX."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tvm

from tests.helpers.amx import EMULATED
from tests.helpers.covering import each_value, grid
from tests.helpers.int8 import Problem, runs_here
from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm.int8 import amx
from tvm_balanced.schedules.llvm.int8.matmul import Epilogue, Knobs, MatmulSpec
from tvm_balanced.targets.host import request_amx_permission

needs_expansion = pytest.mark.skipif(
    not runs_here("avx512-vbmi"), reason="this CPU has no AVX-512 VBMI"
)


def _results(
    problems: Sequence[Problem], target: tvm.target.Target, knobs: Knobs, symbolic: bool = False
) -> Iterator[Any]:
    """Integer sums of problems that differ in their tokens, by one kernel."""
    problem = problems[0]
    spec = problem.spec(symbolic, out_dtype="int32")
    func = amx.kernel(spec, target, knobs, "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": func}), target=target)
    values, scales = int8.quantize_weight(problem.weight)
    packed = (
        int8.pack_dense(values, scales)
        if spec.pattern is None
        else int8.pack_expand(values, scales, spec.pattern)
    )
    layout = packed.format.activations(knobs.tokens, False)
    for problem in problems:
        x, x_scales = problem.activations
        arrays = (layout.arrange(x), x_scales, packed.stream, packed.scales, packed.compensation)
        out = tvm.runtime.tensor(np.full((problem.m, problem.n), 77, np.int32))
        library["kernel"](*(tvm.runtime.tensor(array) for array in arrays), out)
        yield out.numpy()


_EACH = {"pattern": ("4:16", "3:7", "9:100", None), "symbolic": (True, False)}


@needs_expansion
@grid(_EACH, each_value(_EACH))
def test_sums_are_exact(
    emulated_amx: tvm.target.Target, pattern: str | None, symbolic: bool
) -> None:
    problems = [Problem(pattern, 53, 200, m) for m in ((1, 5, 16, 32, 55) if symbolic else (55,))]
    results = _results(problems, emulated_amx, Knobs(32, (2,), (1,), threads=2), symbolic)
    for problem, out in zip(problems, results, strict=True):
        assert np.array_equal(out, problem.sums), problem.m


@needs_expansion
@pytest.mark.parametrize(("tokens", "groups"), [(32, 1), (16, 2), (4, 1)])
@pytest.mark.parametrize("pattern", ["8:16", None])
def test_sums_are_exact_whatever_the_knobs(
    emulated_amx: tvm.target.Target, pattern: str | None, tokens: int, groups: int
) -> None:
    problem = Problem(pattern, 64, 100, 37)
    knobs = Knobs(tokens, (groups,), (1,), token_parts=2)
    (out,) = _results([problem], emulated_amx, knobs)
    assert np.array_equal(out, problem.sums)


def _sapphire_rapids() -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids"})


def test_instructions() -> None:
    target = _sapphire_rapids()
    kernels = {
        name: amx.kernel(MatmulSpec(32, 64, 256, pattern, Epilogue(bias=True)), target, name=name)
        for name, pattern in (
            ("dense", None),
            ("expand", BalancedPattern("4:16")),
            # several kernels of a module share the expansion
            ("again", BalancedPattern("8:16")),
        )
    }
    library = tvm.compile(tvm.IRModule(kernels), target=target)
    text = library.mod.inspect_source("s")
    for word in ("ldtilecfg", "tilezero", "tileloadd", "tdpbusd", "tilestored", "tilerelease"):
        assert re.search(rf"\b{word}\b", text), word
    assert text.count("vpexpandb") >= 2 * 2 * 16
    assert re.search(r"\bsyscall\b", text)


@pytest.mark.skipif(request_amx_permission(), reason="this machine has AMX")
def test_refusal_is_said() -> None:
    if not runs_here("avx512-vbmi"):
        pytest.skip("the code in front of the first tile instruction needs AVX-512")
    attributes = {**EMULATED, "mattr": ["+amx-tile", "+amx-int8"]}
    target = tvm.target.Target(attributes)
    with pytest.raises(RuntimeError, match="refuses AMX tiles"):
        next(_results([Problem(None, 16, 64, 1)], target, Knobs(32, (2,), (1,))))


def test_bad_input() -> None:
    spec = MatmulSpec(1, 16, 64)
    with pytest.raises(InputError, match="has no AMX"):
        amx.kernel(spec, tvm.target.Target(EMULATED))
    with pytest.raises(InputError, match="do not fit eight tile registers"):
        amx.kernel(spec, _sapphire_rapids(), Knobs(32, (3,), (1,)))
