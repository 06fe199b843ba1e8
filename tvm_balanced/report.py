"""Results that stand layer by layer: rows that print as a table and turn into JSON."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, overload

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

JsonObject: TypeAlias = dict[str, Any]

# columns of a table that goes into a file or a pipe
WIDE = 160
_UNBOUNDED = 10_000

# longer names are cut in the middle on a narrow table, as their two ends say most
_NAME_MIN = 32
_REASON_MIN = 18


@dataclass(frozen=True)
class KernelTime:
    """One kernel that could run a layer on a CPU."""

    kernel: str  # "dense", "sparse", "dense int8", "sparse int8" or "sparse w8"
    rows: int  # of activations, M
    us: float  # of one use
    measured: bool  # from a calibration of the CPU, else predicted


@dataclass(frozen=True)
class LayerRow:
    """One dense layer of a model: what was decided for it, and why."""

    name: str  # the weight's own name in the model
    shape: tuple[int, int]  # (N, K)
    rows: str  # rows of activations M of its uses, symbolic ones by name
    uses: int  # dense operators that read the weight
    dtype: str  # of the weight
    pattern: str | None  # "nnz:block", None when the weight follows none
    density: float  # share of weights kept
    bytes_dense: int  # the weight as it was
    bytes_sparse: int  # as it is held: packed, or as it was
    # microseconds of all uses together, predicted or from a calibration, None where neither: of the dense
    # kernel that would run, and of the sparse one
    dense_us: float | None
    sparse_us: float | None
    decision: str  # "sparse" or "dense"
    reason: str
    cublas_us: float | None = None  # of cuBLAS, None off CUDA
    quantize: str = "none"  # "int8", "w8", or "none" for the weight's own dtype
    alternatives: tuple[KernelTime, ...] = ()  # on a CPU, for each M

    @property
    def decided(self) -> str:
        """The decision in words: ``sparse``, ``dense int8``."""
        return self.decision + (f" {self.quantize}" if self.quantize != "none" else "")


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one layer."""

    name: str
    shape: tuple[int, int]
    pattern: str | None
    kept_energy: float  # share of the weight's squared norm that is left
    skipped: str | None  # why the layer was left as it was; None when it was pruned
    loss: float | None = None  # of reconstruction: share of its output's variance that is lost
    note: str = ""  # what to know of a pruned layer


Row = TypeVar("Row", bound=LayerRow | PrunedLayer)


