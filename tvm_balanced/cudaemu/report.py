"""What an instrumented launch saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_balanced.cudaemu.compiler import EmulatorError
from tvm_balanced.packing import PackedFormat, numpy_dtype

if TYPE_CHECKING:
    from tvm_balanced.cudaemu.tvm_kernel import TVMKernel

_SECTOR = 32  # bytes


@dataclass(frozen=True)
class Issue:
    """A defect found while running.

    Parameters
    ----------
    kind : str
        For example a race, a read of unwritten shared memory, an access out of bounds.
    count : int
        How often.
    line : int
        In the CUDA source; 0 where unknown.
    source : str
        Text of that line.
    first : str
        Where it first happened: block and thread.
    """

    kind: str
    count: int
    line: int
    source: str
    first: str


@dataclass(frozen=True)
class Access:
    """One load or store of the source, summed over all warps that ran it.

    Parameters
    ----------
    shared, write : bool
        Shared or global memory; store or load.
    bytes_per_lane : int
        Width of the access.
    array : str
        ``argN`` for global memory, empty for shared memory.
    requests : int
        Warp-wide requests.
    lanes, bytes : int
        Active lanes and bytes asked for, over all requests.
    units, ideal : int
        32-byte sectors (global) or wavefronts (shared) used, and the least that would do.
    block_sectors : int
        Distinct sectors within each thread block, summed.
    line : int
        In the CUDA source; 0 where unknown.
    source : str
        Text of that line.
    """

    shared: bool
    write: bool
    bytes_per_lane: int
    array: str
    requests: int
    lanes: int
    bytes: int
    units: int
    ideal: int
    block_sectors: int
    line: int
    source: str

    @property
    def excess(self) -> float:
        """Sectors or wavefronts over the ideal; 1.0 is perfect."""
        return self.units / max(1, self.ideal)


@dataclass(frozen=True)
class Spread:
    """A count that threads or thread blocks differ in.

    Parameters
    ----------
    members : int
        Threads or blocks that ran.
    total, least, most : int
        Sum over them, smallest and largest.
    """

    members: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    @property
    def mean(self) -> float:
        """Of all members; 0 where there are none."""
        return self.total / max(1, self.members)


class Report:
    """Issues and counts of one launch.

    ``barriers`` is the spread over thread blocks of the barriers passed, ``multiply_adds`` that over
    threads of the float32 multiply-adds executed: instructions into which g++ contracted a product and
    a sum, as nvcc does too, those of the epilogue among them. Both are empty unless profiled.

    Parameters
    ----------
    text : str
        The runtime's own report.
    names : sequence of str
        Name of each array argument.
    locate : callable
        Lines of program counters in the CUDA source.
    source : str
        The CUDA source.
    scale : float
        Blocks of the grid per block run.
    """

    def __init__(
        self,
        text: str,
        names: Sequence[str],
        locate: Callable[[list[int]], dict[int, int]],
        source: str,
        scale: float,
    ) -> None:
        self.scale = scale
        self.issues: list[Issue] = []
        self.accesses: list[Access] = []
        self.sectors: dict[str, tuple[int, int]] = {}
        self.barriers = self.multiply_adds = Spread()
        rows = [line.split("\t") for line in text.splitlines()]
        located = {"I": 2, "S": 1}
        counters = sorted({int(r[located[r[0]]], 16) for r in rows if r[0] in located})
        lines, code = locate(counters), source.split("\n")

        def place(counter: str) -> tuple[int, str]:
            line = lines.get(int(counter, 16), 0)
            return line, code[line - 1].strip() if 0 < line <= len(code) else ""

        for row in rows:
            if row[0] == "I":
                self.issues.append(Issue(row[1], int(row[3]), *place(row[2]), row[4]))
            elif row[0] == "S":
                shared, write, size, array, *counts = (int(field) for field in row[2:])
                name = "" if shared else names[array]
                requests, lanes, used, units, ideal, distinct = counts[:6]
                self.accesses.append(
                    Access(
                        *(bool(shared), bool(write), size, name, requests, lanes, used, units),
                        *(ideal, distinct, *place(row[1])),
                    )
                )
            elif row[0] == "B":
                self.barriers = Spread(*(int(field) for field in row[1:]))
            elif row[0] == "F":
                self.multiply_adds = Spread(*(int(field) for field in row[1:]))
            else:
                self.sectors[names[int(row[1])]] = (int(row[2]), int(row[3]))

    def select(
        self, shared: bool | None = None, write: bool | None = None, array: str | None = None
    ) -> list[Access]:
        """Accesses of one kind; None selects both."""
        return [
            access
            for access in self.accesses
            if (shared is None or access.shared == shared)
            and (write is None or access.write == write)
            and (array is None or access.array == array)
        ]

    def summary(self) -> dict[str, float]:
        """Totals, scaled to the whole grid where only some blocks were run (DRAM figures are not)."""

        def total(field: str, shared: bool, write: bool | None = None) -> float:
            chosen = self.select(shared, write)
            return self.scale * sum(int(getattr(access, field)) for access in chosen)

        return {
            "global_load_requests": total("requests", False, False),
            "global_load_sectors": total("units", False, False),
            "global_load_bytes_used": total("bytes", False, False),
            "global_store_sectors": total("units", False, True),
            "l2_read_bytes_if_l1_perfect": 32 * total("block_sectors", False, False),
            "dram_read_bytes_min": 32.0 * sum(read for read, _ in self.sectors.values()),
            "dram_write_bytes_min": 32.0 * sum(written for _, written in self.sectors.values()),
            "shared_wavefronts": total("units", True),
            "shared_wavefronts_ideal": total("ideal", True),
            "barriers": self.scale * self.barriers.total,
            "multiply_adds": self.scale * self.multiply_adds.total,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything counted, in types that JSON has."""
        return {
            "scale": self.scale,
            "summary": self.summary(),
            "barriers_per_block": _spread_json(self.barriers),
            "multiply_adds_per_thread": _spread_json(self.multiply_adds),
            "accesses": [{**asdict(a), "excess": a.excess} for a in self.accesses],
            "issues": [asdict(issue) for issue in self.issues],
        }

    def text(self, width: int = 70) -> str:
        """:meth:`table`, then the barriers of a block and the multiply-adds of a thread."""
        barriers, adds = self.barriers, self.multiply_adds
        return "\n".join(
            [
                self.table(width),
                f"barriers per block: {barriers.least} to {barriers.most}",
                f"multiply-adds per thread: {adds.least} to {adds.most}, mean {adds.mean:.1f}; "
                f"{self.scale * adds.total:.0f} in all",
            ]
        )

    def table(self, width: int = 70) -> str:
        """Accesses by source line, then issues; sectors (global) or wavefronts (shared) per request."""
        out = [
            f"{'line':>5} {'space':6} {'op':5} {'B':>4} {'requests':>10} {'per req':>8} {'ideal':>8}"
        ]
        for a in sorted(self.accesses, key=lambda a: (a.line, a.write)):
            space, op = "shared" if a.shared else "global", "store" if a.write else "load"
            out.append(
                f"{a.line:5d} {space:6} {op:5} {a.bytes_per_lane:4d} {a.requests:10d} "
                f"{a.units / a.requests:8.2f} {a.ideal / a.requests:8.2f}  {a.array} {a.source[:width]}"
            )
        for i in self.issues:
            out.append(f"{i.kind} x{i.count} at line {i.line} ({i.first}): {i.source[:width]}")
        return "\n".join(out)


