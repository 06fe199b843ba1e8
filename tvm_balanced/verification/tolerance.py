"""How far a kernel may be from its float64 reference, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt
from tvm_balanced.verification import tensorir as ir
from tvm_balanced.verification.arguments import Facts, symbol_value, symbols_of
from tvm_balanced.verification.tensorir import KernelReferenceError

# largest relative error of one rounding to nearest
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Deviation:
    """How far an output is, or may be, from its reference."""

    # largest error, as a share of the largest magnitude of the reference. Shows one wrong element
    largest: float
    # root mean square of the error, as a share of that of the reference. Shows a small error in all elements,
    # which the rounding of a two-byte dtype would hide in any one of them
    rms: float

    def within(self, limit: Deviation) -> bool:
        """Whether neither is larger than in ``limit``."""
        return self.largest <= limit.largest and self.rms <= limit.rms


def tolerance(func: tirx.PrimFunc, symbols: Mapping[str, int] | int) -> dict[int, Deviation]:
    """How far a kernel's outputs may be from :func:`evaluate`.

    Errors are counted along the computation, each as a share of the scale of the value it is made in;
    ``u`` is half a unit in the last place (``ROUNDING``) of the dtype in which the TensorIR computes.
    Linear errors add up to ``largest``, squares of standard deviations to ``rms``.

    =============================  ================  ===========  ====================================
    step                           linear            squared      reason
    =============================  ================  ===========  ====================================
    load, copy, min, max, choice   0                 0            exact
    times or divided by 2**n       0                 0            exact
    ``+ - * /``, narrowing cast    u                 u**2 / 3     rounded once; schedules round less
    constant                       u                 u**2         rounded to its dtype, if it is inexact
    sum of T terms                 2 sqrt(T) u       T u**2 / 6   independent roundings of the partial
                                                                  sums: sqrt(T) u / 3 with terms of one
                                                                  sign, sqrt(T / 6) u with both signs;
                                                                  four standard deviations are 1.6
    the operator, T slots a row    2 sqrt(T) u       T u**2 / 6   the same, in float32
    product of T terms             T u               T u**2       each factor's rounding stays
    exp, tanh, erf, pow, ...       c                 c**2         c is 32 u of float32, at least 2 u: the
                                                                  hardware's exp is off by 13 ulp for
                                                                  arguments in [-10, 0]
    sqrt, rsqrt, fma, ...          2 u               4 u**2       at most one ulp
    argument of exp, pow, log,     4 times its own   16 times     slope times size, for arguments of a
    sin, ...                                                      few units
    =============================  ================  ===========  ====================================

    Of two operands that are added or chosen from, the worse one counts; factors add up. As a value in
    between may be larger than the result it ends in, ``largest`` is 1.5 times the sum, and ``rms`` twice
    the root of the sum. Fewer than 64 elements have no ``rms`` to speak of: it is infinite. Not covered
    are ``tanh`` of a GPU under ``--use_fast_math``, which is good to 2**-11 only, and float32 results of
    tensor cores, whose sums are cut off instead of rounded.

    The limits are by position of the output among the parameters of the unscheduled kernel, for
    :func:`difference`; 0 for integers and booleans. ``symbols`` has the value of each symbol by its name, or
    one for all.

    Raises
    ------
    KernelReferenceError
        For a construct that is not known, and a symbol without a value.
    """
    shares = _Shares(func, symbols)
    limits = {}
    for position in ir.output_positions(func):
        param = func.params[position]
        share = shares.of_buffer(param)
        elements = math.prod(shares.facts.number(extent) for extent in param.ty.shape)
        rms = 2 * share.squared**0.5 if elements >= 64 or not share.squared else math.inf
        limits[position] = Deviation(1.5 * share.linear, rms)
    return limits


def difference(got: Array, expected: Array) -> Deviation:
    """How far a kernel's output is from its reference, an array of the same shape by :func:`evaluate`.

    0 where all agree; infinite where integers differ, or where only one of them is NaN or infinite. Errors
    against a reference that is 0 everywhere are not divided. NaN in both agrees: whoever fills outputs with
    NaN should see that the reference is finite.
    """
    infinite = Deviation(math.inf, math.inf)
    if got.shape != expected.shape:
        return infinite
    if expected.dtype.kind != "f":
        return Deviation(0.0, 0.0) if np.array_equal(got, expected) else infinite
    wide = got.astype(np.float64)
    finite = np.isfinite(expected)
    same = np.array_equal(wide[~finite], expected[~finite], equal_nan=True)
    wide, expected = wide[finite], expected[finite]
    if not same or not np.isfinite(wide).all():
        return infinite
    if not expected.size:
        return Deviation(0.0, 0.0)
    error = wide - expected
    return Deviation(
        float(np.abs(error).max()) / (float(np.abs(expected).max()) or 1.0),
        float(np.sqrt(np.mean(error**2))) / (float(np.sqrt(np.mean(expected**2))) or 1.0),
    )


_EXACT_CALLS = ("ceil", "copysign", "fabs", "abs", "floor", "likely", "nearbyint", "round", "trunc")
# good to a unit in the last place everywhere
_ROUNDED_CALLS = ("fma", "fmod", "hypot", "ldexp", "rsqrt", "sqrt")
_STEEP_CALLS = (
    *("cos", "cosh", "exp", "exp10", "exp2", "log", "log10", "log1p", "log2"),
    *("pow", "sin", "sinh", "tan"),
)
_CALL_ERROR = 32 * ROUNDING["float32"]


@dataclass(frozen=True)
class _Share:
    """Accumulated rounding error, as a share of a value's scale."""

    linear: float = 0.0
    squared: float = 0.0

    def __add__(self, other: _Share) -> _Share:
        return _Share(self.linear + other.linear, self.squared + other.squared)

    def times(self, factor: float) -> _Share:
        return _Share(self.linear * factor, self.squared * factor**2)


