"""Float64 reference of any kernel: its unscheduled TensorIR, evaluated by NumPy.

:func:`evaluate` interprets a fused PrimFunc as it is before any schedule, one block at a time and
vectorised over the block's iteration space. Floating-point values are float64 from the inputs to the
outputs: nothing is rounded to the dtype of a buffer, so what a kernel differs by is its own rounding,
and :func:`tolerance` says how much of that to expect. The operator of this project is not
taken from its TensorIR but from its definition (:mod:`tvm_balanced.format.reference`), so that wrong TensorIR
of the operator is found as well as a wrong schedule.

What the evaluator does not know is an error that names the construct, never a guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx

from tvm_balanced import ops_int8
from tvm_balanced.format import int8, reference
from tvm_balanced.format.packing import BalancedTensor
from tvm_balanced.ops import FORMAT_ATTR, parse_format
from tvm_balanced.support.tensors import Array
from tvm_balanced.support.tvm_types import Block, Buffer, Expr, Stmt
from tvm_balanced.verification import tensorir as ir
from tvm_balanced.verification.tensorir import KernelReferenceError, Update, Value

# elements of one intermediate value; an expression holds a few of them, eight bytes an element
_CHUNK_ELEMENTS = 1 << 23
# iterations that may run one after the other; each costs tens of microseconds
_MAX_STEPS = 1 << 18


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
        The kernel, unscheduled: blocks under serial loops.
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
    state = _Evaluation(func, arrays)
    with np.errstate(all="ignore"):
        state.run(func.body)
    return {i: state.buffers[func.params[i]] for i in ir.output_positions(func)}


def _wide(array: Value) -> Value:
    """Floating point as float64, anything else as it is."""
    return array if array.dtype.kind in "biu" else array.astype(np.float64, copy=False)


def _truncated_division(a: Value, b: Value) -> Value:
    quotient = np.floor_divide(a, b)
    return quotient + ((np.fmod(a, b) != 0) & ((a < 0) != (b < 0))).astype(quotient.dtype)


def _divide(a: Value, b: Value) -> Value:
    return np.true_divide(a, b) if a.dtype.kind == "f" else _truncated_division(a, b)


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
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


def _erf(x: Value) -> Value:
    # NumPy has none, and SciPy is no dependency
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float64)


_IN_NUMPY = (
    *("abs", "ceil", "copysign", "cos", "cosh", "exp", "exp2", "floor", "fmod", "hypot"),
    *("isfinite", "isinf", "isnan", "ldexp", "log", "log10", "log1p", "log2", "sin", "sinh"),
    *("sqrt", "tan", "tanh", "trunc"),
)
_ARC = ("cos", "cosh", "sin", "sinh", "tan", "tan2", "tanh")
# by the name of the operator, and of the C function behind call_pure_extern
_CALLS: dict[str, Callable[..., Value]] = {
    **{name: getattr(np, name) for name in _IN_NUMPY},
    **{f"a{name}": getattr(np, f"arc{name}") for name in _ARC},
    "erf": _erf,
    "exp10": lambda x: np.power(10.0, x),
    "fabs": np.abs,
    "fma": lambda a, b, c: a * b + c,
    "likely": lambda x: x,
    "nearbyint": np.rint,
    "pow": np.power,
    "round": np.rint,  # TVM's round goes to even
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}
# an integer expression as a constant and a factor per axis
_Affine = tuple[int, dict[int, int]]
# start and end of every axis
_Ranges = tuple[tuple[int, int], ...]
_KIND = tirx.stmt.ForKind
_LOOPS_IN_ORDER = (_KIND.SERIAL, _KIND.PARALLEL, _KIND.VECTORIZED, _KIND.UNROLLED)


def _is_flat(stmt: Stmt) -> bool:
    """Whether a block's body can run for many iterations at once."""
    kind = type(stmt).__name__
    if kind == "SeqStmt":
        return all(_is_flat(part) for part in stmt.seq)
    if kind == "IfThenElse":
        return _is_flat(stmt.then_case) and (stmt.else_case is None or _is_flat(stmt.else_case))
    return kind in ("BufferStore", "Bind", "Evaluate")


def _reads_elsewhere(block: Block) -> bool:
    """Whether an iteration may read what another one writes."""
    stores = ir.nodes(block.body, tirx.BufferStore)
    return any(
        load.source.same_as(store.buffer)
        and not tvm_ffi.structural_equal(load.indices, store.indices)
        for load in ir.loads(block.body)
        for store in stores
    )


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


