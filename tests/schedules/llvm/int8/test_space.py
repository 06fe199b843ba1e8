"""Knobs of the int8 kernels: every point is the same function, bit for bit."""

import random

import numpy as np
import pytest
import tvm

from tests.helpers.int8 import Problem
from tests.schedules.llvm.int8.test_rule import _module, _operands, _want
from tvm_balanced.build import pipeline
from tvm_balanced.schedules import dispatch, workload
from tvm_balanced.targets.resolve import resolve

KEPT = 4  # points of a kernel that are built


@pytest.mark.parametrize("pattern", ["4:16", "dense"])
@pytest.mark.parametrize("rows", [1, 13])
def test_points_give_the_same_numbers(pattern, rows):
    problem = Problem(None if pattern == "dense" else pattern, 72, 200, rows)
    cpu = resolve("llvm").target
    with cpu:
        fused = tvm.transform.Sequential(pipeline.fuse_passes())(
            _module(problem, (rows,), False, "float32")
        )
    (func,) = [f for _, f in fused.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    (space,) = dispatch.spaces(func, cpu)
    points = space.points()
    assert len(points) > KEPT
    x = np.random.default_rng(0).standard_normal((rows, problem.k)).astype(np.float32)
    expected = _want(problem, x)
    for point in random.Random(rows).sample(points, KEPT):
        kernel = workload.build_for(func, cpu, space.kernel, point)
        built = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), cpu)
        out = tvm.runtime.tensor(np.full(expected.shape, np.nan, np.float32))
        built["main"](*map(tvm.runtime.tensor, [x, *_operands(problem)]), out)
        np.testing.assert_array_equal(out.numpy(), expected, err_msg=str(point))
