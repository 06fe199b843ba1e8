"""Whole models with ``dense="cublas"`` and as CUDA graphs, on the emulated device, against PyTorch."""

import functools
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import pytest
import torch
from torch import nn

import tvm_balanced as tb
from tests.helpers.zoo import ZOO
from tests.models.test_compile import assert_close, load_weights
from tvm_balanced.artifact.manifest import read_manifest
from tvm_balanced.cli.main import main
from tvm_balanced.cuda.emulator import device
from tvm_balanced.errors import InputError
from tvm_balanced.verification.library import PASS, UNCHECKED, verify


@pytest.fixture(autouse=True)
def emulated():
    """The device, in its plain mode whatever a test before left."""
    got = device.install("sm_90")
    got.reset()
    got.mode()
    got.forget()
    yield got
    got.reset()


def build(name, **options):
    """A zoo model in its small size, pruned, and its library."""
    built = ZOO[name].build("small")
    model = tb.prune(
        tb.from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name),
        "4:16",
    )
    load_weights(built.module, model)
    return built, tb.compile(model, "cuda-sm_90", **options)


@pytest.fixture(scope="module")
def llama():
    """A decode step with every layer dense, attention over a cache included."""
    return build("llama_decode", policy="never", dense="cublas")


def counts(emulated):
    """Launches since the last question: how many by cuBLAS and in all, and how many of them replayed."""
    launches = emulated.launches()
    emulated.forget()
    blas = sum(launch.kernel.startswith("cublas") for launch in launches)
    return blas, len(launches), sum(launch.graph for launch in launches)


def test_dense_model_agrees_with_pytorch_and_is_replayed(llama, emulated):
    built, compiled = llama
    lib = tb.load(compiled, "emulated")
    with torch.no_grad():
        expected = built.module(*built.inputs)
    assert_close(lib(*built.inputs), expected, 1e-4)
    blas, every, replayed = counts(emulated)
    # two layers of seven dense layers and two products of attention, and the head
    assert (blas, replayed) == (2 * (7 + 2) + 1, 0)
    assert not any("matmul" in kernel for kernel in compiled.kernels)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = [torch.randn_like(x) if x.is_floating_point() else x for x in built.inputs]
        with torch.no_grad():
            assert_close(lib(*inputs), built.module(*inputs), 1e-4)
        again = counts(emulated)
        assert again[:2] == (blas, every)
        assert again[2] > 0.8 * every, "all but what reads inputs or writes outputs is a graph"


