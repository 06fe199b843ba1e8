"""What was decided for every layer of a model, as rows that print as a table."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

# columns of a table that goes into a file or a pipe
WIDE = 160


_UNBOUNDED = 10_000


_NAME_MIN = 24


_REASON_MIN = 24


@dataclass(frozen=True)
class LayerRow:
    """One dense layer of a model.

    Parameters
    ----------
    name : str
        The weight's own name in the model.
    shape : tuple of int
        ``(N, K)``.
    rows : str
        Rows of activations M of its uses, symbolic ones by name.
    uses : int
        Dense operators that read the weight.
    pattern : str or None
        ``nnz:block``, None when the weight follows none.
    density : float
        Share of weights kept.
    bytes_dense, bytes_sparse : int
        Size of the weight as it was and as it would be held packed (equal when it stays dense).
    dense_us, sparse_us : float or None
        Predicted microseconds of all uses together, None where nothing was predicted; the dense ones of
        the dense kernel that would run.
    decision : str
        ``"sparse"`` or ``"dense"``.
    reason : str
        Why.
    cublas_us : float or None
        What cuBLAS would take, predicted; None off CUDA.
    """

    name: str
    shape: tuple[int, int]
    rows: str
    uses: int
    dtype: str
    pattern: str | None
    density: float
    bytes_dense: int
    bytes_sparse: int
    dense_us: float | None
    sparse_us: float | None
    decision: str
    reason: str
    cublas_us: float | None = None


class Report(Sequence[LayerRow]):
    """Rows, one a layer; ``str()`` is a table, :meth:`to_json` for machines."""

    def __init__(self, rows: Sequence[LayerRow], title: str = "") -> None:
        self._rows = list(rows)
        self.title = title

    @overload
    def __getitem__(self, index: int) -> LayerRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerRow]: ...
    def __getitem__(self, index: int | slice) -> LayerRow | Sequence[LayerRow]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain dictionaries, one a layer."""
        return [{**asdict(row), "shape": list(row.shape)} for row in self._rows]

    @staticmethod
    def from_json(rows: Sequence[dict[str, Any]], title: str = "") -> Report:
        """Inverse of :meth:`to_json`."""
        # libraries compiled before cuBLAS was predicted do not have it
        rows = [{"cublas_us": None, **row} for row in rows]
        names = [f.name for f in fields(LayerRow)]
        return Report(
            [
                LayerRow(**{**{n: row[n] for n in names}, "shape": tuple(row["shape"])})
                for row in rows
            ],
            title,
        )

    def table(self, width: int = WIDE) -> Any:
        """A ``rich.table.Table`` for a terminal of ``width`` columns.

        Where the full table would squeeze names and reasons, sizes and times share columns and the
        reason stands below the name.
        """
        from rich.console import Console
        from rich.measure import Measurement

        console = Console(width=_UNBOUNDED)
        table = self._full_table()
        natural = Measurement.get(console, console.options, table).maximum
        names = max((len(row.name) for row in self._rows), default=0)
        reasons = max((len(row.reason) for row in self._rows), default=0)
        squeezed = natural - names - reasons + min(names, _NAME_MIN) + min(reasons, _REASON_MIN)
        if squeezed > width:
            table = self._compact_table()
        sparse = [row for row in self._rows if row.decision == "sparse"]
        table.caption = (
            f"{len(sparse)} of {len(self._rows)} dense layers sparse; "
            f"{sum(r.bytes_dense for r in self._rows) / 2**20:.1f} MiB dense -> "
            f"{sum(r.bytes_sparse for r in self._rows) / 2**20:.1f} MiB"
        )
        return table

    def _full_table(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title or None, title_justify="left", expand=False)
        table.add_column("layer", overflow="fold", min_width=12)
        for heading in (
            "N x K",
            "M",
            "pattern",
            "KiB dense",
            "KiB sparse",
            "us dense",
            "us sparse",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("decision", no_wrap=True)
        table.add_column("reason", overflow="fold", min_width=16)
        for row in self._rows:
            table.add_row(
                row.name,
                f"{row.shape[0]} x {row.shape[1]}",
                _rows_text(row),
                row.pattern or "-",
                f"{row.bytes_dense / 1024:.0f}",
                f"{row.bytes_sparse / 1024:.0f}",
                "-" if row.dense_us is None else f"{row.dense_us:.1f}",
                "-" if row.sparse_us is None else f"{row.sparse_us:.1f}",
                row.decision,
                row.reason,
            )
        return table

    def _compact_table(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(
            title=self.title or None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        table.add_column("layer: reason", overflow="fold")
        # unlike columns that must not wrap, these are never cut: sizes of two go below each other
        for heading in ("N x K", "M", "KiB", "us"):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("decision", overflow="fold")
        for row in self._rows:
            times = "-"
            if row.dense_us is not None and row.sparse_us is not None:
                times = f"{row.dense_us:.1f} > {row.sparse_us:.1f}"
            sizes = f"{row.bytes_dense / 1024:.0f}"
            if row.decision == "sparse":
                sizes += f" > {row.bytes_sparse / 1024:.0f}"
            table.add_row(
                f"{row.name}\n  {row.reason}",
                f"{row.shape[0]}x{row.shape[1]}",
                _rows_text(row),
                sizes,
                times,
                row.decision + (f" {row.pattern}" if row.decision == "sparse" else ""),
            )
        return table

    def text(self, width: int = WIDE) -> str:
        """The table as text of at most ``width`` columns."""
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(
            self.table(width), markup=False, highlight=False
        )
        return out.getvalue()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield self.table(options.max_width)

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((WIDE, 24)).columns)


def _rows_text(row: LayerRow) -> str:
    return row.rows + (f" ({row.uses}x)" if row.uses > 1 else "")
