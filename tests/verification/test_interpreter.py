"""The float64 reference of kernels: every construct, every kernel of the zoo, and planted mistakes."""

import math

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import te, tirx, topi
from tvm.script import tirx as T

import tvm_balanced as tb
from tests.helpers.kernels import fused_kernels, run_plain
from tests.helpers.zoo import ZOO
from tvm_balanced import ops
from tvm_balanced.format import layout, reference
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.packing import BalancedTensor, unpack
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.format.weights import is_balanced
from tvm_balanced.targets.resolve import resolve
from tvm_balanced.verification import interpreter as kernel_reference
from tvm_balanced.verification.arguments import seeded_arguments
from tvm_balanced.verification.interpreter import evaluate
from tvm_balanced.verification.tensorir import KernelReferenceError, output_positions
from tvm_balanced.verification.tolerance import Deviation, difference, tolerance


def kernel(*tensors):
    return te.create_prim_func(list(tensors))


def value_of(func, *inputs):
    """The reference of a kernel's only output, which is its last parameter."""
    out = func.params[-1]
    symbols = {}
    for param, array in zip(func.params, inputs, strict=False):
        symbols.update(
            {
                e: n
                for e, n in zip(param.ty.shape, array.shape, strict=True)
                if isinstance(e, tirx.Var)
            }
        )
    shape = [symbols[e] if e in symbols else int(e) for e in out.ty.shape]
    empty = np.zeros(shape, layout.numpy_dtype(str(out.ty.dtype)))
    (value,) = evaluate(func, [*inputs, empty]).values()
    return value


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(layout.numpy_dtype(dtype))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


# constructs


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(function, expected, id=name)
        for name, function, expected in (
            ("exp", tirx.exp, np.exp),
            ("exp2", tirx.exp2, np.exp2),
            ("erf", tirx.erf, np.vectorize(math.erf)),
            ("tanh", tirx.tanh, np.tanh),
            ("sigmoid", tirx.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
            ("sqrt", lambda x: tirx.sqrt(x * x), np.abs),
            ("rsqrt", lambda x: tirx.rsqrt(x * x), lambda x: 1 / np.abs(x)),
            ("log", lambda x: tirx.log(x * x), lambda x: np.log(x * x)),
            ("pow", lambda x: tirx.pow(x, tirx.const(3.0, "float32")), lambda x: x**3),
            ("sin", tirx.sin, np.sin),
            ("cos", tirx.cos, np.cos),
            ("floor", tirx.floor, np.floor),
            ("ceil", tirx.ceil, np.ceil),
            ("trunc", tirx.trunc, np.trunc),
            ("round to even", lambda x: tirx.round(x * 0 + 2.5), lambda x: x * 0 + 2),
            ("abs", tirx.abs, np.abs),
            ("negation", lambda x: -x, np.negative),
            (
                "max",
                lambda x: tirx.max(x, tirx.const(0.5, "float32")),
                lambda x: np.maximum(x, 0.5),
            ),
            (
                "min",
                lambda x: tirx.min(x, tirx.const(0.5, "float32")),
                lambda x: np.minimum(x, 0.5),
            ),
            ("division", lambda x: x / (x + 8), lambda x: x / (x + 8)),
            ("extern", lambda x: tirx.call_pure_extern("float32", "expf", x), np.exp),
            (
                "select",
                lambda x: tirx.Select(x > 0, x, x * 2),
                lambda x: np.where(x > 0, x, x * 2),
            ),
            (
                "let",
                lambda x: (lambda v: tirx.Let(v, x + 1, v * v))(tirx.Var("v", "float32")),
                lambda x: (x + 1) ** 2,
            ),
        )
    ],
)
def test_elementwise(function, expected):
    x = te.placeholder((3, 5), "float32", name="x")
    y = te.compute((3, 5), lambda i, j: function(x[i, j]), name="y")
    given = normal(3, 5)
    close(value_of(kernel(x, y), given), expected(given.astype("f8")))


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (topi.sum, np.sum),
        (topi.max, np.max),
        (topi.min, np.min),
        (topi.prod, np.prod),
        (topi.argmax, np.argmax),
        (topi.argmin, np.argmin),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reduction(reduce, expected, axis):
    x = te.placeholder((4, 3, 5), "float32", name="x")
    given = normal(4, 3, 5)
    close(value_of(kernel(x, reduce(x, axis)), given), expected(given.astype("f8"), axis))


