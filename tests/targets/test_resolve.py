"""Target names, their TVM targets and figures, and what is found on a machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
import tvm

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.schedules.llvm.int8.isa import choose
from tvm_balanced.targets import driver, host
from tvm_balanced.targets import gpus as targets_gpus
from tvm_balanced.targets import resolve as targets
from tvm_balanced.targets.driver import DetectedGpu, Driver

H100 = DetectedGpu("NVIDIA H100 80GB HBM3", "sm_90", 80 << 30, 3352.0, 132, 1.98, 50 << 20, 232448)


def _machine(monkeypatch, *gpus, problem=None):
    monkeypatch.setattr(driver, "detect_driver", lambda: Driver("13.0", gpus, problem))


@pytest.mark.parametrize("name", [name for name in targets.names() if name != "cuda"])
def test_every_name_resolves(name):
    spec = targets.resolve(name)
    assert spec.name == name
    assert spec.kind == ("llvm" if name.startswith("llvm") else "cuda")
    assert spec.target.kind.name == spec.kind
    assert spec.bandwidth_gbps > 0 and spec.fp32_tflops > 0 and spec.cores > 0
    assert targets.resolve(spec) is spec


def test_h100_is_what_the_chip_allows_and_not_the_tag():
    spec = targets.resolve("h100")
    attrs = spec.target.attrs
    assert spec.arch == str(attrs["arch"]) == "sm_90"
    assert spec.shared_bytes == int(attrs["max_shared_memory_per_block"]) == 227 * 1024
    assert int(attrs["max_threads_per_block"]) == 1024
    assert int(attrs["thread_warp_size"]) == 32
    assert int(attrs["registers_per_block"]) == 65536


@pytest.mark.parametrize("name", targets_gpus.GPUS)
def test_figures_of_a_data_sheet_agree_with_each_other(name):
    gpu = targets_gpus.GPUS[name]
    per_clock = targets_gpus.ARCHITECTURES[gpu.arch].fp32_flops
    assert gpu.fp32_tflops == pytest.approx(
        gpu.sm_count * gpu.clock_ghz * per_clock / 1e3, rel=0.02
    )
    assert gpu.tensor_tflops > gpu.fp32_tflops


@pytest.mark.parametrize("arch", targets_gpus.ARCHITECTURES)
def test_every_architecture_has_a_gpu_that_stands_for_it(arch):
    spec = targets.resolve(f"cuda-{arch}")
    assert spec.gpu == next(gpu.name for gpu in targets_gpus.GPUS.values() if gpu.arch == arch)
    limits = targets_gpus.ARCHITECTURES[arch]
    assert spec.shared_bytes == limits.shared_bytes - targets_gpus.RESERVED_SHARED


def test_an_architecture_takes_the_figures_of_its_representative():
    spec = targets.resolve("cuda-sm_90")
    assert (spec.gpu, spec.bandwidth_gbps) == ("h100", targets_gpus.GPUS["h100"].bandwidth_gbps)


@pytest.mark.parametrize("name", ["h1000", "cuda-sm_75", "llvm-x86-64-v9", ""])
def test_unknown_names_are_answered_with_the_choices(name):
    with pytest.raises(InputError, match=r"choose one of cuda, .*h100.*llvm-x86-64-v4"):
        targets.resolve(name)


def test_tvm_targets_are_taken_as_they_are():
    spec = targets.resolve(tvm.target.Target("nvidia/nvidia-h100"))
    assert (spec.arch, spec.gpu, spec.shared_bytes) == ("sm_90a", "h100", 48 * 1024)
    spec = targets.resolve(tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 3}))
    assert (spec.arch, spec.cores, spec.vector_bits) == ("x86-64-v3", 3, 256)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (tvm.target.Target("opencl"), "kind opencl"),
        (tvm.target.Target({"kind": "cuda", "arch": "sm_70"}), 'arch "sm_70"'),
        (7, "a int was given"),
    ],
    ids=["opencl", "old-gpu", "number"],
)
def test_other_targets_are_refused(target, message):
    with pytest.raises(InputError, match=message):
        targets.resolve(target)


def test_cpu_levels_say_what_code_may_use():
    v3, v4 = targets.resolve("llvm-x86-64-v3"), targets.resolve("llvm-x86-64-v4")
    assert {"avx2", "fma"} <= set(v3.features) and "avx512f" not in v3.features
    assert {"avx512f", "avx512vl"} <= set(v4.features)
    assert (v3.vector_bits, v4.vector_bits) == (256, 512)


def test_local_cpu_uses_nothing_the_system_hides(monkeypatch):
    here = host.cpu_flags()
    if "avx2" not in here:
        pytest.skip("this CPU has no AVX2 to hide")
    visible = frozenset(f for f in here if not f.startswith("avx512"))
    monkeypatch.setattr(host, "cpu_flags", lambda: visible)
    spec = targets.resolve("llvm")
    assert set(spec.features) <= visible
    assert spec.vector_bits == 256


@pytest.mark.parametrize(("answer", "granted"), [(0, True), (-1, False)])
def test_amx_is_used_where_the_kernel_grants_its_tiles(monkeypatch, answer, granted):
    asked = []

    def system_call(*arguments):
        asked.append(arguments)
        return answer

    amx = {"amx-tile", "amx-int8", "amx-bf16"}
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(host, "_system_call", system_call)
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"avx2", *amx}))
    assert host.request_amx_permission() is granted
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    assert asked == [(158, 0x1023, 18)]
    assert host.usable_flags() == {"avx2"} | (amx if granted else set())


def test_amx_that_is_refused_is_switched_off_in_the_target(monkeypatch):
    from tvm.target import codegen

    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "sapphirerapids")
    claimed = codegen.llvm_get_cpu_features(
        tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids"})
    )
    flags = frozenset(map(str, claimed)) & host.CPU_FLAGS.keys()
    monkeypatch.setattr(host, "cpu_flags", lambda: flags)
    monkeypatch.setattr(host, "request_amx_permission", lambda: True)
    assert {"amx-tile", "amx-int8"} <= set(targets.resolve("llvm").features)
    monkeypatch.setattr(host, "request_amx_permission", lambda: False)
    spec = targets.resolve("llvm")
    assert set(spec.features) == {flag for flag in flags if not flag.startswith("amx-")}
    assert {"-amx-bf16", "-amx-int8", "-amx-tile"} <= set(map(str, spec.target.attrs["mattr"]))
    assert choose(spec.target).name == "avx512-vbmi"


def test_a_system_call_by_number():
    """By one that every Linux on x86-64 has: getpid."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("numbers of system calls are those of Linux on x86-64")
    assert host._system_call(39) == os.getpid()


