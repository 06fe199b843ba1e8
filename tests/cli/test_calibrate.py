"""``tvm-balanced calibrate`` writes what ``plan`` then goes by."""

from __future__ import annotations

from pathlib import Path

from tvm_balanced.bench import calibrate


def test_calibrate_then_plan(run, onnx_mlp, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 64),))
    monkeypatch.setattr(calibrate, "ROWS", (1,))
    monkeypatch.setattr(calibrate, "_SECONDS", 1e-4)
    answer = run("calibrate", "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert Path(document["path"]).is_relative_to(tmp_path) and Path(document["path"]).is_file()
    assert {sample["kernel"] for sample in document["samples"]} >= {"dense int8", "sparse"}
    plan = run("plan", onnx_mlp, "--pattern", "4:16", "--quantize", "int8", "--json")
    times = [time for row in plan.json["layers"] for time in row["alternatives"]]
    assert times and all(time["measured"] for time in times)


def test_threads_of_none_are_refused(run):
    answer = run("calibrate", "--threads", "0")
    assert answer.code == 2 and "--threads" in answer.err
