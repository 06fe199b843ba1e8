"""Half precision sums are accumulated in float32; nothing else changes."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32


def module(build, dtype, *shapes):
    params = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(build(*params))
        builder.emit_func_output(out)
    return builder.get()


CASES = {
    "matmul": (relax.op.matmul, (2, 300), (300, 4)),
    "conv2d": (lambda x, w: relax.op.nn.conv2d(x, w, padding=1), (1, 40, 6, 6), (3, 40, 3, 3)),
    "softmax": (lambda x: relax.op.nn.softmax(x), (3, 5000)),
    "layer_norm": (
        lambda x, g, b: relax.op.nn.layer_norm(x, g, b, -1),
        (3, 500),
        (500,),
        (500,),
    ),
    "mean": (lambda x: relax.op.mean(x, -1), (3, 5000)),
    "cumsum": (lambda x: relax.op.cumsum(x, -1), (3, 500)),
}


def run(mod, arrays):
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target("llvm")), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


@pytest.mark.parametrize("case", CASES)
def test_as_good_as_float32_rounded_once(case):
    build, *shapes = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape).astype(np.float16) for shape in shapes]
    mod = module(build, "float16", *shapes)
    after = accumulate_float32(mod)
    tvm.ir.assert_structural_equal(after["main"].ret_ty, mod["main"].ret_ty)
    want = run(module(build, "float32", *shapes), [a.astype(np.float32) for a in arrays])
    got = run(after, arrays)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_the_plain_operator_is_worse():
    # what the pass is for: a row of 5000 equal values sums to a float16 that stopped growing
    x = [np.ones((1, 5000), np.float16)]
    mod = module(lambda x: relax.op.nn.softmax(x), "float16", (1, 5000))
    assert abs(run(accumulate_float32(mod), x).astype(np.float64).sum() - 1) < 1e-2
    assert abs(run(mod, x).astype(np.float64).sum() - 1) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_running_it_twice_changes_nothing(case):
    build, *shapes = CASES[case]
    once = accumulate_float32(module(build, "bfloat16", *shapes))
    tvm.ir.assert_structural_equal(accumulate_float32(once), once)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_left_alone(case):
    build, *shapes = CASES[case]
    mod = module(build, "float32", *shapes)
    tvm.ir.assert_structural_equal(accumulate_float32(mod), mod)


def test_element_wise_operators_are_left_alone():
    mod = module(lambda x: relax.op.exp(x), "float16", (3, 4))
    tvm.ir.assert_structural_equal(accumulate_float32(mod), mod)
