"""Default llvm schedules against float64 NumPy, for this CPU, an AVX2 one and plain x86-64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tvm
from tvm import relax, tirx

from tests.helpers.covering import Chosen, all_pairs
from tvm_balanced.relay_passes.fuse_transposes import fuse_transposes
from tvm_balanced.schedules.llvm.rest import common as cpu_common
from tvm_balanced.schedules.llvm.rest.rules import ScheduleForCpu

HOST = tvm.target.codegen.llvm_get_system_cpu()
TARGETS = {
    "host": tvm.target.Target({"kind": "llvm", "mcpu": HOST, "num-cores": 2}),
    "haswell": tvm.target.Target({"kind": "llvm", "mcpu": "haswell", "num-cores": 2}),
    "generic": tvm.target.Target({"kind": "llvm", "mcpu": "x86-64", "num-cores": 2}),
}


# schedules follow the width of the vectors: where the host's are haswell's, it stands for both
NAMES = [n for n in TARGETS if n != "haswell" or cpu_common.vector_bits(TARGETS["host"]) > 256]


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> tvm.target.Target:
    return TARGETS[request.param]


def _pairs(allowed: Callable[[Chosen], bool] = lambda chosen: True, **axes: Any) -> Any:
    """Cases in which every two values of the axes meet, the targets being one of these."""
    axes["target"] = NAMES
    cases = all_pairs(axes, allowed)
    words = {(axis, value): str(value) for axis in axes for value in axes[axis]}
    words |= {("symbolic", False): "static", ("symbolic", True): "symbolic"}
    words |= {("transposed", False): "NN", ("transposed", True): "NT"}
    return pytest.mark.parametrize(
        list(axes),
        [
            pytest.param(*case.values(), id="-".join(words[entry] for entry in case.items()))
            for case in cases
        ],
        indirect=["target"],
    )


def _fused(
    build: Callable[..., Any], inputs: list[tuple[tuple[Any, ...], str]], target: Any
) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    args = [relax.Var(f"x{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(inputs)]
    with bb.function("main", args):
        with bb.dataflow():
            out = bb.emit_output(build(bb, *args))
        bb.emit_func_output(out)
    with target:
        return tvm.transform.Sequential(
            [
                fuse_transposes,
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )(bb.get())


def _scheduled(mod: tvm.IRModule, target: Any) -> tuple[tvm.IRModule, set[str]]:
    with target:
        mod = ScheduleForCpu()(mod)
    rules = {
        str(f.attrs["tvm_balanced.schedule"])
        for _, f in mod.functions_items()
        if isinstance(f, tirx.PrimFunc)
    }
    return mod, rules


def _run(
    build: Callable[..., Any],
    arrays: list[np.ndarray],
    target: Any,
    symbolic: dict[tuple[int, int], str] | None = None,
) -> tuple[np.ndarray, set[str]]:
    """Build, schedule, run; ``symbolic`` maps (input, axis) to a variable's name."""
    variables: dict[str, Any] = {}
    inputs = []
    for i, array in enumerate(arrays):
        shape: list[Any] = list(array.shape)
        for (j, axis), name in (symbolic or {}).items():
            if i == j:
                shape[axis] = variables.setdefault(name, tirx.Var(name, "int64"))
        inputs.append((tuple(shape), str(array.dtype)))
    mod, rules = _scheduled(_fused(build, inputs, target), target)
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    return vm["main"](*[tvm.runtime.tensor(a) for a in arrays]).numpy(), rules


def _random(*shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(sum(shape) + len(shape))
    return (rng.standard_normal(shape) * scale).astype(dtype)


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


MATMULS = [
    (32, 96, 64),
    (1, 256, 64),
    (4, 64, 128),
    (31, 127, 61),
    (7, 5, 3),
    (64, 48, 33),
    (1, 131, 67),
    (2, 1, 16),
    (1, 1, 1),
]


@_pairs(shape=MATMULS, transposed=[False, True], symbolic=[False, True])
def test_matmul_with_epilogue(
    shape: tuple[int, int, int], transposed: bool, symbolic: bool, target: Any
) -> None:
    m, n, k = shape
    x, w, bias = _random(m, k), _random(n, k), _random(n)
    residual = _random(m, n)

    def build(bb: Any, x: Any, w: Any, bias: Any, residual: Any) -> Any:
        right = bb.emit(relax.op.permute_dims(w)) if transposed else w
        y = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, right)), bias))
        return relax.op.add(bb.emit(relax.op.nn.relu(y)), residual)

    arrays = [x, w if transposed else np.ascontiguousarray(w.T), bias, residual]
    got, rules = _run(build, arrays, target, {(0, 0): "m", (3, 0): "m"} if symbolic else None)
    expected = np.maximum(x.astype("f8") @ w.T.astype("f8") + bias, 0) + residual
    if n > 1 and k > 1:
        assert rules == {"cpu_matmul"}
    assert _relative(got, expected) < 2e-6