def _spread_json(spread: Spread) -> dict[str, float]:
    return {**asdict(spread), "mean": spread.mean}


@dataclass(frozen=True)
class Measurement:
    """What one balanced kernel moved and computed, beside the least that would do.

    Byte counts are of the whole grid, reads and writes together.

    Parameters
    ----------
    report : Report
        The counts; of some blocks where only some were run.
    fmt : PackedFormat
        Of the weight.
    rows : int
        M.
    weight_bytes, activation_bytes, output_bytes : int
        What has to move at least: packed values and indices, ``(M, K)``, ``(M, N)``.
    requested_bytes : float
        Asked for by all threads.
    l2_bytes : float
        Sectors moved if the L1 cache kept all that a thread block reads.
    distinct_bytes : float
        Distinct sectors: the least traffic with the memory itself. Epilogues read more than the minimum.
    weight_requests : float
        How often each byte of the packed weight is asked for.
    weight_excess : float
        Sectors of the loads of the packed weight over the ideal.
    """

    report: Report
    fmt: PackedFormat
    rows: int
    weight_bytes: int
    activation_bytes: int
    output_bytes: int
    requested_bytes: float
    l2_bytes: float
    distinct_bytes: float
    weight_requests: float
    weight_excess: float

    @property
    def least_bytes(self) -> int:
        """Packed weight, activations and output."""
        return self.weight_bytes + self.activation_bytes + self.output_bytes

    @cached_property
    def shared_load_excess(self) -> float:
        """Wavefronts of all loads of shared memory over the ideal; most are the gathers."""
        return _excess(self.report.select(shared=True, write=False))

    @cached_property
    def shared_store_excess(self) -> float:
        """Wavefronts of all stores to shared memory (staging, partial sums) over the ideal."""
        return _excess(self.report.select(shared=True, write=True))

    @property
    def multiply_adds(self) -> float:
        """Executed by all threads."""
        return self.report.scale * self.report.multiply_adds.total

    @property
    def needed_multiply_adds(self) -> int:
        """One for each row of activations and slot that is no padding."""
        return self.rows * self.fmt.out_features * self._needed_slots

    @property
    def _needed_slots(self) -> int:
        pattern = self.fmt.pattern
        return -(-self.fmt.in_features // pattern.block) * pattern.nnz

    @property
    def padding(self) -> dict[str, float]:
        """Rows beyond N, slots of a row in blocks beyond K, and their share of all slots held."""
        held = self.fmt.padded_rows * self.fmt.slots
        return {
            "rows": self.fmt.padded_rows - self.fmt.out_features,
            "slots_per_row": self.fmt.slots - self._needed_slots,
            "share": 1 - self.fmt.out_features * self._needed_slots / held,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything measured, in types that JSON has."""
        names = [
            *("rows", "weight_bytes", "activation_bytes", "output_bytes", "least_bytes"),
            *("requested_bytes", "l2_bytes", "distinct_bytes", "weight_requests"),
            *("weight_excess", "shared_load_excess", "shared_store_excess"),
            *("multiply_adds", "needed_multiply_adds", "padding"),
        ]
        fmt = self.fmt
        return {
            "shape": [fmt.out_features, fmt.in_features],
            "pattern": str(fmt.pattern),
            "layout": str(fmt.layout),
            "encoding": fmt.encoding,
            **{name: getattr(self, name) for name in names},
            "launch": self.report.to_json(),
        }

    def text(self) -> str:
        """A page for a person to read."""
        fmt, least, barriers = self.fmt, self.least_bytes, self.report.barriers
        adds, padding = self.report.multiply_adds, self.padding

        def line(name: str, value: float) -> str:
            return f"{name:40s} {value:14.0f}  {value / least:6.3f}x the least"

        return "\n".join(
            [
                f"M={self.rows} N={fmt.out_features} K={fmt.in_features} {fmt.pattern} {fmt.layout} "
                f"{fmt.encoding}",
                f"bytes that have to move: {least} (weight {self.weight_bytes}, activations "
                f"{self.activation_bytes}, output {self.output_bytes})",
                line("bytes in distinct sectors (DRAM, least)", self.distinct_bytes),
                line("bytes through L2, if L1 were perfect", self.l2_bytes),
                line("bytes requested by threads", self.requested_bytes),
                f"packed weight: each byte requested {self.weight_requests:.3f} times, "
                f"{self.weight_excess:.3f}x the ideal sectors",
                f"shared memory: loads {self.shared_load_excess:.3f}x the ideal wavefronts, "
                f"stores {self.shared_store_excess:.3f}x",
                f"barriers per block: {barriers.least} to {barriers.most}",
                f"multiply-adds per thread: {adds.least} to {adds.most}, mean {adds.mean:.1f}; "
                f"{self.multiply_adds:.0f} in all, "
                f"{self.multiply_adds / self.needed_multiply_adds:.3f}x those needed",
                f"padding: {padding['rows']} rows, {padding['slots_per_row']} slots of a row, "
                f"{100 * padding['share']:.1f} % of the slots held",
            ]
        )


def _excess(accesses: Sequence[Access]) -> float:
    return sum(a.units for a in accesses) / max(1, sum(a.ideal for a in accesses))


def measure_balanced(
    kernel: TVMKernel,
    fmt: PackedFormat,
    rows: int,
    dtype: str,
    arrays: Sequence[Any],
    *,
    out_dtype: str | None = None,
    blocks: Sequence[int] | None = None,
) -> Measurement:
    """Run a balanced kernel with counts and put them beside the least that would do.

    Parameters
    ----------
    kernel : TVMKernel
        The operator with or without an epilogue, one launch.
    fmt : PackedFormat
        Of its weight.
    rows : int
        M, the product of all batch axes.
    dtype : str
        Of activations and values.
    arrays : sequence of NumPy arrays
        In the function's argument order; outputs are changed in place.
    out_dtype : str, optional
        Of the output; ``dtype`` when left out.
    blocks : sequence of int, optional
        Thread blocks to run, for large weights; counts are scaled to the whole grid, as blocks of a
        balanced kernel do the same work.

    Raises
    ------
    EmulatorError
        When the function makes several launches or takes no weight of this format.
    """
    launches = kernel.plan(arrays)
    if len(launches) != 1:
        raise EmulatorError(
            f"the function makes {len(launches)} launches; only a single one can be measured"
        )
    args = [arg for arg in launches[0].args if isinstance(arg, np.ndarray)]
    shapes = {fmt.values_shape: numpy_dtype(dtype), fmt.indices_shape: np.dtype(np.uint8)}
    (report,) = kernel(*arrays, profile=True, blocks=blocks)
    sizes = dict(zip(report.sectors, args, strict=True))
    weights = [
        name for name, arg in sizes.items() if arg.ndim == 4 and shapes.get(arg.shape) == arg.dtype
    ]
    if fmt.values_shape == fmt.indices_shape:
        weights = [name for name, arg in sizes.items() if arg.shape == fmt.values_shape]
    if len(weights) != 2:
        raise EmulatorError(
            f"the kernel has no values {fmt.values_shape} and indices {fmt.indices_shape}, which "
            f"{fmt.pattern} in layout {fmt.layout} has; give the format that its weight is packed in"
        )
    streams = [a for name in weights for a in report.select(False, False, name)]
    summary, itemsize = report.summary(), numpy_dtype(dtype).itemsize
    stored = report.scale * sum(a.bytes for a in report.select(False, True))
    distinct = sum(
        min(-(-sizes[name].nbytes // _SECTOR) * _SECTOR, report.scale * _SECTOR * count)
        for name, counts in report.sectors.items()
        for count in counts
    )
    return Measurement(
        report,
        fmt,
        rows,
        weight_bytes=fmt.nbytes(dtype),
        activation_bytes=rows * fmt.in_features * itemsize,
        output_bytes=rows * fmt.out_features * numpy_dtype(out_dtype or dtype).itemsize,
        requested_bytes=summary["global_load_bytes_used"] + stored,
        l2_bytes=summary["l2_read_bytes_if_l1_perfect"] + _SECTOR * summary["global_store_sectors"],
        distinct_bytes=distinct,
        weight_requests=report.scale * sum(a.bytes for a in streams) / fmt.nbytes(dtype),
        weight_excess=_excess(streams),
    )
