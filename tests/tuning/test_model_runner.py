"""Tuning for a GPU that is not here: compiled candidates, predicted times, records that say so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tvm_balanced as tb
from tests.helpers.cuda_cases import Case, fused_kernel, packed_format, target
from tests.helpers.zoo import _bert
from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda.cubin import KernelResources
from tvm_balanced.errors import InputError, ToolchainError, TvmBalancedError
from tvm_balanced.records import lookup as records_lookup
from tvm_balanced.records import record as records_record
from tvm_balanced.records import store as records
from tvm_balanced.records import traces
from tvm_balanced.records.record import Environment
from tvm_balanced.records.store import RecordFolder
from tvm_balanced.schedules import dispatch
from tvm_balanced.schedules import workload as schedules_workload
from tvm_balanced.schedules.cuda import gather_model, gather_tile, machine
from tvm_balanced.support import provenance
from tvm_balanced.targets.gpus import GPUS
from tvm_balanced.targets.resolve import resolve
from tvm_balanced.tuning import estimates as kernel_models
from tvm_balanced.tuning import runners
from tvm_balanced.tuning.estimates import Candidate
from tvm_balanced.tuning.model_runner import can_estimate, estimate
from tvm_balanced.tuning.run import tune
from tvm_balanced.tuning.runners import Runner
from tvm_balanced.tuning.space import default_schedule, point_schedule
from tvm_balanced.verification.library import verify

CASE = Case((3,), 64, 128, "4:16")


@pytest.fixture(scope="module")
def workload() -> Any:
    return schedules_workload.workload(fused_kernel(CASE, packed_format(CASE)), target())


def test_an_estimate_is_of_the_compiled_kernel(workload: Any) -> None:
    assert can_estimate(workload, target())
    got = estimate(default_schedule(workload).mod, target())
    operator = kernel_models.operator_of(workload)
    candidate = Candidate.of(got.kernel, got.knobs)
    compiled = KernelResources("main", got.registers, 0, got.shared_bytes, None)
    said = kernel_models.predict(operator, target(), candidate, compiled)
    assert got.seconds == pytest.approx(said.total_us * 1e-6)
    assert got.registers != kernel_models.predict(operator, target(), candidate).registers


def _layer(pattern: str, encoding: str, rows: int) -> Any:
    case = Case((rows,), 1024, 1024, pattern)
    return schedules_workload.workload(fused_kernel(case, packed_format(case, encoding)), target())


@pytest.mark.parametrize(
    ("pattern", "encoding", "kernel"),
    [("4:16", "u4", "cuda_expand"), ("2:4", "u2", "cuda_sparse_mma")],
    ids=["expand", "sparse-mma"],
)
def test_kernels_for_tensor_cores_are_estimated_with_their_registers(
    pattern: str, encoding: str, kernel: str
) -> None:
    mod = _layer(pattern, encoding, 40)
    assert can_estimate(mod, target())
    got = estimate(default_schedule(mod).mod, target())
    assert got.kernel == kernel
    operator = kernel_models.operator_of(mod)
    candidate = kernel_models.default_candidate(operator, target())
    assert candidate == Candidate.of(kernel, got.knobs)

    def seconds(registers: int) -> float:
        compiled = KernelResources("main", registers, 0, 0, None)
        said = kernel_models.predict(operator, target(), candidate, compiled)
        assert said.registers == registers
        return said.total_us * 1e-6

    assert got.seconds == pytest.approx(seconds(got.registers))
    # more registers than a multiprocessor has
    assert seconds(4096) == math.inf
    (space, gather) = dispatch.spaces(mod["main"], target())
    assert (space.kernel, gather.kernel) == (kernel, "cuda_gather")
    assert {**candidate.values(), "splits": 1} in [
        {"splits": 1, **point} for point in space.points()
    ]
    other = estimate(point_schedule(mod, gather, gather.points()[0]).mod, target())
    assert other.kernel == "cuda_gather" and other.seconds > got.seconds


def test_features_tell_tiles_of_tensor_cores_apart() -> None:
    for layer in (("4:16", "u4"), ("2:4", "u2")):
        mod = _layer(*layer, 40)
        space, _ = dispatch.spaces(mod["main"], target())
        points = space.points()
        candidates = [Candidate.of(space.kernel, point) for point in points]
        said = {tuple(kernel_models.features(mod, target(), one)) for one in candidates}
        assert len(points) > 10 and len(said) > len(points) / 2


def test_registers_of_the_compiled_kernel_decide_what_is_resident(workload: Any) -> None:
    operator = kernel_models.operator_of(workload)
    knobs = kernel_models.candidate_of(default_schedule(workload).mod, target()).knobs
    assert isinstance(knobs, gather_tile.GatherTile)

    def resident(registers: int) -> int:
        resources = KernelResources("main", registers, 0, 1024, None)
        gpu = machine.machine(GPUS["h100"], 1)
        model = gather_model.GatherModel(gpu, operator.fmt, 200, "float16")
        return model.predict(knobs, resources).resident

    assert resident(32) > resident(128) > resident(255) > 0


def test_a_kernel_that_spills_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((16,), 64, 128, "4:16")
    mod = schedules_workload.workload(fused_kernel(case, packed_format(case)), target())
    assert mod is not None
    *_, space = dispatch.spaces(mod["main"], target())
    tallest = max(space.points(), key=lambda point: point["vector"] * point["groups"])
    compile_cubin = nvrtc.compile_cubin

    def in_32_registers(source: str, arch: str) -> nvrtc.CompiledCubin:
        cramped = re.sub(r"__launch_bounds__\(\d+\)", "__launch_bounds__(1024, 2)", source)
        assert cramped != source
        return compile_cubin(cramped, arch)

    monkeypatch.setattr(nvrtc, "compile_cubin", in_32_registers)
    with pytest.raises(TvmBalancedError, match="spills"):
        estimate(point_schedule(mod, space, tallest).mod, target())


def test_a_kernel_that_does_not_compile_fails(
    workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-include=missing.h"))
    with pytest.raises(ToolchainError, match=r"missing\.h"):
        estimate(default_schedule(workload).mod, target())


def _tuned_and_verified(model: tb.Model, name: str, trials: int, place: Path) -> Any:
    """A run of the model runner, the library that uses its records, and the emulated device's opinion."""
    result = tune(model, name, trials=trials, logs=place, runner="model", policy="always")
    assert result.estimated and result.folder.name == records_lookup.ESTIMATES
    library = tb.compile(model, name, policy="always", logs=place)
    schedules = {entry.schedule for entry in library.coverage if entry.balanced}
    assert schedules == {"estimated"}
    checked = verify(library.save(place / "model.tvmb"))
    assert checked.passed, str(checked)
    balanced = [row for row in checked.kernels if "balanced_sparse_dense" in row.name]
    assert balanced
    for row in balanced:
        assert (row.result, row.races, row.bounds, row.unwritten) == ("pass", 0, 0, 0)
    return result


