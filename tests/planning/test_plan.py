"""Plans for a CPU go by measured times where there are any, and say so."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tvm import relax

import tvm_balanced as tb
from tests.helpers.cpu_times import made_up, save
from tvm_balanced.cli.main import main
from tvm_balanced.planning.cpu_times import place
from tvm_balanced.targets.resolve import resolve

# nanoseconds for each multiplication
GATHER_WINS = {"dense": 0.1, "sparse": 0.2, "dense int8": 0.05, "sparse int8": 0.1}
TILES_WIN = {**GATHER_WINS, "dense int8": 0.005}
FLOAT_WINS = {**GATHER_WINS, "dense int8": 1.0, "sparse int8": 2.0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def model(dtype: str = "float32", pattern: str | None = "4:16", rows: int = 8) -> tb.Model:
    """One layer of 64 x 512."""
    x = relax.Var("x", relax.TensorType((rows, 512), dtype))
    w = relax.Var("w", relax.TensorType((64, 512), dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(x, relax.op.permute_dims(w)))
        builder.emit_func_output(out)
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype(dtype)
    imported = tb.from_relax(builder.get(), {"w": weight})
    return imported if pattern is None else tb.prune(imported, pattern)


def test_int8_is_sparse_or_dense_as_this_cpu_is_faster():
    """What a CPU with AMX changes: dense tiles beside a gather."""
    sparse = model()
    save(made_up(GATHER_WINS))
    report = tb.plan(sparse, "llvm", quantize="int8")
    assert report[0].decided == "sparse int8"
    assert report[0].reason == "measured 2.00x faster than dense int8"
    work = 8 * 64 * 512 / 1e3
    times = {time.kernel: time for time in report[0].alternatives}
    assert {kernel: time.us for kernel, time in times.items()} == {
        "dense": pytest.approx(0.1 * work, abs=0.01),
        "dense int8": pytest.approx(0.05 * work, abs=0.01),
        "sparse": pytest.approx(0.2 * work / 4, abs=0.01),
        "sparse int8": pytest.approx(0.1 * work / 4, abs=0.01),
    }
    assert all(time.measured and time.rows == 8 for time in times.values())
    assert f"calibration of this CPU, threads: {resolve('llvm').cores})" in report.title
    assert report.to_json()[0]["alternatives"][0]["kernel"] == "dense"

    save(made_up(TILES_WIN))
    row = tb.plan(sparse, "llvm", quantize="int8")[0]
    assert (row.decided, row.reason) == ("dense int8", "dense int8 measured 5.00x faster")
    # as compiled, too
    assert tb.compile(sparse, "llvm", quantize="int8").report[0].decided == "dense int8"
    assert tb.plan(sparse, "llvm", quantize="int8", policy="always")[0].decided == "sparse int8"


def test_float_stands_in_for_int8_where_it_was_measured_to_be_faster():
    save(made_up(FLOAT_WINS))
    row = tb.plan(model(), "llvm", quantize="int8")[0]
    assert (row.decided, row.quantize) == ("sparse", "none")
    assert row.reason == (
        "measured 2.00x faster than dense; float measured 10.00x faster than int8"
    )
    dense = tb.plan(model(pattern=None), "llvm", quantize="int8")[0]
    assert dense.decided == "dense" and dense.reason.endswith(
        "float measured 10.00x faster than int8"
    )
    assert {time.kernel for time in dense.alternatives} == {"dense", "dense int8"}
    # only auto may choose
    for policy, decided in (("always", "sparse int8"), ("never", "dense int8")):
        assert tb.plan(model(), "llvm", quantize="int8", policy=policy)[0].decided == decided


def test_without_quantize_nothing_becomes_int8():
    save(made_up(TILES_WIN))
    row = tb.plan(model(), "llvm")[0]
    assert (row.decided, row.reason) == ("sparse", "measured 2.00x faster than dense")
    row = tb.plan(model(), "llvm", quantize="w8")[0]
    assert row.decided == "sparse w8"
    assert {time.kernel for time in row.alternatives} >= {"sparse w8", "dense int8", "dense"}


def test_times_that_were_not_measured_are_predicted():
    """Without a calibration, for another CPU, and for floats that are not float32."""
    before = tb.plan(model(), "llvm", quantize="int8")
    assert "predicted, uncalibrated" in before.title and "predicted" in before[0].reason
    other = tb.plan(model(), "llvm-x86-64-v3", quantize="int8")
    save(made_up(TILES_WIN))
    again = tb.plan(model(), "llvm-x86-64-v3", quantize="int8")
    assert again.to_json() == other.to_json() and again.title == other.title
    assert not any(time.measured for time in again[0].alternatives)
    half = tb.plan(model("float16"), "llvm")[0]
    assert "predicted" in half.reason
    assert {time.kernel: time.measured for time in half.alternatives} == {
        "dense": False,
        "sparse": False,
        "dense int8": True,
        "sparse int8": True,
    }


def test_a_calibration_that_cannot_be_used_is_told(caplog):
    expected = tb.plan(model(), "llvm", quantize="int8")
    spec = resolve("llvm")
    save(made_up(TILES_WIN))
    path = place(spec.arch, spec.features, spec.cores)
    path.write_text(path.read_text()[:100])
    with caplog.at_level(logging.WARNING, "tvm_balanced"):
        report = tb.plan(model(), "llvm", quantize="int8")
    assert report.to_json() == expected.to_json()
    assert "calibration cannot be used" in report.title
    assert (
        f"{path} cannot be used" in caplog.text and "until then times are predicted" in caplog.text
    )


def test_a_busy_machine_is_told():
    save(made_up(TILES_WIN, load=3.5))
    assert "measured under load 3.5" in tb.plan(model(), "llvm").title


def test_the_command_prints_it(tmp_path, capsys):
    from tests.helpers.small_files import mlp_weights, write_onnx

    save(made_up(TILES_WIN))
    path = write_onnx(tmp_path / "mlp.onnx", mlp_weights(), 8)
    assert main(["plan", str(path), "--pattern", "4:16", "--quantize", "int8"]) == 0
    out = capsys.readouterr().out
    assert "calibration of this CPU" in out and "dense int8 measured 5.00x faster" in out
