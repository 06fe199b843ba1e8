"""Float32 exp, erf, tanh, sigmoid and small integer powers as polynomials that vectorise.

LLVM has no vector form of ``llvm.exp`` without a vector math library: it calls libm once per element.
Here each call becomes straight-line float32 arithmetic before scheduling. Worst errors found against
float64 (``tests/schedules/llvm/test_rest.py``): exp 2e-7 relative where the result is a normal number,
tanh and sigmoid 3e-7 relative, erf 5e-7 relative. NaN stays NaN and infinities keep their limits.

Source: Cephes ``expf`` and ``tanhf`` (Moshier); the rational minimax of erf is Eigen's
``generic_fast_erf_float``.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
import tvm_ffi
from tvm import tirx

from tvm_balanced.schedules.fused_kernel import loads
from tvm_balanced.support.tvm_types import Expr, Stmt

_LOG2E = 1.44269504088896341
# ln 2 in two parts, the first with few mantissa bits: n times it is exact
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2),
    *(1.6666665459e-1, 5.0000001201e-1),
)
# results beyond are zero (below the smallest normal number) or infinite
_EXP_LOW, _EXP_HIGH = -87.336544, 88.722839
_TANH = (
    *(-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1),
    -3.33332819422e-1,
)
_ERF_LIMIT = 4.0
_ERF_NUMERATOR = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630306855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_DENOMINATOR = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)


def _f(value: float) -> Expr:
    return tirx.const(value, "float32")


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    total = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _f(coefficient)
    return total


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """``let v = value in body(v)``: the value is used several times and must be computed once."""
    if isinstance(value, tirx.Var):
        return body(value)
    var = tirx.Var("v", "float32")
    return tirx.Let(var, value, body(var))


def _exp(x: Expr) -> Expr:
    def with_n(x: Expr, n: Expr) -> Expr:
        def with_r(r: Expr) -> Expr:
            value = _horner(r, _EXP) * r * r + r + _f(1.0)
            whole = tirx.Cast("int32", n)
            half = tirx.shift_right(whole, tirx.const(1, "int32"))
            # 2**n as two factors: n is 128 for the largest arguments, beyond one exponent's range
            scaled = value * _power_of_two(half) * _power_of_two(whole - half)
            low = tirx.Select(x < _f(_EXP_LOW), _f(0.0), scaled)
            return tirx.Select(x > _f(_EXP_HIGH), _f(float("inf")), low)

        return _let(x - n * _f(_LN2_HIGH) - n * _f(_LN2_LOW), with_r)

    def with_x(x: Expr) -> Expr:
        inside = tirx.min(tirx.max(x, _f(_EXP_LOW)), _f(_EXP_HIGH))
        return _let(tirx.floor(inside * _f(_LOG2E) + _f(0.5)), lambda n: with_n(x, n))

    return _let(x, with_x)


def _power_of_two(n: Expr) -> Expr:
    bits = tirx.shift_left(n + tirx.const(127, "int32"), tirx.const(23, "int32"))
    return tirx.reinterpret("float32", bits)


def _tanh(x: Expr) -> Expr:
    def with_x(x: Expr) -> Expr:
        magnitude = tirx.Select(x < _f(0.0), -x, x)

        def with_exp(e: Expr) -> Expr:
            large = _f(1.0) - _f(2.0) / (e + _f(1.0))
            signed = tirx.Select(x < _f(0.0), -large, large)
            small = _let(x * x, lambda z: _horner(z, _TANH) * z * x + x)
            return tirx.Select(magnitude < _f(0.625), small, signed)

        return _let(_exp(magnitude * _f(2.0)), with_exp)

    return _let(x, with_x)


def _sigmoid(x: Expr) -> Expr:
    return _f(1.0) / (_f(1.0) + _exp(-x))


def _erf(x: Expr) -> Expr:
    def ratio(x: Expr) -> Expr:
        return _let(x * x, lambda z: x * _horner(z, _ERF_NUMERATOR) / _horner(z, _ERF_DENOMINATOR))

    def with_x(x: Expr) -> Expr:
        inside = tirx.min(tirx.max(x, _f(-_ERF_LIMIT)), _f(_ERF_LIMIT))
        # the clamp swallows NaN, and which way a comparison with NaN goes is up to LLVM: ask the bits
        magnitude = tirx.reinterpret("int32", x) & tirx.const(0x7FFFFFFF, "int32")
        is_nan = magnitude > tirx.const(0x7F800000, "int32")
        return tirx.Select(is_nan, x, _let(inside, ratio))

    return _let(x, with_x)


def _pow(x: Expr, exponent: Expr) -> Expr | None:
    if not isinstance(exponent, tirx.FloatImm | tirx.IntImm):
        return None
    value = float(exponent.value)
    if value == 2.0:
        return _let(x, lambda v: v * v)
    if value == 3.0:
        return _let(x, lambda v: v * v * v)
    return None


_UNARY = {"tirx.exp": _exp, "tirx.tanh": _tanh, "tirx.sigmoid": _sigmoid, "tirx.erf": _erf}


def rewrite(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace the calls in one function; a function without such calls is returned as it is.

    Before::

        B[i] = T.exp(A[i])

    After::

        B[i] = T.Let(..., where={v: A[i]})    # a polynomial of v, scaled by 2**n
    """
    body = tvm_ffi.structural_map(func.body, (tvm.ir.Call, _as_polynomial), order="post")
    if body.same_as(func.body):
        return func
    return func.with_body(without_lets(body) if _rounds_to_bfloat16(body) else body)