@_pairs(
    shape=[(12, 32, 32, 32), (3, 5, 7, 11), (2, 1, 64, 32)],
    transposed=[False, True],
    symbolic=[False, True],
)
def test_batch_matmul(
    shape: tuple[int, ...], transposed: bool, symbolic: bool, target: Any
) -> None:
    b, m, n, k = shape
    x, w = _random(b, m, k), _random(b, n, k)

    def build(bb: Any, x: Any, w: Any) -> Any:
        right = bb.emit(relax.op.permute_dims(w, [0, 2, 1])) if transposed else w
        return relax.op.matmul(x, right)

    weight = w if transposed else np.ascontiguousarray(w.transpose(0, 2, 1))
    # attention over a growing cache: rows and columns are known only at run time
    names = {(0, 1): "m", (1, 1 if transposed else 2): "n"} if symbolic else None
    got, rules = _run(build, [x, weight], target, names)
    assert rules == {"cpu_matmul"}
    assert _relative(got, x.astype("f8") @ w.transpose(0, 2, 1).astype("f8")) < 2e-6


@_pairs(
    # a leading axis is what can be symbolic
    lambda chosen: not (chosen.get("symbolic") and len(chosen.get("shapes", [(0,) * 3])[0]) < 3),
    shapes=[
        ((2, 3, 5, 16), (16, 32)),
        ((2, 1, 5, 7), (2, 3, 7, 32)),
        ((2, 3, 1, 16), (2, 3, 16, 32)),
        ((16,), (16, 32)),
        ((5, 16), (16,)),
        ((2, 3, 16), (1, 16, 48)),
    ],
    symbolic=[False, True],
)
def test_matmul_of_any_rank(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], symbolic: bool, target: Any
) -> None:
    left, right = shapes
    x, w = _random(*left), _random(*right)
    names = {(0, 0): "b"} if symbolic else {}
    if names and len(right) == 4:
        names[(1, 0)] = "b"
    got, _ = _run(lambda bb, x, w: relax.op.matmul(x, w), [x, w], target, names)
    assert _relative(got, x.astype("f8") @ w.astype("f8")) < 2e-6


def test_matmul_over_a_symbolic_depth(target: Any) -> None:
    x, w = _random(3, 5, 37), _random(3, 37, 16)
    got, _ = _run(
        lambda bb, x, w: relax.op.matmul(x, w), [x, w], target, {(0, 2): "k", (1, 1): "k"}
    )
    assert _relative(got, x.astype("f8") @ w.astype("f8")) < 2e-6


@_pairs(shape=[(32, 96, 64), (1, 64, 256), (5, 13, 31)], transposed=[False, True])
def test_half_precision_accumulates_in_float32(
    shape: tuple[int, int, int], transposed: bool, target: Any
) -> None:
    m, n, k = shape
    x, w = _random(m, k, dtype="float16"), _random(n, k, dtype="float16", scale=0.1)

    def build(bb: Any, x: Any, w: Any) -> Any:
        right = bb.emit(relax.op.permute_dims(w)) if transposed else w
        return relax.op.matmul(x, right)

    got, rules = _run(build, [x, w if transposed else np.ascontiguousarray(w.T)], target)
    assert rules == {"cpu_matmul"}
    # one rounding to float16 (2**-11) of the exact sum; float16 sums would be several times worse
    assert _relative(got.astype("f8"), x.astype("f8") @ w.T.astype("f8")) < 6e-4


