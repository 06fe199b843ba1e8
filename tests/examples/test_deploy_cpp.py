"""The C++ example builds against the wheel and computes what Python computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tvm_balanced.build import cxx
from tvm_balanced.build import export as toolchain
from tvm_balanced.targets import resolve as targets

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy_cpp"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
        import tiny_model

        yield tiny_model


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("deploy") / "deploy"
    command = ["make", "-C", str(EXAMPLE), f"PYTHON={sys.executable}", f"OUT={out}"]
    subprocess.run([*command, f"CXX={cxx.find_cxx()}"], check=True, capture_output=True)
    return out


def _library(tiny, folder, mod, params):
    path = folder / "lib.so"
    spec = targets.resolve("llvm")
    toolchain.export_library(mod, spec, path, params=params, build="tiny_model:build")
    return path


def _run(program, *arguments):
    # nothing of Python's environment: the program stands alone
    environment = {"PATH": os.environ["PATH"], "TVM_NUM_THREADS": "2"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("results", [0, 2], ids=["tensor", "tuple"])
def test_the_example_prints_the_outputs(tiny, program, tmp_path, results):
    library = _library(tiny, tmp_path, tiny.linear(results=results), tiny.weights())
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    x.tofile(tmp_path / "x.raw")
    done = _run(program, library, tmp_path / "x.raw", "3,32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * max(results, 1)
    expected = tiny.expected(x, tiny.weights())
    for number, (shape, values) in enumerate(zip(lines[::2], lines[1::2], strict=True), 1):
        assert shape == "shape 3 24"
        got = np.array(values.split(), np.float64).reshape(3, 24)
        np.testing.assert_allclose(got, number * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [("3,33", "has 384 bytes, expected 396"), ("3,0", "not positive"), ("4,24", "")],
    ids=["size", "zero", "model"],
)
def test_mistakes_end_with_a_message(tiny, program, tmp_path, shape, message):
    library = _library(tiny, tmp_path, tiny.linear(), tiny.weights())
    np.zeros((3, 32), np.float32).tofile(tmp_path / "x.raw")
    done = _run(program, library, tmp_path / "x.raw", shape)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("quantize", ["int8", "w8"])
def test_quantized_libraries(program, tmp_path, quantize):
    module = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 24))
    x = torch.randn(3, 64)
    model = tb.prune(tb.from_torch(module.eval(), (x,)), "4:16")
    library = tb.compile(model, "llvm", policy="always", quantize=quantize)
    library.save(tmp_path / "model.tvmb")
    x.numpy().tofile(tmp_path / "x.raw")
    path = tmp_path / "model.tvmb" / "lib.so"
    done = _run(program, path, tmp_path / "x.raw", "3,64")
    assert done.returncode == 0, done.stderr
    expected = library(x).numpy().ravel()
    values = np.array(done.stdout.splitlines()[1].split(), np.float64)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    # and plain TVM, which knows nothing of this package
    code = (
        "import numpy as np, sys, tvm\nfrom tvm import relax\n"
        "vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())\n"
        "x = np.fromfile(sys.argv[2], np.float32).reshape(3, 64)\n"
        "print(*vm['main'](tvm.runtime.tensor(x)).numpy().ravel())\n"
        "assert 'tvm_balanced' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.raw")]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(
        np.array(plain.stdout.split(), np.float64), expected, rtol=1e-5, atol=1e-6
    )


def test_usage(program):
    done = _run(program)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
