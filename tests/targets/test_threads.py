"""Cores are counted as a process may use them, and TVM's pool gets a thread a core, tied to none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_balanced.targets import host, threads


def _machine(tmp_path: Path, siblings: dict[int, str], limits: dict[str, str]) -> tuple[Path, Path]:
    topology, cgroup = tmp_path / "cpu", tmp_path / "cgroup"
    for cpu, text in siblings.items():
        folder = topology / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    for name, text in limits.items():
        path = cgroup / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return topology, cgroup


@pytest.mark.parametrize(
    ("siblings", "limits", "expected"),
    [
        ({0: "0", 1: "1", 2: "2", 3: "3"}, {}, 4),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {}, 2),
        ({}, {}, 4),
        ({}, {"cpu.max": "max 100000"}, 4),
        ({}, {"cpu.max": "150000 100000"}, 2),
        ({}, {"cpu.max": "10000 100000"}, 1),
        ({}, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
    ids=["cores", "hyper-threads", "unknown", "no-limit", "limit", "part", "v1", "v1-no-limit"],
)
def test_cores_are_what_a_process_may_use(
    siblings: dict[int, str],
    limits: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "cpus", lambda: [0, 1, 2, 3])
    assert host.core_count(*_machine(tmp_path, siblings, limits)) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TVM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"TVM_NUM_THREADS": "many", "OMP_NUM_THREADS": "0"}, 7),
    ],
    ids=["tvm", "openmp", "neither-counts"],
)
def test_variables_name_the_threads(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host, "core_count", lambda: 7)
    assert threads.thread_count() == expected


_CALLED = """
import json, os, threading
import numpy as np
import torch
import tvm
import tvm_balanced as tb

# as a server does with its workers
if os.environ.get("ONE_CPU"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
layer = torch.nn.Linear(512, 512).eval()
library = tb.compile(tb.prune(tb.from_torch(layer, (torch.randn(64, 512),)), "4:16"), "llvm", logs=False)
before = sorted(os.sched_getaffinity(0))
library(np.zeros((64, 512), "float32"))
count = tvm.get_global_func("runtime.NumThreads")
found = [count()]
def elsewhere():
    library(np.zeros((64, 512), "float32"))
    found.append(count())
other = threading.Thread(target=elsewhere)
other.start()
other.join()
print(json.dumps([before, sorted(os.sched_getaffinity(0)), found]))
"""


@pytest.mark.parametrize(
    ("count", "one_cpu"),
    [(None, ""), (1, ""), (3, ""), (None, "yes")],
    ids=["cores", "one", "more-than-cpus", "tied-by-its-user"],
)
def test_a_library_uses_the_cores_and_leaves_its_caller_on_them(
    count: int | None, one_cpu: str
) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "TVM_BIND_THREADS")
    }
    environment["ONE_CPU"] = one_cpu
    if count is not None:
        environment["TVM_NUM_THREADS"] = str(count)
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CALLED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, got = json.loads(said.stdout)
    assert after == before
    expected = 1 if one_cpu else count or host.core_count()
    assert got == [expected, expected]
