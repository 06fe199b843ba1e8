"""Whole models: rows of contenders, gates of float and int8 results, several callers at once."""

import numpy as np
import pytest
import torch

from tvm_balanced.bench import models as benchmark_models
from tvm_balanced.bench import results
from tvm_balanced.bench.callers import Served
from tvm_balanced.bench.engines import ENGINES, ModelCase
from tvm_balanced.bench.models import ModelContest, measure_model
from tvm_balanced.bench.operators import make_machine

PATTERN = ModelContest(patterns=("4:16",), policy="always", seconds=0.02, compiled=False)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    before = torch.get_num_threads()
    yield make_machine("llvm", threads=2)
    torch.set_num_threads(before)


@pytest.fixture
def case():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    return ModelCase("mlp", module.eval(), (torch.randn(2, 64),))


def contest(**changes):
    return ModelContest(**{**vars(PATTERN), **changes})


def test_rows(machine, case):
    rows = measure_model(case, machine, PATTERN)
    assert [row["contender"] for row in rows] == [
        "PyTorch eager",
        "tvm-balanced, dense",
        "tvm-balanced, 4:16",
    ]
    assert [row["sparse_layers"] for row in rows] == [0, 0, 2]
    for row in rows:
        assert set(row) <= set(results.MODEL_COLUMNS)
        assert row["error"] < 1e-4
        assert row["ratio"] == pytest.approx(rows[0]["ms"] / row["ms"])
    # the module that was given keeps its weights
    parameters = case.module.parameters()
    assert all(np.count_nonzero(p.detach().numpy()) == p.numel() for p in parameters)


def test_result_that_does_not_agree_is_not_timed(machine, monkeypatch):
    monkeypatch.setattr(benchmark_models, "_load", lambda module, model: None)
    module = torch.nn.Linear(64, 32).eval()
    rows = measure_model(
        ModelCase("linear", module, (torch.randn(2, 64),)), machine, contest(patterns=("2:16",))
    )
    assert "ms" in rows[0] and "ms" not in rows[2]
    assert "not timed: error" in rows[2]["note"]


def test_quantised_contenders_have_a_gate_of_their_own(machine, case, monkeypatch):
    rows = measure_model(case, machine, contest(quantize=("none", "int8", "w8")))
    by_name = {row["contender"]: row for row in rows}
    # w8 leaves dense layers as they are, so there is no such contender
    assert list(by_name) == [
        "PyTorch eager",
        *(f"tvm-balanced, {words}" for words in ("dense", "dense int8")),
        *(f"tvm-balanced, {words}" for words in ("4:16", "4:16 int8", "4:16 w8")),
    ]
    for name, layers in (("dense int8", 2), ("4:16 int8", 2), ("4:16 w8", 2), ("4:16", 0)):
        row = by_name[f"tvm-balanced, {name}"]
        assert row["int8_layers"] == layers and row["ms"] > 0
        assert (1e-4 < row["relative_l2"] < 0.05) == (layers > 0)
    monkeypatch.setitem(benchmark_models.ROUNDING_TOLERANCE, "int8", 1e-6)
    rows = measure_model(case, machine, contest(quantize=("int8",)))
    assert [row["contender"] for row in rows if "ms" in row] == ["PyTorch eager"]
    assert all("not timed: relative L2 error" in row["note"] for row in rows[1:])


def test_callers_at_once_have_rows_of_their_own(machine, case):
    rows = measure_model(case, machine, contest(callers=(1, 3), peers=("torch-int8",)))
    assert [row["callers"] for row in rows] == [1] * 4 + [3] * 4
    alone, together = rows[:4], rows[4:]
    for one, many in zip(alone, together, strict=True):
        assert one["contender"] == many["contender"]
        assert one["calls_per_s"] == pytest.approx(1e3 / one["ms"])
        assert "ms" not in many and many["calls_per_s"] > 0
        assert many["ratio"] == pytest.approx(many["calls_per_s"] / together[0]["calls_per_s"])


def test_wrong_result_among_callers_has_no_rate(machine, case, monkeypatch):
    def spoilt(call, callers, threads):
        return lambda seconds: Served(1e9, [call()] * (callers - 1) + [call() + 1])

    monkeypatch.setattr(benchmark_models, "in_threads", spoilt)
    rows = measure_model(case, machine, contest(callers=(2,)))
    assert all("calls_per_s" not in row and "ms" not in row for row in rows)
    assert all("several callers at once: error" in row["note"] for row in rows)


def test_peers_run_on_a_cpu_alone(machine, case):
    machine.kind = "emulated"
    maker = benchmark_models._Contenders(case, machine, 2, lambda _: None)
    for name in ENGINES:
        maker.add(name, lambda name=name: maker.peer(name), [])
        assert maker.all[-1].row["note"] == f"{name} is compared on a CPU alone"
        assert maker.all[-1].runner is None
