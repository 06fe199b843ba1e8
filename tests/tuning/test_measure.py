"""What a measured kernel is given, and what it finds in the caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm.s_tir import meta_schedule as ms

import tvm_balanced as tb
from tvm_balanced.errors import OutputError
from tvm_balanced.targets.resolve import resolve
from tvm_balanced.tuning import measure
from tvm_balanced.tuning.options import TuneOptions
from tvm_balanced.tuning.run import open_folder, tune
from tvm_balanced.tuning.space import default_schedule
from tvm_balanced.tuning.tasks import feeds_of, find_tasks, fused_module

# a weight, activations and an output
INFO = [
    ["TENSOR", "float32", [2, 8]],
    ["TENSOR", "uint8", [64]],
    ["TENSOR", "float32", [64]],
    ["TENSOR", "float32", [2, 64]],
]
WEIGHTS = (1, 2)
OWN = 64 + 4 * 64


@pytest.mark.parametrize(
    ("between", "copies"), [(0, 1), (OWN, 1), (OWN + 1, 2), (10 * OWN, 10)], ids=str
)
def test_sets_of_weights_are_as_large_as_what_a_model_reads(between: int, copies: int) -> None:
    feed = measure.Feed(16, WEIGHTS, between)
    arguments = measure.Arguments({measure.signature(INFO): feed}, "model")
    lists = arguments(tvm.cpu(), INFO, 1)
    assert len(lists) == copies
    assert all(one[0].same_as(lists[0][0]) and one[3].same_as(lists[0][3]) for one in lists)
    assert len({one[1].__ctypes_handle__().value for one in lists}) == copies
    assert all(one[1].numpy().max() < 16 for one in lists)


def test_copies_are_not_larger_than_a_limit() -> None:
    feed = measure.Feed(weights=WEIGHTS, between=1 << 40)
    assert feed.copies(measure.signature(INFO)) == -(-measure._MOST_BYTES // OWN)


def test_each_run_takes_the_next_weights() -> None:
    seen: list[int] = []

    class Module:
        entry_name = "main"

        def __getitem__(self, name: str) -> Any:
            assert name == "main"
            return seen.append

    times = measure.Timer("model", here=True)(Module(), tvm.cpu(), None, [(i,) for i in range(4)])
    assert seen[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len(seen) >= 4 + measure._FEWEST_TURNS
    assert len(times) == measure._PARTS and min(times) > 0


def test_tasks_know_their_weights() -> None:
    torch.manual_seed(0)
    # a table of which two rows are read, a sparse layer, a kernel without weights
    table, layer = torch.nn.Embedding(1000, 256), torch.nn.Linear(256, 256, bias=False)
    module = torch.nn.Sequential(table, layer, torch.nn.Softmax(-1)).eval()
    ids = torch.zeros(64, dtype=torch.int64)
    model = tb.prune(tb.from_torch(module, (ids,)), "4:16")
    spec = resolve("llvm")
    tasks = find_tasks(fused_module(model, spec, tb.CompileOptions(policy="always")), spec.target)
    sparse = [task for task in tasks if task.balanced]
    others = [task for task in tasks if not task.balanced and not task.feed.weights]
    assert [task.feed.weights for task in sparse] == [(1, 2)]
    # a quarter of the values and half a byte for the index of each; 64 rows of the table
    stream = 256 * 256 // 4
    assert sparse[0].feed.between == pytest.approx(4.5 * stream + 4 * 64 * 256, rel=0.01)
    assert others and all(task.feed.between == 0 for task in others)


@pytest.mark.large
def test_times_with_other_caches_are_kept_apart(tmp_path: Path) -> None:
    spec = resolve("llvm")
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).eval()
    model = tb.prune(tb.from_torch(layer, (torch.randn(3, 64),)), "4:16")
    given: dict[str, Any] = {"trials": 1, "logs": tmp_path, "policy": "always"}
    tune(model, "llvm", cache="hot", **given)
    with pytest.raises(OutputError, match="--cache hot, not model; give another folder"):
        tune(model, "llvm", **given)
    open_folder(tmp_path, spec, TuneOptions(cache="hot", trials=1))


def test_indices_of_a_kernel_without_packed_ones_are_zero() -> None:
    (one,) = measure.Arguments({}, "hot")(tvm.cpu(), [["TENSOR", "int32", [8]]], 1)
    np.testing.assert_array_equal(one[0].numpy(), np.zeros(8, np.int32))


@pytest.fixture(scope="module")
def built() -> tuple[list[str], Any, dict[measure.Signature, measure.Feed]]:
    spec = resolve("llvm")
    torch.manual_seed(0)
    model = tb.prune(tb.from_torch(torch.nn.Linear(64, 64).eval(), (torch.randn(3, 64),)), "4:16")
    (task,) = find_tasks(fused_module(model, spec, tb.CompileOptions(policy="always")), spec.target)
    info = ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])
    feeds = feeds_of([task])
    paths = [measure.make_library(default_schedule(task.mod).mod, spec.target) for _ in range(2)]
    return paths, info, feeds


@pytest.mark.parametrize("cache", ["model", "hot"])
def test_candidates_are_measured_by_turns(built: Any, cache: str) -> None:
    paths, info, feeds = built
    inputs = [ms.runner.RunnerInput(path, "cpu", info) for path in paths]
    times = measure.LocalRunner(feeds, cache).by_turns(inputs, 3)
    assert times is not None
    assert [len(one) for one in times] == [3, 3] and np.min(times) > 0


def test_a_candidate_that_ends_the_process_is_not_measured_by_turns(
    built: Any, tmp_path: Path
) -> None:
    paths, info, feeds = built
    inputs = [ms.runner.RunnerInput(p, "cpu", info) for p in (paths[0], str(tmp_path / "no.so"))]
    assert measure.LocalRunner(feeds, "hot").by_turns(inputs, 1) is None
