"""On a real GPU: libraries load, run and agree with PyTorch. Run with ``pytest -m gpu``."""

import numpy as np
import pytest
import torch

import tvm_balanced as tb
from tests.helpers.zoo import ZOO
from tests.models.test_compile import assert_close, load_weights
from tvm_balanced.cuda.nvrtc import cuda_root
from tvm_balanced.targets.driver import detect_driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not detect_driver().gpus, reason="no usable NVIDIA GPU"),
]


@pytest.mark.parametrize("name", list(ZOO))
def test_model_agrees_with_pytorch(name, tmp_path):
    built = ZOO[name].build("small")
    with torch.no_grad():
        model = tb.prune(
            tb.from_torch(
                built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name
            ),
            "4:16",
        )
        load_weights(built.module, model)
        expected = built.module(*built.inputs)
    path = tb.compile(model, "cuda", policy="always").save(tmp_path / "model.tvmb")
    assert_close(tb.load(path)(*built.inputs), expected, ZOO[name].tolerance)


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no_graph"])
@pytest.mark.parametrize(
    "name", ["llama_decode", "llama_decode_bf16", "minilm_dynamic", "mlp_fp16"]
)
def test_dense_model_by_cublas_agrees_with_pytorch(name, cuda_graph):
    root = cuda_root()
    if root is None or not (root / "lib" / "libcublas.so.13").is_file():
        pytest.skip("nvidia-cublas is not installed")
    built = ZOO[name].build("small")
    model = tb.from_torch(
        built.module, built.inputs, dynamic_shapes=built.dynamic_shapes, name=name
    )
    with torch.no_grad():
        expected = built.module(*built.inputs)
    lib = tb.compile(model, "cuda", policy="never", dense="cublas", cuda_graph=cuda_graph)
    for _ in range(3):  # run, captured, replayed
        assert_close(lib(*built.inputs), expected, ZOO[name].tolerance)


def test_torch_tensors_stay_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    built = ZOO["mlp_fp16"].build("small")
    model = tb.prune(tb.from_torch(built.module, built.inputs), "4:16")
    lib = tb.compile(model, "cuda", policy="always")
    inputs = [x.cuda() for x in built.inputs]
    with torch.cuda.stream(torch.cuda.Stream()):
        on_gpu = lib(*inputs)
    torch.cuda.synchronize()
    assert on_gpu.is_cuda
    assert np.array_equal(on_gpu.cpu().numpy(), lib(*built.inputs).numpy())
