"""The report's table: readable on narrow terminals, whole in files."""

from __future__ import annotations

from dataclasses import replace

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
            density=0.25 if name == NAMES[0] else 0.3,  # no two rows are equal
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
def test_nothing_but_the_middle_of_a_long_name_is_cut(width):
    text = report().text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("…") == (width < 240)
    # folded cells go on in the next line: what is left of them stands in order
    letters = "".join(text.split())
    for word in ("30522x4096", "12345.6", "1234.5", "488352", "sparse", "dense", "2 of 3"):
        assert word.replace(" ", "") in letters
    if width >= 240:
        assert all(name in text for name in NAMES)


def test_equal_layers_share_a_row_and_long_names_lose_their_middle():
    first = report()[0]
    names = [f"encoder.layer.{i}.attention.{x}.weight" for i in range(12) for x in ("key", "value")]
    alone = f"a.very.{'long.' * 6}name.weight"
    rows = [replace(first, name=name) for name in names] + [replace(first, name=alone, uses=3)]
    many = Report(rows, "model on h100")
    text = many.text(160)
    assert "24 x encoder.layer.….weight" in text and alone not in text
    assert max(len(line) for line in text.splitlines()) <= 160 and len(text.splitlines()) <= 12
    assert "a.very.long" in text and "long.name.weight" in text
    assert alone in many.text(240)
    # only what is printed is grouped
    assert len(many) == len(many.to_json()) == 25
    assert "25 of 25 dense layers sparse" in text


def test_names_without_a_common_head_are_named_by_the_first():
    rows = [replace(report()[0], name=name) for name in ("gate.weight", "up.weight")]
    assert "2 x gate.weight, …" in Report(rows).text(160)


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