def _worst(*shares: _Share) -> _Share:
    return _Share(
        max((share.linear for share in shares), default=0.0),
        max((share.squared for share in shares), default=0.0),
    )


class _Shares:
    """Accumulated rounding error of every buffer."""

    def __init__(self, func: tirx.PrimFunc, symbols: Mapping[str, int] | int) -> None:
        self.facts = Facts(func, {var: symbol_value(var, symbols) for var in symbols_of(func)})
        self.terms = {
            store.buffer: self.facts.terms(block)
            for block in self.facts.blocks
            if any(axis.iter_type == tirx.IterVar.CommReduce for axis in block.iter_vars)
            for store in ir.nodes(block.body, tirx.BufferStore)
        }
        self.named = {bind.var: bind.value for bind in ir.nodes(func.body, tirx.stmt.Bind)}
        self.known: dict[Buffer, _Share] = {}

    def of_buffer(self, buffer: Buffer) -> _Share:
        if buffer not in self.known:
            # what a reduction reads of itself is counted by its terms
            self.known[buffer] = _Share()
            stores = self.facts.stores.get(buffer, [])
            self.known[buffer] = _worst(*(self._of_store(store) for store in stores))
        return self.known[buffer]

    def _of_store(self, store: Stmt) -> _Share:
        dtype = ir.dtype_of(store.buffer)
        if not ir.is_float(dtype):
            return _Share()
        share, unit = self.of(store.value), _unit(dtype)
        terms, kind = self.terms.get(store.buffer, 1), type(store.value).__name__
        if terms > 1 and kind == "Mul":
            return share + _Share(terms * unit, terms * unit**2)
        if terms > 1 and kind == "Add":
            return share + _Share(2 * terms**0.5 * unit, terms * unit**2 / 6)
        return share

    def of(self, expr: Expr) -> _Share:
        kind, dtype = type(expr).__name__, ir.dtype_of(expr)
        if kind == "Var":
            return self.of(self.named[expr]) if expr in self.named else _Share()
        if not ir.is_float(dtype):
            return _Share()
        unit = _unit(dtype)
        rounding = _Share(unit, unit**2 / 3)
        if kind == "FloatImm":
            kept = float(np.float64(expr.value).astype(ir.array_dtype(dtype)))
            return _Share() if kept == expr.value else _Share(unit, unit**2)
        if kind == "TensorLoad":
            return self.of_buffer(expr.source)
        if kind == "Cast":
            source = ir.dtype_of(expr.value)
            widens = ir.is_float(source) and _unit(source) >= unit
            return self.of(expr.value) + (_Share() if widens else rounding)
        if kind in ("Min", "Max"):
            return _worst(self.of(expr.a), self.of(expr.b))
        if kind in ("Add", "Sub"):
            return _worst(self.of(expr.a), self.of(expr.b)) + rounding
        if kind in ("Mul", "Div", "Mod", "FloorMod", "FloorDiv"):
            factors = self.of(expr.a) + self.of(expr.b)
            exact = _is_power_of_two(expr.b) or (kind == "Mul" and _is_power_of_two(expr.a))
            return factors if exact else factors + rounding
        if kind == "Select":
            return _worst(self.of(expr.true_value), self.of(expr.false_value))
        if kind == "Let":
            self.named[expr.var] = expr.value
            return self.of(expr.body)
        if kind == "Call":
            return self._of_call(expr, unit)
        raise KernelReferenceError(f"there is no tolerance for a {kind}: {ir.short(expr)}")

    def _of_call(self, call: Expr, unit: float) -> _Share:
        name, args = ir.call_name(call), list(call.args)
        if name == "if_then_else":
            return _worst(self.of(args[1]), self.of(args[2]))
        if name == "reinterpret":
            return _Share()
        if name == "call_pure_extern":
            name = str(args.pop(0).value).removesuffix("f")
        share = sum((self.of(arg) for arg in args), _Share())
        if name in _EXACT_CALLS:
            return share
        if name in _ROUNDED_CALLS:
            return share + _Share(2 * unit, 4 * unit**2)
        error = max(_CALL_ERROR, 2 * unit)
        return share.times(4 if name in _STEEP_CALLS else 1) + _Share(error, error**2)


def _unit(dtype: str) -> float:
    if dtype not in ROUNDING:
        raise KernelReferenceError(f"there is no tolerance for dtype {dtype}")
    return ROUNDING[dtype]


def _is_power_of_two(expr: Expr) -> bool:
    return type(expr).__name__ == "FloatImm" and math.frexp(abs(expr.value))[0] == 0.5
