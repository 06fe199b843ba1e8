"""What was decided for every layer of a model, as rows that print as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload


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
        Predicted microseconds of all uses together, None where nothing was predicted.
    decision : str
        ``"sparse"`` or ``"dense"``.
    reason : str
        Why.
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
        names = [f.name for f in fields(LayerRow)]
        return Report(
            [
                LayerRow(**{**{n: row[n] for n in names}, "shape": tuple(row["shape"])})
                for row in rows
            ],
            title,
        )

    def table(self) -> Any:
        """A ``rich.table.Table``."""
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
                row.rows + (f" ({row.uses}x)" if row.uses > 1 else ""),
                row.pattern or "-",
                f"{row.bytes_dense / 1024:.0f}",
                f"{row.bytes_sparse / 1024:.0f}",
                "-" if row.dense_us is None else f"{row.dense_us:.1f}",
                "-" if row.sparse_us is None else f"{row.sparse_us:.1f}",
                row.decision,
                row.reason,
            )
        sparse = [row for row in self._rows if row.decision == "sparse"]
        table.caption = (
            f"{len(sparse)} of {len(self._rows)} dense layers sparse; "
            f"{sum(r.bytes_dense for r in self._rows) / 2**20:.1f} MiB dense -> "
            f"{sum(r.bytes_sparse for r in self._rows) / 2**20:.1f} MiB"
        )
        return table

    def __str__(self) -> str:
        import io

        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(self.table())
        return out.getvalue()