def test_result_without_axes():
    x = te.placeholder((4, 30), "float32", name="x")
    total = topi.sum(x)
    func = kernel(x, te.compute((), lambda: total() * tirx.const(0.5, "float32")))
    given = normal(4, 30)
    value = value_of(func, given)
    assert value.shape == ()
    close(value, given.astype("f8").sum() / 2)


@pytest.mark.parametrize(("reduce", "expected"), [(topi.all, np.all), (topi.any, np.any)])
def test_boolean_reduction(reduce, expected):
    x = te.placeholder((6, 3), "bool", name="x")
    given = normal(6, 3) > 0
    np.testing.assert_array_equal(value_of(kernel(x, reduce(x, 1)), given), expected(given, 1))


def test_blocks_feed_each_other():
    x = te.placeholder((3, 4, 6), "float32", name="x")
    given = normal(3, 4, 6)
    e = np.exp(given.astype("f8"))
    close(value_of(kernel(x, topi.nn.softmax(x)), given), e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize("rows", [2, 40], ids=["products", "matrix product"])
def test_batched_matmul(rows):
    a = te.placeholder((3, rows, 50), "float16", name="a")
    b = te.placeholder((3, 30, 50), "float16", name="b")
    k = te.reduce_axis((0, 50), "k")
    c = te.compute(
        (3, rows, 30),
        lambda n, i, j: te.sum(a[n, i, k].astype("float32") * b[n, j, k].astype("float32"), axis=k),
    )
    x, y = normal(3, rows, 50, dtype="float16"), normal(3, 30, 50, dtype="float16", seed=1)
    close(value_of(kernel(a, b, c), x, y), x.astype("f8") @ y.astype("f8").transpose(0, 2, 1))


def test_sum_over_axes_that_a_factor_lacks():
    a = te.placeholder((20,), "float32", name="a")
    b = te.placeholder((30, 7), "float32", name="b")
    k, m = te.reduce_axis((0, 7), "k"), te.reduce_axis((0, 4), "m")
    c = te.compute((20, 30), lambda i, j: te.sum(a[i] * b[j, k], axis=[k, m]))
    x, y = normal(20), normal(30, 7, seed=1)
    close(value_of(kernel(a, b, c), x, y), 4 * np.outer(x.astype("f8"), y.astype("f8").sum(1)))


def test_convolution_with_padding():
    x = te.placeholder((2, 3, 6, 5), "float32", name="x")
    w = te.placeholder((4, 3, 3, 3), "float32", name="w")
    func = kernel(x, w, topi.nn.conv2d_nchw(x, w, 1, 1, 1))
    a, b = normal(2, 3, 6, 5), normal(4, 3, 3, 3, seed=1)
    padded = np.pad(a.astype("f8"), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    close(value_of(func, a, b), np.einsum("nchwyx,fcyx->nfhw", windows, b.astype("f8")))


def test_strided_and_reversed_reads():
    x = te.placeholder((9, 4), "float32", name="x")
    y = te.compute((4, 4), lambda i, j: x[2 * i + 1, 3 - j])
    given = normal(9, 4)
    close(value_of(kernel(x, y), given), given[1:9:2, ::-1])


def test_reads_through_an_index():
    x = te.placeholder((9, 4), "float32", name="x")
    at = te.placeholder((5,), "int64", name="at")
    y = te.compute((5, 4), lambda i, j: x[at[i], j])
    given, where = normal(9, 4), np.array([8, 0, 3, 3, 1])
    close(value_of(kernel(x, at, y), given, where), given[where])


def test_running_sum_keeps_its_order():
    x = te.placeholder((3, 7), "float32", name="x")
    given = normal(3, 7)
    close(value_of(kernel(x, topi.cumsum(x, 1)), given), given.astype("f8").cumsum(1))


def test_block_that_reads_its_neighbour_keeps_its_order():
    @T.prim_func(s_tir=True)
    def scan(x: T.Buffer((6,), "float32"), y: T.Buffer((6,), "float32")):
        for i in range(6):
            with T.sblock("scan"):
                v = T.axis.opaque(6, i)
                y[v] = T.if_then_else(v > 0, y[v - 1] * T.float32(0.5), T.float32(0)) + x[v]

    given = normal(6)
    expected = given.astype("f8")
    for i in range(1, 6):
        expected[i] += expected[i - 1] / 2
    close(value_of(scan, given), expected)


def test_predicate_of_a_block():
    @T.prim_func(s_tir=True)
    def part(x: T.Buffer((10,), "float32"), y: T.Buffer((10,), "float32")):
        for i, j in T.grid(3, 4):
            with T.sblock("part"):
                v = T.axis.spatial(10, i * 4 + j)
                T.where(i * 4 + j < 10)
                y[v] = x[v] * T.float32(2)

    given = normal(10)
    close(value_of(part, given), 2 * given.astype("f8"))


def test_conditional_statement():
    @T.prim_func(s_tir=True)
    def branch(x: T.Buffer((8,), "float32"), y: T.Buffer((8,), "float32")):
        for i in range(8):
            with T.sblock("branch"):
                v = T.axis.spatial(8, i)
                if x[v] > T.float32(0):
                    y[v] = x[v]
                else:
                    y[v] = T.float32(-1)

    given = normal(8)
    close(value_of(branch, given), np.where(given > 0, given, -1))


def test_chunks_give_the_whole(monkeypatch):
    x = te.placeholder((5, 12, 7), "float32", name="x")
    w = te.placeholder((9, 7), "float32", name="w")
    k = te.reduce_axis((0, 7), "k")
    y = te.compute((5, 12, 9), lambda b, i, j: te.sum(x[b, i, k] * w[j, k], axis=k))
    func = kernel(x, w, te.compute(y.shape, lambda *at: tirx.max(y(*at), tirx.const(0.0))))
    given = [normal(5, 12, 7), normal(9, 7, seed=1)]
    whole = value_of(func, *given)
    monkeypatch.setattr(kernel_reference, "_CHUNK_ELEMENTS", 20)
    close(value_of(func, *given), whole)


# dtypes


def test_narrow_floats_are_not_rounded():
    x = te.placeholder((4,), "float32", name="x")
    y = te.compute((4,), lambda i: x[i].astype("float16").astype("float32") * 3)
    given = normal(4)
    close(value_of(kernel(x, y), given), 3 * given.astype("f8"))


def test_float_to_integer_truncates():
    x = te.placeholder((4,), "float32", name="x")
    y = te.compute((4,), lambda i: x[i].astype("int32"))
    value = value_of(kernel(x, y), np.array([1.9, -1.9, 0.5, -0.5], "f4"))
    assert value.dtype == np.int32
    assert value.tolist() == [1, -1, 0, 0]


def test_integers_wrap_around():
    x = te.placeholder((3,), "uint8", name="x")
    y = te.compute((3,), lambda i: (x[i] << tirx.const(4, "uint8")) + tirx.const(250, "uint8"))
    value = value_of(kernel(x, y), np.array([1, 17, 255], "u1"))
    assert value.tolist() == [(v << 4) + 250 & 255 for v in (1, 17, 255)]


@pytest.mark.parametrize(
    ("divide", "expected"),
    [
        (tirx.truncdiv, [-3, 3, -3, 3]),
        (tirx.truncmod, [-1, 1, 1, -1]),
        (tirx.floordiv, [-4, 3, -4, 3]),
        (tirx.floormod, [1, 1, -1, -1]),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_integer_division(divide, expected):
    x, y = (te.placeholder((4,), "int32", name=name) for name in "xy")
    z = te.compute((4,), lambda i: divide(x[i], y[i]))
    given = np.array([-7, 7, 7, -7], "i4"), np.array([2, 2, -2, -2], "i4")
    assert value_of(kernel(x, y, z), *given).tolist() == expected


def test_symbolic_extents_follow_from_the_arrays():
    n = tirx.Var("n", "int64")
    x = te.placeholder((n * 4, n), "float32", name="x")
    y = te.compute((n,), lambda i: x[n * 4 - 1, i] + n.astype("float32"))
    given = normal(12, 3)
    close(value_of(kernel(x, y), given), given[11].astype("f8") + 3)


# what is refused


def test_guarded_read_may_be_out_of_range_and_an_unguarded_one_not():
    x = te.placeholder((4,), "float32", name="x")

    def shifted(at):
        return kernel(x, te.compute((4,), at))

    given = normal(4)
    guarded = shifted(lambda i: tirx.if_then_else(i > 0, x[i - 1], tirx.const(9.0, "float32")))
    close(value_of(guarded, given), [9, *given[:3]])
    with pytest.raises(KernelReferenceError, match=r"x is accessed out of range: .* reaches -1"):
        value_of(shifted(lambda i: x[i - 1]), given)


def test_unknown_function_is_named():
    x = te.placeholder((4,), "float32", name="x")
    y = te.compute((4,), lambda i: tirx.call_pure_extern("float32", "my_function", x[i]))
    with pytest.raises(KernelReferenceError, match="no call_pure_extern of my_function"):
        value_of(kernel(x, y), normal(4))


def test_scheduled_kernel_is_refused():
    x = te.placeholder((4,), "float32", name="x")
    sch = tvm.s_tir.Schedule(kernel(x, te.compute((4,), lambda i: x[i] + 1, name="y")))
    (loop,) = sch.get_loops(sch.get_sblock("y"))
    sch.bind(loop, "threadIdx.x")
    with pytest.raises(KernelReferenceError, match="bound to a thread"):
        value_of(sch.mod["main"], normal(4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (normal(5), "an extent of 5, expected 4"),
        (normal(4, 1), "2 axes, expected 1"),
        (normal(4, dtype="float16"), "float16, expected an array of float32"),
        (3, "int, expected an array of float32"),
    ],
    ids=["extent", "rank", "dtype", "scalar"],
)
def test_argument_that_does_not_fit(array, message):
    x = te.placeholder((4,), "float32", name="x")
    func = kernel(x, te.compute((4,), lambda i: x[i] + 1))
    with pytest.raises(KernelReferenceError, match=message):
        evaluate(func, [array, normal(4)])


# the operator


def balanced(dtype="float32", k=96, n=40, encoding="u4", relu=True):
    fmt = PackedFormat(n, k, BalancedPattern("4:16"), Layout(32, 8), encoding)
    x = te.placeholder((3, k), dtype, name="x")
    values = te.placeholder(fmt.values_shape, dtype, name="values")
    indices = te.placeholder(fmt.indices_shape, "uint8", name="indices")
    y = ops.balanced_sparse_dense_te(x, values, indices, fmt, dtype)
    out = topi.nn.relu(y) if relu else y
    return kernel(x, values, indices, out), fmt


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [96, 50])
@pytest.mark.parametrize("encoding", ["u4", "u8"])
def test_operator_is_its_definition(dtype, k, encoding):
    func, fmt = balanced(dtype, k, encoding=encoding)
    given = seeded_arguments(func, 0, {})
    x, values, indices, _ = given.arrays
    weight = BalancedTensor(values, indices, fmt)
    assert is_balanced(unpack(weight), fmt.pattern)
    value = evaluate(func, given.arrays)[3]
    close(value, np.maximum(reference.balanced_sparse_dense(x, weight), 0))
    assert difference(run_plain(func, given.arrays)[3], value).within(tolerance(func, {})[3])


def test_wrong_tensorir_of_the_operator_is_found():
    func, _ = balanced()
    given = seeded_arguments(func, 0, {})
    # the halves of an index byte change places
    four = tirx.const(4, "uint8")
    body = tvm_ffi.structural_map(
        func.body, (tvm.ir.prim.expr.RShift, lambda shift: shift.a >> (four - shift.b))
    )
    wrong = tirx.PrimFunc(func.params, body, func.ret_type).with_attrs(dict(func.attrs))
    assert not tvm_ffi.structural_equal(wrong, func)
    expected = evaluate(wrong, given.arrays)[3]
    np.testing.assert_array_equal(expected, evaluate(func, given.arrays)[3])
    got = run_plain(wrong, given.arrays)[3]
    assert not difference(got, expected).within(tolerance(wrong, {})[3])


# planted mistakes


def dense(dtype, terms, off_by_one=0, activation=tirx.tanh):
    """``activation(x @ w.T + bias)`` over some of the 2048 terms, in a dtype, summed in float32."""
    x = te.placeholder((4, 2048), dtype, name="x")
    w = te.placeholder((32, 2049), dtype, name="w")
    bias = te.placeholder((33,), dtype, name="bias")
    k = te.reduce_axis((0, terms), "k")
    y = te.compute(
        (4, 32),
        lambda i, j: te.sum(x[i, k].astype("float32") * w[j, k].astype("float32"), axis=k),
    )
    z = te.compute((4, 32), lambda i, j: y[i, j].astype(dtype) + bias[j + off_by_one])
    return kernel(x, w, bias, te.compute((4, 32), lambda i, j: activation(z[i, j]).astype(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("mistake", "wrong"),
    [
        ("none", {}),
        ("dropped term", {"terms": 2047}),
        ("index off by one", {"off_by_one": 1}),
        ("other epilogue", {"activation": lambda v: tirx.sigmoid(v) * 2 - 1}),
        ("no epilogue", {"activation": lambda v: v}),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_mistake_exceeds_the_tolerance(dtype, mistake, wrong):
    right = dense(dtype, terms=2048)
    given = seeded_arguments(right, 1, {})
    expected = evaluate(right, given.arrays)[3]
    got = run_plain(dense(dtype, **{"terms": 2048, **wrong}), given.arrays)[3]
    assert difference(got, expected).within(tolerance(right, {})[3]) == (mistake == "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_element_of_many_exceeds_the_tolerance(dtype):
    func, _ = balanced(dtype, n=512, relu=False)
    given = seeded_arguments(func, 0, {})
    expected = evaluate(func, given.arrays)[3]
    got = expected.copy()
    at = np.unravel_index(np.abs(got).argmax(), got.shape)
    got[at] *= 0.97
    assert not difference(got, expected).within(tolerance(func, {})[3])


# arguments


def test_arguments_are_seeded():
    func, _ = balanced()
    one, same, other = (seeded_arguments(func, seed, {}).arrays for seed in (1, 1, 2))
    for a, b, c in zip(one[:3], same[:3], other[:3], strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_outputs_are_unwritten():
    func, _ = balanced()
    given = seeded_arguments(func, 0, {})
    assert given.outputs == output_positions(func) == (3,)
    assert np.isnan(given.arrays[3]).all()


def test_symbols_have_values_by_name():
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    x = te.placeholder((n, m * 2), "float32", name="x")
    func = kernel(x, te.compute((n, m * 2), lambda i, j: x[i, j] + 1))
    assert seeded_arguments(func, 0, {"n": 3, "m": 5}).arrays[0].shape == (3, 10)
    assert seeded_arguments(func, 0, 2).arrays[0].shape == (2, 4)
    with pytest.raises(KernelReferenceError, match="symbol m has no value; given: n"):
        seeded_arguments(func, 0, {"n": 3})


def test_symbol_as_a_scalar_parameter():
    @T.prim_func(s_tir=True)
    def ramp(n: T.int64, y: T.Buffer((6,), "int64")):
        for i in range(6):
            with T.sblock("ramp"):
                v = T.axis.spatial(6, i)
                y[v] = n * T.Cast("int64", v)

    given = seeded_arguments(ramp, 0, {"n": 4})
    assert given.arrays[0] == 4
    assert evaluate(ramp, given.arrays)[1].tolist() == [0, 4, 8, 12, 16, 20]


@pytest.mark.parametrize(
    ("index", "reach"),
    [
        (lambda at: at, 40),
        (lambda at: tirx.min(tirx.max(at, tirx.const(0, "int64")), tirx.const(39, "int64")), 40),
        (lambda at: tirx.if_then_else(at < 0, at + 40, at), 40),
        (lambda at: at + 5, 20),
        (lambda at: at * 2, 20),
    ],
    ids=["plain", "clamped", "negative allowed", "sum", "product"],
)
def test_integers_run_over_the_axis_they_index(index, reach):
    x = te.placeholder((40,), "float32", name="x")
    at = te.placeholder((500,), "int64", name="at")
    moved = te.compute((500,), lambda i: at[499 - i])
    func = kernel(x, at, te.compute((500,), lambda i: x[index(moved[i])]))
    given = seeded_arguments(func, 0, {})
    assert given.arrays[1].min() == 0
    assert given.arrays[1].max() == reach - 1
    evaluate(func, given.arrays)


def test_other_integers_are_a_mask():
    x = te.placeholder((50,), "int64", name="x")
    given = seeded_arguments(kernel(x, te.compute((50,), lambda i: x[i] * 3)), 0, {})
    assert set(given.arrays[0]) == {0, 1}


def test_integer_divisors_are_not_zero():
    x, y = (te.placeholder((50,), "int64", name=name) for name in "xy")
    func = kernel(x, y, te.compute((50,), lambda i: tirx.floormod(x[i], y[i])))
    assert seeded_arguments(func, 0, {}).arrays[1].min() == 1


def test_extents_that_differ_from_element_to_element():
    x = te.placeholder((1, 2, 8, 8), "float32", name="x")
    func = kernel(x, topi.nn.adaptive_pool(x, (3, 3), "avg"))
    given = seeded_arguments(func, 0, {}).arrays
    expected = evaluate(func, given)[1]
    close(expected[..., 0, 0], given[0].astype("f8")[..., :3, :3].mean((2, 3)))
    assert difference(run_plain(func, given)[1], expected).within(tolerance(func, {})[1])


def test_roots_and_divisors_stay_away_from_zero():
    x, y, z = (te.placeholder((300,), "float32", name=name) for name in "xyz")
    out = te.compute((300,), lambda i: z[i] * tirx.rsqrt(x[i] * 2) / y[i])
    arrays = seeded_arguments(kernel(x, y, z, out), 0, {}).arrays
    assert arrays[0].min() >= 0.5
    assert arrays[1].min() >= 0.5
    assert arrays[2].min() < 0


def test_a_root_of_a_sum_gets_no_negative_sum():
    x = te.placeholder((30, 4), "float32", name="x")
    mean = topi.sum(x, 1)
    func = kernel(x, te.compute((30,), lambda i: tirx.rsqrt(mean[i])))
    given = seeded_arguments(func, 0, {}).arrays
    assert np.isfinite(evaluate(func, given)[1]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_results_are_of_the_order_of_one(dtype):
    func = dense(dtype, terms=2048, activation=lambda v: v)
    value = evaluate(func, seeded_arguments(func, 0, {}).arrays)[3]
    assert 0.5 < value.std() < 4


# tolerance and difference


def test_tolerance_grows_with_the_terms_and_the_roundings():
    short, long = (dense("float32", terms, activation=lambda v: v) for terms in (16, 2048))
    half = dense("float16", 2048, activation=lambda v: v)
    limits = [tolerance(func, {})[3].largest for func in (short, long, half)]
    assert limits == sorted(limits)
    assert limits[0] < 2e-6
    assert limits[1] < 1e-5
    assert limits[2] < 2e-3


def test_integers_must_be_equal():
    x = te.placeholder((4, 50), "float32", name="x")
    func = kernel(x, topi.argmax(x, 1))
    assert tolerance(func, {}) == {1: Deviation(0.0, 0.0)}
    expected = np.arange(4)
    assert difference(expected, expected) == Deviation(0.0, 0.0)
    assert difference(expected + 1, expected).largest == math.inf


@pytest.mark.parametrize(
    ("got", "expected", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 4.0], 0.25),
        ([np.nan, 3.0], [1.0, 3.0], math.inf),
        ([np.inf, 3.0], [1.0, 3.0], math.inf),
        ([np.nan, 3.0], [np.nan, 3.0], 0.0),
        ([-np.inf, 3.0], [np.inf, 3.0], math.inf),
        ([np.nan], [np.nan], 0.0),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_difference(got, expected, largest):
    assert difference(np.array(got, "f4"), np.array(expected)).largest == largest


# the zoo


@pytest.mark.parametrize(
    "name",
    [
        "mlp_fp16",
        "minilm_dynamic",
        "lstm",
        "vgg16",
        "llama_decode_bf16",
        *(pytest.param(n, marks=pytest.mark.large) for n in ("gpt2_prefill", "llama_prefill_fp16")),
    ],
)
def test_every_kernel_of_a_model_agrees_with_llvm(name):
    built = ZOO[name].build("small")
    model = tb.prune(
        tb.from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name),
        "4:16",
    )
    symbols = {"batch": 2, "sequence": 5}
    kernels = fused_kernels(model, resolve("cuda-sm_90"))
    assert any("balanced_sparse_dense" in kernel for kernel in kernels)
    far = {}
    for kernel_name, func in kernels.items():
        given = seeded_arguments(func, 0, symbols)
        expected, limits = evaluate(func, given.arrays), tolerance(func, symbols)
        got = run_plain(func, given.arrays)
        for position in given.outputs:
            assert np.isfinite(expected[position]).all(), kernel_name
            error = difference(got[position], expected[position])
            if not error.within(limits[position]):
                far[kernel_name] = error, limits[position]
    assert not far
