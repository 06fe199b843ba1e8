"""Tuning runs that end before they are done, and two at a time; minutes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tvm_balanced.records import lookup, traces
from tvm_balanced.records import record as records_record
from tvm_balanced.records import store as records
from tvm_balanced.records.record import Record
from tvm_balanced.targets.resolve import resolve

pytestmark = pytest.mark.large

OPTIONS = ["--pattern", "4:16", "--policy", "always"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = torch.nn.Sequential(
        torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
    ).eval()
    path = tmp_path_factory.mktemp("model") / "mlp.pt2"
    torch.export.save(torch.export.export(layers, (torch.zeros(48, 128),)), path)
    return path


def _command(name: str, model: Path, logs: Path, *more: str) -> list[str]:
    words = ["-m", "tvm_balanced.cli.main", name, str(model), *OPTIONS, "--logs", str(logs), *more]
    return [sys.executable, *words]


def _folder(logs: Path) -> Path:
    return logs / lookup.device_name(resolve("llvm"))


def _schedules(got: list[Record]) -> set[tuple[str, str]]:
    return {(r.workload[0], r.trace_text) for r in got if not traces.is_default(r.trace)}


def _finished(said: Path) -> list[int]:
    """How many trials the run said it had, each time it said so."""
    return [int(count) for count in re.findall(r"all kernels: (\d+) of", said.read_text())]


def _coverage(model: Path, logs: Path) -> list[dict[str, Any]]:
    command = _command("compile", model, logs, "-o", str(logs.parent / "mlp.tvmb"), "--json")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    coverage: list[dict[str, Any]] = json.loads(done.stdout)["coverage"]
    return coverage


def test_killed_twenty_times_it_goes_on(model: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = _command("tune", model, logs, "--trials", "400", "--resume", "-v")
    rng = random.Random(0)
    before: list[Record] = []
    for round_ in range(20):
        with (tmp_path / "told").open("w") as said:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        # some are killed while they start, most after the first batch, whenever that is
        while round_ % 4 and not _finished(tmp_path / "told"):
            assert process.poll() is None, (tmp_path / "told").read_text()
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 5.0))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it had ended before, in round {round_}"
        # its workers end by themselves, as they read of their parent's end
        finished = _finished(tmp_path / "told")
        got, problems = records.read_folder(_folder(logs))
        assert not problems
        assert got[: len(before)] == before
        assert len(_schedules(got)) >= (finished[-1] if finished else 0)
        before = got
    # else it was only killed while it started
    assert len(_schedules(before)) >= 20
    # enough for what is there: nothing but the best of it is measured again
    command = _command("tune", model, logs, "--trials", "16", "--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [kernel["schedule"] for kernel in _coverage(model, logs)] == ["tuned"] * 2


def test_two_tuners_share_a_folder(model: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    running = [
        subprocess.Popen(
            [*_command("tune", model, logs, "--trials", "24", "--seed", seed), "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    answers = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    got, problems = records.read_folder(_folder(logs))
    assert not problems
    environment = records_record.Environment.read(_folder(logs) / records.ENVIRONMENT)
    assert sorted(run["seed"] for run in environment.runs) == [1, 2]
    # each wrote the default schedule and its trials of both kernels
    trials = sum(kernel["trials"] for answer in answers for kernel in answer["kernels"])
    assert trials > len(_schedules(got)) / 2
    assert sum(traces.is_default(record.trace) for record in got) >= 4
    assert len(got) >= trials + 4


def test_interrupted_it_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    command = _command("tune", model, tmp_path / "logs", "--trials", "150", "-v")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "all kernels: " in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in out
    got, problems = records.read_folder(_folder(tmp_path / "logs"))
    assert got and not problems
