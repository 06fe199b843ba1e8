"""What an instrumented launch saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

SECTOR = 32  # bytes


@dataclass(frozen=True)
class Issue:
    """A defect found while running."""

    # what is wrong: a race, a read of unwritten shared memory, an access out of bounds, ...
    kind: str
    count: int
    line: int  # of the CUDA source; 0 where unknown
    source: str  # of that line
    first: str  # block and thread where it first happened


@dataclass(frozen=True)
class Access:
    """One load or store of the source, summed over all warps that ran it."""

    # whether it is of shared memory, else global; whether it is a store, else a load
    shared: bool
    write: bool
    bytes_per_lane: int  # width of the access
    array: str  # argument that it reaches, ``argN``, for global memory; empty for shared memory
    requests: int  # warp-wide requests
    # active lanes and bytes asked for, over all requests
    lanes: int
    bytes: int
    # 32-byte sectors (global) or wavefronts (shared) used, and the least that would do
    units: int
    ideal: int
    block_sectors: int  # distinct sectors within each thread block, summed
    line: int  # of the CUDA source; 0 where unknown
    source: str  # of that line

    @property
    def excess(self) -> float:
        """Sectors or wavefronts over the ideal; 1.0 is perfect."""
        return self.units / max(1, self.ideal)


@dataclass(frozen=True)
class Spread:
    """A count that threads or thread blocks differ in."""

    members: int = 0  # threads or blocks that ran
    total: int = 0  # their sum
    least: int = 0
    most: int = 0

    @property
    def mean(self) -> float:
        """Mean over all members; 0 where there are none."""
        return self.total / max(1, self.members)


class EmulatorReport:
    """Issues and counts of one launch.

    ``barriers`` is the spread over thread blocks of the barriers passed, ``multiply_adds`` that over
    threads of the float32 multiply-adds executed: instructions into which g++ contracted a product and
    a sum, as nvcc does too, those of the epilogue among them. Both are empty unless profiled. ``scale``
    is the number of the grid's blocks per block that ran.
    """

    # of the runtime's report; `locate` finds the lines of program counters in the CUDA source
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
                self.barriers = Spread(*map(int, row[1:]))
            elif row[0] == "F":
                self.multiply_adds = Spread(*map(int, row[1:]))
            else:
                self.sectors[names[int(row[1])]] = (int(row[2]), int(row[3]))

    def select(
        self, shared: bool | None = None, write: bool | None = None, array: str | None = None
    ) -> list[Access]:
        """Pick the accesses of one kind; None selects both."""
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
            "l2_read_bytes_if_l1_perfect": SECTOR * total("block_sectors", False, False),
            "dram_read_bytes_min": float(SECTOR) * sum(read for read, _ in self.sectors.values()),
            "dram_write_bytes_min": float(SECTOR)
            * sum(written for _, written in self.sectors.values()),
            "shared_wavefronts": total("units", True),
            "shared_wavefronts_ideal": total("ideal", True),
            "barriers": self.scale * self.barriers.total,
            "multiply_adds": self.scale * self.multiply_adds.total,
        }

    def to_json(self) -> dict[str, object]:
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
        return "\n".join([self.table(width), *self.spreads()])

    def spreads(self) -> list[str]:
        """Lines of what thread blocks and threads differ in."""
        barriers, adds = self.barriers, self.multiply_adds
        return [
            f"barriers per block: {barriers.least} to {barriers.most}",
            f"multiply-adds per thread: {adds.least} to {adds.most}, mean {adds.mean:.1f}; "
            f"{self.scale * adds.total:.0f} in all",
        ]

    def table(self, width: int = 70) -> str:
        """List accesses by line, then issues; sectors (global) or wavefronts (shared) per request."""
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
