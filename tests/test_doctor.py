"""``doctor.collect`` describes a machine and never raises."""

from __future__ import annotations

import json
import subprocess

import pytest

from tvm_balanced import doctor
from tvm_balanced.build import cxx
from tvm_balanced.cli.main import main
from tvm_balanced.cuda import libraries, nvrtc
from tvm_balanced.errors import ToolchainError
from tvm_balanced.targets import driver as targets_driver
from tvm_balanced.targets import host
from tvm_balanced.targets import resolve as targets
from tvm_balanced.targets.driver import DetectedGpu, Driver

A10 = DetectedGpu("NVIDIA A10", "sm_86", 24 << 30, 600.0, 72, 1.695, 6 << 20, 101376)


def _with_driver(monkeypatch, driver):
    monkeypatch.setattr(targets_driver, "detect_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "missing_cuda_packages", list)


def test_it_names_every_target_and_is_json(monkeypatch):
    _with_driver(monkeypatch, Driver(None, (), "no driver"))
    machine = json.loads(json.dumps(doctor.collect()))
    assert list(machine["targets"]) == targets.names()
    assert machine["targets"]["llvm"] == {"compiles": True, "runs": True, "reason": None}
    assert machine["targets"]["h100"] == {
        "compiles": True,
        "runs": False,
        "reason": "runs on another machine, or emulated (run --device emulated, verify): no driver",
    }
    assert machine["targets"]["cuda"]["compiles"] is False
    assert machine["packages"]["apache-tvm"]


def test_a_gpu_runs_its_own_architecture(monkeypatch):
    _with_driver(monkeypatch, Driver("13.0", (A10,), None))
    machine = doctor.collect()
    assert machine["gpus"] == [{"name": "NVIDIA A10", "arch": "sm_86", "memory_bytes": 24 << 30}]
    runs = {name for name, entry in machine["targets"].items() if entry["runs"]}
    assert {"cuda", "cuda-sm_86", "a10", "rtx-3090"} <= runs
    assert "sm_86" in machine["targets"]["h100"]["reason"] and "h100" not in runs


def test_without_nvrtc_only_llvm_compiles(monkeypatch):
    _with_driver(monkeypatch, Driver(None, (), "no driver"))
    monkeypatch.setattr(nvrtc, "missing_cuda_packages", lambda: ["nvidia-cuda-nvrtc"])
    machine = doctor.collect()
    compiles = {name for name, entry in machine["targets"].items() if entry["compiles"]}
    assert "llvm" in compiles and not any(name.startswith("cuda") for name in compiles)
    assert "nvidia-cuda-nvrtc not installed: pip install" in machine["targets"]["h100"]["reason"]


def test_an_nvrtc_that_does_not_load_is_told_from_one_that_is_missing(monkeypatch):
    def broken():
        raise ToolchainError("libnvrtc.so.13 cannot be loaded")

    _with_driver(monkeypatch, Driver(None, (), "no driver"))
    monkeypatch.setattr(nvrtc, "missing_cuda_packages", list)
    monkeypatch.setattr(nvrtc, "compiler", broken)
    machine = doctor.collect()
    assert machine["nvrtc"]["problem"] == "libnvrtc.so.13 cannot be loaded"
    assert machine["targets"]["h100"]["compiles"] is False


def test_cublas_is_the_first_that_loads(tmp_path):
    """By its path and its own version; a file that is no library says so."""
    code = "int cublasGetProperty(int kind, int* value) { *value = 13 - 4 * kind; return 0; }"
    stand_in, broken = (tmp_path / name / "libcublas.so.13" for name in ("sound", "broken"))
    for file in (stand_in, broken):
        file.parent.mkdir()
    broken.write_text("no library")
    (tmp_path / "code.c").write_text(code)
    compiler = [cxx.find_cxx(), "-x", "c", "-shared", "-fPIC", tmp_path / "code.c"]
    subprocess.run([*compiler, "-o", stand_in], check=True)
    missing = str(tmp_path / "libcublas.so.13")
    machine = doctor.find_cublas([missing, str(broken), str(stand_in)])
    assert machine == {"path": str(stand_in), "version": "13.9.5"}
    with pytest.raises(
        ToolchainError, match=r"libcublas.so.13 cannot be loaded \(.*tvm-balanced\[cublas"
    ):
        doctor.find_cublas([missing])
    with pytest.raises(ToolchainError, match=f"{broken}: (file too short|invalid ELF header)"):
        doctor.find_cublas([str(broken), missing])


def test_cublas_is_looked_for_where_libraries_do(monkeypatch):
    monkeypatch.setattr(libraries, "find_cudart", lambda: "/cuda/lib64/libcudart.so.13")
    first, *_, last = doctor.cublas_places()
    assert (first, last) == ("/cuda/lib64/libcublas.so.13", "libcublas.so.13")


@pytest.mark.parametrize(("granted", "text"), [(True, "granted"), (False, "refused by the kernel")])
def test_amx_tiles_have_a_line(monkeypatch, capsys, granted, text):
    """Only where the CPU has them; what is refused is no feature that code may use."""
    _with_driver(monkeypatch, Driver(None, (), "no driver"))
    assert doctor.collect()["cpu"]["amx_tiles"] is None or "amx-tile" in host.cpu_flags()
    flags = frozenset({"avx2", "amx-tile", "amx-int8"})
    monkeypatch.setattr(host, "cpu_flags", lambda: flags)
    monkeypatch.setattr(host, "request_amx_permission", lambda: granted)
    cpu = doctor.collect()["cpu"]
    assert cpu["amx_tiles"] is granted
    assert ("amx-tile" in cpu["features"]) is granted
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("AMX tiles" in line and text in line for line in lines) == 1


def test_without_a_compiler_nothing_compiles(monkeypatch):
    def none():
        raise ToolchainError("no C++ compiler was found")

    monkeypatch.setattr(cxx, "find_cxx", none)
    machine = doctor.collect()
    assert not any(entry["compiles"] for entry in machine["targets"].values())
    assert machine["targets"]["llvm"]["reason"] == "no C++ compiler was found"
    # what was built elsewhere needs none
    assert machine["targets"]["llvm"]["runs"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (targets_driver, "detect_driver"),
        (targets, "resolve"),
        (host, "cpu_flags"),
        (host, "core_count"),
        (cxx, "find_cxx"),
        (nvrtc, "missing_cuda_packages"),
        (doctor, "_check_tvm"),
        (doctor, "find_cublas"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_broken_breaks_it(monkeypatch, module, name):
    def broken(*args):
        raise OSError("broken")

    monkeypatch.setattr(module, name, broken)
    assert set(doctor.collect()["targets"]) == set(targets.names())
