"""Relax modules: constants become weights, weights go behind the inputs."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_balanced.errors import InputError
from tvm_balanced.frontend import from_relax

RNG = np.random.default_rng(0)
FIRST = RNG.standard_normal((4, 8)).astype(np.float32)
SECOND = RNG.standard_normal((4, 4)).astype(np.float32)


def module():
    """``2 * ((x @ w.T) @ SECOND) @ SECOND``, with the weight before the input."""
    w = relax.Var("w", relax.TensorType((4, 8), "float32"))
    x = relax.Var("x", relax.TensorType((2, 8), "float32"))
    second = relax.const(SECOND)
    builder = relax.BlockBuilder()
    with builder.function("main", [w, x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.op.permute_dims(w)), "y")
            y = builder.emit(relax.op.matmul(y, second), "z")
            y = builder.emit(relax.op.matmul(y, second))
            y = builder.emit_output(relax.op.multiply(y, relax.const(2.0, "float32")))
        builder.emit_func_output(y)
    return builder.get()


def test_weights_go_behind_and_constants_are_lifted():
    mod = module()
    before = mod.script()
    model = from_relax(mod, {"w": FIRST}, "net")
    assert mod.script() == before
    assert [p.name for p in model.mod["main"].params] == ["x", "w", "z.constant"]
    assert int(model.mod["main"].attrs["num_input"]) == 1
    assert list(model.params) == ["w", "z.constant"]
    assert [len(layer.uses) for layer in model.dense_layers()] == [1, 2]
    relax.analysis.well_formed(model.mod)

    x = RNG.standard_normal((2, 8)).astype(np.float32)
    machine = relax.VirtualMachine(tvm.compile(model.mod, tvm.target.Target("llvm")), tvm.cpu())
    got = machine["main"](*map(tvm.runtime.tensor, [x, *model.params.values()])).numpy()
    want = 2 * (x.astype(np.float64) @ FIRST.T) @ SECOND @ SECOND
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_importing_again_changes_nothing():
    once = from_relax(module(), {"w": FIRST})
    twice = from_relax(once.mod, once.params)
    tvm.ir.assert_structural_equal(once.mod, twice.mod)
    assert list(once.params) == list(twice.params)


def test_values_are_copied():
    given = FIRST.copy()
    model = from_relax(module(), {"w": tvm.runtime.tensor(given)})
    copy = from_relax(module(), {"w": given})
    given[:] = 0
    assert np.array_equal(model.params["w"], FIRST) and np.array_equal(copy.params["w"], FIRST)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": FIRST}, "params names v, but the parameters of main are w, x"),
        ({"w": FIRST.T}, r"the value of w is float32 of shape \(8, 4\)"),
        ({"w": FIRST.astype(np.float64)}, "the value of w is float64"),
    ],
    ids=["name", "shape", "dtype"],
)
def test_wrong_params(params, message):
    with pytest.raises(InputError, match=message):
        from_relax(module(), params)


def test_no_main():
    with pytest.raises(InputError, match="no Relax function main, only nothing"):
        from_relax(tvm.IRModule())
    with pytest.raises(InputError, match="cannot import a str"):
        from_relax("module")
