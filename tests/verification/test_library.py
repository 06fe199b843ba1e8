"""``verify``: a sound library passes, and every way to be unsound is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te

import tvm_balanced as tb
from tests.helpers.zoo import ZOO
from tvm_balanced.cli.main import main
from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda.emulator import device
from tvm_balanced.errors import ArtifactError, ToolchainError
from tvm_balanced.verification.library import (
    FAIL,
    PASS,
    UNCHECKED,
    KernelRunner,
    Verification,
    verify,
)

RECOMPILED = "cubin made again of kernels/*.cu"


def _save(name: str, target: str, path: Path) -> Path:
    built = ZOO[name].build("small")
    model = tb.from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes)
    return tb.compile(tb.prune(model, "4:16"), target, policy="always").save(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save("mlp_batch", "cuda-sm_90", tmp_path_factory.mktemp("verify") / "sound.tvmb")


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model.tvmb"))


def _sign(path: Path) -> None:
    """Make the manifest agree with the files, as whoever swaps a file on purpose would."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest))


def _edit(path: Path, change: Callable[[str], str]) -> str:
    """Change the first sparse kernel's source; its name."""
    file = sorted((path / "kernels").glob("*balanced_sparse_dense*.cu"))[0]
    before = file.read_text()
    after = change(before)
    assert after != before
    file.write_text(after)
    _sign(path)
    return file.stem


def _part(got: Verification, name: str) -> Any:
    (check,) = [check for check in got.parts if check.part == name]
    return check


def _failed(got: Verification) -> list[str]:
    return [k.name for k in got.kernels if k.result == FAIL]


def test_sound_library_passes(sound: Path) -> None:
    got = verify(sound)
    assert got.passed
    assert {check.result for check in got.parts} == {PASS}
    assert _part(got, RECOMPILED).detail.startswith("nvrtc ")
    assert got.kernels and all(k.result == PASS for k in got.kernels)
    launched = {kernel for k in got.kernels for kernel in k.kernels}
    assert {f"{name}" for name in tb.load(sound, "emulated").kernels} == launched
    for k in got.kernels:
        assert (k.races, k.bounds, k.unwritten) == (0, 0, 0)
        assert k.checked_blocks >= 1
        assert k.error is not None and k.limit is not None and k.error <= k.limit < 1e-4


