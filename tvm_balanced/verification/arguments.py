"""Small seeded inputs for any kernel, made to fit what its TensorIR does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import ops_int8
from tvm_balanced.format.int8 import DenseFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.operators import WeightFormat, as_scaled, operator_for
from tvm_balanced.ops import FORMAT_ATTR, parse_format
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Block, Buffer, Expr
from tvm_balanced.verification import tensorir
from tvm_balanced.verification.tensorir import array_dtype, dtype_of, is_float, loads, nodes

# choices of the places that a block keeps, of which a packed weight is made
_CHOICES = 4096


@dataclass(frozen=True)
class KernelArguments:
    """What a kernel is called with."""

    # one per parameter of the function; numbers where a parameter is a scalar
    arrays: list[Array | float]
    outputs: tuple[int, ...]  # positions of the arrays that the kernel writes


def seeded_arguments(
    func: tirx.PrimFunc, seed: int, symbols: Mapping[str, int] | int
) -> KernelArguments:
    """Make small inputs for an unscheduled kernel, the same for the same seed.

    Floating-point inputs are standard normal; a weight (the right factor of a sum of products) is
    divided by the root of the number of terms, so that results are about 1 in every dtype. What is
    divided by, or goes into a root or a logarithm, is at least 1/2. Packed weights are packed from a
    random balanced matrix. Integers that are used as an index run over the axis they index, other
    integers are 0 or 1, those that divide at least 1. Outputs, and what the function does not use (workspaces
    of its scheduled form), hold NaN, the lowest integer, or True. ``symbols`` has the value of each symbol by
    its name, or one for all.

    Raises
    ------
    KernelReferenceError
        When a symbol has no value.
    """
    rng = np.random.default_rng(seed)
    numbers = {var: symbol_value(var, symbols) for var in symbols_of(func)}
    outputs = tensorir.output_positions(func)
    packed = _packed_weights(func, rng)
    facts = Facts(func, numbers)
    bounds, positive, scale = facts.index_bounds(), facts.positive(), facts.scales()
    divisors = facts.integer_divisors()
    used = set(nodes(func.body, tirx.Var))
    arrays: list[Array | float] = []
    for position, param in enumerate(func.params):
        if not tirx.is_buffer_var(param):
            arrays.append(numbers[param] if param in numbers else float(rng.standard_normal()))
            continue
        shape = tuple(facts.number(extent) for extent in param.ty.shape)
        dtype = array_dtype(dtype_of(param))
        if position in outputs or param not in used:
            arrays.append(_unwritten(shape, dtype))
        elif param in packed:
            arrays.append(packed[param])
        elif dtype.kind in "iu":
            low, high = (1, 4) if param in divisors else (0, 2)
            high = max(low + 1, bounds.get(param, high))
            arrays.append(rng.integers(low, high, shape).astype(dtype))
        elif dtype.kind == "b":
            arrays.append(rng.integers(0, 2, shape).astype(dtype))
        else:
            array = rng.standard_normal(shape)
            if param in positive:
                array = 0.5 + np.abs(array)
            arrays.append(np.asarray(scale.get(param, 1.0) * array).astype(dtype))
    return KernelArguments(arrays, outputs)


def _unwritten(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        return np.full(shape, np.iinfo(dtype).min, dtype)
    return np.full(shape, True if dtype.kind == "b" else np.nan, dtype)


def _packed_weights(func: tirx.PrimFunc, rng: np.random.Generator) -> dict[Buffer, Array]:
    """Operands of every packed weight, by parameter."""
    packed: dict[Buffer, Array] = {}
    for block in nodes(func.body, s_tir.SBlock):
        fmt: WeightFormat
        if FORMAT_ATTR in block.annotations:
            balanced = parse_format(str(block.annotations[FORMAT_ATTR]))
            _, *operands = tensorir.balanced_operands(block)
            dtype = dtype_of(operands[0])
            fmt = as_scaled(balanced) if dtype == "int8" else balanced
        elif ops_int8.FORMAT_ATTR in block.annotations:
            fmt = ops_int8.parse_format(str(block.annotations[ops_int8.FORMAT_ATTR]))
            _, *operands = tensorir.int8_operands(func, block)
            dtype = "float32"
        else:
            continue
        if operands[0] in packed:
            continue
        weight = _random_weight(fmt, rng).astype(
            array_dtype("float32" if dtype == "int8" else dtype)
        )
        # scales of int8 values, which the operator's block does not read, are any numbers
        arrays = operator_for(fmt).pack(weight, fmt)
        packed |= dict(zip(operands, arrays, strict=False))
    return packed


def _random_weight(fmt: WeightFormat, rng: np.random.Generator) -> Array:
    """Return a weight that results of about 1 are made with, float32, in the format's pattern."""
    pattern = None if isinstance(fmt, DenseFormat) else fmt.pattern
    dense = rng.standard_normal((fmt.out_features, fmt.in_features), np.float32)
    if pattern is not None:
        dense *= _kept_places(fmt.out_features, fmt.in_features, pattern, rng)
    terms = fmt.in_features * (1.0 if pattern is None else pattern.density)
    dense /= terms**0.5
    return dense


