"""Which matrix products become calls of cuBLAS, and with which arguments."""

import pytest
import tvm
from tvm import relax, tirx

from tvm_balanced.build.pipeline import fuse_passes
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32
from tvm_balanced.relay_passes.dense_cublas import FUNCTION, cublas_calls, dense_cublas
from tvm_balanced.relay_passes.find_dense import main_bindings
from tvm_balanced.relay_passes.weight_chain import call_name

ROWS = tirx.Var("rows", "int64")


def product(a, b, dtype="float16", axes=(None, None), out_dtype=None):
    """``main`` over two operands, each behind a transpose where axes are given."""
    params = [
        relax.Var(name, relax.TensorType(shape, dtype)) for name, shape in (("a", a), ("b", b))
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            operands = [
                param if order is None else builder.emit(relax.op.permute_dims(param, order))
                for param, order in zip(params, axes, strict=True)
            ]
            out = builder.emit_output(relax.op.matmul(*operands, out_dtype=out_dtype or dtype))
        builder.emit_func_output(out)
    return builder.get()


def names(mod):
    return [call_name(value) for _, value in main_bindings(mod["main"])]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("a", "b", "axes", "flags"),
    [
        ((3, 8), (8, 5), (None, None), (0, 0)),
        ((3, 8), (5, 8), (None, (1, 0)), (0, 1)),
        ((8, 3), (5, 8), ((1, 0), (-1, -2)), (1, 1)),
        ((2, 4, 3, 8), (2, 4, 5, 8), (None, (0, 1, 3, 2)), (0, 1)),
        ((2, 3, 8), (8, 5), (None, None), (0, 0)),
        ((2, 3, 8), (1, 8, 5), (None, None), (0, 0)),
        ((ROWS, 8), (5, 8), (None, (1, 0)), (0, 1)),
        ((ROWS, 4, 3, ROWS), (ROWS, 4, ROWS, 8), (None, None), (0, 0)),
    ],
    ids=[
        "plain",
        "weight_transposed",
        "both_transposed",
        "attention",
        "one_weight",
        "one_weight_of_rank_3",
        "symbolic_rows",
        "symbolic_attention",
    ],
)
def test_products_become_calls(a, b, axes, flags, dtype):
    mod = product(a, b, dtype, axes)
    after = dense_cublas(mod)
    assert names(after) == ["relax.call_dps_packed"], "the transposes are gone"
    ((_, call),) = main_bindings(after["main"])
    assert call.args[0].global_symbol == FUNCTION
    operands, given = call.args[1].fields[:2], call.args[1].fields[2:]
    assert [operand.name for operand in operands] == ["a", "b"]
    assert tuple(int(flag) for flag in given) == flags
    tvm.ir.assert_structural_equal(after["main"].ret_ty, mod["main"].ret_ty, map_free_vars=True)
    (described,) = cublas_calls(after)
    assert (described["function"], described["name"]) == ("main", "b")
    left, right = ([*shape] for shape in (a, b))
    for shape, flag in zip((left, right), flags, strict=True):
        shape[-2:] = shape[-2:][:: -1 if flag else 1]
    texts = [f"({', '.join(str(extent) for extent in shape)})" for shape in (left, right)]
    assert described["product"] == f"{dtype} {texts[0]} x {texts[1]}"
    assert not cublas_calls(mod)
    tvm.ir.assert_structural_equal(dense_cublas(after), after)


ACTIVATIONS = {
    "relu": relax.op.nn.relu,
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
    "silu": relax.op.nn.silu,
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_that_follows_a_product_is_one_kernel(activation, dtype):
    """Bias, activation and residual, behind reshapes as torch.export leaves them."""
    shapes = {"x": (6, 8), "w": (5, 8), "bias": (5,), "residual": (2, 3, 5)}
    params = {name: relax.Var(name, relax.TensorType(s, dtype)) for name, s in shapes.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", list(params.values())):
        with builder.dataflow():
            turned = builder.emit(relax.op.permute_dims(params["w"], (1, 0)))
            out = builder.emit(relax.op.matmul(params["x"], turned))
            out = builder.emit(relax.op.add(out, params["bias"]))
            out = builder.emit(relax.op.reshape(out, (2, 3, 5)))
            out = builder.emit(ACTIVATIONS[activation](out))
            out = builder.emit_output(relax.op.add(out, params["residual"]))
        builder.emit_func_output(out)
    mod = accumulate_float32(dense_cublas(builder.get()))
    with tvm.target.Target({"kind": "cuda", "arch": "sm_90"}):
        mod = tvm.transform.Sequential(fuse_passes())(mod)
    assert names(mod) == ["relax.call_dps_packed", "relax.call_tir"]


@pytest.mark.parametrize(
    "mod",
    [
        product((3, 8), (8, 5), "int8", out_dtype="int32"),
        product((3, 8), (8, 5), "float64"),
        product((3, 8), (8, 5), "float32", out_dtype="float16"),
        product((8,), (8, 5)),
        product((2, 1, 3, 8), (1, 4, 8, 5)),
        product((ROWS, 3, 8), (2, 8, 5)),
    ],
    ids=["int8", "float64", "narrower", "vector", "crossed_batches", "unknown_batches"],
)
def test_what_cublas_does_not_take_stays(mod):
    tvm.ir.assert_structural_equal(dense_cublas(mod), mod)


def test_float32_results_of_half_operands():
    after = dense_cublas(product((3, 8), (8, 5), "bfloat16", out_dtype="float32"))
    assert names(after) == ["relax.call_dps_packed"]
    assert str(after["main"].ret_ty.dtype) == "float32"


def test_a_transpose_that_others_read_too_stays_for_them():
    w = relax.Var("w", relax.TensorType((8, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [w]):
        with builder.dataflow():
            turned = builder.emit(relax.op.permute_dims(w, (1, 0)))
            out = builder.emit(relax.op.matmul(w, turned))
            out = builder.emit_output(relax.op.add(out, turned))
        builder.emit_func_output(out)
    after = dense_cublas(builder.get())
    assert names(after) == ["relax.permute_dims", "relax.call_dps_packed", "relax.add"]


def test_other_permutations_are_read_as_they_are():
    after = dense_cublas(product((4, 3, 2), (4, 2, 5), axes=((0, 1, 2), None)))
    ((_, permuted), (_, call)) = main_bindings(after["main"])
    assert call_name(permuted) == "relax.permute_dims"
    assert [int(flag) for flag in call.args[1].fields[2:]] == [0, 0]
