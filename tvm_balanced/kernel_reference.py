"""Float64 reference of any kernel: unscheduled TensorIR evaluated by NumPy, its inputs and its tolerance.

:func:`evaluate` interprets a fused PrimFunc as it is before any schedule, one block at a time and
vectorised over the block's iteration space. Floating-point values are float64 from the inputs to the
outputs: nothing is rounded to the dtype of a buffer, so what a kernel differs by is its own rounding,
and :func:`tolerance` says how much of that is to be expected. The operator of this project is not
taken from its TensorIR but from its definition (:mod:`tvm_balanced.reference`), so that wrong TensorIR
of the operator is found as well as a wrong schedule.

What the evaluator does not know is an error that names the construct, never a guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

from tvm_balanced import reference
from tvm_balanced.errors import TvmBalancedError
from tvm_balanced.ops import BLOCK_DATA, FORMAT_ATTR, parse_format
from tvm_balanced.packing import Array, BalancedTensor, PackedFormat, numpy_dtype, pack
from tvm_balanced.pruning import prune_weight

# largest relative error of one rounding to nearest
ROUNDING = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}

# elements of one intermediate value; an expression holds a few of them, eight bytes an element
_CHUNK_ELEMENTS = 1 << 23

# iterations that may run one after the other; each costs tens of microseconds
_MAX_STEPS = 1 << 18


class KernelReferenceError(TvmBalancedError):
    """A kernel holds a construct without a reference, or breaks its own rules (exit code 1)."""


@dataclass(frozen=True)
class Arguments:
    """What a kernel is called with.

    Parameters
    ----------
    arrays : list of ndarray or int or float
        One per parameter of the function; numbers where a parameter is a scalar.
    outputs : tuple of int
        Positions of the arrays that the kernel writes.
    """

    arrays: list[Any]
    outputs: tuple[int, ...]


def output_positions(func: tirx.PrimFunc) -> tuple[int, ...]:
    """Positions of the parameters that ``func`` writes."""
    written = {store.buffer for store in _nodes(func.body, tirx.BufferStore)}
    return tuple(i for i, param in enumerate(func.params) if param in written)


def evaluate(func: tirx.PrimFunc, arrays: Sequence[Any]) -> dict[int, Array]:
    """Compute what a kernel should compute.

    Floating-point arithmetic is float64 throughout: a cast between floating-point dtypes changes
    nothing, constants are as exact as the TensorIR holds them, and an overflow of a narrow dtype in
    between does not happen. Casts from floating point to integers truncate as in C. Integers have the
    width and the wrap-around of their dtype. ``reinterpret`` rounds to the dtype whose bits it takes.
    A comparison, or an integer made from a computed value, can therefore differ from a kernel whose
    own rounding crosses the boundary.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled: blocks under serial loops.
    arrays : sequence of ndarray or int or float
        One per parameter, outputs included (what an output holds matters only where the kernel leaves
        or reads it). Not changed.

    Returns
    -------
    dict of int to ndarray
        Position of each output parameter to its value: float64, or the dtype of an integer or boolean.

    Raises
    ------
    KernelReferenceError
        For arrays that do not fit the parameters, an access out of range that no condition excludes,
        and a construct that is not known.
    """
    machine = _Machine(func, arrays)
    with np.errstate(all="ignore"):
        machine.run(func.body)
    return {i: machine.buffers[func.params[i]] for i in output_positions(func)}


def _nodes(root: Any, kind: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kind, found.append), order="post")
    return found


def _dtype(expr: Any) -> str:
    return str(expr.ty.dtype)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    try:
        return numpy_dtype(name)
    except TypeError as error:
        raise KernelReferenceError(f"the reference has no dtype {name}") from error


def _wide(array: Any) -> Any:
    """Floating point as float64, anything else as it is."""
    return array if array.dtype.kind in "biu" else array.astype(np.float64, copy=False)


def _truncated_division(a: Any, b: Any) -> Any:
    quotient = np.floor_divide(a, b)
    return quotient + ((np.fmod(a, b) != 0) & ((a < 0) != (b < 0))).astype(quotient.dtype)


def _divide(a: Any, b: Any) -> Any:
    return np.true_divide(a, b) if a.dtype.kind == "f" else _truncated_division(a, b)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "Mod": np.fmod,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "LShift": np.left_shift,
    "RShift": np.right_shift,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}


def _erf(x: Any) -> Any:
    # NumPy has none, and SciPy is no dependency
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float64)


# by the name of the operator, and of the C function behind call_pure_extern
_CALLS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": _erf,
    "exp": np.exp,
    "exp10": lambda x: np.power(10.0, x),
    "exp2": np.exp2,
    "fabs": np.abs,
    "floor": np.floor,
    "fma": lambda a, b, c: a * b + c,
    "fmod": np.fmod,
    "hypot": np.hypot,
    "isfinite": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "ldexp": np.ldexp,
    "likely": lambda x: x,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "round": np.rint,  # TVM's round goes to even
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}


@dataclass(frozen=True)
class _Combiner:
    """An associative update ``buffer = buffer op value`` and its neutral element."""

    ufunc: Any
    neutral: Callable[[np.dtype[Any]], Any]


def _lowest(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return False
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return True
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


_COMBINERS = {
    "Add": _Combiner(np.add, lambda _: 0),
    "Mul": _Combiner(np.multiply, lambda _: 1),
    "Max": _Combiner(np.maximum, _lowest),
    "Min": _Combiner(np.minimum, _highest),
    "And": _Combiner(np.logical_and, lambda _: True),
    "Or": _Combiner(np.logical_or, lambda _: False),
}

# an integer expression as a constant and a factor per axis
_Affine = tuple[int, dict[int, int]]
# start and end of every axis
_Ranges = tuple[tuple[int, int], ...]

_LOOPS_IN_ORDER = (
    tirx.stmt.ForKind.SERIAL,
    tirx.stmt.ForKind.PARALLEL,
    tirx.stmt.ForKind.VECTORIZED,
    tirx.stmt.ForKind.UNROLLED,
)


@dataclass(frozen=True)
class _Update:
    """A reduction block's body ``buffer[at] = buffer[at] op value``."""

    store: Any
    value: Any
    combiner: _Combiner

    @property
    def is_sum(self) -> bool:
        return self.combiner.ufunc is np.add


