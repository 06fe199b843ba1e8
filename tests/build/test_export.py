import hashlib
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tvm_balanced.build import cxx
from tvm_balanced.build import export as toolchain
from tvm_balanced.cuda import cubin as cuda_cubin
from tvm_balanced.cuda import nvrtc
from tvm_balanced.cuda import nvrtc as cuda_nvrtc
from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.targets import driver
from tvm_balanced.targets import resolve as targets

BUILD = "standin_build:build"

needs_cuda_packages = pytest.mark.skipif(
    bool(cuda_nvrtc.missing_cuda_packages()), reason="NVRTC from PyPI is not installed"
)


def matmul_relu(functions, inner=16, outer=8):
    """``relu(x @ w)``; ``functions`` maps a name to the batch, a number or a symbol."""
    builder = relax.BlockBuilder()
    for name, batch in functions.items():
        rows = tirx.Var(batch, "int64") if isinstance(batch, str) else batch
        x = relax.Var("x", relax.TensorType((rows, inner), "float32"))
        w = relax.Var("w", relax.TensorType((inner, outer), "float32"))
        with builder.function(name, [x, w]):
            with builder.dataflow():
                product = builder.emit(relax.op.matmul(x, w))
                out = builder.emit_output(relax.op.nn.relu(product))
            builder.emit_func_output(out)
    return builder.get()


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A build that uses nothing of the project, so that these tests fail for the toolchain alone."""
    folder = tmp_path / "standin"
    folder.mkdir()
    (folder / "standin_build.py").write_text(
        textwrap.dedent(
            """
            import os

            import tvm
            from tvm import relax
            from tvm.s_tir import dlight

            from tvm_balanced.errors import InputError


            def build(mod, target, **options):
                if options.get("refuse"):
                    raise InputError(options["refuse"])
                if options.get("crash"):
                    os.abort()
                if target.kind.name == "cuda":
                    mod = relax.transform.LegalizeOps()(mod)
                    mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
                built = tvm.compile(mod, target)
                if options.get("twice"):
                    built.mod.import_module(tvm.compile(mod, target).mod)
                return built
            """
        )
    )
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("standin_build", None)


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def test_llvm_library_runs_in_plain_tvm(tmp_path, standin, weight):
    mod = matmul_relu({"main": "n"})
    path = tmp_path / "lib.so"
    exported = toolchain.export_library(
        mod, targets.resolve("llvm"), path, params={"w": weight}, build=BUILD
    )
    assert exported.cuda_source == ""
    assert exported.images == ()
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    x = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    out = vm["main"](tvm.runtime.tensor(x)).numpy()
    expected = np.maximum(x.astype(np.float64) @ weight, 0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_functions_share_an_embedded_weight(tmp_path, standin):
    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    mod = matmul_relu({"main": "n", "main_b1": 1, "main_b8": 8}, 512, 512)
    path = tmp_path / "lib.so"
    toolchain.export_library(mod, targets.resolve("llvm"), path, params={"w": weight}, build=BUILD)
    assert weight.nbytes < path.stat().st_size < 1.5 * weight.nbytes


@needs_cuda_packages
@pytest.mark.parametrize("name", ["cuda-sm_80", "h100", "rtx-5090"])
def test_cuda_library_holds_a_cubin(tmp_path, standin, weight, name):
    spec = targets.resolve(name)
    path = tmp_path / "lib.so"
    exported = toolchain.export_library(
        matmul_relu({"main": "n"}), spec, path, params={"w": weight}, build=BUILD
    )
    assert {image.arch for image in cuda_cubin.cubin_images(path)} == {spec.arch}
    assert [image.arch for image in exported.images] == [spec.arch]
    assert "__global__" in exported.cuda_source
    # what was cut out of the library is a whole cubin, not a piece of one
    data = path.read_bytes()
    start = data.index(b"\x7fELF\x02\x01", 4)
    image = data[start : start + exported.images[0].num_bytes]
    assert b".text." in image and b"matmul" in image


@needs_cuda_packages
def test_cuda_compiles_without_any_toolkit(tmp_path, standin, weight, monkeypatch):
    compiler = cxx.find_cxx()
    programs = tmp_path / "bin"
    programs.mkdir()
    # the compiler driver looks up its own parts by its prefix; only nvcc is to be out of reach
    for tool in ("as", "ld", os.path.basename(compiler)):
        os.symlink(shutil.which(tool), programs / tool)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CUDA_PATH", "/nonexistent")
    exported = toolchain.export_library(
        matmul_relu({"main": 4}),
        targets.resolve("cuda-sm_90"),
        tmp_path / "lib.so",
        params={"w": weight},
        build=BUILD,
    )
    assert [image.arch for image in exported.images] == ["sm_90"]


@needs_cuda_packages
def test_an_export_leaves_this_process_without_a_driver(tmp_path, standin, weight):
    loaded = Path("/proc/self/maps").read_text().count("libcuda.so")
    toolchain.export_library(
        matmul_relu({"main": 4}),
        targets.resolve("cuda-sm_90"),
        tmp_path / "lib.so",
        params={"w": weight},
        build=BUILD,
    )
    assert Path("/proc/self/maps").read_text().count("libcuda.so") == loaded


@needs_cuda_packages
@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        pytest.param("standin_build:nope", {}, ToolchainError, "nope", id="no-such-function"),
        pytest.param(BUILD, {"refuse": "bad bucket"}, InputError, "^bad bucket$", id="own-error"),
        pytest.param(BUILD, {"crash": True}, ToolchainError, "status -6", id="crash"),
    ],
)
def test_a_failed_worker_is_one_error(tmp_path, standin, build, options, error, message):
    path = tmp_path / "lib.so"
    with pytest.raises(error, match=message):
        toolchain.export_library(
            matmul_relu({"main": 4}),
            targets.resolve("cuda-sm_90"),
            path,
            build=build,
            options=options,
        )
    assert not path.exists()


@needs_cuda_packages
def test_a_library_without_machine_code_is_refused(tmp_path, standin, weight, monkeypatch):
    monkeypatch.setattr(cuda_cubin, "cubin_images", lambda path: [])
    path = tmp_path / "lib.so"
    with pytest.raises(ToolchainError, match="machine code for sm_90 and holds none"):
        toolchain.export_library(
            matmul_relu({"main": 4}),
            targets.resolve("cuda-sm_90"),
            path,
            params={"w": weight},
            build=BUILD,
        )
    assert not path.exists()


@needs_cuda_packages
def test_what_is_exported_is_what_its_source_compiles_to(tmp_path, standin, weight):
    exported = toolchain.export_library(
        matmul_relu({"main": "n", "main_b8": 8}),
        targets.resolve("cuda-sm_90"),
        tmp_path / "lib.so",
        params={"w": weight},
        build=BUILD,
    )
    assert exported.compiler == nvrtc.compiler()
    cubin = nvrtc.compile_cubin(exported.cuda_source, "sm_90").cubin
    assert [image.sha256 for image in exported.images] == [hashlib.sha256(cubin).hexdigest()]


@needs_cuda_packages
def test_tvms_own_options_are_not_used_and_that_is_said(tmp_path, standin, weight, monkeypatch):
    monkeypatch.setenv("TVM_CUDA_NVRTC_EXTRA_OPTS", "--no-such-option")
    with pytest.warns(UserWarning, match="TVM_CUDA_NVRTC_EXTRA_OPTS is set and not used"):
        exported = toolchain.export_library(
            matmul_relu({"main": 4}),
            targets.resolve("cuda-sm_90"),
            tmp_path / "lib.so",
            params={"w": weight},
            build=BUILD,
        )
    assert [image.arch for image in exported.images] == ["sm_90"]


@needs_cuda_packages
def test_a_build_that_makes_two_cuda_modules_is_refused(tmp_path, standin, weight):
    with pytest.raises(ToolchainError, match="2 CUDA modules, expected one"):
        toolchain.export_library(
            matmul_relu({"main": 4}),
            targets.resolve("cuda-sm_90"),
            tmp_path / "lib.so",
            params={"w": weight},
            build=BUILD,
            options={"twice": True},
        )


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "missing_cuda_packages", lambda: ["cuda-bindings"])
    with pytest.raises(ToolchainError, match=r"needs cuda-bindings.*pip install"):
        toolchain.export_library(
            matmul_relu({"main": 4}), targets.resolve("cuda-sm_90"), tmp_path / "lib.so"
        )


def test_cxx_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("CXX", "/bin/sh")
    assert cxx.find_cxx() == "/bin/sh"


def test_a_cxx_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="no-such-compiler"):
        cxx.find_cxx()


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolchainError, match="install g\\+\\+ or clang\\+\\+"):
        cxx.find_cxx()


def elf_header(machine, flags, abi):
    ident = b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(7)
    return struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, 0, 0, 64, flags, 64, 0, 0, 0, 0, 0
    )


@pytest.mark.parametrize(
    ("machine", "flags", "abi", "expected"),
    [
        pytest.param(190, 0x005A0C5A, 7, ["sm_90"], id="cuda-12"),
        pytest.param(190, 0x06007802, 8, ["sm_120"], id="cuda-13"),
        pytest.param(62, 0, 0, [], id="host"),
    ],
)
def test_architecture_is_read_from_the_elf_flags(tmp_path, machine, flags, abi, expected):
    path = tmp_path / "file"
    path.write_bytes(b"\x7fELF" + b"x" * 100 + elf_header(machine, flags, abi) + b"\x7fELF\x02\x01")
    assert [image.arch for image in cuda_cubin.cubin_images(path)] == expected


@needs_cuda_packages
@pytest.mark.skipif(
    driver.detect_driver().problem is None, reason="for machines without a usable GPU"
)
def test_the_cuda_runtime_is_refused_without_a_driver():
    code = textwrap.dedent(
        """
        from tvm_balanced.errors import ToolchainError
        from tvm_balanced.cuda.libraries import load_cuda_runtime

        try:
            load_cuda_runtime()
        except ToolchainError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("libcuda.so.1 cannot be loaded")
