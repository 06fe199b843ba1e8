"""From a tuning run to a library that uses its records."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.build.compiler import _target_json
from tvm_balanced.errors import InputError
from tvm_balanced.records import lookup, traces
from tvm_balanced.records import record as records_record
from tvm_balanced.records import store as records
from tvm_balanced.schedules import dispatch, tuned, workload
from tvm_balanced.support import provenance
from tvm_balanced.targets.resolve import resolve
from tvm_balanced.tuning.options import TuneOptions
from tvm_balanced.tuning.run import open_folder, tune
from tvm_balanced.tuning.tasks import Task, find_tasks, fused_module

ROWS, FEATURES = 3, 64
X = np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> tb.Model:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(FEATURES, FEATURES), torch.nn.ReLU()).eval()
    return tb.prune(tb.from_torch(layers, (torch.randn(ROWS, FEATURES),)), "4:16")


@pytest.fixture(scope="module")
def task(model: tb.Model) -> Task:
    spec = resolve("llvm")
    (got,) = find_tasks(fused_module(model, spec, tb.CompileOptions(policy="always")), spec.target)
    return got


def _choice(task: Task, kernel: str, args_info: Any = None, **knobs: int) -> lookup.Choice:
    steps: list[Any] = [["GetSBlock", [], ["balanced_sparse_dense", "main"], ["b0"]]]
    steps.append(["Annotate", ["b0", f'"{kernel}"'], [workload.KERNEL], []])
    steps += [["Annotate", ["b0", value], [workload.KNOB + n], []] for n, value in knobs.items()]
    args = args_info or [
        ["TENSOR", str(p.dtype), [int(e) for e in p.shape]] for p in task.mod["main"].params
    ]
    return lookup.Choice((task.key, ""), [steps, []], args, 1e-6, "measured", "somewhere")


def test_every_point_of_a_space_is_scheduled(task: Task) -> None:
    target = resolve("llvm").target
    for space in dispatch.spaces(task.mod["main"], target):
        points = space.points()
        assert points
        for point in (points[0], points[-1]):
            assert workload.build_for(task.mod["main"], target, space.kernel, point)


def test_a_record_that_fits_is_used(task: Task) -> None:
    scheduled = tuned.ScheduleTuned(
        resolve("llvm").target,
        {task.key: _choice(task, "llvm_batch_lanes", sums=4, batch_tile=1)},
    )
    mod = scheduled(task.mod)
    assert [kernel.schedule for kernel in scheduled.coverage] == ["tuned"]
    assert mod["main"].attrs["tvm_balanced.schedule"] == "llvm_batch_lanes"


@pytest.mark.parametrize(
    ("kernel", "args_info", "knobs"),
    [
        ("llvm_batch_lanes", [["TENSOR", "float32", [1, 2]]], {}),
        ("llvm_batch_lanes", None, {"sums": 1 << 20}),
        ("llvm_batch_lanes", None, {"colour": 3}),
        ("of_another_release", None, {}),
    ],
    ids=["wrong-shapes", "wild-knob", "unknown-knob", "unknown-kernel"],
)
def test_a_record_that_does_not_fit_leaves_the_default(
    task: Task, kernel: str, args_info: Any, knobs: dict[str, int]
) -> None:
    choice = _choice(task, kernel, args_info, **knobs)
    scheduled = tuned.ScheduleTuned(resolve("llvm").target, {task.key: choice})
    scheduled(task.mod)
    assert [kernel.schedule for kernel in scheduled.coverage] == ["default"]
    assert len(scheduled.problems) == 1 and "somewhere" in scheduled.problems[0]


@pytest.fixture(scope="module")
def plain(model: tb.Model) -> Any:
    """What the default schedule computes of :data:`X`."""
    return tb.compile(model, "llvm", policy="always", logs=False)(X)


def _cut(folder: Path) -> None:
    path = folder / records.RECORDS
    path.write_bytes(path.read_bytes()[:-20])


def _no_json(folder: Path) -> None:
    (folder / records.RECORDS).write_text("[[[[{no json\n")


def _another_tvm(folder: Path) -> None:
    path = folder / records.ENVIRONMENT
    path.write_text(path.read_text().replace(provenance.tvm_version(), "0.1.0"))


def _another_gpu(folder: Path) -> None:
    path = folder / records.ENVIRONMENT
    path.write_text(path.read_text().replace(f'"device": "{folder.name}"', '"device": "h100"'))


def _wrong_shapes(folder: Path) -> None:
    path = folder / records.RECORDS
    path.write_text(path.read_text().replace(f"[{ROWS},{FEATURES}]", "[1,2]"))


@pytest.mark.parametrize(
    "damage", [None, _cut, _no_json, _another_tvm, _another_gpu, _wrong_shapes]
)
def test_records_that_cannot_be_used_cost_one_warning(
    model: tb.Model,
    task: Task,
    plain: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None] | None,
) -> None:
    spec = resolve("llvm")
    choice = _choice(task, "llvm_batch_lanes", sums=4)
    target = _target_json(spec)
    record = records_record.Record(choice.workload, choice.trace, (1e-6,), target, choice.args_info)
    folder = open_folder(tmp_path, spec, TuneOptions(cache="hot", trials=1))
    folder.append([record])
    if damage is not None:
        damage(folder.folder)
    monkeypatch.setattr(logging.getLogger("tvm_balanced"), "propagate", True)
    with caplog.at_level(logging.WARNING, "tvm_balanced"):
        library = tb.compile(model, "llvm", policy="always", logs=tmp_path)
    said = [entry.getMessage() for entry in caplog.records if entry.name == "tvm_balanced"]
    expected = "tuned" if damage is None else "default"
    assert [kernel.schedule for kernel in library.coverage] == [expected]
    assert len(said) == (damage is not None)
    assert all(str(folder.folder) in text for text in said)
    np.testing.assert_allclose(library(X), plain, atol=1e-5)


@pytest.mark.large
def test_a_small_space_is_measured_whole(model: tb.Model, task: Task, tmp_path: Path) -> None:
    spaces = dispatch.spaces(task.mod["main"], resolve("llvm").target)
    points = [(space.kernel, point) for space in spaces for point in space.points()]
    result = tune(model, "llvm", trials=len(points) + 1, logs=tmp_path, policy="always")
    got, _ = records.read_folder(result.folder)
    measured = [
        traces.sampled_knobs(text)
        for text in {r.trace_text: r.trace for r in got if not traces.is_default(r.trace)}.values()
    ]
    assert len(measured) == len(points)
    assert all(point in measured for point in points)


@pytest.mark.large
def test_a_run_is_resumed_and_compile_uses_it(model: tb.Model, tmp_path: Path) -> None:
    first = tune(model, "llvm", trials=3, logs=tmp_path, policy="always")
    (kernel,) = first.kernels
    assert kernel.trials == 3 and not kernel.failures
    assert kernel.default_us is not None and kernel.best_us is not None
    got, problems = records.read_folder(first.folder)
    assert not problems
    again = tune(model, "llvm", trials=3, logs=tmp_path, policy="always", resume=True)
    # nothing new was searched; at most the best were measured again
    later, _ = records.read_folder(first.folder)
    assert later[: len(got)] == got
    assert {r.trace_text for r in later} == {r.trace_text for r in got}
    assert again.kernels[0].trials == 3

    library = tb.compile(model, "llvm", policy="always", logs=tmp_path)
    assert [entry.schedule for entry in library.coverage] == ["tuned"]
    plain = tb.compile(model, "llvm", policy="always", logs=False)
    assert [entry.schedule for entry in plain.coverage] == ["default"]
    np.testing.assert_allclose(library(X), plain(X), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trials": 0}, "trials"),
        ({"seconds": -1.0}, "time"),
        ({"cache": "warm"}, "model, cold or hot"),
        ({"target": "h100"}, "only CPUs"),
    ],
    ids=["trials", "time", "cache", "target"],
)
def test_bad_arguments_are_refused(
    model: tb.Model, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        tune(model, **{"target": "llvm", "logs": tmp_path, **change})
    assert not list(tmp_path.iterdir())