def _reduction(block: Any) -> _Update | None:
    """The body of ``block`` as an associative update; None where it is something else."""
    store = block.body
    if type(store).__name__ != "BufferStore" or type(store.value).__name__ not in _COMBINERS:
        return None
    pairs = ((store.value.a, store.value.b), (store.value.b, store.value.a))
    for current, value in pairs:
        if (
            type(current).__name__ == "TensorLoad"
            and current.source.same_as(store.buffer)
            and tvm_ffi.structural_equal(current.indices, store.indices)
            and not any(load.source.same_as(store.buffer) for load in _loads(value))
        ):
            return _Update(store, value, _COMBINERS[type(store.value).__name__])
    return None


def _product(value: Any) -> tuple[Any, Any] | None:
    """The factors of a product, which may have been widened."""
    while type(value).__name__ == "Cast" and _is_float(_dtype(value)):
        if not _is_float(_dtype(value.value)):
            return None
        value = value.value
    return (value.a, value.b) if type(value).__name__ == "Mul" else None


def _loads(root: Any) -> list[Any]:
    return _nodes(root, tvm.ir.expr.TensorLoad)


def _is_flat(stmt: Any) -> bool:
    """Whether a block's body can run for many iterations at once."""
    kind = type(stmt).__name__
    if kind == "SeqStmt":
        return all(_is_flat(part) for part in stmt.seq)
    if kind == "IfThenElse":
        return _is_flat(stmt.then_case) and (stmt.else_case is None or _is_flat(stmt.else_case))
    return kind in ("BufferStore", "Bind", "Evaluate")


def _reads_elsewhere(block: Any) -> bool:
    """Whether an iteration may read what another one writes."""
    stores = _nodes(block.body, tirx.BufferStore)
    return any(
        load.source.same_as(store.buffer)
        and not tvm_ffi.structural_equal(load.indices, store.indices)
        for load in _loads(block.body)
        for store in stores
    )


def _operands(block: Any) -> tuple[Any, Any, Any]:
    """Buffers of data, values and indices that the operator's block reads."""
    sources = [region.source for region in block.reads]
    data = [b for b in sources if b.name.startswith(BLOCK_DATA)]
    indices = [b for b in sources if _dtype(b) == "uint8"]
    values = [b for b in sources if _is_float(_dtype(b)) and b not in data]
    if not len(data) == len(values) == len(indices) == 1:
        raise KernelReferenceError(
            f"block {block.name_hint} does not read one array each of data, values and indices"
        )
    return data[0], values[0], indices[0]


def _extent(axis: tuple[int, int]) -> int:
    return axis[1] - axis[0]


