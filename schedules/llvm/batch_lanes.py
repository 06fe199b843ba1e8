"""The balanced operator with lanes over the batch, for every CPU, layout and block.

The activations are transposed once, so that a register holds one column of ``lanes`` rows of the batch;
a slot is then an ordinary vector load at its column times a value for all lanes, and nothing is permuted.
The registers of a tile of the batch lie side by side, so that a slot of 16 rows reads one cache line.
A batch that does not fill the last register is padded: at batch 1 a slot costs one vector operation
where scalar code needs one scalar operation.

Thread map: groups of weight rows -> threads; slots of a row -> one thread, in the order of K. A group
goes through K in chunks whose activations stay in the first cache, where a slot would miss it else:
its sums wait in memory between chunks. Knobs: :class:`Knobs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx

from tvm_balanced.format.layout import PackedFormat
from tvm_balanced.schedules.llvm import batch_lanes as llvm_batch_lanes
from tvm_balanced.schedules.llvm import nest
from tvm_balanced.schedules.llvm.rest.common import lanes as lanes_of
from tvm_balanced.schedules.llvm.rest.common import vector_bits
from tvm_balanced.schedules.space import Space, _powers

NAME = "llvm_batch_lanes"
# slots written out in the body of the innermost loop
_UNROLL = 8
# floats of a cache line
_LINE = 16
# steps of the parallel loop, where there are rows enough
_STEPS = 16


@dataclass(frozen=True)
class Knobs:
    """What a tuner may sample.

    Parameters
    ----------
    sums : int
        Registers of sums in a tile: weight rows times registers of activations.
    batch_tile : int
        Most registers of activations in a tile, a power of two.
    group : int
        Most weight rows that one step of the parallel loop handles.
    chunk : int
        Bytes of activations that a group works on at a time.
    """

    sums: int = 8
    batch_tile: int = 4
    group: int = 64
    chunk: int = 16384


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


def group_sizes(fmt: PackedFormat, lanes: int) -> list[int]:
    """Weight rows that one step of the parallel loop may handle, ascending; more count as the last.

    Parameters
    ----------
    fmt : PackedFormat
        Of the weight.
    lanes : int
        float32 values in a register.
    """
    # steps are whole registers and cache lines, and every thread has some to take
    multiple = math.lcm(_LINE, lanes, _unit(fmt))
    most = -(-fmt.padded_rows // (_STEPS * multiple))
    doubled = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [multiple * size for size in [*doubled, most]]


def tile_sizes(fmt: PackedFormat, lanes: int, knobs: Knobs, width: int) -> tuple[int, int]:
    """What ``knobs`` come to in a tile of ``width`` registers of activations.

    Parameters
    ----------
    fmt : PackedFormat
        Of the weight.
    lanes : int
        float32 values in a register.
    knobs : Knobs
        What was asked for.
    width : int
        Registers of activations.

    Returns
    -------
    rows, chunk : int
        Weight rows whose sums are held together, and steps of K (blocks, or pairs of them) in a chunk.
    """
    unit, step = _unit(fmt), _step(fmt)
    rows = 1
    while rows * 2 * width <= knobs.sums and unit % (rows * 2) == 0:
        rows *= 2
    bytes_of_step = step * 4 * (fmt.pattern.block * width * lanes + fmt.pattern.nnz * unit)
    return rows, min(fmt.blocks // step, max(1, knobs.chunk // bytes_of_step))


def tile_widths(registers: int, batch_tile: int) -> list[int]:
    """Widths of the tiles that ``registers`` of activations are cut into; one or two values."""
    whole, rest = divmod(registers, batch_tile)
    return [batch_tile] * bool(whole) + [rest] * bool(rest)


def _vector_index(fmt: PackedFormat) -> bool:
    """Whether the indices of as many rows as fill a vector lie side by side."""
    return fmt.layout.vector == 1 and fmt.layout.rows in (8, 16, 32)


def _unit(fmt: PackedFormat) -> int:
    """Weight rows whose indices are unpacked together."""
    return fmt.layout.rows if _vector_index(fmt) else math.gcd(fmt.padded_rows, 8)


def _step(fmt: PackedFormat) -> int:
    """Blocks of a step: an odd number of 4-bit slots per block ends in the middle of a byte."""
    return 2 if fmt.encoding == "u4" and fmt.pattern.nnz % 2 else 1


class _Kernel:
    def __init__(self, parts: nest.Parts, lanes: int, knobs: Knobs) -> None:
        self.parts = parts
        self.fmt = parts.fmt
        self.lanes = lanes
        self.knobs = knobs
        self.columns = -(-self.fmt.padded_features // _LINE) * _LINE
        self.registers = (parts.rows + lanes - 1) // lanes
        self.vector_index = _vector_index(self.fmt)
        self.unit = _unit(self.fmt)
        self.group = min(knobs.group, group_sizes(self.fmt, lanes)[-1])

    def body(self) -> Any:
        parts, fmt = self.parts, self.fmt
        self.values, declare_values = nest.flat_view(parts.values)
        self.indices, declare_indices = nest.flat_view(parts.indices)
        statements = [declare_values, declare_indices]
        size = self.registers * self.lanes * self.columns
        direct = parts.source is not None and fmt.in_features == self.columns
        # one workspace: of two whose size is symbolic, TVM lets the second overwrite the first
        self.origin = tirx.const(0, nest.INDEX) if direct else size
        self.data, allocate = nest.workspace(size if direct else size * 2, "balanced_columns")
        statements += allocate
        if direct:
            self.source, declare_source = nest.flat_source(parts)
            statements.append(declare_source)
        else:
            self.source = self.data
            statements.append(
                nest.by_work(
                    parts.rows,
                    self.columns * 8,
                    lambda parallel: nest.stage(parts, self.source, self.columns, parallel),
                )
            )
        statements += [
            nest.by_work(parts.rows, self.columns * 8, self._transpose),
            nest.by_work(parts.rows, fmt.padded_rows * fmt.slots, self._groups),
        ]
        return nest.sequence(statements)

    def _tiles(self, build: Callable[[Any, int], Any]) -> Any:
        """``build(register, width)`` for tiles of the batch: full ones, then the rest."""
        tile, registers = self.knobs.batch_tile, self.registers
        if isinstance(registers, int):
            whole, rest = divmod(registers, tile)
            pieces = [nest.loop(whole, lambda i: build(i * tile, tile), name="mo")] if whole else []
            if rest:
                pieces.append(build(tirx.const(whole * tile, nest.INDEX), rest))
            return nest.sequence(pieces)
        pieces = [nest.loop(registers // tile, lambda i: build(i * tile, tile), name="mo")]
        size = tile // 2
        while size:
            # registers before this part of the rest: a multiple of twice its size
            at = registers // (2 * size) * (2 * size)
            there = registers % (2 * size) >= size
            pieces.append(tirx.IfThenElse(there, build(at, size), None))
            size //= 2
        return nest.sequence(pieces)

    def _place(self, register: Any, width: int, column: Any, w: int) -> Any:
        """Where ``column`` of register ``register + w`` lies, of a tile of ``width`` from ``register``."""
        return self.origin + (register * self.columns + column * width + w) * self.lanes

    def _transpose(self, parallel: bool) -> Any:
        """Columns of activations side by side, one cache line of each row at a time."""
        lanes, rows = self.lanes, self.parts.rows

        def square(register: Any, width: int, w: Any, column: Any) -> Any:
            def load(i: int) -> Any:
                m = (register + w) * lanes + i
                if not isinstance(rows, int) or rows % lanes:
                    # nothing is stored of the lanes behind the last row
                    m = tirx.min(m, rows - 1)
                return self.source[nest.ramp(m * self.columns + column, lanes)]

            statements, turned = _turn([load(i) for i in range(lanes)], lanes)
            for i, register_of in enumerate(turned):
                at = self._place(register, width, column + i, w)
                statements.append(tirx.BufferStore(self.data, register_of, [nest.ramp(at, lanes)]))
            return nest.sequence(statements)

        def tile(line: Any, register: Any, width: int) -> Any:
            def squares(w: Any) -> Any:
                return nest.loop(
                    _LINE // lanes,
                    lambda i: square(register, width, w, line * _LINE + i * lanes),
                    name="i",
                )

            return nest.loop(width, squares, name="w")

        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
        return nest.loop(
            self.columns // _LINE,
            lambda line: self._tiles(lambda register, width: tile(line, register, width)),
            kind,
            name="line",
        )

    def _groups(self, parallel: bool) -> Any:
        rows = self.fmt.padded_rows
        kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL

        def group(g: Any) -> Any:
            first = g * self.group
            count: Any = self.group
            if rows % self.group:
                count = tirx.min(tirx.const(self.group, nest.INDEX), rows - first)
            return self._tiles(lambda register, width: self._tile(first, count, register, width))

        return nest.loop(-(-rows // self.group), group, kind, name="g")

    def _tile(self, first: Any, count: Any, register: Any, width: int) -> Any:
        """``count`` weight rows from ``first`` by ``width`` registers from ``register``."""
        fmt, lanes = self.fmt, self.lanes
        sums, allocate = nest.workspace(self.group * width * lanes, "balanced_sums")
        step = _step(fmt)
        steps = fmt.blocks // step
        rows, chunk = tile_sizes(fmt, lanes, self.knobs, width)
        places = nest.local(chunk * step * fmt.pattern.nnz * self.unit, "balanced_places", "int32")
        one = chunk == steps

        def work(c: Any) -> Any:
            extent: Any = chunk
            if steps % chunk:
                extent = tirx.min(tirx.const(chunk, nest.INDEX), steps - c * chunk)
            start = c * (chunk * step)

            def unit(u: Any) -> Any:
                n = first + u * self.unit
                unpack = self._unpack(places, n, width, start, extent, step)

                def accumulate(i: Any) -> Any:
                    row = u * self.unit + i * rows
                    slots = extent * (step * fmt.pattern.nnz)
                    return self._accumulate(
                        sums, places, n, i * rows, row, rows, register, width, start, slots, one
                    )

                return nest.sequence([unpack, nest.loop(self.unit // rows, accumulate, name="t")])

            return nest.loop(count // self.unit, unit, name="u")

        pieces = [nest.loop(-(-steps // chunk), work, name="c")]
        if not one:
            zero = nest.splat(tirx.const(0.0, "float32"), lanes)
            pieces.insert(
                0,
                nest.loop(
                    count * width,
                    lambda i: tirx.BufferStore(sums, zero, [nest.ramp(i * lanes, lanes)]),
                    name="i",
                ),
            )
        return nest.sequence(
            [
                *allocate,
                tirx.AllocBuffer(places),
                *pieces,
                self._finish(sums, first, count, register, width),
            ]
        )

    def _unpack(self, places: Any, n: Any, width: int, start: Any, extent: Any, step: int) -> Any:
        """Write down where the slots of ``unit`` weight rows from ``n`` find their activations.

        LLVM would decode the indices of a few rows in a vector register and take it apart again.
        """
        fmt, unit, nnz = self.fmt, self.unit, self.fmt.pattern.nnz
        scale = width * self.lanes

        def slot(b: Any, i: int, s: Any) -> Any:
            t = ((start + b * step + i) * nnz) + s
            at = ((b * step + i) * nnz + s) * unit
            origin = tirx.Cast("int32", (b * step + i) * (fmt.pattern.block * scale))
            if self.vector_index:
                index = self._index(n, t, unit)
                place = index * nest.splat(tirx.const(scale, "int32"), unit)
                place = place + nest.splat(origin, unit)
                # the next rows lie elsewhere, where the CPU does not expect them
                fetch = nest.prefetch(self.values, self._at(n + unit, t))
                return nest.sequence(
                    [fetch, tirx.BufferStore(places, place, [nest.ramp(at, unit)])]
                )
            return nest.loop(
                unit,
                lambda r: tirx.BufferStore(
                    places,
                    self._index(n + r, t, 1) * tirx.const(scale, "int32") + origin,
                    [at + r],
                ),
                name="r",
            )

        def blocks(b: Any) -> Any:
            if step == 1 and nnz > _UNROLL:
                # slots of a byte together
                unit = 2 if nnz % 2 == 0 else 1
                return nest.loop(
                    nnz // unit,
                    lambda s: nest.sequence([slot(b, 0, s * unit + i) for i in range(unit)]),
                    name="s",
                )
            return nest.sequence([slot(b, i, s) for i in range(step) for s in range(nnz)])

        return nest.loop(extent, blocks, name="b")

    def _accumulate(
        self,
        sums: Any,
        places: Any,
        n: Any,
        sub: Any,
        row: Any,
        rows: int,
        register: Any,
        width: int,
        start: Any,
        slots: Any,
        clear: bool,
    ) -> Any:
        """One chunk of K of ``rows`` weight rows, whose sums are held in registers meanwhile."""
        fmt, lanes, nnz = self.fmt, self.lanes, self.fmt.pattern.nnz
        held = nest.local(rows * width * lanes, "balanced_held")
        cells = [(r, w) for r in range(rows) for w in range(width)]
        zero = nest.splat(tirx.const(0.0, "float32"), lanes)
        base = self._place(register, width, start * fmt.pattern.block, 0)

        def cell(r: int, w: int) -> Any:
            return nest.ramp((r * width + w) * lanes, lanes)

        def waiting(r: int, w: int) -> Any:
            return nest.ramp(((row + r) * width + w) * lanes, lanes)

        load = [
            tirx.BufferStore(held, zero if clear else sums[waiting(r, w)], [cell(r, w)])
            for r, w in cells
        ]
        save = [tirx.BufferStore(sums, held[cell(r, w)], [waiting(r, w)]) for r, w in cells]

        def slot(t: Any) -> Any:
            statements: list[Any] = []
            for r in range(rows):
                place = tirx.Var(f"place_{r}", nest.INDEX)
                weight = tirx.Var(f"weight_{r}", "float32")
                stored = places[t * self.unit + sub + r]
                value = nest.load_float(self.values, self._at(n + sub + r, start * nnz + t), 1)
                statements += [
                    tirx.Bind(place, base + tirx.Cast(nest.INDEX, stored)),
                    tirx.Bind(weight, value),
                ]
                for w in range(width):
                    x = self.data[nest.ramp(place + w * lanes, lanes)]
                    product = x * nest.splat(weight, lanes)
                    statements.append(
                        tirx.BufferStore(held, held[cell(r, w)] + product, [cell(r, w)])
                    )
            return nest.sequence(statements)

        return nest.sequence(
            [tirx.AllocBuffer(held), *load, nest.loop(slots, slot, name="slot"), *save]
        )

    def _finish(self, sums: Any, first: Any, count: Any, register: Any, width: int) -> Any:
        """Store the result of a group, ``lanes`` weight rows at a time."""
        lanes, rows = self.lanes, self.parts.rows
        # rows of the activations by weight rows
        turned = nest.local(width * lanes * lanes, "balanced_turned")

        def square(i: Any, w: Any) -> Any:
            at = [((i * lanes + r) * width + w) * lanes for r in range(lanes)]
            statements, columns = _turn([sums[nest.ramp(a, lanes)] for a in at], lanes)
            for r, column in enumerate(columns):
                place = nest.ramp((w * lanes + r) * lanes, lanes)
                statements.append(tirx.BufferStore(turned, column, [place]))
            return nest.sequence(statements)

        def block(i: Any) -> Any:
            def store(lane: Any) -> Any:
                m = register * lanes + lane
                n = first + i * lanes
                stored = nest.store_rows(self.parts, m, n, lanes, turned, lane * lanes)
                if isinstance(rows, int) and rows % lanes == 0:
                    return stored
                return tirx.IfThenElse(m < rows, stored, None)

            return nest.sequence(
                [
                    tirx.AllocBuffer(turned),
                    nest.loop(width, lambda w: square(i, w), name="w"),
                    nest.loop(width * lanes, store, name="lane"),
                ]
            )

        return nest.loop((count + lanes - 1) // lanes, block, name="i")

    def _at(self, n: Any, t: Any) -> Any:
        """Where the value of slot ``t`` of row ``n`` lies."""
        rows, vector = self.fmt.layout.rows, self.fmt.layout.vector
        run = (n // rows * (self.fmt.slots // vector) + t // vector) * rows + n % rows
        return run * vector + t % vector

    def _index(self, n: Any, t: Any, lanes: int) -> Any:
        """Indices of ``lanes`` rows from ``n`` as int32; several only where they lie side by side."""
        rows, vector = self.fmt.layout.rows, self.fmt.index_vector
        run = (n // rows * (self.fmt.slots // vector) + t // vector) * rows + n % rows
        packed = 2 if self.fmt.encoding == "u4" else 1
        at = run * (vector // packed) + t % vector // packed
        stored = tirx.Cast(nest.vector("int32", lanes), self.indices[nest.ramp(at, lanes)])
        if packed == 1:
            return stored
        shift = tirx.Cast("int32", t % 2 * 4)
        return (stored >> nest.splat(shift, lanes)) & nest.splat(tirx.const(15, "int32"), lanes)


def _turn(vectors: list[Any], lanes: int) -> tuple[list[Any], list[Any]]:
    """Transpose ``lanes`` vectors of as many lanes: statements, and the vectors they bind."""
    dtype = nest.vector("float32", lanes)
    statements: list[Any] = []

    def bind(value: Any) -> Any:
        var = tirx.Var("square", dtype)
        statements.append(tirx.Bind(var, value))
        return var

    held = [bind(v) for v in vectors]
    half = lanes // 2
    while half:
        for i in (i for i in range(lanes) if not i & half):
            low, high = held[i], held[i + half]
            # of `low` and `high` side by side
            even = [j + lanes - half if j & half else j for j in range(lanes)]
            odd = [j + lanes if j & half else j + half for j in range(lanes)]
            held[i], held[i + half] = (
                bind(tirx.Shuffle([low, high], [tirx.const(j, "int32") for j in order]))
                for order in (even, odd)
            )
        half //= 2
    return statements, held


# of the kernel with lanes over the batch: steps of the parallel loop that are tried, the largest ones, and
# bytes of activations, from a part of the first cache to all of a usual K
_GROUPS = 5
_CHUNKS = (8192, 16384, 32768, 65536, 262144)


def batch_lanes_space(parts: nest.Parts, target: tvm.target.Target) -> list[Space]:
    lanes = lanes_of(target)
    fmt = parts.fmt
    registers = -(-int(parts.rows) // lanes)
    # half of them hold sums at most; the others activations and weights
    most = 16 if vector_bits(target) >= 512 else 8
    choices = {
        "sums": tuple(size for size in _powers(most) if size > 1),
        "batch_tile": tuple(size for size in _powers(8) if size < 2 * registers),
        "group": tuple(llvm_batch_lanes.group_sizes(fmt, lanes)[-_GROUPS:]),
        "chunk": _CHUNKS,
    }

    def knobs(values: Mapping[str, int]) -> llvm_batch_lanes.Knobs:
        return dataclasses.replace(llvm_batch_lanes.Knobs(), **values)

    def sizes(values: Mapping[str, int]) -> list[tuple[int, int]]:
        widths = llvm_batch_lanes.tile_widths(registers, values["batch_tile"])
        return [llvm_batch_lanes.tile_sizes(fmt, lanes, knobs(values), width) for width in widths]

    def valid(values: Mapping[str, int]) -> bool:
        if values["batch_tile"] > values["sums"]:
            return False
        # of values that come to the same kernel only the least counts
        return not any(
            sizes({**values, name: smaller}) == sizes(values)
            for name in ("sums", "chunk")
            for smaller in choices[name]
            if smaller < values[name] and (name == "chunk" or smaller >= values["batch_tile"])
        )

    def build(values: Mapping[str, int]) -> Any:
        return llvm_batch_lanes.schedule(parts, lanes, knobs(values))

    return [Space(llvm_batch_lanes.NAME, choices, valid, build)]