@pytest.mark.large
def test_a_small_model_is_tuned_by_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # another process costs more than it saves here
    monkeypatch.setattr(runners, "core_count", lambda: 1)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(256, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
    ).eval()
    # the second one stays dense
    model = tb.prune(tb.from_torch(layers, (torch.randn(3, 256),)), "4:16", ignore=["2.weight"])
    result = _tuned_and_verified(model, "cuda-sm_80", 2, tmp_path)
    sparse, dense = result.kernels
    assert sparse.trials + sparse.failures == 2
    assert (dense.trials, dense.best) == (0, "default, not estimated")

    # a measured record, slower and from elsewhere, stands before them
    spec = resolve("cuda-sm_80")
    (got, problems) = records.read_folder(result.folder)
    assert not problems
    environment = Environment.read(result.folder / records.ENVIRONMENT)
    assert environment.runs[0]["runner"] == "model"
    (default,) = [record for record in got if traces.is_default(record.trace)]
    measured = Environment(
        environment.device,
        environment.model,
        "cuda",
        "sm_80",
        provenance.tvm_version(),
        "measured",
    )
    slow = records_record.Record(default.workload, default.trace, (1.0,), default.target, [])
    RecordFolder(tmp_path / "late" / environment.device, measured).append([slow])
    lookup = records_lookup.find(spec, [tmp_path, tmp_path / "late"], default.target)
    choice = lookup.choices[default.workload[0]]
    assert (choice.method, choice.seconds) == ("measured", 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "llvm", "runner": "model"}, "only CUDA"),
        ({"target": "h100", "runner": "local"}, "runner model"),
        ({"target": "h100", "runner": "model", "cache": "hot"}, "cold"),
        ({"target": "llvm", "runner": "gpu"}, "local, rpc or model"),
        ({"target": "llvm", "runner": "rpc"}, "tracker"),
        ({"target": "llvm", "runner": "rpc", "tracker": "here", "key": "cpu"}, "host:port"),
        ({"target": "llvm", "key": "cpu"}, "runner rpc"),
    ],
    ids=["cpu-model", "gpu-local", "hot", "unknown", "no-tracker", "no-port", "key-alone"],
)
def test_runners_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    layer = torch.nn.Linear(64, 64).eval()
    model = tb.prune(tb.from_torch(layer, (torch.randn(3, 64),)), "4:16")
    with pytest.raises(InputError, match=said):
        tune(model, logs=tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_a_model_without_sparse_layers_is_refused(tmp_path: Path) -> None:
    model = tb.from_torch(torch.nn.Linear(64, 64).eval(), (torch.randn(128, 64),))
    with pytest.raises(InputError, match="can be estimated"):
        tune(model, "h100", logs=tmp_path, runner="model")
    assert Runner.parse("model").estimates


@pytest.mark.large
@pytest.mark.parametrize("name", ["cuda-sm_80", "h100"])
def test_minilm_is_tuned_by_estimates(name: str, tmp_path: Path) -> None:
    ids, mask = torch.randint(0, 30522, (1, 32)), torch.ones(1, 32, dtype=torch.int64)
    model = tb.prune(tb.from_torch(_bert("stated").eval(), (ids, mask)), "4:16")
    result = _tuned_and_verified(model, name, 8, tmp_path)
    sparse = [kernel for kernel in result.kernels if kernel.trials]
    assert len(sparse) >= 4
    assert all(kernel.gain is not None and kernel.gain >= 1 for kernel in sparse)