def _split(ranges: _Ranges, axes_of: Callable[[_Ranges], Sequence[int]]) -> Iterator[_Ranges]:
    """Cut an iteration space so that an array over ``axes_of(part)`` stays small."""
    axes = axes_of(ranges)
    size = math.prod(_extent(ranges[axis]) for axis in axes)
    if size <= _CHUNK_ELEMENTS:
        yield ranges
        return
    longest = max(axes, key=lambda axis: _extent(ranges[axis]))
    start, end = ranges[longest]
    step = max(1, (end - start) * _CHUNK_ELEMENTS // size)
    for low in range(start, end, step):
        part = (low, min(low + step, end))
        yield from _split((*ranges[:longest], part, *ranges[longest + 1 :]), axes_of)


def _call_name(call: Any) -> str:
    return str(getattr(call.op, "name", call.op)).rpartition(".")[2]


def _short(node: Any) -> str:
    text = " ".join(str(node).split())
    return text if len(text) <= 120 else text[:117] + "..."


class _Machine:
    """State of one evaluation.

    While a block runs vectorised, ``ranges`` holds the part of its loops that is being computed, one
    axis a loop; values are scalars or arrays with one axis per loop that broadcast against each other.
    """

    def __init__(self, func: tirx.PrimFunc, arrays: Sequence[Any]) -> None:
        self.values: dict[Any, Any] = {}
        self.affine: dict[Any, _Affine] = {}
        self.buffers: dict[Any, Array] = {}
        self.ranges: _Ranges = ()
        self.guard: Any = None
        self.steps = 0
        self._bind(func, arrays)

    # parameters

    def _bind(self, func: tirx.PrimFunc, arrays: Sequence[Any]) -> None:
        if len(arrays) != len(func.params):
            raise KernelReferenceError(
                f"{len(arrays)} arguments were given for a kernel of {len(func.params)} parameters"
            )
        written = set(output_positions(func))
        extents = []
        for position, (param, given) in enumerate(zip(func.params, arrays, strict=True)):
            if not tirx.is_buffer_var(param):
                self._set(param, given)
                continue
            dtype, shape = _numpy_dtype(_dtype(param)), param.ty.shape
            if not isinstance(given, np.ndarray) or given.dtype != dtype:
                what = given.dtype.name if isinstance(given, np.ndarray) else type(given).__name__
                raise KernelReferenceError(
                    f"parameter {param.name} was given as {what}, expected an array of {dtype.name}"
                )
            if given.ndim != len(shape):
                raise KernelReferenceError(
                    f"parameter {param.name} was given with {given.ndim} axes, expected {len(shape)}"
                )
            extents += [(param, e, n) for e, n in zip(shape, given.shape, strict=True)]
            # an output takes float64 results; an input is widened where it is read
            self.buffers[param] = _wide(given).copy() if position in written else given
        # bare symbols first: they fix most of the expressions
        for _, extent, number in extents:
            if isinstance(extent, tirx.Var) and extent not in self.values:
                self._set(extent, number)
        for param, extent, number in extents:
            self._solve(extent, number)
            if int(self.evaluate(extent)) != number:
                raise KernelReferenceError(
                    f"parameter {param.name} was given an extent of {number}, expected {extent} = "
                    f"{int(self.evaluate(extent))}"
                )

    def _set(self, var: Any, number: Any) -> None:
        dtype = _dtype(var)
        self.values[var] = (
            np.float64(number) if _is_float(dtype) else _numpy_dtype(dtype).type(number)
        )

    def _solve(self, extent: Any, number: int) -> None:
        """Give the one symbol that ``extent`` leaves open the value that makes it ``number``."""
        unknown = [v for v in dict.fromkeys(_nodes(extent, tirx.Var)) if v not in self.values]
        if not unknown:
            return
        if len(unknown) == 1:
            (var,) = unknown
            points = []
            for trial in (0, 1):
                self._set(var, trial)
                points.append(int(self.evaluate(extent)))
            slope = points[1] - points[0]
            if slope and (number - points[0]) % slope == 0:
                self._set(var, (number - points[0]) // slope)
                return
        raise KernelReferenceError(f"extent {extent} does not fix the value of its symbols")

    # statements

    def run(self, stmt: Any) -> None:
        kind = type(stmt).__name__
        if kind == "SeqStmt":
            for part in stmt.seq:
                self.run(part)
        elif kind == "BufferStore":
            self.store(stmt.buffer, stmt.indices, self.evaluate(stmt.value))
        elif kind == "For":
            self._loops(stmt)
        elif kind == "SBlockRealize":
            self._block(stmt, [])
        elif kind == "Bind":
            # a copy: the value must not follow what is stored later
            self.values[stmt.var] = np.array(self.evaluate(stmt.value))
            self.affine.pop(stmt.var, None)
        elif kind == "IfThenElse":
            condition = self.evaluate(stmt.condition)
            with self._where(condition) as some:
                if some:
                    self.run(stmt.then_case)
            if stmt.else_case is not None:
                with self._where(np.logical_not(condition)) as some:
                    if some:
                        self.run(stmt.else_case)
        elif kind == "While" and not self.ranges:
            while self.evaluate(stmt.condition):
                self._step(stmt)
                self.run(stmt.body)
        elif kind == "AllocBuffer":
            self._allocate(stmt.buffer)
        elif kind == "Evaluate" and isinstance(stmt.value, tirx.IntImm):
            pass  # an empty statement
        else:
            raise KernelReferenceError(f"the reference has no {kind} statement: {_short(stmt)}")

    def _loops(self, loop: Any) -> None:
        nest = []
        inner = loop
        while type(inner).__name__ == "For":
            self._check_loop(inner)
            nest.append(inner)
            inner = inner.body
        bound = {outer.loop_var for outer in nest}
        rectangular = all(
            var not in bound
            for part in nest
            for expr in (part.min, part.extent)
            for var in _nodes(expr, tirx.Var)
        )
        # statements without a block, as te.extern has them, run in their order
        if type(inner).__name__ == "SBlockRealize" and rectangular:
            self._block(inner, nest)
            return
        start, extent = int(self.evaluate(loop.min)), int(self.evaluate(loop.extent))
        for i in range(start, start + extent):
            self._step(loop)
            self._set(loop.loop_var, i)
            self.run(loop.body)

    def _check_loop(self, loop: Any) -> None:
        step = getattr(loop, "step", None)
        if loop.kind not in _LOOPS_IN_ORDER or loop.thread_binding is not None:
            raise KernelReferenceError(
                f"loop {loop.loop_var.name} is bound to a thread: give the kernel before scheduling"
            )
        if step is not None and int(self.evaluate(step)) != 1:
            raise KernelReferenceError(f"loop {loop.loop_var.name} has a step other than 1")

    def _step(self, stmt: Any) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise KernelReferenceError(
                f"more than {_MAX_STEPS} iterations depend on the ones before: {_short(stmt)}; use "
                "smaller inputs"
            )

    @contextmanager
    def _where(self, condition: Any) -> Iterator[bool]:
        """Evaluate or store where ``condition`` holds only; tells whether it holds anywhere."""
        before = self.guard
        holds = condition if before is None else np.logical_and(before, condition)
        some = bool(np.any(holds))
        self.guard = None if np.all(holds) else holds
        try:
            yield some
        finally:
            self.guard = before

    # blocks

    def _block(self, realize: Any, loops: list[Any]) -> None:
        block = realize.block
        if block.match_buffers:
            raise KernelReferenceError(f"block {block.name_hint} has match_buffer regions")
        for buffer in block.alloc_buffers:
            self._allocate(buffer)
        if FORMAT_ATTR in block.annotations:
            self._balanced(block)
            return
        ranges: _Ranges = tuple(
            (start, start + int(self.evaluate(loop.extent)))
            for loop in loops
            for start in (int(self.evaluate(loop.min)),)
        )
        if not _is_flat(block.body):
            self._nested(realize, loops, ranges)
            return
        ordered = self._ordered_axes(realize, loops)
        reduced = {a for a, kind in ordered.items() if kind == tirx.IterVar.CommReduce}

        def enter(part: _Ranges) -> None:
            self._enter(realize, loops, part)

        try:
            if block.init is not None:
                first = tuple((r[0], r[0] + 1) if a in reduced else r for a, r in enumerate(ranges))
                for part in _split(first, lambda _: range(len(ranges))):
                    enter(part)
                    self._predicated(realize, block.init)
            if any(start >= end for start, end in ranges):
                return
            update = _reduction(block) if reduced and set(ordered) == reduced else None
            if update is not None:
                enter(ranges)
                for part in _split(ranges, self._operand_axes(update)):
                    enter(part)
                    with self._where(self.evaluate(realize.predicate)) as some:
                        value = self._reduce(update, reduced) if some else None
                    if value is not None:
                        enter(
                            tuple(
                                (s, s + 1) if a in reduced else (s, e)
                                for a, (s, e) in enumerate(part)
                            )
                        )
                        store = update.store
                        current = self.load(store.buffer, store.indices)
                        self.store(
                            store.buffer, store.indices, update.combiner.ufunc(current, value)
                        )
                return
            if _reads_elsewhere(block):
                ordered = dict.fromkeys(range(len(loops)), tirx.IterVar.Ordered)
            for fixed in itertools.product(*(range(*ranges[axis]) for axis in ordered)):
                if ordered:
                    self._step(realize)
                at = dict(zip(ordered, fixed, strict=True))
                rest = tuple((at[a], at[a] + 1) if a in at else r for a, r in enumerate(ranges))
                for part in _split(rest, lambda _: range(len(ranges))):
                    enter(part)
                    self._predicated(realize, block.body)
        finally:
            self.ranges = ()

    def _predicated(self, realize: Any, stmt: Any) -> None:
        with self._where(self.evaluate(realize.predicate)) as some:
            if some:
                self.run(stmt)

    def _nested(self, realize: Any, loops: list[Any], ranges: _Ranges) -> None:
        """A block that holds blocks or loops: its own loops run one iteration after the other."""
        block = realize.block
        for point in itertools.product(*(range(*r) for r in ranges)):
            if loops:
                self._step(realize)
            for loop, i in zip(loops, point, strict=True):
                self._set(loop.loop_var, i)
            for axis, value in zip(block.iter_vars, realize.iter_values, strict=True):
                self.values[axis.var] = self.evaluate(value)
            if not self.evaluate(realize.predicate):
                continue
            if block.init is not None and all(
                int(self.values[axis.var]) == int(self.evaluate(axis.dom.min))
                for axis in block.iter_vars
                if axis.iter_type == tirx.IterVar.CommReduce
            ):
                self.run(block.init)
            self.run(block.body)

    def _ordered_axes(self, realize: Any, loops: list[Any]) -> dict[int, int]:
        """Loops whose iterations may depend on each other, by the kind of their block axis."""
        number = {loop.loop_var: a for a, loop in enumerate(loops)}
        spatial, ordered = set(), {}
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            used = {number[v] for v in _nodes(value, tirx.Var) if v in number}
            if axis.iter_type == tirx.IterVar.DataPar:
                spatial |= used
            else:
                ordered.update(dict.fromkeys(used, axis.iter_type))
        for axis in spatial & ordered.keys():
            ordered[axis] = tirx.IterVar.Ordered
        return dict(sorted(ordered.items()))

    def _enter(self, realize: Any, loops: list[Any], ranges: _Ranges) -> None:
        """Bind loops and block axes to the part ``ranges`` of the iteration space."""
        self.ranges = ranges
        for axis, (loop, (start, end)) in enumerate(zip(loops, ranges, strict=True)):
            shape = [1] * len(ranges)
            shape[axis] = end - start
            dtype = _numpy_dtype(_dtype(loop.loop_var))
            self.values[loop.loop_var] = np.arange(start, end, dtype=dtype).reshape(shape)
            self.affine[loop.loop_var] = (start, {axis: 1})
        for iter_var, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            self.values[iter_var.var] = self.evaluate(value)
            form = self._as_affine(value)
            if form is not None:
                self.affine[iter_var.var] = form
            else:
                self.affine.pop(iter_var.var, None)

    def _allocate(self, buffer: Any) -> None:
        shape = [int(self.evaluate(extent)) for extent in buffer.ty.shape]
        dtype = _dtype(buffer)
        # what is read before it is written shows as NaN
        self.buffers[buffer] = (
            np.full(shape, np.nan) if _is_float(dtype) else np.zeros(shape, _numpy_dtype(dtype))
        )

    def _balanced(self, block: Any) -> None:
        """The project's operator, by its definition."""
        fmt = parse_format(str(block.annotations[FORMAT_ATTR]))
        data, values, indices = (self.buffers[b] for b in _operands(block))
        for name, array, shape in (
            ("values", values, fmt.values_shape),
            ("indices", indices, fmt.indices_shape),
        ):
            if array.shape != shape:
                raise KernelReferenceError(
                    f"{name} of block {block.name_hint} have shape {array.shape}, expected {shape}"
                )
        columns = data.reshape(*data.shape[:-2], -1)[..., : fmt.in_features]
        result = reference.balanced_sparse_dense(columns, BalancedTensor(values, indices, fmt))
        out = self.buffers[block.writes[0].source]
        out[..., : fmt.out_features] = result
        out[..., fmt.out_features :] = 0  # rows that the layout adds

    # reductions

    def _operand_axes(self, update: _Update) -> Callable[[_Ranges], Sequence[int]]:
        """For :func:`_split`: the axes of the largest array that the reduction makes."""
        product = _product(update.value) if update.is_sum else None
        groups = [self._axes(part) for part in (product or (update.value,))]
        if product is not None:  # the sum of products itself never exists
            groups.append(self._axes(update.store.indices))

        def largest(ranges: _Ranges) -> Sequence[int]:
            return max(groups, key=lambda axes: math.prod(_extent(ranges[a]) for a in axes))

        return largest

    def _axes(self, expr: Any) -> list[int]:
        used: set[int] = set()
        for var in _nodes(expr, tirx.Var):
            shape = np.shape(self.values.get(var, 0))
            used.update(axis for axis, extent in enumerate(shape) if extent > 1)
        return sorted(used)

    def _reduce(self, update: _Update, reduced: set[int]) -> Any:
        """The new terms of a reduction, combined; reduced axes have extent 1."""
        axes = tuple(sorted(reduced))
        product = _product(update.value) if update.is_sum and self.guard is None else None
        if product is not None:
            a, b = (self._full(self.evaluate(part)) for part in product)
            terms = math.prod(np.broadcast_shapes(a.shape, b.shape))
            if terms > 4 * max(a.size, b.size):
                return self._contract(a, b, axes)
            value = a * b
        else:
            value = self._full(self.evaluate(update.value))
        if self.guard is not None:
            value = np.where(self.guard, value, update.combiner.neutral(value.dtype))
            value = value.astype(self.buffers[update.store.buffer].dtype, copy=False)
        ufunc = update.combiner.ufunc
        if ufunc is np.add or ufunc is np.multiply:
            # terms that are the same along an axis are one value in the array
            shape = [
                _extent(r) if i in reduced else n
                for (i, r), n in zip(enumerate(self.ranges), value.shape, strict=True)
            ]
            return ufunc.reduce(
                np.broadcast_to(value, shape), axis=axes, dtype=value.dtype, keepdims=True
            )
        return ufunc.reduce(value, axis=axes, keepdims=True)

    def _full(self, value: Any) -> Array:
        """With one axis per loop."""
        array = np.asarray(value)
        return array if array.ndim else array.reshape((1,) * len(self.ranges))

    def _contract(self, a: Array, b: Array, reduced: tuple[int, ...]) -> Array:
        """Sum of ``a * b`` over the reduced axes by a matrix product."""
        factor = 1
        for axis in reduced:
            if a.shape[axis] == 1 and b.shape[axis] == 1:
                factor *= _extent(self.ranges[axis])
            elif b.shape[axis] == 1:
                a = a.sum(axis=axis, dtype=a.dtype, keepdims=True)
            elif a.shape[axis] == 1:
                b = b.sum(axis=axis, dtype=b.dtype, keepdims=True)
        rank = range(a.ndim)
        both = [i for i in rank if a.shape[i] > 1 and b.shape[i] > 1]
        shared = [i for i in both if i not in reduced]
        summed = [i for i in both if i in reduced]
        only_a = [i for i in rank if a.shape[i] > 1 and b.shape[i] == 1]
        only_b = [i for i in rank if b.shape[i] > 1 and a.shape[i] == 1]
        ones = [i for i in rank if a.shape[i] == 1 and b.shape[i] == 1]

        def lengths(array: Array, axes: list[int]) -> list[int]:
            return [array.shape[i] for i in axes]

        def matrix(array: Array, *groups: list[int]) -> Array:
            rest = [i for i in rank if not any(i in group for group in groups)]
            turned = array.transpose(*itertools.chain(*groups), *rest)
            return turned.reshape([math.prod(lengths(array, group)) for group in groups])

        total = matrix(a, shared, only_a, summed) @ matrix(b, shared, summed, only_b)
        order = [*shared, *only_a, *only_b, *summed, *ones]
        total = total.reshape(
            *lengths(a, shared),
            *lengths(a, only_a),
            *lengths(b, only_b),
            *[1] * (len(summed) + len(ones)),
        )
        return factor * total.transpose(np.argsort(order))

    # expressions

    def evaluate(self, expr: Any) -> Any:
        kind = type(expr).__name__
        if kind == "Var":
            if expr not in self.values:
                raise KernelReferenceError(f"symbol {expr.name} has no value")
            return self.values[expr]
        if kind == "IntImm":
            return _numpy_dtype(_dtype(expr)).type(int(expr.value))
        if kind == "FloatImm":
            return np.float64(expr.value)
        if kind in _BINARY:
            return _BINARY[kind](self.evaluate(expr.a), self.evaluate(expr.b))
        if kind == "TensorLoad":
            return self.load(expr.source, expr.indices)
        if kind == "Cast":
            return self._cast(expr)
        if kind == "Select":
            return self._choose(expr.condition, expr.true_value, expr.false_value)
        if kind in ("And", "Or"):
            first = self.evaluate(expr.a)
            # the second operand may rely on the first
            with self._where(first if kind == "And" else np.logical_not(first)) as some:
                second = self.evaluate(expr.b) if some else np.bool_(kind == "Or")
            return (np.logical_and if kind == "And" else np.logical_or)(first, second)
        if kind == "Not":
            return np.logical_not(self.evaluate(expr.a))
        if kind == "BitwiseNot":
            return np.invert(self.evaluate(expr.a))
        if kind == "Let":
            self.values[expr.var] = self.evaluate(expr.value)
            self.affine.pop(expr.var, None)
            return self.evaluate(expr.body)
        if kind == "Call":
            return self._call(expr)
        raise KernelReferenceError(f"the reference has no {kind} expression: {_short(expr)}")

    def _cast(self, expr: Any) -> Any:
        value, to = self.evaluate(expr.value), _dtype(expr)
        if to == "bool":
            return np.asarray(value) != 0
        if not _is_float(to):
            return np.asarray(value).astype(_numpy_dtype(to), copy=False)
        return value if _is_float(_dtype(expr.value)) else np.asarray(value).astype(np.float64)

    def _choose(self, condition: Any, if_true: Any, if_false: Any) -> Any:
        holds = self.evaluate(condition)
        with self._where(holds) as some_true:
            first = self.evaluate(if_true) if some_true else None
        with self._where(np.logical_not(holds)) as some_false:
            second = self.evaluate(if_false) if some_false else None
        if first is None and second is None:  # nothing is asked for
            return _wide(np.zeros((), _numpy_dtype(_dtype(if_true))))
        if first is None or second is None:
            return second if first is None else first
        return np.where(holds, first, second)

    def _call(self, call: Any) -> Any:
        full, name = str(getattr(call.op, "name", call.op)), _call_name(call)
        if name == "if_then_else":
            return self._choose(*call.args)
        if name == "reinterpret":
            source = _numpy_dtype(_dtype(call.args[0]))
            value = np.asarray(self.evaluate(call.args[0])).astype(source)
            return _wide(value.view(_numpy_dtype(_dtype(call))))
        args = list(call.args)
        if name == "call_pure_extern":
            # expf, fabsf, ...
            full = f"call_pure_extern of {args[0].value}"
            name = str(args.pop(0).value)
            name = name[:-1] if name not in _CALLS and name.endswith("f") else name
        if full.startswith(("tirx.ptx.", "tirx.cuda.")) or name not in _CALLS:
            raise KernelReferenceError(f"the reference has no {full}: {_short(call)}")
        return _CALLS[name](*(self.evaluate(arg) for arg in args))

    # memory

    def load(self, buffer: Any, indices: Sequence[Any]) -> Any:
        array = self._array(buffer)
        view = self._view(array, indices)
        if view is not None:
            return _wide(view)
        return _wide(array[self._positions(buffer, array, indices)])

    def store(self, buffer: Any, indices: Sequence[Any], value: Any) -> None:
        array = self._array(buffer)
        view = self._view(array, indices)
        if view is None:
            at = np.broadcast_arrays(*self._positions(buffer, array, indices), value)
            *place, value = at
            chosen = slice(None) if self.guard is None else np.broadcast_to(self.guard, value.shape)
            array[tuple(p[chosen] for p in place)] = value[chosen]
            return
        if self.guard is not None:
            value = np.where(self.guard, value, view)
        if np.ndim(value):
            # iterations that write one place: the last one stays
            value = value[
                tuple(
                    slice(-1, None) if n == 1 and v > 1 else slice(None)
                    for n, v in zip(view.shape, value.shape, strict=True)
                )
            ]
        view[...] = value

    def _array(self, buffer: Any) -> Array:
        if buffer not in self.buffers:
            raise KernelReferenceError(f"buffer {buffer.name} is neither a parameter nor allocated")
        return self.buffers[buffer]

    def _view(self, array: Array, indices: Sequence[Any]) -> Array | None:
        """The elements at affine ``indices`` without a copy; None where they are not, or not inside."""
        first = []
        strides = [0] * len(self.ranges)
        for index, extent, stride in zip(indices, array.shape, array.strides, strict=True):
            form = self._as_affine(index)
            if form is None:
                return None
            low, high = self._bounds(form)
            if low < 0 or high >= extent:
                return None
            first.append(slice(form[0], None))
            for axis, factor in form[1].items():
                strides[axis] += factor * stride
        shape = [_extent(r) if s else 1 for r, s in zip(self.ranges, strides, strict=True)]
        view: Array = np.lib.stride_tricks.as_strided(array[tuple(first)], shape, strides)
        return view

    def _positions(self, buffer: Any, array: Array, indices: Sequence[Any]) -> tuple[Any, ...]:
        found = []
        for index, extent in zip(indices, array.shape, strict=True):
            at = np.asarray(self.evaluate(index))
            outside = (at < 0) | (at >= extent)
            if outside.any():
                if self.guard is not None:
                    outside = outside & self.guard
                if outside.any():
                    raise KernelReferenceError(
                        f"{buffer.name} is accessed out of range: index {_short(index)} reaches "
                        f"{at[at < 0].min() if (at < 0).any() else at.max()}, the extent is {extent}"
                    )
                at = np.clip(at, 0, max(extent - 1, 0))
            found.append(at)
        return tuple(found)

    def _as_affine(self, expr: Any) -> _Affine | None:
        kind = type(expr).__name__
        if kind == "IntImm":
            return int(expr.value), {}
        if kind == "Var":
            if expr in self.affine and self.ranges:
                return self.affine[expr]
            value = self.values.get(expr)
            return (int(value), {}) if value is not None and np.ndim(value) == 0 else None
        if kind == "Cast":
            both_integers = not _is_float(_dtype(expr.value)) and _dtype(expr) in ("int32", "int64")
            return self._as_affine(expr.value) if both_integers else None
        if kind not in ("Add", "Sub", "Mul", "FloorDiv", "FloorMod"):
            return None
        a, b = self._as_affine(expr.a), self._as_affine(expr.b)
        if a is None or b is None:
            return None
        if kind in ("Add", "Sub"):
            sign = 1 if kind == "Add" else -1
            factors = dict(a[1])
            for axis, factor in b[1].items():
                factors[axis] = factors.get(axis, 0) + sign * factor
            return a[0] + sign * b[0], factors
        if kind == "Mul":
            if a[1] and b[1]:
                return None
            (times, _), (base, factors) = (a, b) if not a[1] else (b, a)
            return times * base, {axis: times * factor for axis, factor in factors.items()}
        if b[1] or b[0] <= 0:
            return None
        low, high = (bound // b[0] for bound in self._bounds(a))
        if low != high:
            return None
        return (low, {}) if kind == "FloorDiv" else (a[0] - low * b[0], a[1])

    def _bounds(self, form: _Affine) -> tuple[int, int]:
        low = high = form[0]
        for axis, factor in form[1].items():
            reach = factor * (_extent(self.ranges[axis]) - 1)
            low, high = low + min(reach, 0), high + max(reach, 0)
        return low, high


# Arguments


def seeded_arguments(func: tirx.PrimFunc, seed: int, symbols: Mapping[str, int] | int) -> Arguments:
    """Make small inputs for a kernel.

    Floating-point inputs are standard normal; a weight (the right factor of a sum of products) is
    divided by the root of the number of terms, so that results are about 1 in every dtype. What is
    divided by, or goes into a root or a logarithm, is at least 1/2. Packed weights are packed from a
    pruned matrix. Integers that are used as an index run over the axis they index, other integers are
    0 or 1. Outputs hold NaN, the lowest integer, or True.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled.
    seed : int
        Same seed, same arrays.
    symbols : mapping of str to int, or int
        Value of each symbol by its name, or one value for all.

    Returns
    -------
    Arguments

    Raises
    ------
    KernelReferenceError
        When a symbol has no value.
    """
    rng = np.random.default_rng(seed)
    numbers = {var: _symbol(var, symbols) for var in _symbols(func)}
    outputs = output_positions(func)
    packed = _packed_weights(func, rng)
    facts = _Facts(func, numbers)
    bounds, positive, scale = facts.index_bounds(), facts.positive(), facts.scales()
    arrays: list[Any] = []
    for position, param in enumerate(func.params):
        if not tirx.is_buffer_var(param):
            arrays.append(numbers[param] if param in numbers else float(rng.standard_normal()))
            continue
        shape = tuple(facts.number(extent) for extent in param.ty.shape)
        dtype = _numpy_dtype(_dtype(param))
        if position in outputs:
            arrays.append(_unwritten(shape, dtype))
        elif param in packed:
            arrays.append(packed[param])
        elif dtype.kind in "iu":
            arrays.append(rng.integers(0, bounds.get(param, 2), shape).astype(dtype))
        elif dtype.kind == "b":
            arrays.append(rng.integers(0, 2, shape).astype(dtype))
        else:
            array = rng.standard_normal(shape)
            if param in positive:
                array = 0.5 + np.abs(array)
            arrays.append(np.asarray(scale.get(param, 1.0) * array).astype(dtype))
    return Arguments(arrays, outputs)


def _unwritten(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if dtype.kind in "iu":
        return np.full(shape, np.iinfo(dtype).min, dtype)
    return np.full(shape, True if dtype.kind == "b" else np.nan, dtype)


def _symbols(func: tirx.PrimFunc) -> list[Any]:
    """Symbols of a function's parameters, each once."""
    found: dict[Any, None] = {}
    for param in func.params:
        if not tirx.is_buffer_var(param):
            if not _is_float(_dtype(param)):
                found[param] = None
            continue
        for extent in param.ty.shape:
            found.update(dict.fromkeys(_nodes(extent, tirx.Var)))
    return list(found)


def _symbol(var: Any, symbols: Mapping[str, int] | int) -> int:
    if not isinstance(symbols, Mapping):
        return symbols
    if var.name not in symbols:
        given = ", ".join(symbols) or "none"
        raise KernelReferenceError(f"symbol {var.name} has no value; given: {given}")
    return symbols[var.name]


def _balanced_blocks(func: tirx.PrimFunc) -> list[Any]:
    return [b for b in _nodes(func.body, s_tir.SBlock) if FORMAT_ATTR in b.annotations]


def _packed_weights(func: tirx.PrimFunc, rng: np.random.Generator) -> dict[Any, Array]:
    """Values and indices of every packed weight, by parameter."""
    packed: dict[Any, Array] = {}
    for block in _balanced_blocks(func):
        fmt: PackedFormat = parse_format(str(block.annotations[FORMAT_ATTR]))
        _, values, indices = _operands(block)
        if values in packed:
            continue
        dense = rng.standard_normal((fmt.out_features, fmt.in_features), np.float32)
        dense /= fmt.in_features**0.5
        dense = prune_weight(dense.astype(_numpy_dtype(_dtype(values))), fmt.pattern)
        weight = pack(dense, fmt.pattern, fmt.layout, fmt.encoding)
        packed[values], packed[indices] = weight.values, weight.indices
    return packed


# operators without a value, or without a finite one, for some arguments
_NEEDS_POSITIVE = ("sqrt", "rsqrt", "log", "log2", "log10", "log1p")


class _Facts:
    """What a function's TensorIR says about the inputs it can be given.

    Values are followed back from where they are used to parameters, through intermediate buffers.
    """

    def __init__(self, func: tirx.PrimFunc, numbers: Mapping[Any, int]) -> None:
        self.func = func
        self.params = set(func.params)
        self.numbers = numbers
        self.blocks = _nodes(func.body, s_tir.SBlock)
        self.loops = _nodes(func.body, tirx.For)
        self.stores: dict[Any, list[Any]] = {}
        for store in _nodes(func.body, tirx.BufferStore):
            self.stores.setdefault(store.buffer, []).append(store)
        self.reducing = {
            store.buffer
            for block in self.blocks
            if any(axis.iter_type != tirx.IterVar.DataPar for axis in block.iter_vars)
            for store in _nodes(block.body, tirx.BufferStore)
        }

    def number(self, expr: Any) -> int:
        """An integer expression of symbols."""
        return _to_int(self._with_symbols(expr))

    def _with_symbols(self, expr: Any) -> Any:
        return tvm_ffi.structural_map(
            expr,
            (
                tirx.Var,
                lambda var: (
                    tirx.const(self.numbers[var], _dtype(var)) if var in self.numbers else var
                ),
            ),
        )

    # indices

    def index_bounds(self) -> dict[Any, int]:
        """Integer parameters that are used as an index, and the number of values they may take."""
        constraints = []
        accesses = [(a.source, a.indices) for a in _loads(self.func.body)]
        accesses += [(s.buffer, s.indices) for all_ in self.stores.values() for s in all_]
        for buffer, indices in accesses:
            for index, extent in zip(indices, buffer.ty.shape, strict=True):
                params = self._integers(index)
                if params:
                    constraints.append((index, self.number(extent), params))
        bounds: dict[Any, int] = {}
        for _, extent, params in constraints:
            for param in params:
                bounds[param] = max(1, min(extent, bounds.get(param, extent)))
        for index, extent, params in constraints:
            # an index computed from the input: as many values as are sure to stay inside
            while not self._fits(index, extent, bounds) and any(bounds[p] > 1 for p in params):
                bounds.update({p: max(1, bounds[p] // 2) for p in params})
        return bounds

    def _integers(self, expr: Any, seen: frozenset[Any] = frozenset()) -> list[Any]:
        """Integer parameters whose elements an expression depends on."""
        found: dict[Any, None] = {}
        for load in _loads(expr):
            source = load.source
            if source in seen or _is_float(_dtype(source)):
                continue
            if source in self.stores:
                for store in self.stores[source]:
                    found.update(dict.fromkeys(self._integers(store.value, seen | {source})))
            elif source in self.params and _dtype(source) != "bool":
                found[source] = None
        return list(found)

    def _fits(self, index: Any, extent: int, bounds: Mapping[Any, int]) -> bool:
        low, high = self._range(index, bounds, frozenset())
        return low >= 0 and high < extent

    def _range(self, expr: Any, bounds: Mapping[Any, int], seen: frozenset[Any]) -> tuple[int, int]:
        """Lowest and highest value of an integer expression, as far as TVM can tell."""
        analyzer = tvm.sym.Analyzer()
        for loop in self.loops:
            self._limit(analyzer, loop.loop_var, loop.min, loop.extent)
        for block in self.blocks:
            for axis in block.iter_vars:
                self._limit(analyzer, axis.var, axis.dom.min, axis.dom.extent)

        def as_variable(load: Any) -> Any:
            var = tirx.Var("loaded", _dtype(load))
            low, high = self._loaded_range(load.source, bounds, seen)
            if low > tvm.sym.ConstIntBound.NEG_INF and high < tvm.sym.ConstIntBound.POS_INF:
                first, count = (tirx.const(n, _dtype(load)) for n in (low, high - low + 1))
                analyzer.bind(var, tvm.ir.Range.from_min_extent(first, count))
            return var

        loaded = tvm_ffi.structural_map(
            self._with_symbols(expr), (tvm.ir.expr.TensorLoad, as_variable)
        )
        bound = analyzer.const_int_bound(analyzer.simplify(loaded))
        return int(bound.min_value), int(bound.max_value)

    def _limit(self, analyzer: Any, var: Any, start: Any, extent: Any) -> None:
        start, extent = self._with_symbols(start), self._with_symbols(extent)
        if isinstance(tvm.sym.Analyzer().simplify(extent), tirx.IntImm):
            analyzer.bind(var, tvm.ir.Range.from_min_extent(start, extent))

    def _loaded_range(
        self, buffer: Any, bounds: Mapping[Any, int], seen: frozenset[Any]
    ) -> tuple[int, int]:
        unknown = tvm.sym.ConstIntBound.NEG_INF, tvm.sym.ConstIntBound.POS_INF
        if buffer in seen or _is_float(_dtype(buffer)):
            return unknown
        if buffer in self.stores:
            ranges = [self._range(s.value, bounds, seen | {buffer}) for s in self.stores[buffer]]
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        if _dtype(buffer) == "bool":
            return 0, 1
        return (0, bounds.get(buffer, 2) - 1) if buffer in self.params else unknown

    # floating point

    def positive(self) -> set[Any]:
        """Parameters that must stay away from zero and below."""
        found: set[Any] = set()

        for div in _nodes(self.func.body, tvm.ir.prim.expr.Div):
            if _is_float(_dtype(div)):
                found |= self._sources(div.b)
        for call in _nodes(self.func.body, tvm.ir.Call):
            name = _call_name(call)
            # a whole power of a negative number is one
            exponent = getattr(call.args[1], "value", 0.5) if name == "pow" else 1
            if name in _NEEDS_POSITIVE or not float(exponent).is_integer():
                found |= self._sources(call.args[0])
        return found

    def scales(self) -> dict[Any, float]:
        """Parameters to be made smaller, because many products with them are added up."""
        found: dict[Any, float] = {}
        for block in self.blocks:
            update = _reduction(block) if FORMAT_ATTR not in block.annotations else None
            factors = _product(update.value) if update is not None and update.is_sum else None
            if factors is None:
                continue
            terms = self.terms(block)
            left, right = (self._sources(factor) for factor in factors)
            if left != right:
                for param in right or left:
                    found[param] = min(found.get(param, 1.0), terms**-0.5)
        return found

    def terms(self, block: Any) -> int:
        """Iterations of a block that go into one element of its result."""
        return math.prod(
            max(1, self.number(axis.dom.extent))
            for axis in block.iter_vars
            if axis.iter_type == tirx.IterVar.CommReduce
        )

    def _sources(self, expr: Any, seen: frozenset[Any] = frozenset()) -> set[Any]:
        """Floating-point parameters whose elements reach an expression by plain arithmetic."""
        kind = type(expr).__name__
        if kind == "Cast":
            return self._sources(expr.value, seen)
        if kind in ("Add", "Mul", "Div"):
            return self._sources(expr.a, seen) | self._sources(expr.b, seen)
        if kind == "Select":
            return self._sources(expr.true_value, seen) | self._sources(expr.false_value, seen)
        if kind == "Call" and _call_name(expr) == "if_then_else":
            return self._sources(expr.args[1], seen) | self._sources(expr.args[2], seen)
        if kind != "TensorLoad" or not _is_float(_dtype(expr.source)) or expr.source in seen:
            return set()
        buffer = expr.source
        if buffer in self.stores:
            if buffer in self.reducing:
                return set()
            return {
                param
                for store in self.stores[buffer]
                for param in self._sources(store.value, seen | {buffer})
            }
        return {buffer} & self.params


def _to_int(expr: Any) -> int:
    return int(tvm.sym.Analyzer().simplify(expr))


# Tolerance


@dataclass(frozen=True)
class Deviation:
    """How far an output is, or may be, from its reference.

    Parameters
    ----------
    largest : float
        Largest error, as a share of the largest magnitude of the reference. Shows one wrong element.
    rms : float
        Root mean square of the error, as a share of that of the reference. Shows a small error in all
        elements, which the rounding of a two-byte dtype would hide in any one of them.
    """

    largest: float
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
    is ``tanh`` of a GPU under ``--use_fast_math``, which is good to 2**-11 only.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        Unscheduled.
    symbols : mapping of str to int, or int
        Value of each symbol by its name, or one value for all.

    Returns
    -------
    dict of int to Deviation
        Limit of each output parameter, for :func:`difference`. 0 for integers and booleans.

    Raises
    ------
    KernelReferenceError
        For a construct that is not known, and a symbol without a value.
    """
    shares = _Shares(func, symbols)
    limits = {}
    for position in output_positions(func):
        param = func.params[position]
        share = shares.of_buffer(param)
        elements = math.prod(shares.facts.number(extent) for extent in param.ty.shape)
        rms = 2 * share.squared**0.5 if elements >= 64 or not share.squared else math.inf
        limits[position] = Deviation(1.5 * share.linear, rms)
    return limits


def difference(got: Array, expected: Array) -> Deviation:
    """How far a kernel's output is from its reference.

    Parameters
    ----------
    got : ndarray
        What a kernel wrote.
    expected : ndarray, same shape
        The value of :func:`evaluate`.

    Returns
    -------
    Deviation
        0 where all agree; infinite where integers differ, or where only one of them is NaN or infinite.
        Errors against a reference that is 0 everywhere are not divided.
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
    "cos",
    "cosh",
    "exp",
    "exp10",
    "exp2",
    "log",
    "log10",
    "log1p",
    "log2",
    "pow",
    "sin",
)
_STEEP_CALLS += ("sinh", "tan")
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
        self.facts = _Facts(func, {var: _symbol(var, symbols) for var in _symbols(func)})
        self.terms = {
            store.buffer: self.facts.terms(block)
            for block in self.facts.blocks
            if any(axis.iter_type == tirx.IterVar.CommReduce for axis in block.iter_vars)
            for store in _nodes(block.body, tirx.BufferStore)
        }
        self.named = {bind.var: bind.value for bind in _nodes(func.body, tirx.stmt.Bind)}
        self.known: dict[Any, _Share] = {}

    def of_buffer(self, buffer: Any) -> _Share:
        if buffer not in self.known:
            self.known[buffer] = (
                _Share()
            )  # what a reduction reads of itself is counted by its terms
            stores = self.facts.stores.get(buffer, [])
            self.known[buffer] = _worst(*(self._of_store(store) for store in stores))
        return self.known[buffer]

    def _of_store(self, store: Any) -> _Share:
        dtype = _dtype(store.buffer)
        if not _is_float(dtype):
            return _Share()
        share, unit = self.of(store.value), _unit(dtype)
        terms, kind = self.terms.get(store.buffer, 1), type(store.value).__name__
        if terms > 1 and kind == "Mul":
            return share + _Share(terms * unit, terms * unit**2)
        if terms > 1 and kind == "Add":
            return share + _Share(2 * terms**0.5 * unit, terms * unit**2 / 6)
        return share

    def of(self, expr: Any) -> _Share:
        kind, dtype = type(expr).__name__, _dtype(expr)
        if kind == "Var":
            return self.of(self.named[expr]) if expr in self.named else _Share()
        if not _is_float(dtype):
            return _Share()
        unit = _unit(dtype)
        rounding = _Share(unit, unit**2 / 3)
        if kind == "FloatImm":
            kept = float(np.float64(expr.value).astype(_numpy_dtype(dtype)))
            return _Share() if kept == expr.value else _Share(unit, unit**2)
        if kind == "TensorLoad":
            return self.of_buffer(expr.source)
        if kind == "Cast":
            source = _dtype(expr.value)
            widens = _is_float(source) and _unit(source) >= unit
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
        raise KernelReferenceError(f"there is no tolerance for a {kind}: {_short(expr)}")

    def _of_call(self, call: Any, unit: float) -> _Share:
        name, args = _call_name(call), list(call.args)
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


def _is_power_of_two(expr: Any) -> bool:
    return type(expr).__name__ == "FloatImm" and math.frexp(abs(expr.value))[0] == 0.5
