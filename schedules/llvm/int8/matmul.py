"""What the gather and the dense kernel share: their problem, knobs, loops around a tile, and the epilogue.

Tiles of tokens by groups of 16 weight rows keep their sums in registers. Groups are cut into *tasks*, whose
weights stay in the second-level cache while all tiles of tokens pass; threads share tasks, and where there
are few rows of the weight, the tokens too.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import ROWS, DenseFormat, Format, GatherFormat
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.schedules.llvm.int8.isa import Isa
from tvm_balanced.schedules.llvm.int8.statements import (
    as_polynomials,
    constant,
    function,
    over_tiles,
    share,
    word_view,
)
from tvm_balanced.schedules.llvm.nest import INDEX, flat_view, local, loop, ramp, sequence
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

FormatT = TypeVar("FormatT", bound=Format)

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# dot products of whole registers from which threads pay for waking them; some 15 us
PARALLEL_DOTS = 1 << 15

_THREADS = 8


@dataclass(frozen=True)
class Epilogue:
    """What happens to the dequantised sums, in this order.

    Parameters
    ----------
    bias : bool
        Add a vector ``(N,)``.
    activation : str
        One of :data:`ACTIVATIONS`.
    residual : bool
        Add a matrix ``(M, N)``.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f'activation "{self.activation}" is not known; choose one of {", ".join(ACTIVATIONS)}'
            )


@dataclass(frozen=True)
class MatmulSpec:
    """A multiplication by an int8 weight.

    Parameters
    ----------
    rows : int or str
        Tokens, M; a name where it is symbolic.
    out_features, in_features : int
        N and K.
    pattern : BalancedPattern or None
        What the weight follows; None for a dense one.
    epilogue : Epilogue
        On the result.
    out_dtype : str
        ``"float32"``, or ``"int32"`` for the sums themselves, without scales or epilogue.
    """

    rows: int | str
    out_features: int
    in_features: int
    pattern: BalancedPattern | None = None
    epilogue: Epilogue = Epilogue()
    out_dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.rows, int) and self.rows < 1:
            raise InputError(f"a kernel for {self.rows} rows was asked for; give at least one")
        if self.out_dtype not in ("float32", "int32"):
            raise InputError(f'out_dtype "{self.out_dtype}" is not known; choose float32 or int32')
        if self.out_dtype == "int32" and self.epilogue != Epilogue():
            raise InputError("integer sums have no epilogue; choose out_dtype float32")

    @property
    def format(self) -> Format:
        """The packed weight's format."""
        if self.pattern is None:
            return DenseFormat(self.out_features, self.in_features)
        return GatherFormat(self.out_features, self.in_features, self.pattern)


@dataclass(frozen=True)
class Knobs:
    """What a tuner may sample.

    Parameters
    ----------
    tokens : int
        Tokens of a full tile, a power of two; the quantiser must use the same.
    groups : tuple of int
        Groups of 16 weight rows in a tile; entry ``i`` is for tiles of ``2 ** i`` tokens.
    sums : tuple of int
        Partial sums of each cell of a tile, which are independent chains of dot products; as ``groups``.
    threads : int
        Threads that tasks are cut for; the number of tasks is a multiple of it.
    task_bytes : int
        Packed weight of a task, at most.
    token_parts : int
        Parts that the tokens are cut into, each with tasks of its own.
    """

    tokens: int
    groups: tuple[int, ...]
    sums: tuple[int, ...]
    threads: int = 1
    task_bytes: int = 768 * 1024
    token_parts: int = 1

    def tile(self, height: int) -> tuple[int, int]:
        """Return groups and partial sums of a tile of ``height`` tokens."""
        place = (height - 1).bit_length()
        groups, sums = (t[min(place, len(t) - 1)] for t in (self.groups, self.sums))
        return groups, sums