@pytest.mark.parametrize(("system", "machine"), [("Linux", "aarch64"), ("Darwin", "x86_64")])
def test_other_systems_are_not_asked_for_amx(monkeypatch, system, machine):
    monkeypatch.setattr(host.platform, "system", lambda: system)
    monkeypatch.setattr(host.platform, "machine", lambda: machine)
    monkeypatch.setattr(host, "_system_call", lambda *_: pytest.fail("a call of another system"))
    assert host.request_amx_permission() is False


def test_flags_are_read_from_the_kernel(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx avx2 bmi1 sse4_2 avx512_vnni abm\n")
    expected = {"avx", "avx2", "bmi", "sse4.2", "avx512vnni", "lzcnt"}
    assert host.cpu_flags(str(file)) == expected
    assert host.cpu_flags(str(tmp_path / "none")) == frozenset()


def test_cuda_without_a_gpu_says_so(monkeypatch):
    _machine(monkeypatch, problem="the NVIDIA driver sees no GPU")
    with pytest.raises(ToolchainError, match=r"sees no GPU; .*cuda-sm_90"):
        targets.resolve("cuda")


def test_cuda_is_the_first_gpu(monkeypatch):
    _machine(monkeypatch, H100)
    spec = targets.resolve("cuda")
    assert (spec.arch, spec.gpu, spec.cores) == ("sm_90", H100.name, 132)
    assert spec.bandwidth_gbps == targets_gpus.GPUS["h100"].bandwidth_gbps


def test_an_old_gpu_is_refused(monkeypatch):
    _machine(monkeypatch, DetectedGpu("Tesla V100", "sm_70", 1, 900.0, 80, 1.5, 1, 98304))
    with pytest.raises(ToolchainError, match=r"Tesla V100 \(sm_70\), which is not supported"):
        targets.resolve("cuda")


def test_a_namesake_with_fewer_multiprocessors_gets_figures_of_its_own():
    laptop = DetectedGpu(
        "NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", 16 << 30, 576.0, 76, 2.04, 64 << 20, 101376
    )
    figures = targets_gpus.known_gpu(laptop)
    assert figures.bandwidth_gbps == 576.0
    assert figures.fp32_tflops == pytest.approx(39.7, rel=0.01)


_FAKE_DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, "Imagined GPU", n); return 0; }
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = 1ul << 35; return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) {
  switch (which) {
    case 75: *v = 8; break;
    case 76: *v = 6; break;
    case 16: *v = 40; break;
    case 13: *v = 1500000; break;
    case 36: *v = 8000000; break;
    case 37: *v = 256; break;
    case 38: *v = 4 << 20; break;
    case 97: *v = 101376; break;
    default: *v = -1;
  }
  return 0;
}
"""


def _fake_driver(folder: Path, init: int) -> None:
    (folder / "driver.c").write_text(_FAKE_DRIVER)
    library = folder / "libcuda.so.1"
    command = ["g++", "-x", "c", "-shared", "-fPIC", f"-DINIT={init}", "-o", str(library)]
    subprocess.run([*command, str(folder / "driver.c")], check=True)


@pytest.mark.parametrize("init", [0, 999], ids=["starts", "broken"])
def test_what_the_driver_says_is_read(tmp_path, monkeypatch, init):
    _fake_driver(tmp_path, init)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    got = driver.detect_driver.__wrapped__()
    assert got.cuda_version == "13.1"
    if init:
        assert got.gpus == () and "error 999" in got.problem
        return
    assert got.problem is None
    (gpu,) = got.gpus
    assert (gpu.name, gpu.arch, gpu.sm_count) == ("Imagined GPU", "sm_86", 40)
    assert (gpu.bandwidth_gbps, gpu.clock_ghz, gpu.memory_bytes) == (512.0, 1.5, 1 << 35)
    assert (gpu.l2_bytes, gpu.shared_bytes) == (4 << 20, 101376)