@pytest.mark.parametrize(
    "channels,out,size,kernel,stride",
    [(3, 32, 14, 3, 1), (16, 64, 7, 3, 2), (8, 16, 11, 1, 1), (5, 7, 13, 3, 1)],
    ids=str,
)
def test_conv2d(channels: int, out: int, size: int, kernel: int, stride: int, target: Any) -> None:
    x, w = _random(2, channels, size, size), _random(out, channels, kernel, kernel)
    bias = _random(1, out, 1, 1)
    pad = kernel // 2

    def build(bb: Any, x: Any, w: Any, bias: Any) -> Any:
        y = bb.emit(relax.op.nn.conv2d(x, w, strides=stride, padding=pad))
        return relax.op.nn.relu(bb.emit(relax.op.add(y, bias)))

    got, _ = _run(build, [x, w, bias], target)
    padded = np.pad(x.astype("f8"), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    expected = np.maximum(np.einsum("nchwij,ocij->nohw", windows, w.astype("f8")) + bias, 0)
    assert _relative(got, expected) < 2e-6


@pytest.mark.parametrize("depthwise", [False, True], ids=["max_pool", "depthwise"])
def test_windows_without_a_matmul(depthwise: bool, target: Any) -> None:
    x, w = _random(1, 8, 12, 12), _random(8, 1, 3, 3)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype("f8"), (3, 3), axis=(2, 3))
    if depthwise:
        got, _ = _run(lambda bb, x, w: relax.op.nn.conv2d(x, w, groups=8), [x, w], target)
        expected = np.einsum("nchwij,cij->nchw", windows, w[:, 0].astype("f8"))
    else:
        got, _ = _run(lambda bb, x: relax.op.nn.max_pool2d(x, (3, 3)), [x], target)
        expected = windows.max(axis=(-1, -2))
    assert _relative(got, expected) < 2e-6


ROWS = [(2, 12, 32), (3, 5, 384), (1, 7, 61), (2, 3, 1), (1, 1, 4096)]


@_pairs(shape=ROWS, axis=["static", "rows", "depth"])
def test_softmax(shape: tuple[int, ...], axis: str, target: Any) -> None:
    symbolic = {"static": None, "rows": 1, "depth": 2}[axis]
    x = _random(*shape, scale=4)
    x[0, 0, 0] = -np.inf if shape[2] > 1 else 0
    names = None if symbolic is None else {(0, symbolic): "s"}
    got, rules = _run(lambda bb, x: relax.op.nn.softmax(x), [x], target, names)
    assert rules == {"cpu_rows"}
    # a depth known only at run time is summed in order, whose error grows with it
    rtol = 2e-5 if symbolic == 2 else 2e-6
    expected = scipy.special.softmax(x.astype("f8"), axis=-1)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-7)


@_pairs(shape=ROWS, symbolic=[False, True])
def test_layer_norm(shape: tuple[int, ...], symbolic: bool, target: Any) -> None:
    x, gamma, beta = _random(*shape), _random(shape[2]), _random(shape[2])
    names = {(0, 1): "s"} if symbolic else None
    got, rules = _run(
        lambda bb, x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[-1], epsilon=1e-5),
        [x, gamma, beta],
        target,
        names,
    )
    d = x.astype("f8")
    scale = np.sqrt(d.var(-1, keepdims=True) + 1e-5)
    expected = (d - d.mean(-1, keepdims=True)) / scale * gamma + beta
    assert rules == {"cpu_rows"}
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rms_norm_from_operators(shape: tuple[int, ...], target: Any) -> None:
    x, gamma = _random(*shape), _random(shape[2])

    def build(bb: Any, x: Any, gamma: Any) -> Any:
        square = bb.emit(relax.op.power(x, relax.const(2.0)))
        mean = bb.emit(relax.op.mean(square, -1, keepdims=True))
        scale = bb.emit(relax.op.rsqrt(bb.emit(relax.op.add(mean, relax.const(1e-6)))))
        return relax.op.multiply(bb.emit(relax.op.multiply(x, scale)), gamma)

    got, _ = _run(build, [x, gamma], target)
    d = x.astype("f8")
    expected = d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "sum_last": (lambda bb, x: relax.op.sum(x, -1), lambda x: x.sum(-1)),
    "mean_middle": (lambda bb, x: relax.op.mean(x, 1), lambda x: x.mean(1)),
    "max_all": (lambda bb, x: relax.op.max(x), lambda x: x.max()),
    "sum_two": (lambda bb, x: relax.op.sum(x, [0, 2]), lambda x: x.sum((0, 2))),
    "argmax": (lambda bb, x: relax.op.argmax(x, -1), lambda x: x.argmax(-1)),
    "cumsum": (lambda bb, x: relax.op.cumsum(x, 1), lambda x: x.cumsum(1)),
}


