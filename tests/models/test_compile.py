"""Every model of the zoo, pruned and compiled: right on the CPU, sparse and right for CUDA.

The CUDA half needs no GPU: libraries are built and must hold a cubin, and every distinct sparse kernel
runs on the emulated device against its unscheduled self.
"""

import numpy as np
import pytest
import torch
import tvm

import tvm_balanced as tb
from tests.helpers.kernels import arguments, distinct_kernels, run_plain
from tests.helpers.zoo import ZOO
from tvm_balanced.cuda import emulator as cudaemu
from tvm_balanced.targets.resolve import resolve

# run whole by tests/models/test_emulated_device.py
WHOLE = ("lstm", "llama_decode", "llama_decode_bf16", "gpt2_prefill", "vgg16")
# whose kernels differ from theirs
KERNELS_ONLY = ("mlp_batch", "mlp_bf16", "minilm_dynamic", "llama_prefill_fp16")
SMALL = [pytest.param(name, "small", id=f"{name}-small") for name in ZOO]
STATED = [
    pytest.param(name, "stated", id=f"{name}-stated", marks=pytest.mark.large) for name in ZOO
]


@pytest.fixture(scope="module")
def pruned():
    """Pruned models by name and size, kept for the tests of one model."""
    cache = {}

    def get(name, size):
        if (name, size) not in cache:
            cache.clear()
            built = ZOO[name].build(size)
            with torch.no_grad():
                model = tb.prune(
                    tb.from_torch(
                        built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name
                    ),
                    "4:16",
                )
                load_weights(built.module, model)
                expected = built.module(*built.inputs)
            cache[name, size] = built, model, expected
        return cache[name, size]

    return get


def load_weights(module, model):
    """Give the PyTorch module the model's pruned weights, by name."""
    state = module.state_dict()
    taken = 0
    for row in model.pruned:
        if row.skipped is None:
            array = model.params[row.name]
            if array.dtype.name == "bfloat16":
                array = array.view(np.uint16)
                state[row.name].copy_(torch.from_numpy(array.copy()).view(torch.bfloat16))
            else:
                state[row.name].copy_(torch.from_numpy(array.copy()))
            taken += 1
    assert taken


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result.float().numpy()]
    return [array for part in result for array in flat(part)]


def assert_close(got, expected, tolerance):
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def eligible(model):
    """Names of the layers that nothing speaks against."""
    return {layer.name for layer in model.dense_layers() if layer.blocked is None} & set(
        model.patterns
    )


def check_kernels(model, tolerance):
    """Run every distinct sparse CUDA kernel of a model emulated, against its unscheduled self."""
    target = resolve("cuda-sm_90")
    kernels = distinct_kernels(model, target)
    assert kernels
    for kernel in kernels:
        arrays, outputs = arguments(kernel.plain)
        expected = run_plain(kernel.plain, arrays)
        device = cudaemu.from_tvm(
            tvm.IRModule({"main": kernel.scheduled.with_attr("global_symbol", "main")}),
            target.target,
        )
        got = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
        device(*got)
        for position in outputs:
            reference = expected[position].astype(np.float64)
            error = np.abs(got[position].astype(np.float64) - reference).max()
            assert error <= tolerance * np.abs(reference).max(), kernel.name


@pytest.mark.parametrize(("name", "size"), SMALL + STATED)
def test_llvm_agrees_with_pytorch(name, size, pruned):
    built, model, expected = pruned(name, size)
    lib = tb.compile(model, "llvm", policy="always")
    assert {row.name for row in lib.report if row.decision == "sparse"} == eligible(model)
    assert_close(lib(*built.inputs), expected, ZOO[name].tolerance)


@pytest.mark.parametrize(
    ("name", "size", "arch"),
    [
        # for sm_90 small models are built where they run whole
        ("mlp", "small", "sm_80"),
        *(
            pytest.param(name, "stated", arch, marks=pytest.mark.large)
            for name in ZOO
            for arch in ("sm_80", "sm_90")
        ),
    ],
)
def test_cuda_builds_with_every_eligible_layer_sparse(name, size, arch, pruned, tmp_path):
    _, model, _ = pruned(name, size)
    lib = tb.compile(model, f"cuda-{arch}", policy="always")
    assert {row.name for row in lib.report if row.decision == "sparse"} == eligible(model)
    from tvm_balanced.cuda.cubin import cubin_images

    path = lib.save(tmp_path / "model.tvmb")
    assert {image.arch for image in cubin_images(path / "lib.so")} == {arch}
    assert any("balanced_sparse_dense" in kernel for kernel in lib.kernels)
    assert "__global__" in lib.source(lib.kernels[0])


@pytest.mark.parametrize(
    ("name", "size"), [param for param in SMALL if param.values[0] in KERNELS_ONLY] + STATED
)
def test_cuda_kernels_run_emulated(name, size, pruned):
    _, model, _ = pruned(name, size)
    check_kernels(model, ZOO[name].tolerance)