def _first_of(ranges: _Ranges, axes: set[int]) -> _Ranges:
    """Only the first iteration of some axes, all of the others."""
    return tuple((r[0], r[0] + 1) if a in axes else r for a, r in enumerate(ranges))


class _Evaluation:
    """State of one evaluation.

    While a block runs vectorised, ``ranges`` holds the part of its loops that is being computed, one
    axis a loop; values are scalars or arrays with one axis per loop that broadcast against each other.
    """

    def __init__(self, func: tirx.PrimFunc, arrays: Sequence[Any]) -> None:
        self.values: dict[Expr, Value] = {}
        self.affine: dict[Expr, _Affine] = {}
        self.buffers: dict[Buffer, Array] = {}
        self.ranges: _Ranges = ()
        self.guard: Value | None = None
        self.steps = 0
        self.func = func
        self._bind(func, arrays)

    # parameters

    def _bind(self, func: tirx.PrimFunc, arrays: Sequence[Any]) -> None:
        if len(arrays) != len(func.params):
            raise KernelReferenceError(
                f"{len(arrays)} arguments were given for a kernel of {len(func.params)} parameters"
            )
        written = set(ir.output_positions(func))
        extents = []
        for position, (param, given) in enumerate(zip(func.params, arrays, strict=True)):
            if not tirx.is_buffer_var(param):
                self._set(param, given)
                continue
            dtype, shape = ir.array_dtype(ir.dtype_of(param)), param.ty.shape
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

    def _set(self, var: Expr, number: float) -> None:
        dtype = ir.dtype_of(var)
        self.affine.pop(var, None)
        self.values[var] = (
            np.float64(number) if ir.is_float(dtype) else ir.array_dtype(dtype).type(number)
        )

    def _solve(self, extent: Expr, number: int) -> None:
        """Give the one symbol that ``extent`` leaves open the value that makes it ``number``."""
        unknown = [v for v in dict.fromkeys(ir.nodes(extent, tirx.Var)) if v not in self.values]
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

    def run(self, stmt: Stmt) -> None:
        """Run a statement, for all of the iterations in ``ranges`` at once."""
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
            self._run_where(condition, stmt.then_case)
            if stmt.else_case is not None:
                self._run_where(np.logical_not(condition), stmt.else_case)
        elif kind == "While" and not self.ranges:
            while self.evaluate(stmt.condition):
                self._step(stmt)
                self.run(stmt.body)
        elif kind == "AllocBuffer":
            self._allocate(stmt.buffer)
        elif kind == "Evaluate" and isinstance(stmt.value, tirx.IntImm):
            pass  # an empty statement
        else:
            raise KernelReferenceError(f"the reference has no {kind} statement: {ir.short(stmt)}")

    def _run_where(self, condition: Value, stmt: Stmt) -> None:
        with self._where(condition) as some:
            if some:
                self.run(stmt)

    def _loops(self, loop: Stmt) -> None:
        nest = []
        inner = loop
        while type(inner).__name__ == "For":
            self._check_loop(inner)
            nest.append(inner)
            inner = inner.body
        bound = {outer.loop_var for outer in nest}
        limits = [expr for part in nest for expr in (part.min, part.extent)]
        rectangular = not any(v in bound for expr in limits for v in ir.nodes(expr, tirx.Var))
        # statements without a block, as te.extern has them, run in their order
        if type(inner).__name__ == "SBlockRealize" and rectangular:
            self._block(inner, nest)
            return
        start, extent = int(self.evaluate(loop.min)), int(self.evaluate(loop.extent))
        for i in range(start, start + extent):
            self._step(loop)
            self._set(loop.loop_var, i)
            self.run(loop.body)

    def _check_loop(self, loop: Stmt) -> None:
        step = getattr(loop, "step", None)
        if loop.kind not in _LOOPS_IN_ORDER or loop.thread_binding is not None:
            raise KernelReferenceError(
                f"loop {loop.loop_var.name} is bound to a thread: give the kernel before scheduling"
            )
        if step is not None and int(self.evaluate(step)) != 1:
            raise KernelReferenceError(f"loop {loop.loop_var.name} has a step other than 1")

    def _step(self, stmt: Stmt) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise KernelReferenceError(
                f"more than {_MAX_STEPS} iterations depend on the ones before: {ir.short(stmt)}; use "
                "smaller inputs"
            )

    @contextmanager
    def _where(self, condition: Value) -> Iterator[bool]:
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

    def _block(self, realize: Stmt, loops: list[Stmt]) -> None:
        block = realize.block
        if block.match_buffers:
            raise KernelReferenceError(f"block {block.name_hint} has match_buffer regions")
        for buffer in block.alloc_buffers:
            self._allocate(buffer)
        if FORMAT_ATTR in block.annotations:
            self._balanced(block)
            return
        if ops_int8.FORMAT_ATTR in block.annotations:
            self._int8(block)
            return
        starts = [int(self.evaluate(loop.min)) for loop in loops]
        extents = [int(self.evaluate(loop.extent)) for loop in loops]
        ranges = tuple((low, low + n) for low, n in zip(starts, extents, strict=True))
        if not _is_flat(block.body):
            self._nested(realize, loops, ranges)
            return
        ordered = self._ordered_axes(realize, loops)
        reduced = {a for a, kind in ordered.items() if kind == tirx.IterVar.CommReduce}
        update = ir.reduction(block) if reduced and set(ordered) == reduced else None
        try:
            if block.init is not None:
                self._vectorised(realize, loops, _first_of(ranges, reduced), block.init)
            if any(start >= end for start, end in ranges):
                return
            if update is not None:
                self._reduction(realize, loops, ranges, update, reduced)
                return
            if _reads_elsewhere(block):
                ordered = dict.fromkeys(range(len(loops)), tirx.IterVar.Ordered)
            for fixed in itertools.product(*(range(*ranges[axis]) for axis in ordered)):
                if ordered:
                    self._step(realize)
                at = dict(zip(ordered, fixed, strict=True))
                rest = tuple((at[a], at[a] + 1) if a in at else r for a, r in enumerate(ranges))
                self._vectorised(realize, loops, rest, block.body)
        finally:
            self.ranges = ()

    def _vectorised(self, realize: Stmt, loops: list[Stmt], ranges: _Ranges, stmt: Stmt) -> None:
        """Run a statement of a block for all iterations in ``ranges``."""
        for part in _split(ranges, lambda _: range(len(ranges))):
            self._enter(realize, loops, part)
            self._run_where(self.evaluate(realize.predicate), stmt)

    def _reduction(
        self,
        realize: Stmt,
        loops: list[Stmt],
        ranges: _Ranges,
        update: Update,
        reduced: set[int],
    ) -> None:
        """Run an associative update for all iterations in ``ranges``."""
        store = update.store
        self._enter(realize, loops, ranges)
        for part in _split(ranges, self._operand_axes(realize, update)):
            self._enter(realize, loops, part)
            with self._where(self.evaluate(realize.predicate)) as some:
                value = self._reduce(update, reduced) if some else None
            if value is not None:
                self._enter(realize, loops, _first_of(part, reduced))
                current = self.load(store.buffer, store.indices)
                self.store(store.buffer, store.indices, update.combiner.ufunc(current, value))

    def _nested(self, realize: Stmt, loops: list[Stmt], ranges: _Ranges) -> None:
        """Run a block that holds blocks or loops, one iteration of its own loops after the other."""
        block = realize.block
        for point in itertools.product(*(range(*r) for r in ranges)):
            if loops:
                self._step(realize)
            for loop, i in zip(loops, point, strict=True):
                self._set(loop.loop_var, i)
            for axis, value in zip(block.iter_vars, realize.iter_values, strict=True):
                self.values[axis.var] = self.evaluate(value)
                self.affine.pop(axis.var, None)
            if not self.evaluate(realize.predicate):
                continue
            if block.init is not None and all(
                int(self.values[axis.var]) == int(self.evaluate(axis.dom.min))
                for axis in block.iter_vars
                if axis.iter_type == tirx.IterVar.CommReduce
            ):
                self.run(block.init)
            self.run(block.body)

    def _ordered_axes(self, realize: Stmt, loops: list[Stmt]) -> dict[int, int]:
        """Loops whose iterations may depend on each other, by the kind of their block axis."""
        number = {loop.loop_var: a for a, loop in enumerate(loops)}
        spatial, ordered = set(), {}
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            used = {number[v] for v in ir.nodes(value, tirx.Var) if v in number}
            if axis.iter_type == tirx.IterVar.DataPar:
                spatial |= used
            else:
                ordered.update(dict.fromkeys(used, axis.iter_type))
        for axis in spatial & ordered.keys():
            ordered[axis] = tirx.IterVar.Ordered
        return dict(sorted(ordered.items()))

    def _enter(self, realize: Stmt, loops: list[Stmt], ranges: _Ranges) -> None:
        """Bind loops and block axes to the part ``ranges`` of the iteration space."""
        self.ranges = ranges
        for axis, (loop, (start, end)) in enumerate(zip(loops, ranges, strict=True)):
            shape = [1] * len(ranges)
            shape[axis] = end - start
            dtype = ir.array_dtype(ir.dtype_of(loop.loop_var))
            self.values[loop.loop_var] = np.arange(start, end, dtype=dtype).reshape(shape)
            self.affine[loop.loop_var] = (start, {axis: 1})
        for iter_var, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            self.values[iter_var.var] = self.evaluate(value)
            form = self._as_affine(value)
            if form is not None:
                self.affine[iter_var.var] = form
            else:
                self.affine.pop(iter_var.var, None)

    def _allocate(self, buffer: Buffer) -> None:
        shape = [int(self.evaluate(extent)) for extent in buffer.ty.shape]
        dtype = ir.dtype_of(buffer)
        # what is read before it is written shows as NaN
        self.buffers[buffer] = (
            np.full(shape, np.nan) if ir.is_float(dtype) else np.zeros(shape, ir.array_dtype(dtype))
        )

    def _balanced(self, block: Block) -> None:
        """Compute the project's operator by its definition."""
        fmt = parse_format(str(block.annotations[FORMAT_ATTR]))
        data, values, indices = (self.buffers[b] for b in ir.balanced_operands(block))
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

    def _int8(self, block: Block) -> None:
        """Compute the sums of the int8 operator by its definition; what is around them is plain TensorIR."""
        fmt = ops_int8.parse_format(str(block.annotations[ops_int8.FORMAT_ATTR]))
        data, stream, scales, compensation = (
            self.buffers[b] for b in ir.int8_operands(self.func, block)
        )
        weight = int8.unpack(int8.Int8Weight(stream, scales, compensation, fmt))
        inside = data[..., : fmt.activations(1, False).columns]
        columns = inside.reshape(*inside.shape[:-2], -1)[..., : fmt.in_features]
        out = self.buffers[block.writes[0].source]
        # whole numbers below 2**53 are exact in float64
        out[..., : fmt.out_features] = columns.astype(np.float64) @ weight.T.astype(np.float64)
        out[..., fmt.out_features :] = 0

    # reductions

    def _operand_axes(self, realize: Stmt, update: Update) -> Callable[[_Ranges], Sequence[int]]:
        """For :func:`_split`: the axes of the largest array that the reduction makes."""
        whole = isinstance(realize.predicate, tirx.IntImm)
        product = ir.factors_of(update.value) if update.is_sum and whole else None
        groups = [self._axes(part) for part in (product or (update.value,))]
        if product is not None:  # the sum of products itself never exists
            groups.append(self._axes(update.store.indices))

        def largest(ranges: _Ranges) -> Sequence[int]:
            return max(groups, key=lambda axes: math.prod(_extent(ranges[a]) for a in axes))

        return largest

    def _axes(self, expr: Expr) -> list[int]:
        used: set[int] = set()
        for var in ir.nodes(expr, tirx.Var):
            shape = np.shape(self.values.get(var, 0))
            used.update(axis for axis, extent in enumerate(shape) if extent > 1)
        return sorted(used)

    def _reduce(self, update: Update, reduced: set[int]) -> Value:
        """Combine the new terms of a reduction; reduced axes have extent 1."""
        axes = tuple(sorted(reduced))
        product = ir.factors_of(update.value) if update.is_sum and self.guard is None else None
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

    def _full(self, value: Value) -> Array:
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
        kept = [*lengths(a, shared), *lengths(a, only_a), *lengths(b, only_b)]
        total = total.reshape(*kept, *[1] * (len(summed) + len(ones)))
        return factor * total.transpose(np.argsort(order))

    # expressions

    def evaluate(self, expr: Expr) -> Value:
        """Value of an expression, for all of the iterations in ``ranges`` at once."""
        kind = type(expr).__name__
        if kind == "Var":
            if expr not in self.values:
                raise KernelReferenceError(f"symbol {expr.name} has no value")
            return self.values[expr]
        if kind == "IntImm":
            return ir.array_dtype(ir.dtype_of(expr)).type(int(expr.value))
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
        raise KernelReferenceError(f"the reference has no {kind} expression: {ir.short(expr)}")

    def _cast(self, expr: Expr) -> Value:
        value, to = self.evaluate(expr.value), ir.dtype_of(expr)
        if to == "bool":
            return np.asarray(value) != 0
        if not ir.is_float(to):
            return np.asarray(value).astype(ir.array_dtype(to), copy=False)
        return (
            value if ir.is_float(ir.dtype_of(expr.value)) else np.asarray(value).astype(np.float64)
        )

    def _choose(self, condition: Expr, if_true: Expr, if_false: Expr) -> Value:
        holds = self.evaluate(condition)
        with self._where(holds) as some_true:
            first = self.evaluate(if_true) if some_true else None
        with self._where(np.logical_not(holds)) as some_false:
            second = self.evaluate(if_false) if some_false else None
        if first is None and second is None:  # nothing is asked for
            return _wide(np.zeros((), ir.array_dtype(ir.dtype_of(if_true))))
        if first is None or second is None:
            return second if first is None else first
        return np.where(holds, first, second)

    def _call(self, call: Expr) -> Value:
        full, name = str(getattr(call.op, "name", call.op)), ir.call_name(call)
        if name == "if_then_else":
            return self._choose(*call.args)
        if name == "reinterpret":
            source = ir.array_dtype(ir.dtype_of(call.args[0]))
            value = np.asarray(self.evaluate(call.args[0])).astype(source)
            return _wide(value.view(ir.array_dtype(ir.dtype_of(call))))
        args = list(call.args)
        if name == "call_pure_extern":
            # expf, fabsf, ...
            full = f"call_pure_extern of {args[0].value}"
            name = str(args.pop(0).value)
            name = name[:-1] if name not in _CALLS and name.endswith("f") else name
        if full.startswith(("tirx.ptx.", "tirx.cuda.")) or name not in _CALLS:
            raise KernelReferenceError(f"the reference has no {full}: {ir.short(call)}")
        return _CALLS[name](*(self.evaluate(arg) for arg in args))

    # memory

    def load(self, buffer: Buffer, indices: Sequence[Expr]) -> Value:
        """Elements of a buffer, floating point as float64."""
        array = self._array(buffer)
        view = self._view(array, indices)
        if view is not None:
            return _wide(view)
        return _wide(array[self._positions(buffer, array, indices)])

    def store(self, buffer: Buffer, indices: Sequence[Expr], value: Value) -> None:
        """Set elements of a buffer; of iterations that write one place the last one stays."""
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
            shapes = zip(view.shape, value.shape, strict=True)
            value = value[tuple(slice(-1 if n == 1 < v else None, None) for n, v in shapes)]
        view[...] = value

    def _array(self, buffer: Buffer) -> Array:
        if buffer not in self.buffers:
            raise KernelReferenceError(f"buffer {buffer.name} is neither a parameter nor allocated")
        return self.buffers[buffer]

    def _view(self, array: Array, indices: Sequence[Expr]) -> Array | None:
        """Elements at affine ``indices`` without a copy; None where they are not, or not inside."""
        first: list[Any] = []
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
        # the ellipsis keeps an array without axes an array
        base: Array = array[(*first, ...)]
        view: Array = np.lib.stride_tricks.as_strided(base, shape, strides)
        return view

    def _positions(
        self, buffer: Buffer, array: Array, indices: Sequence[Expr]
    ) -> tuple[Array, ...]:
        """Places of elements along every axis; those outside are clipped where nothing is asked for."""
        places = []
        for index, extent in zip(indices, array.shape, strict=True):
            at = np.asarray(self.evaluate(index))
            outside = (at < 0) | (at >= extent)
            if (outside if self.guard is None else outside & self.guard).any():
                raise KernelReferenceError(
                    f"{buffer.name} is accessed out of range: index {ir.short(index)} reaches "
                    f"{at[at < 0].min() if (at < 0).any() else at.max()}, the extent is {extent}"
                )
            if outside.any():
                at = np.clip(at, 0, max(extent - 1, 0))
            places.append(at)
        return tuple(places)

    def _as_affine(self, expr: Expr) -> _Affine | None:
        kind = type(expr).__name__
        if kind == "IntImm":
            return int(expr.value), {}
        if kind == "Var":
            if expr in self.affine and self.ranges:
                return self.affine[expr]
            value = self.values.get(expr)
            return (int(value), {}) if value is not None and np.ndim(value) == 0 else None
        if kind == "Cast":
            wide = ir.dtype_of(expr) in ("int32", "int64") and not ir.is_float(
                ir.dtype_of(expr.value)
            )
            return self._as_affine(expr.value) if wide else None
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
