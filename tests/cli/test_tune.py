"""What ``tune`` refuses before it starts; whole runs are in tests/tuning."""

from __future__ import annotations

import pytest

from tvm_balanced.cli.tune import parse_time


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0)], ids=str
)
def test_times(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--time", "30"], "30m"),
        (["--time", "0s"], "30m"),
        (["--prune", "0"], "at least 1"),
        (["--trials", "0"], "at least 1"),
        (["--plot", "trials.txt"], ".svg"),
        (["--plot", "missing/trials.svg"], "missing is not a folder"),
        (["--target", "h100"], "only CPUs"),
        (["--runner", "model"], "only CUDA"),
        (["--runner", "rpc"], "host:port"),
        (["--key", "cpu"], "give runner rpc"),
    ],
    ids=lambda value: "-".join(value[:2]).strip("-") if isinstance(value, list) else None,
)
def test_mistakes(run, onnx_mlp, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    answer = run("tune", onnx_mlp, "--logs", tmp_path / "logs", *argv)
    assert answer.code == 2
    assert said in answer.err
    assert not list(tmp_path.iterdir())
