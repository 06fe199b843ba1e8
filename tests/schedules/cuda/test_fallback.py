"""What only the fallback takes: several results, a cast in the epilogue, work before the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from tests.helpers.cuda_cases import Case, arguments, packed_format, target
from tvm_balanced import ops
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.cuda import fallback as cuda_fallback
from tvm_balanced.schedules.cuda import target as cuda
from tvm_balanced.schedules.cuda.tensor_core_model import TensorCoreTile

_CASE = Case((3,), 50, 70, "4:16", "float32", "float32", ())


def _inputs(fmt: PackedFormat, dtype: str) -> list[Any]:
    return [
        te.placeholder((3, fmt.in_features), dtype, name="x"),
        te.placeholder(fmt.values_shape, dtype, name="values"),
        te.placeholder(fmt.indices_shape, "uint8", name="indices"),
    ]


def _first_rule(func: tirx.PrimFunc) -> tuple[Any, Any]:
    """The rule that takes ``func`` in the order of the target, and its schedule."""
    for rule in cuda.BALANCED_RULES:
        sch = rule.apply(func, target())
        if sch is not None:
            return rule, sch
    raise AssertionError("no rule takes the kernel")


def _check(sch: Any, args: list[Any], expected: list[Any]) -> None:
    kernel = cudaemu.from_tvm(sch.mod, target())
    for report in kernel.inspect(*args):
        assert not report.issues, report.table()
    for got, want in zip(args[-len(expected) :], expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_several_results() -> None:
    """The sum is a result beside what its epilogue makes of it."""
    fmt = packed_format(_CASE)
    x, values, indices = _inputs(fmt, "float32")
    total = ops.balanced_sparse_dense_te(x, values, indices, fmt, "float32")
    positive = te.compute(total.shape, lambda *at: tirx.max(total(*at), 0.0), name="positive")
    double = te.compute(total.shape, lambda *at: positive(*at) * 2.0, name="double")
    rule, sch = _first_rule(
        te.create_prim_func([x, values, indices, total, double], index_dtype_override="int64")
    )
    assert rule is cuda_fallback
    args, expected = arguments(_CASE, fmt, (3,))
    _check(sch, [*args, np.full_like(args[-1], np.nan)], [expected, 2 * np.maximum(expected, 0)])


def test_work_before_the_operator() -> None:
    fmt = packed_format(_CASE)
    x, values, indices = _inputs(fmt, "float32")
    negative = te.compute(x.shape, lambda *at: -x(*at), name="negative")
    total = ops.balanced_sparse_dense_te(negative, values, indices, fmt, "float32")
    _, sch = _first_rule(
        te.create_prim_func([x, values, indices, total], index_dtype_override="int64")
    )
    args, expected = arguments(_CASE, fmt, (3,))
    _check(sch, args, [-expected])


# by_rows takes only symbolic batches, and puts kernels of these rules together
_STATIC_RULES = [rule for rule in cuda.BALANCED_RULES if rule is not cuda.by_rows]


@pytest.mark.parametrize("rule", _STATIC_RULES, ids=lambda rule: rule.__name__.split("_")[-1])
def test_cast_after_the_operator(rule: Any) -> None:
    """A float16 layer whose fused epilogue ends in float32."""
    case = Case((3,), 50, 70, "2:4" if rule is cuda.sparse_mma else "4:16", epilogue=())
    fmt = packed_format(case)
    x, values, indices = _inputs(fmt, "float16")
    total = ops.balanced_sparse_dense_te(x, values, indices, fmt, "float16")
    wide = te.compute(total.shape, lambda *at: total(*at).astype("float32"), name="wide")
    func = te.create_prim_func([x, values, indices, wide], index_dtype_override="int64")
    # of so few rows the kernels for tensor cores take only what they are told to
    tensor = rule in (cuda.expand, cuda.sparse_mma)
    tile = [TensorCoreTile(8, 1, 2, 2)] if tensor else []
    sch = rule.apply(func, target(), *tile)
    assert sch is not None
    args, expected = arguments(case, fmt, (3,))
    args[-1] = np.full((3, 50), np.nan, "f4")
    cudaemu.from_tvm(sch.mod, target())(*args)
    np.testing.assert_allclose(args[-1], expected, atol=2e-3 * np.abs(expected).max())


def test_other_kernels_are_left_alone() -> None:
    x = te.placeholder((4, 4), "float32", name="x")
    y = te.compute((4, 4), lambda i, j: x[i, j] + 1.0, name="y")
    func = te.create_prim_func([x, y], index_dtype_override="int64")
    assert all(rule.apply(func, target()) is None for rule in cuda.BALANCED_RULES)
