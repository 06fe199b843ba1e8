"""Every model of the zoo imports and, compiled by TVM alone, agrees with where it came from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from tests.helpers.zoo import SIZES, ZOO
from tvm_balanced.frontend import from_onnx, from_torch
from tvm_balanced.frontend.torch_importer import to_numpy
from tvm_balanced.relay_passes.accumulate_float32 import accumulate_float32

sizes = pytest.mark.parametrize(
    "size", [s if s == "small" else pytest.param(s, marks=pytest.mark.large) for s in SIZES]
)


def run(model, inputs):
    """All outputs of a model compiled with TVM's defaults, as float64 arrays."""
    executable = tvm.compile(accumulate_float32(model.mod), tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    out = machine["main"](*map(tvm.runtime.tensor, [*inputs, *model.params.values()]))
    parts = [out] if isinstance(out, tvm.runtime.Tensor) else list(out)
    return [part.numpy() for part in parts]


def error(got, want):
    """Largest difference as a share of the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


@sizes
@pytest.mark.parametrize("name", ZOO)
def test_torch(name, size):
    entry = ZOO[name]
    built = entry.build(size)
    with torch.no_grad():
        want = built.module(*built.inputs)
    want = want if isinstance(want, tuple) else (want,)
    model = from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes)

    layers = {layer.name: layer for layer in model.dense_layers()}
    assert layers[entry.dense].blocked is None
    state = {**dict(built.module.named_parameters()), **dict(built.module.named_buffers())}
    assert set(model.params) <= set(state)
    for weight, array in model.params.items():
        assert np.array_equal(array, to_numpy(state[weight])), weight
    got = run(model, [to_numpy(x) for x in built.inputs])
    for one, other in zip(got, want, strict=True):
        assert one.dtype == to_numpy(other).dtype
        assert error(one, to_numpy(other)) <= entry.tolerance


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (1, 64)], ids=str)
def test_one_import_serves_every_shape(shape, dynamic_minilm):
    module, machine, params = dynamic_minilm
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 100, shape), torch.ones(shape, dtype=torch.int64)
    mask[0, -1] = 0
    with torch.no_grad():
        want = module(ids, mask)
    got = machine["main"](*map(tvm.runtime.tensor, [ids.numpy(), mask.numpy(), *params]))
    assert error(got.numpy(), want.numpy()) <= 1e-4


@pytest.fixture(scope="module")
def dynamic_minilm():
    built = ZOO["minilm_dynamic"].build("small")
    model = from_torch(built.module, built.inputs, dynamic_shapes=built.dynamic_shapes)
    executable = tvm.compile(model.mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return built.module, machine, list(model.params.values())


@pytest.mark.parametrize("name", ["mlp", "mlp_fp16", "minilm", "vgg16"])
def test_onnx_export(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    built = ZOO[name].build("small")
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        built.module, built.inputs, path, dynamo=True, external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    feeds = {
        value.name: to_numpy(x) for value, x in zip(session.get_inputs(), built.inputs, strict=True)
    }
    model = from_onnx(path)
    assert model.dense_layers()
    (got,) = run(model, feeds.values())
    (want,) = session.run(None, feeds)
    assert error(got, want) <= ZOO[name].tolerance


def test_onnx_of_a_package():
    """Magika's file-type classifier, as its authors export it from JAX."""
    onnxruntime = pytest.importorskip("onnxruntime")
    spec = importlib.util.find_spec("magika")
    if spec is None or spec.origin is None:
        pytest.skip("magika is not installed (extra `dev`)")
    path = Path(spec.origin).parent / "models" / "standard_v3_3" / "model.onnx"
    model = from_onnx(path, {"bytes": (1, 2048)})
    assert [layer.in_features for layer in model.dense_layers()] == [257, 512]
    data = np.random.default_rng(0).integers(0, 256, (1, 2048)).astype(np.int32)
    (got,) = run(model, [data])
    (want,) = onnxruntime.InferenceSession(path).run(None, {"bytes": data})
    assert error(got, want) <= 1e-4
