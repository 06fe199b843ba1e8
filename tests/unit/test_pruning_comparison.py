"""The comparison in examples/accuracy: its patterns, its text, its statistics, and a small run of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from examples.accuracy import run, tasks, text
from examples.accuracy.patterns import Tiles, rules


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 1), (8, 8)])
def test_tiles_are_cut_whole_and_to_the_share(rows, columns):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).abs()
    rule = Tiles(0.75, rows, columns)
    half = rule.mask(weight, 0.5)
    final = rule.mask(torch.where(half, weight, torch.tensor(-1.0)), 0.0)
    assert float(half.float().mean()) == 0.625 and float(final.float().mean()) == 0.25
    assert bool((half | ~final).all())
    tiles = final.reshape(32 // rows, rows, 64 // columns, columns).transpose(1, 2).flatten(2)
    assert bool((tiles.all(-1) == tiles.any(-1)).all())


def test_balanced_blocks_only_where_they_hold_the_share():
    assert [n for n in rules(0.875, {64, 144}) if n.startswith("balanced")] == [
        "balanced 8",
        "balanced 16",
    ]
    assert "2:4" in rules(0.5, {64}) and "2:4" not in rules(0.75, {64})


def test_calibration_text_is_not_what_is_tested_on(monkeypatch):
    # reading all of the standard library takes seconds
    read = list(itertools.islice(text._docstrings(), 100))
    monkeypatch.setattr(text, "_docstrings", lambda: read)
    triples = text.triples()
    tested = {sentence for triple in triples for sentence in triple}
    assert len(triples) == 30 and len(tested) == 90
    drawn = text.calibration_sentences(100)
    assert len(set(drawn)) == 100 and not tested & set(drawn)
    assert drawn == text.calibration_sentences(100)


def test_differences_are_paired():
    rows = [
        {"task": "T", "sparsity": 0.5, "pattern": name, "seed": seed, "fold": 0,
         "score": 90 + 10 * seed + shift}
        for seed, noise in ((0, 0.1), (1, -0.1), (2, 0.0))
        for name, shift in (("unstructured", 0.0), ("balanced 16", -1 + noise))
    ]  # fmt: skip
    (balanced, base) = run.differences(rows)
    assert balanced["difference"] == pytest.approx(-1)
    # Student's 4.303 for three pairs; the seeds' own spread of 10 does not widen it
    assert balanced["half"] == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)
    assert "half" not in base
    assert "-1.00 ± 0.25" in run.table([balanced, base])


def test_a_small_run(tmp_path):
    """At 87.5 % zeros: every pattern has its share of zeros, and all learn the digits."""
    rows = list(tasks.digits(lambda step: None, "MLP", [0.875], seeds=1, epochs=4, folds=1))
    assert [row["pattern"] for row in rows][:3] == ["dense", "unstructured", "balanced 8"]
    for row in rows[1:]:
        assert row["zeros"] == pytest.approx(0.875, abs=0.03), row
    scores = {row["pattern"]: row["score"] for row in rows}
    assert scores["dense"] > 85
    assert scores["balanced 16"] > 70
    run.plot(run.differences(rows), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000
