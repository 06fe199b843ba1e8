"""``tvm-balanced bench``: files, resuming, and what it answers to mistakes."""

import pytest
import torch

from tvm_balanced.bench import results
from tvm_balanced.bench.peers import KERNELS, peer_names
from tvm_balanced.cli import bench

SET = ["bench", "--set", "minilm", "--layer", "minilm-attention", "--pattern", "4:16"]
SMALL = [*SET, "--threads", "1", "--seconds", "0.01", "--peers", "dense"]


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Whatever a command sets, the tests after this one find what was before."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_options_name_the_peers_there_are():
    assert [*bench.KERNELS, *bench.ENGINES] == peer_names()
    assert bench.KERNELS == KERNELS


def test_rows_go_to_the_file_and_the_document(run, tmp_path):
    path = tmp_path / "rows.csv"
    answer = run(*SMALL, "--m", "1", "-o", path, "--plot", tmp_path / "plots", "--json")
    assert answer.code == 0, answer.err
    assert "llvm are timed on this CPU" in answer.err
    document = answer.json
    assert [row["cache"] for row in document["rows"]] == ["cold", "hot"]
    assert document["left"] == 0
    rows = results.read(path)
    assert [(r["m"], r["cache"]) for r in rows] == [("1", "cold"), ("1", "hot")]
    assert all(float(r["dense_ratio"]) > 0 and float(r["error"]) < 1e-5 for r in rows)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(
        p.rpartition("/")[2] for p in document["plots"]
    )

    again = run(*SMALL, "--m", "1,2", "--cache", "hot", "-o", path, "--resume", "--json")
    assert [(row["m"], row["cache"]) for row in again.json["rows"]] == [(2, "hot")]
    assert len(results.read(path)) == 3


def test_table_without_a_file(run):
    answer = run(*SMALL, "--m", "1", "--cache", "hot")
    assert answer.code == 0, answer.err
    assert "384x384" in answer.out and "of ceiling" in answer.out


def test_quantised_rows_beside_another_engine(run, tmp_path):
    path = tmp_path / "rows.csv"
    words = ["--m", "1", "--cache", "hot", "--quantize", "none,int8,w8", "--peers", "torch-int8"]
    answer = run(*SMALL, *words, "-o", path)
    assert answer.code == 0, answer.err
    rows = results.read(path)
    assert [row["quantize"] for row in rows] == ["none", "int8", "w8"]
    assert all(float(row["int8_engines_ratio"]) > 0 for row in rows)
    assert [float(row["error"]) < 1e-5 for row in rows] == [True, False, False]
    again = run(*SMALL, *words, "-o", path, "--resume", "--json")
    assert again.json["rows"] == []


def test_layers_of_a_library(run, library):
    answer = run("bench", library, "--threads", 1, "--seconds", 0.01, "--peers", "none", "--json")
    assert answer.code == 0, answer.err
    shapes = {(row["n"], row["k"], row["m"]) for row in answer.json["rows"]}
    assert shapes == {(64, 32, 4), (16, 64, 4)}


def test_exhausted_time_limit_is_told(run, tmp_path, monkeypatch):
    from tvm_balanced.bench.operators import Benchmark

    monkeypatch.setattr(Benchmark, "measure", lambda self, problem: [])
    monkeypatch.setattr(
        "tvm_balanced.bench.operators.time.monotonic", iter(range(0, 900, 9)).__next__
    )
    answer = run(*SMALL, "--m", "1,2,4", "--time-limit", "12", "-o", tmp_path / "rows.csv")
    assert answer.code == 0, answer.err
    assert "not begun" in answer.out and "--resume goes on" in answer.out


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--m", "0"], 2, 'is not of the form 1,8; give whole numbers from 1'),
        (["--m", "1", "--peers", "cublas"], 2, "peer cublas is not known; choose dense"),
        (["--m", "1", "--quantize", "int4"], 2, 'quantize "int4" is not known; choose none, int8 or w8'),
        (["--m", "1", "--quantize", ","], 2, 'quantize "" is not known'),
        (["--m", "1", "--target", "h100"], 2, 'target "h100" cannot be measured here'),
        (["--m", "1", "--resume"], 2, "--resume and --plot go with -o"),
        (["--m", "1", "--set", "all"], 2, "'all' is not one of"),
        (["--m", "1", "-o", "no/such/folder.csv"], 2, "is not a folder"),
    ],
    ids=["m", "peer", "quantize", "no quantize", "target", "resume", "set", "folder"],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_timed(run, monkeypatch, words, code, said):
    from tvm_balanced.bench.operators import Benchmark

    monkeypatch.setattr(Benchmark, "measure", lambda self, problem: pytest.fail("timed"))
    answer = run(*SMALL, *words)
    assert answer.code == code and said in answer.err
    assert answer.out == ""


def test_file_of_something_else_is_refused(run, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    answer = run(*SMALL, "--m", "1", "-o", path)
    assert answer.code == 2 and "does not have the columns" in answer.err
    assert path.read_text() == "a,b\n"


def test_library_and_set_contradict_each_other(run, library):
    answer = run("bench", library, "--set", "llm")
    assert answer.code == 2 and "either LIBRARY or --set" in answer.err
    answer = run("bench", library, "--quantize", "int8")
    assert answer.code == 2 and "leave --quantize out" in answer.err