@_pairs(name=list(REDUCTIONS), shape=[(3, 5, 64), (2, 7, 61), (1, 4, 1)])
def test_reductions(name: str, shape: tuple[int, ...], target: Any) -> None:
    build, reference = REDUCTIONS[name]
    x = _random(*shape)
    got, _ = _run(build, [x], target)
    np.testing.assert_allclose(got, reference(x.astype("f8")), rtol=2e-6, atol=1e-5)


CHAINS: dict[str, tuple[Any, Any]] = {
    "gelu": (
        lambda bb, x: relax.op.nn.gelu(x),
        lambda x: x * (0.5 + 0.5 * scipy.special.erf(x / 2**0.5)),
    ),
    "silu": (lambda bb, x: relax.op.nn.silu(x), lambda x: x * scipy.special.expit(x)),
    "transpose": (
        lambda bb, x: relax.op.permute_dims(x, [2, 0, 1]),
        lambda x: x.transpose(2, 0, 1),
    ),
    "concat": (
        lambda bb, x: relax.op.concat([x, bb.emit(relax.op.negative(x))], 1),
        lambda x: np.concatenate([x, -x], 1),
    ),
    "reshape": (lambda bb, x: relax.op.reshape(x, (-1,)), lambda x: x.reshape(-1)),
    "broadcast": (
        lambda bb, x: relax.op.add(x, bb.emit(relax.op.strided_slice(x, [2], [0], [1]))),
        lambda x: x + x[:, :, :1],
    ),
}


@_pairs(
    # a reshape of a symbolic tensor is no kernel
    lambda chosen: not (chosen.get("symbolic") and chosen.get("name") == "reshape"),
    name=list(CHAINS),
    shape=[(3, 5, 64), (2, 7, 61), (1, 1, 1), (17, 31, 521)],
    symbolic=[False, True],
)
def test_element_wise(name: str, shape: tuple[int, ...], symbolic: bool, target: Any) -> None:
    build, reference = CHAINS[name]
    x = _random(*shape, scale=2)
    got, rules = _run(build, [x], target, {(0, 1): "s"} if symbolic else None)
    assert rules <= {"cpu_elementwise"}
    np.testing.assert_allclose(got, reference(x.astype("f8")), rtol=1e-6, atol=1e-6)


NORMS: dict[str, Any] = {
    "softmax_middle": lambda bb, x: relax.op.nn.softmax(x, 1),
    "log_softmax": lambda bb, x: relax.op.nn.log_softmax(x),
    "avg_pool": lambda bb, x: relax.op.nn.avg_pool2d(
        bb.emit(relax.op.expand_dims(x, 0)), (2, 2), (2, 2)
    ),
    "variance": lambda bb, x: relax.op.variance(x, -1),
    "half": lambda bb, x: relax.op.astype(
        bb.emit(relax.op.sum(bb.emit(relax.op.astype(x, "float16")), -1)), "float32"
    ),
}
EXPECTED: dict[str, Any] = {
    "softmax_middle": lambda x: scipy.special.softmax(x, 1),
    "log_softmax": lambda x: scipy.special.log_softmax(x, -1),
    "avg_pool": lambda x: x.reshape(1, 3, 4, 2, 32, 2).mean((3, 5)),
    "variance": lambda x: x.var(-1),
    "half": lambda x: x.sum(-1),
}


@pytest.mark.parametrize("name", NORMS)
def test_other_normalisations(name: str, target: Any) -> None:
    x = _random(3, 8, 64)
    got, _ = _run(NORMS[name], [x], target)
    tolerance = 1e-2 if name == "half" else 5e-6
    np.testing.assert_allclose(got, EXPECTED[name](x.astype("f8")), rtol=tolerance, atol=tolerance)


