"""ONNX models, pruned and compiled, against ONNX Runtime on the same pruned weights."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import tvm_balanced as tb
from tests.helpers.zoo import ZOO
from tests.models.test_compile import check_kernels, eligible
from tvm_balanced.cuda.cubin import cubin_images
from tvm_balanced.frontend.checkpoint import write_onnx
from tvm_balanced.frontend.torch_importer import to_numpy


def check(path, tmp_path, inputs, tolerance, input_shapes=None):
    model = tb.prune(tb.from_onnx(path, input_shapes), "4:16")
    pruned = tmp_path / "pruned.onnx"
    changed = {row.name: model.params[row.name] for row in model.pruned if row.skipped is None}
    write_onnx(path, pruned, changed, overwrite=False)
    session = onnxruntime.InferenceSession(pruned)
    names = [value.name for value in session.get_inputs()]
    (expected,) = session.run(None, dict(zip(names, inputs, strict=True)))
    lib = tb.compile(model, "llvm", policy="always")
    assert {row.name for row in lib.report if row.decision == "sparse"} == eligible(model)
    got = lib(*inputs)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    check_kernels(model, tolerance)
    return model


def check_cuda(model, tmp_path):
    """Cubins of two architectures, every eligible layer sparse."""
    for arch in ("sm_80", "sm_90"):
        lib = tb.compile(model, f"cuda-{arch}", policy="always")
        assert {row.name for row in lib.report if row.decision == "sparse"} == eligible(model)
        path = lib.save(tmp_path / f"{arch}.tvmb")
        assert {image.arch for image in cubin_images(path / "lib.so")} == {arch}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mlp", "small"),
        ("minilm", "small"),
        pytest.param("mlp", "stated", marks=pytest.mark.large),
        pytest.param("minilm", "stated", marks=pytest.mark.large),
    ],
)
def test_export_from_torch(name, size, tmp_path):
    built = ZOO[name].build(size)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        built.module, built.inputs, path, dynamo=True, external_data=False, verbose=False
    )
    model = check(path, tmp_path, [to_numpy(x) for x in built.inputs], ZOO[name].tolerance)
    if size == "stated":
        check_cuda(model, tmp_path)


def test_model_of_a_package(tmp_path):
    """Magika's file-type classifier: K = 257 and 512, exported from JAX with shapes computed at run time."""
    spec = importlib.util.find_spec("magika")
    assert spec is not None and spec.origin is not None, "install the extra `dev`"
    path = Path(spec.origin).parent / "models" / "standard_v3_3" / "model.onnx"
    data = np.random.default_rng(0).integers(0, 256, (1, 2048)).astype(np.int32)
    check_cuda(check(path, tmp_path, [data], 1e-4, {"bytes": (1, 2048)}), tmp_path)
