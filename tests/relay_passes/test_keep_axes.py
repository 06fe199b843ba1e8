"""Products of flattened activations keep the activations' axes, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tvm_balanced.relay_passes.keep_axes import keep_axes
from tvm_balanced.relay_passes.weight_chain import call_name

_K, _N = 16, 24


def _run(mod: tvm.IRModule, arrays: list[Any]) -> Any:
    vm = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    return vm["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def _module(
    lead: list[int | str], body: Callable[[Any, list[Any]], Any], k: int = _K
) -> tvm.IRModule:
    """``main`` over activations ``(*lead, k)``, a weight, a bias and a residual ``(*lead, N)``."""
    axes = [tirx.Var(a, "int64") if isinstance(a, str) else a for a in lead]
    types = {"x": [*axes, k], "w": [_K, _N], "b": [_N], "r": [*axes, _N]}
    builder = relax.BlockBuilder()
    variables = [
        relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in types.items()
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            out = builder.emit_output(body(builder, variables))
        builder.emit_func_output(out)
    return builder.get()


def _operators(mod: tvm.IRModule) -> list[str | None]:
    return [call_name(b.value) for block in mod["main"].body.blocks for b in block.bindings]


def _layer(builder: Any, variables: list[Any]) -> Any:
    """What torch.export makes of ``gelu(linear(x)) + r`` with three axes."""
    x, w, b, r = variables
    *lead, _ = x.ty.shape.values
    rows = lead[0] * lead[1]
    flat = builder.emit(relax.op.reshape(x, [rows, _K]))
    product = builder.emit(relax.op.matmul(flat, w))
    biased = builder.emit(relax.op.add(b, product))
    back = builder.emit(relax.op.reshape(biased, [*lead, _N]))
    active = builder.emit(relax.op.nn.gelu(back))
    return relax.op.add(active, r)


@pytest.mark.parametrize("lead", [[2, 3], ["b", 3], ["b", "s"]])
def test_a_layer_loses_its_reshapes(lead: list[int | str]) -> None:
    mod = _module(lead, _layer)
    after = keep_axes(mod)
    assert _operators(after) == ["relax.matmul", "relax.add", "relax.nn.gelu", "relax.add"]
    assert keep_axes(after).script() == after.script()
    rng = np.random.default_rng(0)
    shapes = [(2, 3, _K), (_K, _N), (_N,), (2, 3, _N)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    np.testing.assert_allclose(_run(after, arrays), _run(mod, arrays), rtol=1e-5, atol=1e-6)


def test_a_result_with_other_axes_gets_them() -> None:
    def body(builder: Any, variables: list[Any]) -> Any:
        x, w, _, _ = variables
        flat = builder.emit(relax.op.reshape(x, [6, _K]))
        return builder.emit(relax.op.matmul(flat, w))

    mod = _module([2, 3], body)
    after = keep_axes(mod)
    assert [int(d) for d in after["main"].ret_ty.shape.values] == [6, _N]
    assert _operators(after) == ["relax.matmul", "relax.reshape"]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((2, 3, _K), (_K, _N), (_N,))]
    arrays.append(np.zeros((2, 3, _N), np.float32))
    np.testing.assert_allclose(_run(after, arrays), _run(mod, arrays), rtol=1e-5, atol=1e-6)


def test_what_mixes_the_last_axis_stays() -> None:
    def body(builder: Any, variables: list[Any]) -> Any:
        x, w, b, _ = variables
        flat = builder.emit(relax.op.reshape(x, [6, _K]))
        product = builder.emit(relax.op.matmul(flat, w))
        return builder.emit(relax.op.add(product, b))

    # (2, 3 x 4, 4) to (6, 16): rows of the product are parts of several of the activations'
    mod = _module([2, 12], body, k=4)
    assert _operators(keep_axes(mod)) == ["relax.reshape", "relax.matmul", "relax.add"]


def test_a_product_of_batches_stays() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 4, 5), "float32"))
    y = relax.Var("y", relax.TensorType((6, 5, 7), "float32"))
    with builder.function("main", [x, y]):
        with builder.dataflow():
            flat = builder.emit(relax.op.reshape(x, (6, 4, 5)))
            out = builder.emit_output(relax.op.matmul(flat, y))
        builder.emit_func_output(out)
    mod = builder.get()
    assert _operators(keep_axes(mod)) == ["relax.reshape", "relax.matmul"]


def test_an_operand_of_the_flat_shape_stays() -> None:
    def body(builder: Any, variables: list[Any]) -> Any:
        x, w, _, r = variables
        flat = builder.emit(relax.op.reshape(x, [6, _K]))
        product = builder.emit(relax.op.matmul(flat, w))
        other = builder.emit(relax.op.permute_dims(r, [1, 0, 2]))
        return builder.emit(relax.op.add(product, builder.emit(relax.op.reshape(other, [6, _N]))))

    mod = _module([2, 3], body)
    after = keep_axes(mod)
    rng = np.random.default_rng(0)
    shapes = [(2, 3, _K), (_K, _N), (_N,), (2, 3, _N)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    np.testing.assert_allclose(_run(after, arrays), _run(mod, arrays), rtol=1e-5, atol=1e-6)
