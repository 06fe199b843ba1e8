"""Functions as they are emitted for CUDA, emulated, against float64 and the bounds of docs/accuracy.md."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import relax

from tvm_balanced.build.pipeline import TIR_PIPELINE, fuse_passes, schedule_passes
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.cuda import nvrtc
from tvm_balanced.format.layout import numpy_dtype
from tvm_balanced.targets import resolve as targets

SHAPE = (16, 512)
UNIT = 2.0**-24  # half a unit in the last place, relative to 1

TARGET = targets.resolve("cuda-sm_90").target
FAST = re.compile(
    r"\b__(exp|exp10|log|log2|log10|pow|sin|cos|sincos|tan|tanh)f\s*\(|__fdividef|_approx"
)


def _new_gelu(x: Any) -> Any:
    """GELU as GPT-2 writes it: with a power of what may be negative."""
    cube = relax.op.power(x, _constant(3.0))
    inner = relax.op.add(x, relax.op.multiply(cube, _constant(0.044715)))
    tanh = relax.op.tanh(relax.op.multiply(inner, _constant((2 / np.pi) ** 0.5)))
    half = relax.op.multiply(x, _constant(0.5))
    return relax.op.multiply(half, relax.op.add(tanh, _constant(1.0)))


def _constant(value: float) -> Any:
    return relax.const(value, "float32")


OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(relax.op, name)
        for name in (
            *("exp", "log", "sqrt", "rsqrt", "sigmoid", "erf", "sin", "cos", "tan"),
            *("sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh"),
        )
    },
    "divide": relax.op.divide,
    "power": relax.op.power,
    "silu": relax.op.nn.silu,
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
    "new_gelu": _new_gelu,
    "softmax": relax.op.nn.softmax,
    "log_softmax": relax.op.nn.log_softmax,
}
BINARY = ("divide", "power")


class Functions:
    """The operators in one CUDA source, so that it is compiled once."""

    def __init__(self, names: tuple[str, ...], dtype: str) -> None:
        builder = relax.BlockBuilder()
        for name in names:
            count = 2 if name in BINARY else 1
            params = [relax.Var(f"x{i}", relax.TensorType(SHAPE, dtype)) for i in range(count)]
            with builder.function(f"main_{name}", params):
                with builder.dataflow():
                    y = builder.emit_output(OPERATORS[name](*params))
                builder.emit_func_output(y)
        with TARGET:
            mod = tvm.transform.Sequential([*fuse_passes(), *schedule_passes(TARGET)])(
                builder.get()
            )
        self.dtype = numpy_dtype(dtype)
        self._names = {name: _called(mod[f"main_{name}"]) for name in names}
        self._mod = mod
        self.source = self._kernel(names[0]).source

    def __call__(self, name: str, *inputs: Any) -> Any:
        """The function's results, float64, of float64 inputs that its dtype holds."""
        out = np.full(SHAPE, np.nan, self.dtype)
        self._kernel(name)(*[x.astype(self.dtype) for x in inputs], out)
        return out.astype("f8")

    def _kernel(self, name: str) -> cudaemu.TVMKernel:
        return cudaemu.from_tvm(self._mod, TARGET, self._names[name], TIR_PIPELINE)


def _called(function: relax.Function) -> str:
    names = [
        str(binding.value.args[0].name_hint)
        for block in function.body.blocks
        for binding in block.bindings
        if isinstance(binding.value, tvm.ir.Call) and len(binding.value.args) == 2
    ]
    assert len(names) == 1, f"one kernel is expected, there are {names}"
    return names[0]


@pytest.fixture(scope="module")
def float32() -> Functions:
    return Functions(tuple(OPERATORS), "float32")


def _values(low: float, high: float, *, logarithmic: bool = False, dtype: Any = np.float32) -> Any:
    """Seeded values that the dtype holds, as float64; the ends are among them."""
    rng = np.random.default_rng(0)
    if logarithmic:
        values = np.exp(rng.uniform(np.log(low), np.log(high), SHAPE))
    else:
        values = rng.uniform(low, high, SHAPE)
    values.flat[:2] = low, high
    return np.clip(values, low, high).astype(dtype).astype("f8")


def _ulps(got: Any, exact: Any) -> float:
    """Largest error in units of the last place of the correctly rounded float32 result."""
    rounded = np.abs(exact).astype(np.float32)
    return float(np.max(np.abs(got - exact) / np.spacing(rounded).astype("f8")))