def test_take(target: Any) -> None:
    table, rows = _random(50, 61), np.array([3, 49, 0, 7], "int32")
    got, _ = _run(lambda bb, t, i: relax.op.take(t, i, axis=0), [table, rows], target)
    np.testing.assert_array_equal(got, table[rows])


FUNCTIONS: dict[str, tuple[Any, Any, float]] = {
    "exp": (relax.op.exp, np.exp, 2e-7),
    "tanh": (relax.op.tanh, np.tanh, 3e-7),
    "sigmoid": (relax.op.sigmoid, scipy.special.expit, 3e-7),
    "erf": (relax.op.erf, scipy.special.erf, 5e-7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_polynomials_keep_their_stated_error(name: str, target: Any) -> None:
    operator, reference, bound = FUNCTIONS[name]
    rng = np.random.default_rng(3)
    scales = np.array([1e-6, 1e-3, 0.1, 1, 4, 30, 87], "f4")[:, None]
    x = (rng.uniform(-1, 1, (7, 4099)) * scales).astype("float32")
    got, _ = _run(lambda bb, x: operator(x), [x], target)
    expected = reference(x.astype("f8"))
    normal = np.abs(expected) > np.finfo("f4").tiny
    assert (np.abs(got - expected)[normal] / np.abs(expected[normal])).max() < bound
    limits = np.tile(np.array([np.nan, np.inf, -np.inf, 0, 200, -200], "f4"), 16)
    got, _ = _run(lambda bb, x: operator(x), [limits], target)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(got, reference(limits), rtol=bound, atol=1e-37)


def test_no_libm_call_is_left() -> None:
    mod = _fused(lambda bb, x: relax.op.nn.gelu(x), [((64, 64), "float32")], TARGETS["host"])
    mod, _ = _scheduled(mod, TARGETS["host"])
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert "T.erf(" not in func.script()


def test_twice_is_once_and_marked_kernels_are_left() -> None:
    target = TARGETS["host"]
    mod = _fused(lambda bb, x: relax.op.nn.softmax(x), [((8, 64), "float32")], target)
    once, _ = _scheduled(mod, target)
    twice, _ = _scheduled(once, target)
    tvm.ir.assert_structural_equal(once, twice)
    (gvar,) = [g for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    mod[gvar] = mod[gvar].with_attr("tirx.is_scheduled", True)
    with target:
        tvm.ir.assert_structural_equal(ScheduleForCpu()(mod), mod)


def test_small_kernels_stay_on_one_thread() -> None:
    def text(rows: int) -> str:
        mod = _fused(lambda bb, x: relax.op.nn.relu(x), [((rows, 512), "float32")], TARGETS["host"])
        mod, _ = _scheduled(mod, TARGETS["host"])
        return str(mod.script())

    assert "T.parallel" not in text(8)
    assert "T.parallel" in text(4096)


@pytest.mark.parametrize("name,bits", [("haswell", 256), ("generic", 128)])
def test_vector_width_follows_the_features(name: str, bits: int) -> None:
    assert cpu_common.vector_bits(TARGETS[name]) == bits


def test_repeated_bfloat16_loads_are_read_as_bits():
    """A parallel SiLU in bfloat16 reads its operand several times in one expression."""
    import ml_dtypes
    from tvm import relax

    from tvm_balanced.build.pipeline import build

    x = relax.Var("x", relax.TensorType((64, 5632), "bfloat16"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x]):
        with bb.dataflow():
            wide = bb.emit(relax.op.astype(x, "float32"))
            out = bb.emit(relax.op.multiply(wide, relax.op.sigmoid(wide)))
            out = bb.emit_output(relax.op.astype(out, "bfloat16"))
        bb.emit_func_output(out)
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    vm = relax.VirtualMachine(build(bb.get(), target), tvm.cpu())
    data = np.random.default_rng(0).standard_normal((64, 5632)).astype(ml_dtypes.bfloat16)
    got = vm["main"](tvm.runtime.tensor(data)).numpy().astype("float64")
    exact = data.astype("float64") / (1 + np.exp(-data.astype("float64")))
    np.testing.assert_allclose(got, exact, rtol=1e-2, atol=1e-6)
