"""Result files: rows are added whole or not at all, and plots need nothing else."""

import csv

import pytest

from tvm_balanced.bench import results
from tvm_balanced.errors import InputError, OutputError


def row(m=1, zeros=0.75, **more):
    made = {
        "set": "llm",
        "layer": "square",
        "n": 64,
        "k": 64,
        "m": m,
        "pattern": "4:16",
        "zeros": zeros,
        "dtype": "float16",
        "quantize": "none",
        "cache": "cold",
        "kind": "cuda",
        "device": "Some GPU",
        "us": 10.0 * m,
        "dense_us": 30.0,
        "dense_ratio": 3.0 / m,
        "bytes": 1 << 20,
        "ceiling": 3.2,
        "share_of_copy": 0.8,
    }
    return made | more


def test_rows_are_added_to_those_before(tmp_path):
    path = tmp_path / "rows.csv"
    results.append(path, [row(1)])
    results.append(path, [row(8), row(16)])
    assert [r["m"] for r in results.read(path)] == ["1", "8", "16"]
    with path.open() as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)


def test_what_was_not_measured_is_empty(tmp_path):
    path = tmp_path / "rows.csv"
    results.append(path, [row(csv_us=None)])
    (got,) = results.read(path)
    assert got["csr_us"] == "" and results.number(got, "csr_us") is None
    assert results.number(got, "us") == 10.0


def test_text_with_commas_and_quotes_comes_back(tmp_path):
    path = tmp_path / "rows.csv"
    said = 'RuntimeError: shape "(1, 2)", not\nfit'
    results.append(path, [row(csr_note=said)])
    assert results.read(path)[0]["csr_note"] == said


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    results.append(path, [row()])
    before = path.read_bytes()

    def fail(part, text):
        part.write_text(text[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "_write", fail)
    with pytest.raises(OutputError):
        results.append(path, [row(8)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("m,us\n1,2\n")
    with pytest.raises(InputError, match="does not have the columns"):
        results.append(path, [row()])
    assert path.read_text() == "m,us\n1,2\n"


def test_key_is_the_same_before_and_after_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    made = row(zeros=1 - 5 / 16)
    results.append(path, [made])
    assert results.key(results.read(path)[0]) == results.key(made)
    for other in ({"cache": "hot"}, {"quantize": "int8"}):
        assert results.key(made) != results.key(made | other)


def test_repeated_rows_count_once_by_their_median():
    rows = [row(dense_ratio=ratio) for ratio in (1.0, 9.0, 3.0)]
    assert [r["dense_ratio"] for r in results.median_rows(rows)] == [3.0]


def test_rows_that_were_not_timed_are_not_plotted():
    assert results.median_rows([row(us=None)]) == []
    with pytest.raises(InputError, match="nothing to plot"):
        results.plot([row(us=None)], None)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots_of_a_file(tmp_path, suffix):
    path = tmp_path / "rows.csv"
    results.append(path, [row(m, zeros) for m in (1, 8) for zeros in (0.5, 0.75, 0.875)])
    written = results.plot(results.read(path), tmp_path / "plots", suffix)
    assert [p.name for p in written] == [
        f"ratio-cuda-some-gpu-float16-none-cold{suffix}",
        f"roofline-cuda-some-gpu-float16-none-cold{suffix}",
    ]
    magic = {".svg": b"<?xml", ".png": b"\x89PNG"}[suffix]
    assert all(p.read_bytes().startswith(magic) for p in written)


def test_ratio_plot_shows_a_line_for_each_batch(tmp_path):
    rows = [row(m, zeros) for m in (1, 8) for zeros in (0.5, 0.75)]
    ratio, _ = results.plot(rows, tmp_path)
    drawn = ratio.read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("M = 1", "M = 8", "ceiling by bytes"))


def test_unknown_plot_format_is_refused(tmp_path):
    with pytest.raises(InputError, match=r'not "\.gif"'):
        results.plot([row()], tmp_path, ".gif")