def test_threads_capture_and_replay_side_by_side(llama, emulated):
    built, compiled = llama
    lib = tb.load(compiled, "emulated")
    torch.manual_seed(5)
    inputs = [
        [torch.randn_like(x) if x.is_floating_point() else x for x in built.inputs]
        for _ in range(3)
    ]
    with torch.no_grad():
        expected = [built.module(*each) for each in inputs]
    answers = {}

    def work(i):
        answers[i] = [lib(*inputs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        for answer in answers[i]:
            assert_close(answer, want, 1e-4)
    assert counts(emulated)[2] > 0


def test_answers_of_earlier_calls_stay(llama):
    built, compiled = llama
    lib = tb.load(compiled, "emulated")
    first = lib(*built.inputs)
    kept = [x.clone() for x in first]
    lib(*(torch.randn_like(x) if x.is_floating_point() else x for x in built.inputs))
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)


def test_plain_tvm_finds_the_function_in_the_library(llama, tmp_path):
    _, compiled = llama
    path = compiled.save(tmp_path / "model.tvmb")
    code = """
        import sys, tvm
        lib = tvm.runtime.load_module(sys.argv[1])
        assert lib.get_function("tvm_balanced_cublas_matmul", True) is not None
        assert lib.get_function("vm_load_executable") is not None
        assert not any(name.startswith("tvm_balanced") for name in sys.modules)
    """
    # TVM's CUDA runtime must be there, or it cannot take the cubin
    load = f"""
        import ctypes
        for name in {[*_stand_ins()]}:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    """
    whole = textwrap.dedent(load) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", whole, str(path / "lib.so")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _stand_ins():
    from pathlib import Path

    from tvm_balanced.cuda.emulator.compiler import device_libraries, runtime

    every = Path(device_libraries()._name)
    return runtime()._name, str(every), str(every.with_name("libcuda.so.1"))


@pytest.mark.large
def test_symbolic_shapes_and_batched_attention_beside_sparse_layers(emulated):
    built, compiled = build("minilm_dynamic", policy="always", dense="cublas")
    lib = tb.load(compiled, "emulated")
    for batch in (1, 2, 1):
        ids, mask = (x[:1].repeat(batch, 1) for x in built.inputs)
        ids = (ids + torch.arange(batch)[:, None]) % 50
        with torch.no_grad():
            assert_close(lib(ids, mask), built.module(ids, mask), 1e-4)
        launches = emulated.launches()
        emulated.forget()
        names = Counter(launch.kernel for launch in launches)
        assert names["cublasGemmStridedBatchedEx"] == 4, "two products of attention in two layers"
        assert sum("balanced" in launch.kernel for launch in launches) > 4
        # the sequence is symbolic in the bucket too, and nothing of symbolic shape is captured
        assert not any(launch.graph for launch in launches)


class Heads(nn.Module):
    """Half precision layers whose answer is a reshape of the last product."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 128)

    def forward(self, x):
        return self.last(torch.relu(self.first(torch.relu(x)))).reshape(4, 2, 64)


@functools.cache
def heads(cuda_graph):
    """The module and its library."""
    torch.manual_seed(0)
    module = Heads().eval().to(torch.float16)
    model = tb.from_torch(module, (torch.zeros(4, 64).half(),))
    return module, tb.compile(model, "cuda-sm_90", dense="cublas", cuda_graph=cuda_graph)


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no_graph"])
def test_graphs_can_be_turned_off(cuda_graph, emulated):
    module, compiled = heads(cuda_graph)
    lib = tb.load(compiled, "emulated")
    inputs = [torch.randn(4, 64).half() for _ in range(3)]
    answers = [lib(x) for x in inputs]  # compared after all calls: none may be written over
    for answer, x in zip(answers, inputs, strict=True):
        with torch.no_grad():
            assert_close(answer, module(x), 1e-2)
    blas, every, replayed = counts(emulated)
    assert blas == 6
    # each product has one kernel behind it, and the input's ReLU is one before the first
    assert every == 6 + 3 * 3
    assert (replayed > 0) == cuda_graph


def test_what_cublas_computes_is_recorded_told_and_not_judged(tmp_path, capsys, monkeypatch):
    path = heads(True)[1].save(tmp_path / "model.tvmb")
    manifest = read_manifest(path)
    assert manifest.options["dense"] == "cublas"
    products = {call.name: call.product for call in manifest.cublas}
    assert products == {
        "first.weight": "float16 (4, 64) x (64, 96)",
        "last.weight": "float16 (4, 96) x (96, 128)",
    }
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(path)]) == 0
    assert "by cuBLAS (2), libcublas.so.13 is needed" in capsys.readouterr().out
    checked = verify(path)
    assert checked.passed
    left = [row for row in checked.kernels if row.result == UNCHECKED]
    assert {row.name: row.detail for row in left} == {
        name: f"computed by cuBLAS: {product}" for name, product in products.items()
    }
    assert {row.result for row in checked.kernels if row not in left} == {PASS}


def test_cublas_is_refused_for_a_cpu():
    module = nn.Linear(16, 16)
    model = tb.from_torch(module, (torch.zeros(1, 16),))
    with pytest.raises(InputError, match='dense "cublas" was given for target llvm'):
        tb.compile(model, "llvm", dense="cublas")
    with pytest.raises(InputError, match='dense "cudnn" is not known; choose dlight or cublas'):
        tb.plan(model, "h100", dense="cudnn")
