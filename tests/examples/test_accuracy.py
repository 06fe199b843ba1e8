"""The comparison in examples/accuracy: its patterns, its text, its statistics, and a small run of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from examples.accuracy import report, run, tasks, text
from examples.accuracy.patterns import Tiles, rules
from tvm_balanced.demo import sentences as calibration_text


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
    read = list(itertools.islice(calibration_text.docstring_sentences(), 100))
    monkeypatch.setattr(calibration_text, "docstring_sentences", lambda: read)
    triples = text.triples()
    tested = {sentence for triple in triples for sentence in triple}
    assert len(triples) == 30 and len(tested) == 90
    drawn = calibration_text.calibration_sentences(100)
    assert len(set(drawn)) == 100 and not tested & set(drawn)
    assert drawn == calibration_text.calibration_sentences(100)


def test_sentences_to_distil_from_are_varied_and_not_those_tested_on(monkeypatch):
    read = list(itertools.islice(calibration_text.docstring_sentences(), 100))
    monkeypatch.setattr(text, "docstring_sentences", lambda: read)
    drawn = text.varied_sentences(300, ["zebra", "quartz"])
    assert len(set(drawn)) == 300
    assert not {sentence for triple in text.triples() for sentence in triple} & set(drawn)
    assert 100 < sum("zebra" in sentence or "quartz" in sentence for sentence in drawn) < 300


def _rows(task, shifts):
    """Scores of three runs whose own spread is 10."""
    return [
        {"task": task, "sparsity": 0.5, "pattern": name, "seed": seed, "fold": 0,
         "score": (90 + 10 * seed) * (1 + shift / 100) if task == "LSTM" else 90 + 10 * seed + shift}
        for seed in range(3)
        for name, shift in (("unstructured", 0.0), ("balanced 16", shifts[seed]))
    ]  # fmt: skip


@pytest.mark.parametrize("task, corrected", [("MLP", 0.3286), ("LSTM", 0.2484)])
def test_differences_are_paired(task, corrected):
    (balanced, base) = report.differences(_rows(task, (-0.9, -1.1, -1.0)))
    assert balanced["difference"] == pytest.approx(-1)
    # Student's 4.303 for three pairs; the seeds' own spread does not widen it
    assert balanced["half"] == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)
    # one image is tested on for every four trained on, so 1/3 + 1/4 in place of 1/3
    assert balanced["corrected"] == pytest.approx(corrected, rel=1e-3)
    assert "half" not in base
    assert "-1.00 ± 0.25" in report.table([balanced, base])


@pytest.mark.parametrize(
    "task, difference, excluded",
    [("MLP", -0.7, True), ("MLP", -0.9, False), ("LSTM", 1.7, True), ("LSTM", 1.9, False)],
)
def test_a_loss_is_excluded_by_the_end_of_the_interval(task, difference, excluded):
    row = {"task": task, "difference": difference, "half": 0.2, "corrected": 0.2}
    assert report.excludes_loss(row) == excluded


def test_a_small_run(tmp_path, monkeypatch):
    """Shares of zeros are kept, more zeros cost more, and a second run repeats nothing."""
    some = ("unstructured", "balanced 16", "block 8x8")
    monkeypatch.setattr(
        tasks, "rules", lambda *of: {n: rule for n, rule in rules(*of).items() if n in some}
    )
    monkeypatch.setattr(run, "SPARSITIES", (0.5, 0.9375))
    monkeypatch.setitem(tasks.EPOCHS, "MLP", 4)
    unit, path = ("MLP", 0, 1), tmp_path / "rows.jsonl"
    run.work(unit, path)
    rows = [row for row in run.read(path) if "score" in row]
    for row in rows[1:]:
        assert row["zeros"] == pytest.approx(row["sparsity"], abs=0.03), row
    scores = {(row["pattern"], row["sparsity"]): row["score"] for row in rows}
    assert scores["dense", 0.0] > 85
    for pattern in some:
        assert scores[pattern, 0.9375] < scores[pattern, 0.5]
    assert scores["block 8x8", 0.9375] < scores["balanced 16", 0.9375]

    monkeypatch.setattr(run, "units", lambda names, seeds: [unit])
    monkeypatch.setattr(run, "work", lambda unit, path: pytest.fail("run again"))
    answer = CliRunner().invoke(run.main, ["--task", "MLP", "-o", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert "| MLP | 93.75 % | balanced 16 | 1 |" in answer.output
    assert (tmp_path / "quality.png").stat().st_size > 5000
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + len(rows)


@pytest.mark.parametrize("name, zeros, close", [("CNN", 0.75, 0), ("LSTM", 0.75, 1e-4)])
def test_the_compiled_network_scores_as_the_trained_one(name, zeros, close, monkeypatch):
    monkeypatch.setattr(tasks, "LETTERS", 200)
    monkeypatch.setattr(tasks, "LENGTH", 3)
    row = tasks.check(name, zeros, epochs=2)
    assert row["library"] == pytest.approx(row["torch"], abs=close)
    assert row["sparse_layers"] == {"CNN": 1, "LSTM": 4}[name]