def _as_polynomial(call: Expr) -> Expr:
    # an address has no dtype
    if not isinstance(call.op, tvm.ir.Op) or str(getattr(call.ty, "dtype", "")) != "float32":
        return call
    name = call.op.name
    if name in _UNARY:
        return _UNARY[name](call.args[0])
    if name == "tirx.pow":
        power = _pow(call.args[0], call.args[1])
        return call if power is None else power
    return call


_HALVES = ("float16", "bfloat16")
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min)


def in_float32(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """As :func:`rewrite`, and element-wise work on 16-bit floats becomes float32 work, rounded at its end.

    Before::

        B[i] = A[i] + bias[i]                                       # all bfloat16

    After::

        B[i] = bfloat16(float32(A[i]) + float32(bias[i]))

    For kernels that are written out: what is left of the casts has to be stored by :func:`unrounded`, as TVM
    0.27 expands one to bfloat16 into bit operations that hold their operand twice.
    """

    def compute(node: Expr) -> Expr:
        dtype = str(node.ty.dtype)
        if dtype not in _HALVES:
            return node
        return tirx.Cast(dtype, type(node)(_widened(node.a), _widened(node.b)))

    def call(node: Expr) -> Expr:
        dtype = str(getattr(node.ty, "dtype", ""))
        name = getattr(node.op, "name", "")
        if dtype in _HALVES and name in _UNARY:
            return tirx.Cast(dtype, _UNARY[name](_widened(node.args[0])))
        return _as_polynomial(node)

    def store(one: Stmt) -> Stmt:
        # a reduction keeps its form, by which it is known
        if any(load.source.same_as(one.buffer) for load in loads(one.value)):
            return one
        value = tvm_ffi.structural_map(
            one.value, [(_ARITHMETIC, compute), (tvm.ir.Call, call)], order="post"
        )
        return one if value.same_as(one.value) else tirx.BufferStore(one.buffer, value, one.indices)

    body = tvm_ffi.structural_map(func.body, (tirx.BufferStore, store), order="post")
    return func if body.same_as(func.body) else func.with_body(body)


def unrounded(value: Expr) -> Expr:
    """Return a value without the roundings to 16 bits in it, and without the last one."""

    def cast(one: Expr) -> Expr:
        return _widened(one.value) if str(one.ty.dtype) == "float32" else one

    rounds = str(value.ty.dtype) == "bfloat16"
    value = tvm_ffi.structural_map(value, (tirx.Cast, cast), order="post")
    value = value.value if isinstance(value, tirx.Cast) else value
    return without_lets(value) if rounds else value


def _widened(value: Expr) -> Expr:
    if isinstance(value, tirx.Cast) and str(value.ty.dtype) in _HALVES:
        inner = value.value
        if str(inner.ty.dtype) == "float32":
            return inner
    if isinstance(value, tirx.FloatImm):
        return _f(float(value.value))
    return value if str(value.ty.dtype) == "float32" else tirx.Cast("float32", value)


def _rounds_to_bfloat16(body: Stmt) -> bool:
    casts: list[Expr] = []
    tvm_ffi.structural_walk(body, (tirx.Cast, casts.append), order="post")
    return any(str(cast.ty.dtype).startswith("bfloat16") for cast in casts)


def without_lets(body: Expr | Stmt) -> Expr | Stmt:
    """Write every ``Let`` out.

    TVM 0.27 expands a cast to bfloat16 into bit operations that hold their operand twice. A variable bound
    in it would then be bound twice, which its passes refuse or, with new names, compile wrongly, as they do
    in a kernel that stores bfloat16 anywhere. Repeated subexpressions are found again further down.
    """

    def write_out(let: Expr) -> Expr:
        return tvm_ffi.structural_map(
            let.body, (tirx.Var, lambda var: let.value if var.same_as(let.var) else var)
        )

    return tvm_ffi.structural_map(body, (tirx.Let, write_out), order="post")


def rename_lets(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Give each ``Let`` a variable of its own where one is bound twice.

    A schedule that inlines an expression in two places copies its variables with it.
    """

    def rename(let: Expr) -> Expr:
        var = tirx.Var(let.var.name, let.var.ty)
        body = tvm_ffi.structural_map(
            let.body, (tirx.Var, lambda v: var if v.same_as(let.var) else v)
        )
        return tirx.Let(var, let.value, body)

    bound: list[Expr] = []
    tvm_ffi.structural_walk(func.body, (tirx.Let, lambda let: bound.append(let.var)), order="post")
    if len(set(bound)) == len(bound):
        return func
    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.Let, rename), order="post"))