def symbols_of(func: tirx.PrimFunc) -> list[Expr]:
    """Symbols of a function's parameters, each once."""
    symbols: dict[Expr, None] = {}
    for param in func.params:
        if tirx.is_buffer_var(param):
            for extent in param.ty.shape:
                symbols.update(dict.fromkeys(nodes(extent, tirx.Var)))
        elif not is_float(dtype_of(param)):
            symbols[param] = None
    return list(symbols)


def symbol_value(var: Expr, symbols: Mapping[str, int] | int) -> int:
    """Value of one symbol by ``symbols``."""
    if not isinstance(symbols, Mapping):
        return symbols
    if var.name not in symbols:
        given = ", ".join(symbols) or "none"
        raise tensorir.KernelReferenceError(f"symbol {var.name} has no value; given: {given}")
    return symbols[var.name]


def _kept_places(
    out_features: int, in_features: int, pattern: BalancedPattern, rng: np.random.Generator
) -> Array:
    """Random balanced mask ``(N, K)``; pruning random weights gives as random a one, slowly."""
    block = pattern.block
    chosen = np.argsort(rng.random((_CHOICES, block)), axis=1)[:, : pattern.nnz]
    kept = np.zeros((_CHOICES, block), np.bool_)
    np.put_along_axis(kept, chosen, True, axis=1)
    mask = kept[rng.integers(0, _CHOICES, (out_features, -(-in_features // block)))]
    return mask.reshape(out_features, -1)[:, :in_features]


# operators without a value, or without a finite one, for some arguments
_NEEDS_POSITIVE = ("sqrt", "rsqrt", "log", "log2", "log10", "log1p")


class Facts:
    """What a function's TensorIR says about the inputs it can be given.

    Values are followed back from where they are used to parameters, through intermediate buffers.
    """

    def __init__(self, func: tirx.PrimFunc, numbers: Mapping[Expr, int]) -> None:
        self.func = func
        self.params = set(func.params)
        self.numbers = numbers
        self.blocks = nodes(func.body, s_tir.SBlock)
        self.loops = nodes(func.body, tirx.For)
        self.stores: dict[Buffer, list[Any]] = {}
        for store in nodes(func.body, tirx.BufferStore):
            self.stores.setdefault(store.buffer, []).append(store)

    def number(self, expr: Expr) -> int:
        """Value of an integer expression of symbols."""
        return int(tvm.sym.Analyzer().simplify(self._with_symbols(expr)))

    def _with_symbols(self, expr: Expr) -> Expr:
        def value(var: Expr) -> Expr:
            return tirx.const(self.numbers[var], dtype_of(var)) if var in self.numbers else var

        return tvm_ffi.structural_map(expr, (tirx.Var, value))

    # indices

    def index_bounds(self) -> dict[Buffer, int]:
        """Integer parameters that are used as an index, and the number of values they may take."""
        constraints = []
        accesses = [(a.source, a.indices) for a in loads(self.func.body)]
        accesses += [(s.buffer, s.indices) for all_ in self.stores.values() for s in all_]
        for buffer, indices in accesses:
            for index, extent in zip(indices, buffer.ty.shape, strict=True):
                params = self._integers(index)
                if params:
                    constraints.append((index, self.number(extent), params))
        bounds: dict[Buffer, int] = {}
        for _, extent, params in constraints:
            for param in params:
                bounds[param] = max(1, min(extent, bounds.get(param, extent)))
        for index, extent, params in constraints:
            # an index computed from the input: as many values as are sure to stay inside
            while not self._fits(index, extent, bounds) and any(bounds[p] > 1 for p in params):
                bounds.update({p: max(1, bounds[p] // 2) for p in params})
        return bounds

    def _integers(self, expr: Expr, seen: frozenset[Buffer] = frozenset()) -> list[Buffer]:
        """Integer parameters whose elements an expression depends on."""
        params: dict[Buffer, None] = {}
        for load in loads(expr):
            source = load.source
            if source in seen or is_float(dtype_of(source)):
                continue
            if source in self.stores:
                for store in self.stores[source]:
                    params.update(dict.fromkeys(self._integers(store.value, seen | {source})))
            elif source in self.params and dtype_of(source) != "bool":
                params[source] = None
        return list(params)

    def _fits(self, index: Expr, extent: int, bounds: Mapping[Buffer, int]) -> bool:
        low, high = self._range(index, bounds, frozenset())
        return low >= 0 and high < extent

    def _range(
        self, expr: Expr, bounds: Mapping[Buffer, int], seen: frozenset[Buffer]
    ) -> tuple[int, int]:
        """Lowest and highest value of an integer expression, as far as TVM can tell."""
        analyzer = tvm.sym.Analyzer()
        for loop in self.loops:
            self._limit(analyzer, loop.loop_var, loop.min, loop.extent)
        for block in self.blocks:
            for axis in block.iter_vars:
                self._limit(analyzer, axis.var, axis.dom.min, axis.dom.extent)

        def as_variable(load: Expr) -> Expr:
            var = tirx.Var("loaded", dtype_of(load))
            low, high = self._loaded_range(load.source, bounds, seen)
            if low > tvm.sym.ConstIntBound.NEG_INF and high < tvm.sym.ConstIntBound.POS_INF:
                first, count = (tirx.const(n, dtype_of(load)) for n in (low, high - low + 1))
                analyzer.bind(var, tvm.ir.Range.from_min_extent(first, count))
            return var

        loaded = tvm_ffi.structural_map(
            self._with_symbols(expr), (tvm.ir.expr.TensorLoad, as_variable)
        )
        bound = analyzer.const_int_bound(analyzer.simplify(loaded))
        return int(bound.min_value), int(bound.max_value)

    def _limit(self, analyzer: tvm.sym.Analyzer, var: Expr, start: Expr, extent: Expr) -> None:
        start, extent = self._with_symbols(start), self._with_symbols(extent)
        if isinstance(tvm.sym.Analyzer().simplify(extent), tirx.IntImm):
            analyzer.bind(var, tvm.ir.Range.from_min_extent(start, extent))

    def _loaded_range(
        self, buffer: Buffer, bounds: Mapping[Buffer, int], seen: frozenset[Buffer]
    ) -> tuple[int, int]:
        unknown = tvm.sym.ConstIntBound.NEG_INF, tvm.sym.ConstIntBound.POS_INF
        if buffer in seen or is_float(dtype_of(buffer)):
            return unknown
        if buffer in self.stores:
            ranges = [self._range(s.value, bounds, seen | {buffer}) for s in self.stores[buffer]]
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        if dtype_of(buffer) == "bool":
            return 0, 1
        return (0, bounds.get(buffer, 2) - 1) if buffer in self.params else unknown

    def integer_divisors(self) -> set[Buffer]:
        """Integer parameters that something is divided by: a zero would end the process."""
        kinds = tvm.ir.prim.expr
        return {
            param
            for kind in (kinds.Div, kinds.Mod, kinds.FloorDiv, kinds.FloorMod)
            for division in nodes(self.func.body, kind)
            if not is_float(dtype_of(division))
            for param in self._integers(division.b)
        }

    # floating point

    def positive(self) -> set[Buffer]:
        """Parameters that must stay away from zero and below."""
        params: set[Buffer] = set()
        for div in nodes(self.func.body, tvm.ir.prim.expr.Div):
            if is_float(dtype_of(div)):
                params |= self._sources(div.b)
        for call in nodes(self.func.body, tvm.ir.Call):
            name = tensorir.call_name(call)
            # a whole power of a negative number is one
            exponent = getattr(call.args[1], "value", 0.5) if name == "pow" else 1
            if name in _NEEDS_POSITIVE or not float(exponent).is_integer():
                params |= self._sources(call.args[0])
        return params

    def scales(self) -> dict[Buffer, float]:
        """Parameters to be made smaller, because many products with them are added up."""
        scales: dict[Buffer, float] = {}
        for block in self.blocks:
            balanced = {FORMAT_ATTR, ops_int8.FORMAT_ATTR} & {str(key) for key in block.annotations}
            update = None if balanced else tensorir.reduction(block)
            factors = tensorir.factors_of(update.value) if update and update.is_sum else None
            if factors is None:
                continue
            terms = self.terms(block)
            left, right = (self._sources(factor) for factor in factors)
            if left != right:
                for param in right or left:
                    scales[param] = min(scales.get(param, 1.0), terms**-0.5)
        return scales

    def terms(self, block: Block) -> int:
        """Count the iterations of a block that go into one element of its result."""
        total = 1
        for axis in block.iter_vars:
            if axis.iter_type == tirx.IterVar.CommReduce:
                # an extent may depend on the element; the longest counts
                _, most = self._range(axis.dom.extent, {}, frozenset())
                total *= max(1, most) if most < tvm.sym.ConstIntBound.POS_INF else 1
        return total

    def _sources(self, expr: Expr, seen: frozenset[Buffer] = frozenset()) -> set[Buffer]:
        """Floating-point parameters whose elements reach an expression by plain arithmetic."""
        kind = type(expr).__name__
        if kind == "Cast":
            return self._sources(expr.value, seen)
        if kind == "Mul" and tvm_ffi.structural_equal(expr.a, expr.b):
            return set()  # a square is positive whatever it is made of
        if kind in ("Add", "Mul", "Div"):
            return self._sources(expr.a, seen) | self._sources(expr.b, seen)
        if kind == "Select":
            return self._sources(expr.true_value, seen) | self._sources(expr.false_value, seen)
        if kind == "Call" and tensorir.call_name(expr) == "if_then_else":
            return self._sources(expr.args[1], seen) | self._sources(expr.args[2], seen)
        if kind != "TensorLoad" or not is_float(dtype_of(expr.source)) or expr.source in seen:
            return set()
        buffer = expr.source
        if buffer in self.stores:
            return {
                param
                for store in self.stores[buffer]
                for param in self._sources(store.value, seen | {buffer})
            }
        return {buffer} & self.params