def test_command_line(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = verify(sound).kernels[0].name
    assert main(["verify", str(sound), "--json", "--kernel", name, "--blocks", "0", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and document["command"] == "verify"
    (kernel,) = document["kernels"]
    assert kernel["name"] == name and kernel["blocks"] == kernel["checked_blocks"] > 1
    assert main(["verify", str(sound), "--kernel", "absent"]) == 2
    assert 'has no kernel function "absent"; it has' in capsys.readouterr().err


def test_cubin_that_is_not_its_sources(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another source beside the same cubin, with a manifest that agrees."""
    _edit(copy, lambda text: text.replace("0x1p-1f", "0x1.000002p-1f"))
    got = verify(copy)
    assert not got.passed
    check = _part(got, RECOMPILED)
    assert check.result == FAIL and "the cubin is not its source's" in check.detail
    assert main(["verify", str(copy)]) == 1
    captured = capsys.readouterr()
    assert "the cubin is not its source's" in " ".join(captured.out.split())
    assert "did not pass: 1 of" in captured.err


@pytest.mark.parametrize("name", ["lib.so", "kernels", "report.txt"])
def test_changed_file_is_named_and_nothing_run(name: str, copy: Path) -> None:
    file = copy / name if name != "kernels" else sorted((copy / name).iterdir())[0]
    file.write_bytes(file.read_bytes() + b"\n")
    got = verify(copy)
    assert not got.passed and not got.kernels
    (bad,) = [check for check in got.parts if check.result == FAIL]
    assert bad.part == str(file.relative_to(copy)) and "the manifest says" in bad.detail
    assert _part(got, "kernels").result == UNCHECKED


def test_missing_file(copy: Path) -> None:
    (copy / "report.txt").unlink()
    assert "cannot be read" in _part(verify(copy), "report.txt").detail


def test_cubin_the_manifest_does_not_name(copy: Path) -> None:
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["cubins"][0]["sha256"] = "0" * 64
    file.write_text(json.dumps(manifest))
    got = verify(copy)
    said = " ".join(check.detail for check in got.parts if check.result == FAIL)
    assert "which the manifest does not name" in said and "000000000000 is not there" in said


def test_race_in_a_kernel(copy: Path) -> None:
    stem = _edit(copy, lambda text: text.replace("__syncthreads();", "", 1))
    got = verify(copy)
    (name,) = _failed(got)
    assert stem == f"{name}_kernel"
    (row,) = [k for k in got.kernels if k.name == name]
    assert row.races and "race" in row.detail and "at line" in row.detail


def test_wrong_result_of_a_kernel(copy: Path) -> None:
    """GELU's factor off by 1/4096: nothing to check but the numbers."""
    stem = _edit(copy, lambda text: text.replace("0x1p-1f", "0x1.001p-1f"))
    got = verify(copy)
    (name,) = _failed(got)
    assert stem == f"{name}_kernel"
    (row,) = [k for k in got.kernels if k.name == name]
    assert row.detail == "the result is wrong"
    assert row.error is not None and row.limit is not None and row.error > 10 * row.limit


def test_kernel_that_does_not_end(copy: Path) -> None:
    barrier = 'asm volatile("bar.sync 1, 1024;");'  # for more threads than there are
    _edit(copy, lambda text: text.replace("__syncthreads();", barrier, 1))
    got = verify(copy)
    (row,) = [k for k in got.kernels if k.result == FAIL]
    assert row.error is None and "barrier deadlock" in row.detail
    # the device goes on with the next kernel
    assert sum(k.result == PASS for k in got.kernels) == len(got.kernels) - 1


def test_other_version_of_the_compiler(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = nvrtc.compiler()
    monkeypatch.setattr(nvrtc, "compiler", lambda: {**here, "version": "12.0.1"})
    got = verify(copy)
    check = _part(got, RECOMPILED)
    assert check.result == UNCHECKED and "here is nvrtc 12.0.1" in check.detail
    assert got.passed


def test_without_nvrtc(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ToolchainError("compiling for CUDA needs nvidia-cuda-nvrtc, not installed here")

    monkeypatch.setattr(nvrtc, "compiler", missing)
    got = verify(sound)
    assert _part(got, RECOMPILED).result == UNCHECKED
    assert got.passed and got.kernels


def test_library_without_a_reference(copy: Path) -> None:
    (copy / "reference.json.gz").unlink()
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"]["reference.json.gz"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"has no reference\.json\.gz.*compile the model again"):
        verify(copy)


def test_damaged_reference(copy: Path) -> None:
    (copy / "reference.json.gz").write_bytes(gzip.compress(b"{"))
    _sign(copy)
    with pytest.raises(ArtifactError, match=r"reference\.json\.gz cannot be read"):
        verify(copy)


def test_llvm_library(tmp_path: Path) -> None:
    got = verify(_save("mlp", "llvm", tmp_path / "cpu.tvmb"))
    assert got.passed and got.device == "CPU"
    assert got.kernels and all(k.races is None for k in got.kernels)


def test_verified_library_gives_what_pytorch_gives(sound: Path) -> None:
    """What verify ran is what a user runs."""
    x = np.random.default_rng(0).standard_normal((3, 64)).astype("f4")
    lib = tb.load(sound, "emulated")
    assert isinstance(lib(torch.from_numpy(x)), torch.Tensor)
    assert np.isfinite(lib(x)).all()


def test_a_function_that_runs_on_the_host_fails(emulated: device.Device) -> None:
    """It is right where the device's memory is the host's, and would end the process on a GPU."""
    x = te.placeholder((4,), "float32", "x")
    func = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1.0, "y")])

    def on_host(given: tvm.runtime.Tensor, result: tvm.runtime.Tensor) -> None:
        result.copyfrom(given.numpy() + 1)

    module = SimpleNamespace(get_function=lambda *_, **__: on_host)
    row = KernelRunner(module, tvm.cuda(0), emulated, 0).check("add", func, 3)
    assert row.result == FAIL
    assert row.detail.startswith("no CUDA kernel was launched")
