"""The report's table: readable on narrow terminals, whole in files."""

from __future__ import annotations

import pytest

from tvm_balanced.report import LayerRow, Report

NAMES = [
    "out.weight",
    "encoder.layer.11.attention.self.query.weight",
    "embeddings.[brackets].weight",
]


def report() -> Report:
    rows = [
        LayerRow(
            name=name,
            shape=(30522, 4096),
            rows="batch*seq",
            uses=2,
            dtype="float32",
            pattern=None if dense else "4:16",
            density=0.25,
            bytes_dense=30522 * 4096 * 4,
            bytes_sparse=30522 * 4096 * (4 if dense else 1),
            dense_us=None if dense else 12345.6,
            sparse_us=None if dense else 1234.5,
            decision="dense" if dense else "sparse",
            reason="its weight follows no balanced pattern; prune it first"
            if dense
            else "predicted 10.00x faster; M assumed 8",
        )
        for dense, name in zip((False, False, True), NAMES, strict=True)
    ]
    return Report(rows, "model on h100")


@pytest.mark.parametrize("width", [80, 100, 120, 160, 240])
def test_nothing_is_cut(width):
    text = report().text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    # folded cells go on in the next line: what is left of them stands in order
    letters = "".join(text.split())
    for word in ("30522x4096", "12345.6", "1234.5", "488352", "sparse", "dense", "2 of 3"):
        assert word.replace(" ", "") in letters
    if width >= 240:
        assert all(name in text for name in NAMES)


def test_narrow_terminals_keep_names_together():
    lines = report().text(80).splitlines()
    assert any(line.strip().startswith("out.weight") for line in lines)
    wide = report().text(160)
    assert "KiB dense" in wide and "KiB dense" not in report().text(80)


def test_print_follows_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert str(report()) == report().text(80)
    monkeypatch.setenv("COLUMNS", "200")
    assert str(report()) == report().text(200)


def test_decisions_are_not_cut_at_80_columns():
    lines = report().text(80).splitlines()
    assert sum("sparse 4:16" in line for line in lines) == 2
