"""Multiplication by a dense int8 weight, by dot products of four bytes.

A register holds four columns of 16 weight rows; four activations of a token are broadcast beside it. Tiles of
tokens by groups of rows keep the sums in registers.

Thread map: tasks of groups of 16 rows -> threads, as :mod:`~tvm_balanced.schedules.llvm.int8.matmul` tells.
"""

from __future__ import annotations

import math

import tvm
from tvm import tirx

from tvm_balanced.errors import InputError
from tvm_balanced.format.int8 import QUAD, REGISTER, ROWS, DenseFormat
from tvm_balanced.schedules.llvm.int8.isa import PLAIN, Isa, choose
from tvm_balanced.schedules.llvm.int8.matmul import (
    Cell,
    Knobs,
    MatmulSpec,
    RegisterKernel,
    as_function,
    for_threads,
)
from tvm_balanced.schedules.llvm.int8.statements import bound
from tvm_balanced.schedules.llvm.nest import loop, ramp, sequence, vector
from tvm_balanced.support.tvm_types import Buffer, Expr, Stmt

# quads of columns written out in the body of the innermost loop
_QUADS = 4

_SMALL_WEIGHT = 768 * 1024


def default_knobs(spec: MatmulSpec, target: tvm.target.Target, isa: Isa) -> Knobs:
    """Tile sizes that keep the sums in registers: 32 of them with AVX-512, 16 without.

    Parameters
    ----------
    spec : MatmulSpec
        Of a dense weight.
    target : tvm.target.Target
        An llvm target.
    isa : Isa
        What the kernel is written for.
    """
    if isa.bytes == REGISTER:
        # one stream of weights is fetched ahead of its use where it comes from the second-level cache
        small = math.prod(spec.format.stream_shape) <= _SMALL_WEIGHT
        knobs = Knobs(8, (4, 4, 4, 1 if small else 2), (2, 1))
    else:
        knobs = Knobs(4, (2, 2, 1), (1,))
    return for_threads(knobs, spec, target)


def kernel(
    spec: MatmulSpec,
    target: tvm.target.Target,
    knobs: Knobs | None = None,
    isa: str | None = None,
    name: str = "int8_dense",
) -> tirx.PrimFunc:
    """Return the kernel for a problem; parameters as of the gather's.

    Parameters
    ----------
    spec : MatmulSpec
        Of a dense weight.
    target : tvm.target.Target
        An llvm target.
    knobs : Knobs, optional
        Tile sizes; :func:`default_knobs` otherwise.
    isa : str, optional
        An instruction set that the target has, instead of the best one.
    name : str
        Of the function.

    Raises
    ------
    InputError
        For a balanced weight, or an instruction set that the target lacks.
    """
    if spec.pattern is not None:
        raise InputError("the dense kernel multiplies dense weights; use the gather kernel")
    chosen = choose(target, isa)
    used = knobs or default_knobs(spec, target, chosen)
    fmt = spec.format
    assert isinstance(fmt, DenseFormat)
    return as_function(name, spec, fmt, chosen, used, Dense)


class Dense(RegisterKernel[DenseFormat]):
    """See the module."""

    @property
    def dots(self) -> int:
        """Dot products of a tile for one token."""
        return self.groups * self.fmt.windows * ROWS

    def accumulate(self, m: Expr, height: int, group: Expr, sums: dict[Cell, Buffer]) -> Stmt:
        """Add a tile's products to its sums."""
        quad, unroll = (self._plain, 1) if self.isa is PLAIN else (self._vector, _QUADS)

        def window(k: Expr) -> Stmt:
            x = m * self.layout.token_bytes + k * (height * REGISTER)
            weight = group * self.strip + k * (REGISTER * ROWS)

            def quads(j: Expr) -> Stmt:
                statements: list[Stmt] = []
                for s in range(unroll):
                    quad(x, weight, j * unroll + s, s, sums, statements)
                return sequence(statements)

            return loop(ROWS // unroll, quads, name="j")

        return loop(self.fmt.windows, window, name="k")

    def _vector(
        self,
        x: Expr,
        weight: Expr,
        j: Expr,
        turn: int,
        sums: dict[Cell, Buffer],
        statements: list[Stmt],
    ) -> None:
        """Quad ``j`` of a window; which partial sum takes it is by ``turn``."""
        isa = self.isa
        partials = 1 + max(cell.partial for cell in sums)
        cells = [cell for cell in sums if cell.partial == turn % partials]
        values: dict[tuple[int, int], Expr] = {}
        for cell in cells:
            if cell.token == 0:
                at = weight + cell.group * self.strip + j * REGISTER + cell.part * isa.bytes
                load = self.flat_stream[ramp(at, isa.bytes)]
                values[cell.group, cell.part] = bound("value", load, statements)
        everything = [ramp(0, isa.lanes)]
        tokens: dict[int, Expr] = {}
        for cell in cells:
            if cell.token not in tokens:
                word = self.x_words[(x + cell.token * REGISTER) // QUAD + j]
                wide = tirx.reinterpret(vector("int8", isa.bytes), tirx.Broadcast(word, isa.lanes))
                tokens[cell.token] = bound("x", wide, statements)
            total = sums[cell]
            new = isa.dot(total[everything[0]], tokens[cell.token], values[cell.group, cell.part])
            statements.append(tirx.BufferStore(total, new, everything))

    def _plain(
        self,
        x: Expr,
        weight: Expr,
        j: Expr,
        turn: int,
        sums: dict[Cell, Buffer],
        statements: list[Stmt],
    ) -> None:
        """Return the same for any CPU."""
        del turn
        wide = vector("int32", ROWS)
        everything = [ramp(0, ROWS)]
        for byte in range(QUAD):
            for cell, total in sums.items():
                if cell.partial:
                    continue
                at = weight + cell.group * self.strip + j * REGISTER + byte
                column = tirx.Ramp(at, tirx.const(QUAD, "int64"), ROWS)
                value = tirx.Cast(wide, self.flat_stream[column])
                activation = self.flat_x[x + cell.token * REGISTER + j * QUAD + byte]
                product = tirx.Broadcast(tirx.Cast("int32", activation), ROWS) * value
                statements.append(
                    tirx.BufferStore(total, total[everything[0]] + product, everything)
                )
