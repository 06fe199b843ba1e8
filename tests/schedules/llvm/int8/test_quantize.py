"""Rounding activations on this CPU against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from tests.helpers.covering import grid
from tests.helpers.int8 import runs_here
from tvm_balanced.errors import InputError
from tvm_balanced.format import int8
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm.int8 import quantize
from tvm_balanced.schedules.llvm.int8.quantize import QuantizeSpec

CPUS = {"icelake-server": "avx512-vbmi", "haswell": "avx2", "x86-64": "plain"}


def _run(x: Any, layout: int8.ActivationLayout, mcpu: str, symbolic: bool) -> tuple[Any, Any]:
    cpu = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    func = quantize.kernel(QuantizeSpec("m" if symbolic else len(x), layout), cpu, "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": func}), target=cpu)
    out = tvm.runtime.tensor(np.full((len(x), layout.token_bytes), 5, layout.dtype))
    scales = tvm.runtime.tensor(np.full(len(x), 7, np.float32))
    library["kernel"](tvm.runtime.tensor(x), out, scales)
    return out.numpy(), scales.numpy()


def _tie(x: Any, layout: int8.ActivationLayout, scales: Any) -> Any:
    """Where a quotient lies so near the middle of two whole numbers that one rounding decides."""
    exact = x.astype(np.float64) / scales[:, None].astype(np.float64)
    near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    return np.abs(layout.arrange(near.astype(np.int8)).astype(int) - layout.arrange(0 * near)) > 0


@grid(
    {
        "mcpu": list(CPUS),
        "shape": [("4:16", 384), ("3:7", 300), ("9:100", 250), (None, 17)],
        "signed": [False, True],
        "symbolic": [False, True],
    }
)
def test_bytes_and_scales(
    mcpu: str, shape: tuple[str | None, int], signed: bool, symbolic: bool
) -> None:
    pattern, k = shape
    if not runs_here(CPUS[mcpu]):
        pytest.skip(f"this CPU does not run code for {mcpu}")
    fmt = (
        int8.DenseFormat(16, k)
        if pattern is None
        else int8.GatherFormat(16, k, BalancedPattern(pattern))
    )
    layout = fmt.activations(4, signed)
    rng = np.random.default_rng(k)
    x = rng.standard_normal((11, k)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-42
    x[3] *= 1e30
    x[4, k - 1] = 50
    x[5, 0] = -50
    out, scales = _run(x, layout, mcpu, symbolic)
    values, want_scales = int8.quantize_tokens(x)
    want = layout.arrange(values)
    assert np.array_equal(scales, want_scales)
    differs = out != want
    assert not (differs & ~_tie(x, layout, scales)).any()
    assert np.abs(out.astype(int) - want.astype(int)).max() <= 1


def test_not_finite_tokens_have_scale_nan() -> None:
    mcpu = next(mcpu for mcpu, isa in CPUS.items() if runs_here(isa))
    layout = int8.DenseFormat(16, 100).activations(8, False)
    x = np.ones((5, 100), np.float32)
    x[1, 3], x[2, 99], x[3, 50] = np.nan, np.inf, -np.inf
    out, scales = _run(x, layout, mcpu, False)
    assert np.isnan(scales[1:4]).all() and np.isfinite(scales[[0, 4]]).all()
    whole = layout.arrange(np.where(np.isfinite(x), x, 0).astype(np.int8) * 127)
    # the last tile holds one token, which is whole
    assert np.array_equal(out[4], whole[4])


def test_threads_share_tokens() -> None:
    mcpu = next(mcpu for mcpu, isa in CPUS.items() if runs_here(isa))
    layout = int8.DenseFormat(16, 2048).activations(8, False)
    x = np.random.default_rng(0).standard_normal((45, 2048)).astype(np.float32)
    cpu = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    assert "T.parallel" in quantize.kernel(QuantizeSpec(45, layout), cpu).script()
    out, scales = _run(x, layout, mcpu, True)
    values, want = int8.quantize_tokens(x)
    assert np.array_equal(scales, want)
    assert (out != layout.arrange(values)).mean() < 1e-4


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        QuantizeSpec(0, int8.DenseFormat(16, 64).activations(8, False))