def table_of(title: str | None, headings: Iterable[str], **columns: Any) -> Table:
    """Make a table with its title at the left; ``columns`` are keywords of ``rich.Table.add_column``."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, **columns)
    return table


class Printable:
    """A result whose ``str()`` is tables."""

    def tables(self, width: int = WIDE) -> Sequence[Table]:
        """``rich.table.Table`` for a terminal of ``width`` columns."""
        raise NotImplementedError

    def text(self, width: int = WIDE) -> str:
        """Return the tables as text of at most ``width`` columns."""
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=width, color_system=None)
        for table in self.tables(width):
            console.print(table, markup=False, highlight=False)
        return out.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield from self.tables(options.max_width)

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((WIDE, 24)).columns)


class _Rows(Printable, Sequence[Row], Generic[Row]):
    """Rows, one a layer; :meth:`to_json` for machines."""

    def __init__(self, rows: Iterable[Row] = (), title: str = "") -> None:
        self._rows = list(rows)
        self.title = title

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def to_json(self) -> list[JsonObject]:
        """Plain dictionaries, one a layer."""
        return [{**asdict(row), "shape": list(row.shape)} for row in self._rows]

    def grouped(self, width: int) -> list[tuple[str, Row]]:
        """Rows that differ in their name alone as one, named for what the names have in common."""
        groups: dict[Row, list[str]] = {}
        for row in self._rows:
            groups.setdefault(replace(row, name=""), []).append(row.name)
        longest = max(_NAME_MIN, 2 * width // 9)
        return [(_common(names, longest), row) for row, names in groups.items()]


class Report(_Rows[LayerRow]):
    """What was decided for every dense layer, and why."""

    @property
    def sparse(self) -> list[LayerRow]:
        """The layers that run sparse."""
        return [row for row in self if row.decision == "sparse"]

    def tables(self, width: int = WIDE) -> list[Table]:
        """One table; equal layers share a row.

        Where the full table would squeeze names and reasons, sizes and times share columns and the
        reason stands below the name.
        """
        from rich.console import Console
        from rich.measure import Measurement

        console = Console(width=_UNBOUNDED)
        groups = self.grouped(width)
        table = self._full_table(groups)
        natural = Measurement.get(console, console.options, table).maximum
        reasons = max((len(row.reason) for row in self), default=0)
        if natural - reasons + min(reasons, _REASON_MIN) > width:
            table = self._compact_table(groups)
        table.caption = (
            f"{len(self.sparse)} of {len(self)} dense layers sparse; "
            f"{sum(row.bytes_dense for row in self) / 2**20:.1f} MiB dense -> "
            f"{sum(row.bytes_sparse for row in self) / 2**20:.1f} MiB"
        )
        return [table]

    def _full_table(self, groups: Sequence[tuple[str, LayerRow]]) -> Table:
        table = table_of(self.title or None, ("layer",), no_wrap=True)
        headings = ("N x K", "M", "pattern", "KiB dense", "KiB sparse", "us dense", "us sparse")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("decision", no_wrap=True)
        table.add_column("reason", overflow="fold", min_width=16)
        for name, row in groups:
            table.add_row(
                name,
                f"{row.shape[0]} x {row.shape[1]}",
                _rows_text(row),
                row.pattern or "-",
                f"{row.bytes_dense / 1024:.0f}",
                f"{row.bytes_sparse / 1024:.0f}",
                "-" if row.dense_us is None else f"{row.dense_us:.1f}",
                "-" if row.sparse_us is None else f"{row.sparse_us:.1f}",
                row.decided,
                row.reason,
            )
        return table

    def _compact_table(self, groups: Sequence[tuple[str, LayerRow]]) -> Table:
        from rich import box

        table = table_of(self.title or None, ("layer: reason",), overflow="fold")
        table.box, table.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
        table.pad_edge = table.show_edge = False
        # unlike columns that must not wrap, these are never cut: sizes of two go below each other
        for heading in ("N x K", "M", "KiB", "us"):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("decision", overflow="fold")
        for name, row in groups:
            times = "-"
            if row.dense_us is not None and row.sparse_us is not None:
                times = f"{row.dense_us:.1f} > {row.sparse_us:.1f}"
            sizes = f"{row.bytes_dense / 1024:.0f}"
            if row.bytes_sparse != row.bytes_dense:
                sizes += f" > {row.bytes_sparse / 1024:.0f}"
            table.add_row(
                f"{name}\n  {row.reason}",
                f"{row.shape[0]}x{row.shape[1]}",
                _rows_text(row),
                sizes,
                times,
                row.decided + (f" {row.pattern}" if row.decision == "sparse" else ""),
            )
        return table


class PruningReport(_Rows[PrunedLayer]):
    """What pruning did, layer by layer."""

    @property
    def changed(self) -> list[PrunedLayer]:
        """The layers that were pruned."""
        return [row for row in self if row.skipped is None]

    def tables(self, width: int = WIDE) -> list[Table]:
        """One table; layers are equal here only where nothing was done to them."""
        table = table_of(self.title or "pruned layers", ("layer",), no_wrap=True)
        lossy = any(row.loss is not None for row in self)
        for heading in ("N x K", "pattern", "energy kept", *(("loss",) if lossy else ())):
            table.add_column(heading, justify="right", no_wrap=True)
        noted = any(row.note for row in self)
        table.add_column("note" if noted else "left alone because", overflow="fold")
        for name, row in self.grouped(width):
            table.add_row(
                name,
                f"{row.shape[0]} x {row.shape[1]}",
                row.pattern or "-",
                f"{row.kept_energy:.1%}",
                *(("-" if row.loss is None else f"{row.loss:.2%}",) if lossy else ()),
                row.skipped or row.note,
            )
        table.caption = f"{len(self.changed)} of {len(self)} dense layers pruned"
        return [table]


def _common(names: Sequence[str], longest: int) -> str:
    """One name, cut in the middle where it is long; of several their number, common head and tail."""
    count = f"{len(names)} x " if len(names) > 1 else ""
    head, middle, tail = names[0], "", ""
    if count:
        common = _common_head(names)
        rests = [name[len(common) :][::-1] for name in names]
        # a name without anything in common stands for the others
        head, middle = (common, "…") if common else (names[0], ", …")
        tail = _common_head(rests)[::-1] if common else ""
    half = (longest - len(count)) // 2
    if len(head + middle + tail) > 2 * half:
        whole = head + tail
        head, middle, tail = whole[: half - 1], "…", whole[-half:]
    return f"{count}{head}{middle}{tail}"


def _common_head(names: Sequence[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _rows_text(row: LayerRow) -> str:
    return row.rows + (f" ({row.uses}x)" if row.uses > 1 else "")