def for_threads(knobs: Knobs, spec: MatmulSpec, target: tvm.target.Target) -> Knobs:
    """Knobs with tasks for the threads of a target.

    Parameters
    ----------
    knobs : Knobs
        Tile sizes.
    spec : MatmulSpec
        The problem; with fewer groups of rows than threads, its tokens are cut into parts.
    target : tvm.target.Target
        An llvm target; without ``num-cores``, eight are taken.
    """
    threads = int(target.attrs.get("num-cores", _THREADS))
    parts = -(-threads // spec.format.groups)
    if isinstance(spec.rows, int):
        parts = max(1, min(parts, spec.rows // knobs.tokens))
    return dataclasses.replace(knobs, threads=threads, token_parts=parts)


@dataclass(frozen=True)
class Cell:
    """One accumulator: token, group and vector register of a tile, and which partial sum."""

    token: int
    group: int
    part: int
    partial: int


@dataclass(frozen=True)
class Operands(Generic[FormatT]):
    """What a kernel reads and writes.

    Parameters
    ----------
    rows : int or expression
        Tokens.
    fmt : GatherFormat, DenseFormat or ExpandFormat
        Of the packed weight.
    x : buffer
        Quantised activations in the order that ``fmt`` asks for.
    stream : buffer
        Packed weight.
    write : callable of (token, weight row, sum of stored bytes) -> statement
        Makes the result of one integer sum; with unsigned activations the compensation is still in it.
    """

    rows: int | Expr
    fmt: FormatT
    x: Buffer
    stream: Buffer
    write: Callable[[Expr, Expr, Expr], Stmt]


class Kernel(abc.ABC, Generic[FormatT]):
    """A multiplication written out; subclasses say how a tile is computed.

    Parameters
    ----------
    operands : Operands
        What it reads and writes.
    isa : Isa
        What it is written for.
    knobs : Knobs
        Tile sizes.
    """

    def __init__(self, operands: Operands[FormatT], isa: Isa, knobs: Knobs) -> None:
        self.operands, self.isa, self.knobs = operands, isa, knobs
        self.fmt, self.rows = operands.fmt, operands.rows
        self.groups = self.fmt.groups
        self.strip = math.prod(self.fmt.stream_shape[1:])
        self.layout = self.fmt.activations(knobs.tokens, isa.signed)

    @property
    @abc.abstractmethod
    def dots(self) -> int:
        """Dot products of 64 bytes for one token."""

    @abc.abstractmethod
    def _tile(self, m: Expr, height: int, group: Expr, width: int) -> Stmt:
        """Results of tokens ``m .. m + height`` for ``width`` groups from ``group``."""

    def body(self) -> Stmt:
        """All statements; reads and writes the parameters."""
        x, stream = self.operands.x, self.operands.stream
        self.flat_x, declare_x = flat_view(x)
        self.flat_stream, declare_stream = flat_view(stream)
        self.words, declare_words = word_view(stream)
        self.x_words, declare_x_words = word_view(x)
        work = self.rows * self.dots
        if isinstance(work, int):
            tasks = self._tasks(work >= PARALLEL_DOTS)
        elif self.dots >= PARALLEL_DOTS:
            tasks = self._tasks(True)
        else:
            tasks = tirx.IfThenElse(work >= PARALLEL_DOTS, self._tasks(True), self._tasks(False))
        return sequence([declare_x, declare_stream, declare_words, declare_x_words, tasks])

    def _tasks(self, parallel: bool) -> Stmt:
        knobs = self.knobs
        rounds = -(-self.groups * self.strip // (knobs.task_bytes * knobs.threads))
        count = min(rounds * knobs.threads, self.groups)
        parts = knobs.token_parts
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL

        def task(index: Expr) -> Stmt:
            begin, size = share(self.groups, index // parts, count)
            part = (index % parts, parts) if parts > 1 else None
            return over_tiles(
                self.layout,
                self.rows,
                lambda m, height: self._groups(m, height, begin, size),
                part,
            )

        return loop(count * parts, task, kind, name="task")

    def _groups(self, m: Expr, height: int, begin: int | Expr, size: int | Expr) -> Stmt:
        """Tokens ``m .. m + height`` by ``size`` groups from ``begin``."""
        width, _ = self.knobs.tile(height)
        pieces = []
        whole = size // width
        if not isinstance(whole, int) or whole:
            pieces.append(
                loop(whole, lambda g: self._tile(m, height, begin + g * width, width), name="g")
            )
        rest = size % width
        if width > 1 and (not isinstance(rest, int) or rest):
            at = begin + whole * width
            pieces.append(loop(rest, lambda g: self._tile(m, height, at + g, 1), name="g"))
        return sequence(pieces)

    def _store(self, m: Expr, n: Expr, total: Buffer, first: Expr) -> Stmt:
        """Write the results of one register of sums, which begin at ``first`` of ``total``."""
        lanes, count = self.isa.lanes, self.fmt.out_features

        def write(width: int) -> Stmt:
            def element(e: Expr) -> Stmt:
                return self.operands.write(m, n + e, total[first + e])

            return loop(width, element, tirx.ForKind.VECTORIZED, name="e")

        if count % lanes == 0 and (self.isa.parts == 1 or count % ROWS == 0):
            return write(lanes)
        rest = count % lanes
        part = tirx.IfThenElse(n < count, write(rest), None) if rest else None
        return tirx.IfThenElse(n + lanes <= count, write(lanes), part)


class RegisterKernel(Kernel[FormatT]):
    """A kernel whose sums are vector registers; subclasses fill those of a tile."""

    @abc.abstractmethod
    def accumulate(self, m: Expr, height: int, group: Expr, sums: dict[Cell, Buffer]) -> Stmt:
        """Add the products of tokens ``m .. m + height`` with groups from ``group`` to ``sums``."""

    def _tile(self, m: Expr, height: int, group: Expr, width: int) -> Stmt:
        isa = self.isa
        _, partials = self.knobs.tile(height)
        lanes = isa.lanes
        sums = {
            Cell(i, r, q, a): local(lanes, "sums", "int32")
            for i in range(height)
            for r in range(width)
            for q in range(isa.parts)
            for a in range(partials)
        }
        everything = [ramp(0, lanes)]
        clear = [
            s
            for b in sums.values()
            for s in (tirx.AllocBuffer(b), tirx.BufferStore(b, constant(0, lanes), everything))
        ]
        finish = []
        for cell, total in sums.items():
            if cell.partial:
                continue
            more = [sums[Cell(cell.token, cell.group, cell.part, a)] for a in range(1, partials)]
            for partial in more:
                joined = total[everything[0]] + partial[everything[0]]
                finish.append(tirx.BufferStore(total, joined, everything))
            n = (group + cell.group) * ROWS + cell.part * lanes
            finish.append(self._store(m + cell.token, n, total, tirx.const(0, INDEX)))
        return sequence([*clear, self.accumulate(m, height, group, sums), *finish])


def activate(value: Expr, name: str) -> Expr:
    """Return a float32 ``value`` after an activation of :data:`ACTIVATIONS`."""

    def f(number: float) -> Expr:
        return tirx.const(number, "float32")

    if name == "none":
        return value
    bound = tirx.Var("value", "float32")
    result = {
        "relu": lambda v: tirx.max(v, f(0.0)),
        "gelu": lambda v: f(0.5) * v * (f(1.0) + tirx.erf(v * f(math.sqrt(0.5)))),
        "gelu_tanh": lambda v: (
            f(0.5)
            * v
            * (f(1.0) + tirx.tanh(f(math.sqrt(2 / math.pi)) * (v + f(0.044715) * v * v * v)))
        ),
        "silu": lambda v: v * tirx.sigmoid(v),
    }[name](bound)
    return tirx.Let(bound, value, as_polynomials(result))


def as_function(
    name: str,
    spec: MatmulSpec,
    fmt: FormatT,
    isa: Isa,
    knobs: Knobs,
    kernel: type[Kernel[FormatT]],
) -> tirx.PrimFunc:
    """Return a kernel as a function of its own.

    Parameters
    ----------
    name : str
        Of the function.
    spec : MatmulSpec
        The problem.
    fmt : GatherFormat, DenseFormat or ExpandFormat
        Of the packed weight.
    isa : Isa
        What it is written for.
    knobs : Knobs
        Tile sizes.
    kernel : type
        Of the kernel.

    Returns
    -------
    tirx.PrimFunc
        Over activations, their scales, stream, scales and compensation of the weight, bias and residual where
        the epilogue has them, and the result.
    """
    rows = spec.rows if isinstance(spec.rows, int) else tirx.Var(spec.rows, INDEX)
    layout = fmt.activations(knobs.tokens, isa.signed)

    def buffer(name: str, shape: tuple[int | Expr, ...], dtype: str) -> Buffer:
        return tirx.decl_buffer(shape, dtype, name=name, layout=None)

    n = spec.out_features
    x = buffer("x", (rows, layout.token_bytes), layout.dtype)
    x_scales = buffer("x_scales", (rows,), "float32")
    stream = buffer("stream", fmt.stream_shape, "int8")
    scales = buffer("scales", (fmt.groups * ROWS,), "float32")
    compensation = buffer("compensation", (fmt.groups * ROWS,), "int32")
    bias = buffer("bias", (n,), "float32") if spec.epilogue.bias else None
    residual = buffer("residual", (rows, n), "float32") if spec.epilogue.residual else None
    out = buffer("out", (rows, n), spec.out_dtype)

    def result(m: Expr, n: Expr, total: Expr) -> Expr:
        if not isa.signed:
            total = total - compensation[n]
        if spec.out_dtype == "int32":
            return total
        value = tirx.Cast("float32", total) * scales[n] * x_scales[m]
        if bias is not None:
            value = value + bias[n]
        value = activate(value, spec.epilogue.activation)
        return value if residual is None else value + residual[m, n]

    def write(m: Expr, n: Expr, total: Expr) -> Stmt:
        return tirx.BufferStore(out, result(m, n, total), [m, n])

    body = kernel(Operands(rows, fmt, x, stream, write), isa, knobs).body()
    extra = [b for b in (bias, residual) if b is not None]
    return function(name, [x, x_scales, stream, scales, compensation, *extra, out], body)
