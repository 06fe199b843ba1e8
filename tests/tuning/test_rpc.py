"""Servers of a real RPC tracker on loopback measure together; one is killed and the run completes."""

from __future__ import annotations

import contextlib
import json
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
from tvm.s_tir import meta_schedule as ms

import tvm_balanced as tb
from tvm_balanced.errors import ToolchainError
from tvm_balanced.records import record
from tvm_balanced.records import store as records
from tvm_balanced.targets.resolve import resolve
from tvm_balanced.tuning.measure import Feed, remove_artifact, signature
from tvm_balanced.tuning.result import Status
from tvm_balanced.tuning.rpc import RpcRunner, Tracker, make_shared
from tvm_balanced.tuning.run import tune
from tvm_balanced.tuning.space import default_schedule
from tvm_balanced.tuning.tasks import find_tasks, fused_module

KEY = "cpu"
SERVERS = 3  # in the large test; two otherwise, as each has a process here that imports TVM

# as python -m tvm.exec.rpc_tracker and rpc_server do, in processes that share one import of TVM; each has a
# group of its own, so that what it forks ends with it
_LAUNCHER = """
import json, os, signal, sys
from tvm.rpc.server import PopenRPCServerState
from tvm.rpc.tracker import PopenTrackerServerState

port, key, servers = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def fork(start):
    pid = os.fork()
    if not pid:
        os.setsid()
        start()
        while True:
            signal.pause()
    return pid

def serve():
    PopenRPCServerState("127.0.0.1", 9200, 9400, tracker_addr=("127.0.0.1", port), key=key,
                        custom_addr="127.0.0.1", silent=True)

pids = [fork(lambda: PopenTrackerServerState("127.0.0.1", port, port + 1, True))]
pids += [fork(serve) for _ in range(servers)]
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(json.dumps(pids), flush=True)
signal.pause()
"""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _wait_for(servers: int, tracker: Tracker) -> None:
    for _ in range(600):
        with contextlib.suppress(ToolchainError):
            if tracker.servers() == servers:
                return
        time.sleep(0.1)
    pytest.fail(f"{servers} servers were not there after a minute")


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[Tracker, list[int]]]:
    """A tracker, and the processes of its servers."""
    count = SERVERS if request.node.get_closest_marker("large") else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tracker = Tracker("127.0.0.1", port, KEY)
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, str(port), KEY, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert launcher.stdout is not None
    pids = json.loads(launcher.stdout.readline())
    try:
        _wait_for(count, tracker)
        yield tracker, pids[1:]
    finally:
        for pid in pids:
            _kill(pid)
        launcher.kill()
        launcher.wait()


def _kill_in_session(pid: int) -> threading.Event:
    """End a server as soon as it has a candidate; the event says that it was."""
    killed = threading.Event()

    def watch() -> None:
        process = psutil.Process(pid)
        while not process.children():
            time.sleep(0.002)
        _kill(pid)
        killed.set()

    threading.Thread(target=watch, daemon=True).start()
    return killed


@pytest.fixture
def model() -> tb.Model:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).eval()
    return tb.prune(tb.from_torch(layer, (torch.randn(3, 64),)), "4:16")


@pytest.mark.large
def test_what_a_dying_server_had_goes_to_another(
    servers: tuple[Tracker, list[int]], model: tb.Model
) -> None:
    tracker, pids = servers
    spec = resolve("llvm")
    (task,) = find_tasks(fused_module(model, spec, tb.CompileOptions(policy="always")), spec.target)
    path = make_shared(default_schedule(task.mod).mod, spec.target)
    arguments = ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
    feeds = {signature([info.as_json() for info in arguments]): Feed(task.feed.bound)}
    inputs = [ms.runner.RunnerInput(path, "cpu", arguments)] * 6
    runner = RpcRunner(tracker, feeds, "cold")
    killed = _kill_in_session(pids[0])
    results = [future.result() for future in runner.run(inputs)]
    assert killed.is_set() and tracker.servers() == len(pids) - 1
    assert [result.error_msg for result in results] == [None] * len(inputs)
    assert all(float(seconds) > 0 for result in results for seconds in result.run_secs)
    # with none left there is nothing to wait for
    for pid in pids:
        _kill(pid)
    with pytest.raises(ToolchainError, match=f'no server of key "{KEY}"'):
        runner.run(inputs)
    runner.close()
    remove_artifact(path)


@pytest.mark.large
def test_a_run_outlives_a_server(
    servers: tuple[Tracker, list[int]], model: tb.Model, tmp_path: Path
) -> None:
    tracker, pids = servers
    events = []

    def after_the_default(status: Status) -> None:
        if not events:
            events.append(_kill_in_session(pids[0]))

    result = tune(
        model,
        "llvm",
        trials=8,
        logs=tmp_path,
        policy="always",
        runner="rpc",
        tracker=str(tracker),
        key=KEY,
        progress=after_the_default,
    )
    assert events[0].is_set() and tracker.servers() == SERVERS - 1
    (kernel,) = result.kernels
    assert (kernel.trials, kernel.failures) == (8, 0)
    assert kernel.default_us is not None and kernel.best_us is not None
    environment = record.Environment.read(result.folder / records.ENVIRONMENT)
    assert (environment.runs[0]["runner"], environment.runs[0]["key"]) == ("rpc", KEY)


def test_a_missing_tracker_is_told(model: tb.Model, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ToolchainError, match=f"no RPC tracker answers at {address}"):
        tune(model, "llvm", logs=tmp_path, policy="always", runner="rpc", tracker=address, key=KEY)
