"""``calibrate`` times every kernel and leaves what plans go by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tvm_balanced as tb
from tvm_balanced.bench import calibrate
from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.planning import cpu_times
from tvm_balanced.targets.resolve import resolve


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 128),))
    monkeypatch.setattr(calibrate, "ROWS", (1, 3))
    monkeypatch.setattr(calibrate, "_SECONDS", 1e-4)


def test_every_kernel_is_timed_and_found_again():
    spec, steps = resolve("llvm"), []
    before = os.environ.get("TVM_NUM_THREADS")
    times = tb.calibrate(progress=steps.append)
    assert os.environ.get("TVM_NUM_THREADS") == before
    assert steps == ["layers of 64 x 128"]
    path = cpu_times.place(spec.arch, spec.features, spec.cores)
    assert cpu_times.load(path, spec) == times
    cases = {(sample.kernel, sample.pattern, sample.rows) for sample in times.samples}
    sparse = {(f"sparse{end}", p) for end in ("", " int8") for p in ("8:16", "4:16", "2:16")}
    expected = sparse | {("dense", None), ("dense int8", None)}
    assert cases == {(*kernel, rows) for kernel in expected for rows in (1, 3)}
    assert all(0 < sample.us < 1e6 for sample in times.samples)
    text = str(times)
    assert "sparse int8" in text and "M = 3" in text and "64 x 128" in text


def test_kernels_compute_what_their_names_say():
    """Layers of a call are of the weights and inputs that are timed."""
    import numpy as np

    from tvm_balanced.pruning.magnitude import prune_weight

    weight = np.random.default_rng(3).standard_normal((64, 128)).astype(np.float32)
    inputs = np.random.default_rng(1).standard_normal((4, 3, 128)).astype(np.float32)
    for pattern in (None, "4:16"):
        balanced = weight if pattern is None else prune_weight(weight, pattern)
        for quantize, most in (("none", 1e-4), ("int8", 0.02)):
            results = calibrate._layers(resolve("llvm"), balanced, 3, pattern, quantize)()
            exact = inputs @ balanced.T
            got = np.stack([result.numpy() for result in results])
            error = np.abs(got - exact).max() / np.abs(exact).max()
            assert error < most
            # that rounding is seen says that int8 was used
            assert quantize == "none" or error > 1e-4


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5])
def test_threads_are_a_number(threads):
    with pytest.raises(InputError, match="expected a number from 1"):
        tb.calibrate(threads)


def test_more_threads_than_there_are_is_told():
    with pytest.raises(InputError, match="threads is 4096, but TVM's pool of this process has"):
        tb.calibrate(4096)


def test_a_busy_machine_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 0.0, 0.0))
    assert tb.calibrate().load == 7.5
    assert "load was 7.5" in caplog.text


def test_a_damaged_file_is_replaced_without_a_word(caplog):
    spec = resolve("llvm")
    path = cpu_times.place(spec.arch, spec.features, spec.cores)
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    times = tb.calibrate()
    assert "cannot be used" not in caplog.text
    assert cpu_times.load(path, spec) == times


def test_a_cache_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "tvm-balanced").write_text("in the way")
    steps: list[str] = []
    with pytest.raises(OutputError, match="could not be written"):
        tb.calibrate(progress=steps.append)
    assert steps == []
