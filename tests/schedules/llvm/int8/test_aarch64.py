"""The int8 kernels of 64-bit ARM, run by qemu without TVM's runtime: bit for bit the reference's numbers."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx

import tvm_balanced as tb
from tests.build.test_quantize import pruned
from tests.helpers.covering import each_value, grid
from tests.helpers.int8 import Problem
from tests.schedules.llvm.int8.test_matmul import ACTIVATIONS
from tests.schedules.llvm.int8.test_rule import _module, _operands, _scheduled, _want
from tvm_balanced.format import int8
from tvm_balanced.schedules.llvm.int8 import dense, gather, quantize
from tvm_balanced.schedules.llvm.int8.isa import choose
from tvm_balanced.schedules.llvm.int8.matmul import Epilogue, Knobs, MatmulSpec

_COMPILER, _EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

# the emulated CPU ends the program at an instruction that the real one lacks; qemu 7 has no apple-m1
_EMULATED = {"neoverse-n1": "neoverse-n1", "apple-m1": "max", "cortex-a72": "cortex-a72"}

_CODES = {"i": 0, "u": 1, "f": 2}  # kinds of DLPack

Runner = Callable[[tirx.PrimFunc, str], Callable[[Sequence[Any]], list[Any]]]


def _target(cpu: str, **attributes: Any) -> tvm.target.Target:
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": cpu}
    return tvm.target.Target({**arm, **attributes})


def _argument(array: Any) -> bytes:
    extents = (*array.shape, *[0] * (4 - array.ndim))
    kind = array.dtype
    head = struct.pack("<3i4q", _CODES[kind.kind], 8 * kind.itemsize, array.ndim, *extents)
    return head + array.tobytes()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What calls kernels."""
    missing = [tool for tool in (_COMPILER, _EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: Debian's gcc-aarch64-linux-gnu and qemu-user")
    include = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    include.append(str(Path(tvm.__file__).parent / "include"))
    source = Path(__file__).with_name("aarch64_runner.c")
    path = tmp_path_factory.mktemp("aarch64") / "runner"
    options = ["-O2", "-rdynamic", *(f"-I{folder}" for folder in include), "-o", path, "-ldl"]
    subprocess.run([_COMPILER, source, *options], check=True)
    return path


@pytest.fixture
def compiled(program: Path, tmp_path: Path) -> Runner:
    """Compile a kernel for a CPU; what it returns takes arguments and gives them as the kernel left them."""

    def compile_kernel(func: tirx.PrimFunc, cpu: str) -> Callable[[Sequence[Any]], list[Any]]:
        module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        library = tmp_path / "kernel.so"
        tvm.compile(module, target=_target(cpu)).export_library(
            library, fcompile=tvm.support.cc.cross_compiler(_COMPILER)
        )
        folder = Path(f"/usr/{_COMPILER.removesuffix('-gcc')}")
        command = [_EMULATOR, "-cpu", _EMULATED[cpu], "-L", folder, program, library]

        def call(arrays: Sequence[Any]) -> list[Any]:
            data = b"".join(map(_argument, arrays))
            done = subprocess.run(
                [*command, "__tvm_ffi_kernel"], input=data, capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr.decode()
            assert len(done.stdout) == sum(array.nbytes for array in arrays)
            results, at = [], 0
            for array in arrays:
                part = done.stdout[at : at + array.nbytes]
                results.append(np.frombuffer(part, array.dtype).reshape(array.shape))
                at += array.nbytes
            return results

        return call

    return compile_kernel


def _kernel(
    spec: MatmulSpec, cpu: str, knobs: Knobs | None = None
) -> tuple[tirx.PrimFunc, int8.ActivationLayout]:
    """The kernel for a problem, and how it reads activations."""
    target = _target(cpu)
    rule, isa = dense if spec.pattern is None else gather, choose(target)
    used = knobs or rule.default_knobs(spec, target, isa)
    return rule.kernel(spec, target, used), spec.format.activations(used.tokens, isa.signed)


def _arguments(problem: Problem, layout: int8.ActivationLayout, *extra: Any) -> list[Any]:
    x, scales = problem.activations
    packed = problem.packed
    return [layout.arrange(x), scales, packed.stream, packed.scales, packed.compensation, *extra]


_EACH = {
    "pattern": ("4:16", "2:16", "8:16", "3:16", "4:32", "3:7", "9:100", "16:256", None),
    "cpu": ("neoverse-n1", "apple-m1"),
}


@grid(_EACH, each_value(_EACH))
def test_sums_are_exact(compiled: Runner, pattern: str | None, cpu: str) -> None:
    spec = Problem(pattern, 37, 300, 1).spec(symbolic=True, out_dtype="int32")
    func, layout = _kernel(spec, cpu)
    text = func.script()
    assert "aarch64.neon.sdot" in text and ("aarch64.neon.tbl1" in text) == (pattern is not None)
    run = compiled(func, cpu)
    for m in (1, 2, 3, 7, 12):
        problem = Problem(pattern, 37, 300, m)
        *_, out = run(_arguments(problem, layout, np.full((m, 37), 77, np.int32)))
        assert np.array_equal(out, problem.sums), m


@pytest.mark.parametrize("pattern", ["4:16", "9:100", None])
def test_sums_of_plain_code_are_exact(compiled: Runner, pattern: str | None) -> None:
    problem = Problem(pattern, 21, 210, 5)
    func, layout = _kernel(problem.spec(out_dtype="int32"), "cortex-a72")
    assert "aarch64" not in func.script()
    out = compiled(func, "cortex-a72")(_arguments(problem, layout, np.full((5, 21), 77, np.int32)))
    assert np.array_equal(out[-1], problem.sums)


_SHARED = Knobs(8, (2, 1), (2, 1), threads=3, task_bytes=4096, token_parts=2)


@pytest.mark.parametrize(("pattern", "knobs"), [("5:16", _SHARED), ("5:16", None), (None, _SHARED)])
def test_threads_and_knobs(compiled: Runner, pattern: str | None, knobs: Knobs | None) -> None:
    problem = Problem(pattern, 602, 256, 45)
    func, layout = _kernel(problem.spec(out_dtype="int32"), "neoverse-n1", knobs)
    assert "T.parallel" in func.script()
    run = compiled(func, "neoverse-n1")
    *_, out = run(_arguments(problem, layout, np.full((45, 602), 77, np.int32)))
    assert np.array_equal(out, problem.sums)


def test_largest_sums(compiled: Runner) -> None:
    k = int8.MOST_COLUMNS
    weight = np.full((2, k), 127, np.int8)
    weight[1] = -127
    packed = int8.pack_dense(weight, np.ones(2, np.float32))
    problem = Problem(None, 2, k, 1)
    x = np.full((1, k), -127, np.int8)
    problem.__dict__.update(packed=packed, activations=(x, np.ones(1, np.float32)))
    func, layout = _kernel(problem.spec(out_dtype="int32"), "neoverse-n1")
    run = compiled(func, "neoverse-n1")
    *_, out = run(_arguments(problem, layout, np.zeros((1, 2), np.int32)))
    assert out.tolist() == [[-127 * 127 * k, 127 * 127 * k]]


def test_results_are_scaled_in_one_order(compiled: Runner) -> None:
    problem = Problem("4:16", 37, 128, 5)
    func, layout = _kernel(problem.spec(), "neoverse-n1")
    run = compiled(func, "neoverse-n1")
    *_, out = run(_arguments(problem, layout, np.zeros((5, 37), np.float32)))
    scales = problem.packed.scales[:37]
    assert np.array_equal(out, int8.dequantize(problem.sums, scales, problem.activations[1]))


def test_epilogue(compiled: Runner) -> None:
    problem = Problem(None, 37, 128, 5)
    rng = np.random.default_rng(3)
    bias = rng.standard_normal(37).astype(np.float32)
    residual = rng.standard_normal((5, 37)).astype(np.float32)
    func, layout = _kernel(problem.spec(epilogue=Epilogue(True, "gelu", True)), "neoverse-n1")
    arguments = _arguments(problem, layout, bias, residual, np.zeros((5, 37), np.float32))
    *_, out = compiled(func, "neoverse-n1")(arguments)
    scales = problem.packed.scales[:37]
    plain = int8.dequantize(problem.sums, scales, problem.activations[1])
    want = ACTIVATIONS["gelu"](plain + bias) + residual
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()


def test_activations_are_rounded(compiled: Runner) -> None:
    cpu = "neoverse-n1"
    layout = int8.DenseFormat(16, 300).activations(4, True)
    func = quantize.kernel(quantize.QuantizeSpec("m", layout), _target(cpu))
    x = np.random.default_rng(0).standard_normal((11, 300)).astype(np.float32)
    x[1], x[2, 3], x[3] = 0, np.nan, x[3] * 1e30
    out = [np.full((11, layout.token_bytes), 5, np.int8), np.full(11, 7, np.float32)]
    _, stored, scales = compiled(func, cpu)([x, *out])
    finite = np.isfinite(x).all(axis=1)
    assert np.isnan(scales[~finite]).all()
    values, wanted = int8.quantize_tokens(x)
    assert np.array_equal(scales[finite], wanted[finite])
    # tokens of a tile lie between each other, window by window
    where = layout.arrange(np.broadcast_to(finite[:, None], x.shape).astype(np.int8)) > 0
    assert where.any() and np.array_equal(stored[where], layout.arrange(values)[where])


@pytest.mark.parametrize("pattern", ["4:16", None])
def test_operator(compiled: Runner, pattern: str | None) -> None:
    """Rounding and multiplication in one kernel, as a model has it."""
    problem = Problem(pattern, 37, 200, 1)
    target = _target("neoverse-n1")
    mod = _scheduled(_module(problem, (7,), False, "float32"), target)
    (func,) = [f for _, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert "aarch64.neon.sdot" in func.script()
    x = np.random.default_rng(0).standard_normal((7, 200)).astype(np.float32)
    arguments = [x, *_operands(problem), np.full((7, 37), np.nan, np.float32)]
    *_, out = compiled(func, "neoverse-n1")(arguments)
    assert np.array_equal(out, _want(problem, x))


def test_a_model_is_linked_by_the_cross_compiler(
    program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del program  # there are the tools
    monkeypatch.setenv("CXX", _COMPILER)
    _, _, model = pruned(5)
    library = tb.compile(model, _target("neoverse-n1"), policy="always", quantize="int8")
    library.save(tmp_path / "model.tvmb")
    disassembler = _COMPILER.replace("gcc", "objdump")
    command = [disassembler, "-d", tmp_path / "model.tvmb" / "lib.so"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bsdot\b", text) and re.search(r"\btbl\b", text)


def test_processors_without_the_instruction_get_plain_code() -> None:
    assert choose(_target("neoverse-n1")).name == "neon-dotprod"
    assert choose(_target("generic", mattr=["+dotprod"])).name == "neon-dotprod"
    assert choose(_target("neoverse-n1", mattr=["-neon"])).name == "plain"
    assert choose(_target("cortex-a72")).name == "plain"
    # the same features of a 32-bit processor, and bytes of words the other way round
    for triple in ("armv8a-linux-gnueabihf", "aarch64_be-linux-gnu"):
        assert choose(_target("cortex-a76", mtriple=triple)).name == "plain"