STANDARD = [
    # function, reference, values, CUDA's bound in ulp
    ("exp", np.exp, _values(-87, 88), 2),
    ("log", np.log, _values(1e-38, 1e38, logarithmic=True), 1),
    ("sqrt", np.sqrt, _values(1e-38, 1e38, logarithmic=True), 0),
    ("rsqrt", lambda x: 1 / np.sqrt(x), _values(1e-38, 1e38, logarithmic=True), 2),
    ("erf", special.erf, _values(-4, 4), 2),
    ("sin", np.sin, _values(-4, 4), 2),
    ("cos", np.cos, _values(-4, 4), 2),
    ("tan", np.tan, _values(-4, 4), 4),
    ("sinh", np.sinh, _values(-80, 80), 3),
    ("cosh", np.cosh, _values(-80, 80), 2),
    ("tanh", np.tanh, _values(-10, 10), 2),
    ("asin", np.arcsin, _values(-1, 1), 2),
    ("acos", np.arccos, _values(-1, 1), 2),
    ("atan", np.arctan, _values(-50, 50), 2),
    ("asinh", np.arcsinh, _values(-50, 50), 3),
    ("acosh", np.arccosh, _values(1, 1e9, logarithmic=True), 4),
    ("atanh", np.arctanh, _values(-0.999, 0.999), 3),
]


@pytest.mark.parametrize(
    ("name", "reference", "x", "bound"), STANDARD, ids=[case[0] for case in STANDARD]
)
def test_a_function_keeps_its_bound(float32, name, reference, x, bound):
    # the guide's bounds count from the correctly rounded result
    assert _ulps(float32(name, x), reference(x)) <= bound + 0.5


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles_are_reduced_exactly(float32, name):
    """A rotary embedding at position 100000 turns its first pair by 100000 radians."""
    x = _values(1, 1e5, logarithmic=True)
    assert _ulps(float32(name, x), getattr(np, name)(x)) <= 2.5


def test_division_is_correctly_rounded(float32):
    x, y = _values(-1e3, 1e3), _values(1e-30, 1e30, logarithmic=True)
    np.testing.assert_array_equal(float32("divide", x, y), (x / y).astype(np.float32))


def test_a_power_of_a_negative_number_keeps_its_bound(float32):
    x, y = _values(-8, 8), np.full(SHAPE, 3.0)
    assert _ulps(float32("power", x, y), x**3) <= 4.5


def test_sigmoid_and_silu(float32):
    x = _values(-80, 80)
    exact = special.expit(x)
    assert np.all(np.abs(float32("sigmoid", x) - exact) <= 7 * UNIT * exact)
    assert np.all(np.abs(float32("silu", x) - x * exact) <= 8 * UNIT * np.abs(x) * exact)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "new_gelu"])
def test_gelu(float32, name):
    x = _values(-6, 6)
    if name == "gelu":
        exact, bound = x * special.ndtr(x), 5
    else:
        exact = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
        bound = 8
    assert np.all(np.abs(float32(name, x) - exact) <= bound * UNIT * np.abs(x))


def test_softmax(float32):
    x = _values(-10, 10)
    away = x.max(-1, keepdims=True) - x
    bound = (away + 40) * UNIT
    exact = special.softmax(x, -1)
    assert np.all(np.abs(float32("softmax", x) - exact) <= bound * exact)
    exact = special.log_softmax(x, -1)
    assert np.all(np.abs(float32("log_softmax", x) - exact) <= 40 * UNIT + 2 * UNIT * np.abs(exact))


def test_denormals_are_kept(float32):
    x = np.full(SHAPE, 2.0**-140)
    np.testing.assert_array_equal(float32("divide", x, np.full(SHAPE, 2.0)), x / 2)
    assert np.all(float32("exp", np.full(SHAPE, -100.0)) > 0)


TWO_BYTE = ("exp", "log", "tanh", "sin", "cos", "sqrt", "divide")


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def two_byte(request) -> Functions:
    return Functions(TWO_BYTE, request.param)


@pytest.mark.parametrize("name", TWO_BYTE)
def test_two_byte_functions_round_once(two_byte, name):
    """To the nearest, but next to a tie; tanh of bfloat16 is an approximate instruction before that."""
    kind = two_byte.dtype
    unit = 2.0**-11 if kind == np.float16 else 2.0**-8
    x = _values(0.01, 8, dtype=kind)
    inputs = (x, x[::-1]) if name in BINARY else (x,)
    exact = getattr(np, name)(*inputs)
    error = np.abs(two_byte(name, *inputs) - exact)
    instruction = 2.0**-11 if (name, unit) == ("tanh", 2.0**-8) else 1e-6
    assert np.all(error <= (unit + instruction) * np.abs(exact))
    missed = error > np.abs(exact.astype(kind).astype("f8") - exact)
    assert np.mean(missed) < (0.3 if instruction > unit / 100 else 0.01)


def test_no_fast_intrinsic_is_emitted(float32):
    assert not FAST.search(float32.source)


def test_none_is_emitted_where_tvm_is_told_to_use_them():
    with tvm.transform.PassContext(config={"tirx.enable_fast_math": True}):
        source = Functions(("exp", "tanh", "sin", "power", "softmax"), "float32").source
        assert not FAST.search(source)
        for function in ("expf(", "tanhf(", "sinf(", "powf("):
            assert function in source


@pytest.mark.skipif(bool(nvrtc.missing_cuda_packages()), reason="NVRTC is not installed")
def test_what_is_compiled_holds_no_approximate_function(float32):
    ptx = nvrtc.compile_cubin(float32.source, "sm_90").ptx
    # exp, reciprocal and rsqrt start within the precise functions from the approximate ones
    assert not re.search(r"(tanh|sin|cos|lg2|sqrt)\.approx", ptx.replace("rsqrt.approx", ""))
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx


# of x[i] and y[i]; in one source, so that they are compiled once
PLANTED = (
    *("expf(x)", "powf(x, y)", "__expf(x)", "__powf(x, y)", "__fdividef(x, y)"),
    *(
        "__logf(x)",
        "__log2f(x)",
        "__log10f(x)",
        "__sinf(x)",
        "__cosf(x)",
        "__tanf(x)",
        "__tanhf(x)",
    ),
    "__expf(x) + __cosf(x) + __sinf(x)",
)
KERNEL = """
extern "C" __global__ void kernel_{0}(float* xs, float* ys, float* out, int n) {{
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {{
    float x = xs[i], y = ys[i];
    out[i] = {1};
  }}
}}
"""


@functools.cache
def _module() -> cudaemu.Module:
    return cudaemu.Module("".join(KERNEL.format(*entry) for entry in enumerate(PLANTED)))


def _planted(expression: str, x: Any, y: Any = 0.0) -> Any:
    """One of the hand-written expressions run emulated on float32 values, as float64."""
    x = np.atleast_1d(np.asarray(x, np.float32)).ravel()
    y = np.full_like(x, y)
    out = np.full_like(x, np.inf)
    kernel = f"kernel_{PLANTED.index(expression)}"
    _module().launch(cudaemu.Launch(kernel, [-(-x.size // 256)], [256], [x, y, out, x.size]))
    return out.astype("f8")


def test_a_fast_power_of_a_negative_number_is_none():
    x = np.array([-2.0, -0.5, 3.0])
    assert np.isnan(_planted("__powf(x, y)", x, 3.0)[:2]).all()
    np.testing.assert_array_equal(_planted("powf(x, y)", x, 3.0), x**3)


def test_a_fast_exponential_is_as_wrong_as_documented():
    x = _values(-80, 80).ravel()
    exact = np.exp(x)
    error = np.abs(_planted("__expf(x)", x) - exact) / np.spacing(exact.astype(np.float32))
    assert np.all(error <= 2.5 + np.floor(1.173 * np.abs(x)))
    assert error.max() > 40 > 2.5 >= _ulps(_planted("expf(x)", x), exact)


@pytest.mark.parametrize(
    ("name", "reference", "near", "ulps"),
    [
        ("__logf", np.log, 2**-21.41, 3),
        ("__log2f", np.log2, 2**-22, 2),
        ("__log10f", np.log10, 2**-24, 3),
    ],
)
def test_a_fast_logarithm_is_as_wrong_as_documented(name, reference, near, ulps):
    x = np.concatenate([_values(0.5, 2), _values(1e-30, 1e30, logarithmic=True)]).ravel()
    exact, got = reference(x), _planted(f"{name}(x)", x)
    inside = (x >= 0.5) & (x <= 2)
    assert np.all(np.abs(got - exact)[inside] <= near)
    assert _ulps(got[~inside], exact[~inside]) <= ulps + 0.5
    # next to 1 the absolute error is many units of a small result
    assert _ulps(got[inside], exact[inside]) > 10


@pytest.mark.parametrize(("name", "near"), [("sin", 2**-21.41), ("cos", 2**-21.19)])
def test_a_fast_sine_is_lost_at_large_angles(name, near):
    x = np.concatenate([_values(-np.pi, np.pi), _values(1e3, 1e5)]).ravel()
    error = np.abs(_planted(f"__{name}f(x)", x) - getattr(np, name)(x))
    assert error[: x.size // 2].max() <= near
    assert error[x.size // 2 :].max() > 1e-3


def test_a_fast_tangent_hyperbolic_is_off_by_its_instruction():
    x = _values(-4, 4).ravel()
    error = np.abs(_planted("__tanhf(x)", x) / np.tanh(x) - 1)
    assert 2**-12 < error.max() <= 2**-11
    np.testing.assert_array_equal(np.abs(_planted("__tanhf(x)", [-50.0, 50.0])), 1)


def test_a_fast_quotient_is_flushed_for_a_large_divisor():
    x, y = _values(1, 1e3).ravel(), 3.0
    assert 0.5 < _ulps(_planted("__fdividef(x, y)", x, y), x / y) <= 2.5
    large = _planted("__fdividef(x, y)", [1.0, np.inf], 2.0**127)
    assert large[0] == 0 and np.isnan(large[1])


def test_a_fast_tangent_is_the_quotient_of_sine_and_cosine():
    x = _values(0.1, 1.5).ravel()
    assert 4 * UNIT < np.abs(_planted("__tanf(x)", x) / np.tan(x) - 1).max() < 1e-5


@pytest.mark.parametrize("bits", [0, 1, 127])
def test_fast_exponentials_of_integers_are_exact(bits):
    assert _planted("__powf(x, y)", 2.0, float(bits)) == 2.0**bits
    assert _planted("__expf(x) + __cosf(x) + __sinf(x)", 0.0) == 2
