"""The CUDA text of two schedules, to read what a change does to it; the net holds hashes of all.

``pytest tests/golden --update-golden`` writes the files anew. One file serves all architectures, as the
text does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.cuda_cases import Case, chosen_tile, fused_kernel, packed_format, target
from tvm_balanced.build.pipeline import TIR_PIPELINE
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda.source import split_kernels
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.balanced_block import find
from tvm_balanced.schedules.cuda import fallback as cuda_fallback
from tvm_balanced.schedules.cuda import gather as cuda_gather

from .conftest import HERE

ARCHITECTURES = ("sm_80", "sm_90")

# short vectors and rows, so that what is unrolled stays short
KERNELS = {
    "gather_m1": (cuda_gather, Case((1,), 64, 512, "4:16"), "r32v8"),
    "gather_m1_float32": (
        cuda_gather,
        Case((1,), 64, 1024, "8:32", "float32", "float32", ("relu",)),
        "r32v4",
    ),
    "gather_m8": (cuda_gather, Case((8,), 4096, 256, "4:16", epilogue=("bias", "gelu")), "r32v2"),
    "gather_symbolic_m": (cuda_gather, Case(("m",), 50, 70, "4:16", epilogue=()), "r32v2"),
    "fallback": (cuda_fallback, Case((3,), 50, 70, "3:16", epilogue=("bias", "gelu")), "r1v1"),
}
STORED = ("gather_m1", "fallback")


def _text(rule: Any, case: Case, layout: str, arch: str) -> str:
    """CUDA of the case's kernel without what stands before every kernel."""
    preferred = packed_format(case)
    fmt = PackedFormat(
        case.n, case.k, BalancedPattern(case.pattern), Layout.parse(layout), preferred.encoding
    )
    func = fused_kernel(case, fmt)
    if rule is cuda_gather:
        # that of one GPU, as each has its own
        got = find(func)
        assert got is not None
        tile = chosen_tile(fmt, got.rows, case.dtype)
        sch = cuda_gather.apply(func, target(arch), tile)
    else:
        sch = rule.apply(func, target(arch))
    assert sch is not None
    source = cudaemu.from_tvm(sch.mod, target(arch), pipeline=TIR_PIPELINE).source
    (kernel,) = split_kernels(source).values()
    return kernel[kernel.index('extern "C" __global__') :]


@pytest.mark.parametrize("name", STORED)
def test_text_is_as_stored(name: str, check_golden: Callable[[str, str], None]) -> None:
    check_golden(f"cuda/{name}.cu", _text(*KERNELS[name], ARCHITECTURES[0]))


@pytest.mark.parametrize("name", KERNELS)
def test_text_does_not_depend_on_the_architecture(name: str) -> None:
    first, *others = (_text(*KERNELS[name], arch) for arch in ARCHITECTURES)
    assert all(other == first for other in others)


def test_files_are_few_and_small() -> None:
    files = list((HERE / "cuda").iterdir())
    assert {file.name for file in files} == {f"{name}.cu" for name in STORED}
    assert sum(file.stat().st_size for file in files) < 12 << 10
