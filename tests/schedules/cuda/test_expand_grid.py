"""The expand schedule at every pattern, number of rows and dtype it is for: right, and within its limits."""

from __future__ import annotations

from typing import Any

import pytest
import tvm

from tests.helpers.cuda_cases import (
    Case,
    arguments,
    check_close,
    fused_kernel,
    packed_format,
    target,
)
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.cuda import expand as cuda_expand
from tvm_balanced.schedules.cuda.expand_model import EXPAND
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile

PATTERNS = ("8:16", "4:16", "2:16", "1:16", "8:32", "4:32")
ROWS = (16, 17, 32, 64, 100, 128)
DTYPES = ("float16", "bfloat16")
# fills no tile of 32 outputs or 64; ends within a block, and within a window of every pattern
N, K = 70, 328

GRID = [Case((m,), N, K, p, d, d) for d in DTYPES for p in PATTERNS for m in ROWS]
# every pattern and number of rows once, dtypes in turns
DIAGONAL = [
    Case((m,), N, K, p, DTYPES[i % 2], DTYPES[i % 2])
    for i, (p, m) in enumerate(zip(PATTERNS, (64, 17, 128, 16, 100, 32), strict=True))
]


def _format(case: Case) -> PackedFormat:
    return packed_format(case, "u4" if case.pattern.endswith(":16") else "u8")


def _tile(case: Case) -> TensorCoreTile:
    """One of those that are compared, another one at another place of the grid."""
    (rows,) = case.shapes[0]
    tiles = EXPAND.candidates(_format(case), rows, 99 << 10)
    return tiles[GRID.index(case) % len(tiles)]


def _kernels(cases: list[Case]) -> dict[Case, cudaemu.TVMKernel]:
    """In one module, as a module takes about as long to compile as a kernel."""
    mod = {}
    for i, case in enumerate(cases):
        sch = cuda_expand.apply(fused_kernel(case, _format(case)), target(), _tile(case))
        assert sch is not None
        mod[f"cell_{i}"] = sch.mod["main"].with_attr("global_symbol", f"cell_{i}")
    first = cudaemu.from_tvm(tvm.IRModule(mod), target(), "cell_0")
    return {case: first.function(f"cell_{i}") for i, case in enumerate(cases)}


def _check(case: Case, kernel: cudaemu.TVMKernel) -> None:
    """Near float64, race-free; the stream is read once a tile of rows; banks are met by one lane."""
    fmt, tile = _format(case), _tile(case)
    args, expected = arguments(case, fmt, case.shapes[0])
    (report,) = kernel.inspect(*args)
    assert not report.issues, report.table()
    check_close(case, args[-1], expected)

    def of(*names: str) -> list[Any]:
        got = [a for a in report.accesses if any(f"{name}<" in a.source for name in names)]
        assert got, report.table()
        return got

    row_tiles = -(-case.shapes[0][0] // tile.rows)
    stream = 32 * sum(access.units for access in of("balanced_load"))
    assert stream <= 1.1 * row_tiles * fmt.nbytes(case.dtype)
    for access in of("balanced_zero", "balanced_scatter", "balanced_read", "balanced_clear"):
        assert access.shared and access.units <= 2 * access.requests
    for access in of("balanced_multiply"):
        assert access.shared and access.units == access.ideal


def test_diagonal() -> None:
    for case, kernel in _kernels(DIAGONAL).items():
        _check(case, kernel)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_grid(pattern: str, dtype: str) -> None:
    cases = [case for case in GRID if (case.pattern, case.dtype) == (pattern, dtype)]
    for case, kernel in _kernels(cases).items():
        _check(case, kernel)
