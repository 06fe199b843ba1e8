"""Servers of a real RPC tracker on loopback measure together; one is killed and the run completes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import tvm_balanced as tb
from tvm_balanced import records
from tvm_balanced.errors import ToolchainError
from tvm_balanced.tuning.result import Status
from tvm_balanced.tuning.rpc import Tracker
from tvm_balanced.tuning.run import tune

KEY = "cpu"
SERVERS = 3

# as python -m tvm.exec.rpc_tracker and rpc_server do, without the second process that these start
_TRACKER = """
import sys
from tvm.rpc.tracker import PopenTrackerServerState
PopenTrackerServerState("127.0.0.1", int(sys.argv[1]), int(sys.argv[1]) + 1, True)
"""
_SERVER = """
import sys
from tvm.rpc.server import PopenRPCServerState
PopenRPCServerState(
    "127.0.0.1", 9200, 9400, tracker_addr=("127.0.0.1", int(sys.argv[1])), key=sys.argv[2],
    custom_addr="127.0.0.1", silent=True,
)
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    # a group of its own: what a server forks ends with it
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(servers: int, tracker: Tracker) -> None:
    for _ in range(600):
        try:
            if tracker.servers() == servers:
                return
        except ToolchainError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{servers} servers were not there after a minute")


@pytest.fixture
def servers() -> Iterator[tuple[Tracker, list[subprocess.Popen[bytes]]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracker = Tracker("127.0.0.1", port, KEY)
    started = [_start(_TRACKER, str(port))]
    try:
        _wait_for(0, tracker)
        started += [_start(_SERVER, str(port), KEY) for _ in range(SERVERS)]
        _wait_for(SERVERS, tracker)
        yield tracker, started[1:]
    finally:
        for process in started:
            _kill(process)


@pytest.fixture
def model() -> tb.Model:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).eval()
    return tb.from_torch(layer, (torch.randn(3, 64),)).prune("4:16")


def test_a_server_that_dies_with_a_candidate_is_survived(
    servers: tuple[Tracker, list[subprocess.Popen[bytes]]], model: tb.Model, tmp_path: Path
) -> None:
    tracker, processes = servers
    victim, trials = processes[0], 8
    killed = threading.Event()

    def kill_in_session() -> None:
        process = psutil.Process(victim.pid)
        while not process.children():
            time.sleep(0.005)
        _kill(victim)
        killed.set()

    def after_the_default(status: Status) -> None:
        if status.trials == 0 and not killed.is_set():
            threading.Thread(target=kill_in_session, daemon=True).start()

    result = tune(
        model,
        "llvm",
        trials=trials,
        logs=tmp_path,
        policy="always",
        runner="rpc",
        tracker=str(tracker),
        key=KEY,
        progress=after_the_default,
    )
    assert killed.is_set()
    assert tracker.servers() == SERVERS - 1
    (kernel,) = result.kernels
    assert (kernel.trials, kernel.failures) == (trials, 0)
    assert kernel.default_us is not None and kernel.best_us is not None
    environment = records.Environment.read(result.folder / records.ENVIRONMENT)
    assert (environment.runs[0]["runner"], environment.runs[0]["key"]) == ("rpc", KEY)

    # with none left there is nothing to wait for
    for process in processes:
        _kill(process)
    with pytest.raises(ToolchainError, match=f'no server of key "{KEY}"'):
        tune(
            model,
            "llvm",
            logs=tmp_path,
            policy="always",
            runner="rpc",
            tracker=str(tracker),
            key=KEY,
        )


def test_a_missing_tracker_is_told(model: tb.Model, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ToolchainError, match=f"no RPC tracker answers at {address}"):
        tune(model, "llvm", logs=tmp_path, policy="always", runner="rpc", tracker=address, key=KEY)
