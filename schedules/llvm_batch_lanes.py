"""The balanced operator with lanes over the batch, for every CPU, layout and block.

The activations are transposed once, so that a register holds one column of ``lanes`` rows of the batch;
a slot is then an ordinary vector load at its column times a value for all lanes, and nothing is permuted.
A batch that does not fill the last register is padded: at batch 1 a slot costs one vector operation
where scalar code needs one scalar operation.

Thread map: groups of ``row_tile`` weight rows -> threads, in equal shares; slots of a row -> one thread,
in the order of K. Knobs: :class:`Knobs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.schedules import llvm_nest as nest
from tvm_balanced.schedules.cpu_common import lanes as lanes_of

# slots written out in the body of the innermost loop
_UNROLL = 8


@dataclass(frozen=True)
class Knobs:
    """What a tuner may sample.

    Parameters
    ----------
    row_tile : int
        Weight rows in a tile.
    batch_tile : int
        Registers of activations in a tile. ``row_tile * batch_tile`` sums stay in registers.
    """

    row_tile: int = 4
    batch_tile: int = 2


def apply(func: tirx.PrimFunc, target: tvm.target.Target) -> s_tir.Schedule | None:
    """Schedule ``func``, or None where more than element-wise work was fused.

    Parameters
    ----------
    func : tirx.PrimFunc
        The operator, fused with element-wise work.
    target : tvm.target.Target
        An llvm target.
    """
    parts = nest.take_apart(func)
    return None if parts is None else schedule(parts, lanes_of(target), Knobs())


def schedule(parts: nest.Parts, lanes: int, knobs: Knobs) -> s_tir.Schedule:
    """Write the kernel out for ``knobs``."""
    return nest.assemble(parts, body(parts, lanes, knobs), "balanced_batch_lanes")


def body(parts: nest.Parts, lanes: int, knobs: Knobs) -> Any:
    """The statements of the kernel, for a rule that puts them beside others."""
    return _Kernel(parts, lanes, knobs).body()


class _Kernel:
    def __init__(self, parts: nest.Parts, lanes: int, knobs: Knobs) -> None:
        self.parts = parts
        self.fmt = parts.fmt
        self.lanes = lanes
        self.knobs = knobs
        self.columns = self.fmt.padded_features
        rows = parts.rows
        self.registers = (rows + lanes - 1) // lanes
        size = self.registers * self.columns * lanes
        self.data, self.allocate = nest.workspace(size, "balanced_columns")

    def body(self) -> Any:
        fmt, rows = self.fmt, self.parts.rows
        self.values, declare = nest.flat_view(self.parts.values)
        statements = [
            declare,
            *self.allocate,
            nest.by_work(rows, self.columns * 8, self._transpose),
            nest.by_work(rows, fmt.padded_rows * fmt.slots, self._groups),
        ]
        return nest.sequence(statements)

    def _transpose(self, parallel: bool) -> Any:
        """Columns of activations side by side: ``data[register, column, lane]``."""
        parts, lanes, block = self.parts, self.lanes, self.fmt.pattern.block

        def element(kb: Any, register: Any, lane: Any, e: Any) -> Any:
            m = register * lanes + lane
            inside = parts.data_at(parts.coordinates(m), kb, e)
            zero = tirx.const(0.0, "float32")
            value = tirx.if_then_else(m < parts.rows, tirx.Cast("float32", inside), zero)
            at = (register * self.columns + kb * block + e) * lanes + lane
            return tirx.BufferStore(self.data, value, [at])

        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        return nest.loop(
            self.fmt.blocks,
            lambda kb: nest.loop(
                self.registers,
                lambda register: nest.loop(
                    lanes,
                    lambda lane: nest.loop(block, lambda e: element(kb, register, lane, e)),
                ),
            ),
            kind,
            name="kb",
        )

    def _groups(self, parallel: bool) -> Any:
        tile = self.knobs.row_tile
        whole, rest = divmod(self.fmt.padded_rows, tile)
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        pieces = []
        if whole:
            pieces.append(nest.loop(whole, lambda g: self._group(g * tile, tile), kind, name="g"))
        if rest:
            pieces.append(self._group(tirx.const(whole * tile, nest.INDEX), rest))
        return nest.sequence(pieces)

    def _group(self, n: Any, rows: int) -> Any:
        """``rows`` weight rows from ``n`` by the whole batch."""
        tile, registers = self.knobs.batch_tile, self.registers
        static = isinstance(registers, int)
        pieces = []
        if not static or registers >= tile:
            pieces.append(
                nest.loop(
                    registers // tile, lambda i: self._tile(n, rows, i * tile, tile), name="mo"
                )
            )
        if static and registers % tile:
            at = tirx.const(registers // tile * tile, nest.INDEX)
            pieces.append(self._tile(n, rows, at, registers % tile))
        elif not static:
            pieces.append(
                nest.loop(
                    registers % tile,
                    lambda i: self._tile(n, rows, registers // tile * tile + i, 1),
                    name="mo",
                )
            )
        return nest.sequence(pieces)

    def _tile(self, n: Any, rows: int, register: Any, width: int) -> Any:
        """``rows`` weight rows from ``n`` by ``width`` registers of activations from ``register``."""
        fmt, lanes, nnz = self.fmt, self.lanes, self.fmt.pattern.nnz
        sums = nest.local(rows * width * lanes, "balanced_sums")
        # the sums are read back lane by lane, which registers do not allow
        spill = nest.local(rows * width * lanes, "balanced_spill")
        cells = [(r, w) for r in range(rows) for w in range(width)]

        def cell(r: int, w: int) -> Any:
            return nest.ramp((r * width + w) * lanes, lanes)

        zero = nest.splat(tirx.const(0.0, "float32"), lanes)
        clear = [tirx.BufferStore(sums, zero, [cell(r, w)]) for r, w in cells]

        def slot(kb: Any, s: Any) -> Any:
            t = kb * nnz + s
            statements: list[Any] = []
            for r in range(rows):
                column = tirx.Var(f"column_{r}", nest.INDEX)
                weight = tirx.Var(f"weight_{r}", "float32")
                place = kb * fmt.pattern.block + self._index(n + r, t)
                statements += [
                    tirx.Bind(column, place),
                    tirx.Bind(weight, self._value(n + r, t)),
                ]
                for w in range(width):
                    at = ((register + w) * self.columns + column) * lanes
                    product = self.data[nest.ramp(at, lanes)] * nest.splat(weight, lanes)
                    statements.append(
                        tirx.BufferStore(sums, sums[cell(r, w)] + product, [cell(r, w)])
                    )
            return nest.sequence(statements)

        def block(kb: Any) -> Any:
            if nnz > _UNROLL:
                return nest.loop(nnz, lambda s: slot(kb, s), name="s")
            return nest.sequence([slot(kb, tirx.const(s, nest.INDEX)) for s in range(nnz)])

        accumulate = nest.loop(fmt.blocks, block, name="kb")
        copy = [tirx.BufferStore(spill, sums[cell(r, w)], [cell(r, w)]) for r, w in cells]

        def finish(lane: Any) -> Any:
            m = register * lanes + lane
            lead = self.parts.coordinates(m)

            def element(r: Any) -> Any:
                total = spill[r * (width * lanes) + lane]
                store = tirx.BufferStore(
                    self.parts.out, self.parts.out_at(lead, n + r, total), [*lead, n + r]
                )
                if fmt.padded_rows == fmt.out_features:
                    return store
                return tirx.IfThenElse(n + r < fmt.out_features, store, None)

            return tirx.IfThenElse(m < self.parts.rows, nest.loop(rows, element, name="r"), None)

        return nest.sequence(
            [
                tirx.AllocBuffer(sums),
                tirx.AllocBuffer(spill),
                *clear,
                accumulate,
                *copy,
                nest.loop(width * lanes, finish, name="lane"),
            ]
        )

    def _value(self, n: Any, t: Any) -> Any:
        rows, vector = self.fmt.layout.rows, self.fmt.layout.vector
        run = (n // rows * (self.fmt.slots // vector) + t // vector) * rows + n % rows
        return nest.load_float(self.values, run * vector + t % vector, 1)

    def _index(self, n: Any, t: Any) -> Any:
        rows, vector = self.fmt.layout.rows, self.fmt.index_vector
        indices = self.parts.indices
        if self.fmt.encoding == "u8":
            stored = indices[n // rows, t // vector, n % rows, t % vector]
        else:
            pair = indices[n // rows, t // vector, n % rows, t % vector // 2]
            stored = (pair >> tirx.Cast("uint8", t % 2 * 4)) & tirx.const(15, "uint8")
        return tirx.Cast(nest.INDEX, stored)
