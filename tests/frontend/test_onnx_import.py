"""ONNX graphs written here: names, shapes, and one sentence for each mistake."""

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.frontend import from_onnx, load_model
from tvm_balanced.support import optional

RNG = np.random.default_rng(0)
WEIGHTS = {
    "layer/fc1.weight": RNG.standard_normal((6, 8)).astype(np.float32),  # Gemm, transposed
    "layer/fc1.bias": RNG.standard_normal(6).astype(np.float32),
    "onnx::MatMul_7": RNG.standard_normal((6, 4)).astype(np.float32),
}


def proto(shape=("batch", 8), op="Relu", listed=False):
    """``x @ fc1.T + bias``, reshaped by computed shapes, ``op``, times a second matrix."""
    x = helper.make_tensor_value_info("x.1", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (None, None))
    nodes = [
        helper.make_node("Gemm", ["x.1", "layer/fc1.weight", "layer/fc1.bias"], ["h"], transB=1),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Reshape", ["h", "s"], ["r"]),
        helper.make_node(op, ["r"], ["a"]),
        helper.make_node("MatMul", ["a", "onnx::MatMul_7"], ["y"]),
    ]
    weights = [numpy_helper.from_array(a, n) for n, a in WEIGHTS.items()]
    inputs = [x]
    if listed:  # as files before IR version 4 do
        inputs += [helper.make_tensor_value_info(n, 1, a.shape) for n, a in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "two_layers", inputs, [y], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def run(model, x):
    machine = relax.VirtualMachine(tvm.compile(model.mod, tvm.target.Target("llvm")), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, [x, *model.params.values()])).numpy()


def expected(x):
    first, bias, second = WEIGHTS.values()
    return np.maximum(x.astype(np.float64) @ first.T + bias, 0) @ second


@pytest.mark.parametrize("listed", [False, True], ids=["plain", "weights-listed-as-inputs"])
@pytest.mark.parametrize("shapes", [{"x.1": (3, 8)}, {"x.1": ("n", 8)}, None], ids=str)
def test_shapes(shapes, listed):
    source = proto(listed=listed)
    before = source.SerializeToString()
    model = from_onnx(source, shapes)
    assert source.SerializeToString() == before
    assert int(model.mod["main"].attrs["num_input"]) == 1
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), expected(x), rtol=1e-4, atol=1e-5)


def test_names_are_the_initializers():
    model = from_onnx(proto(), {"x.1": (1, 8)})
    assert model.name == "two_layers"
    layers = {layer.name: (layer.out_features, layer.in_features) for layer in model.dense_layers()}
    assert layers == {"layer/fc1.weight": (6, 8), "onnx::MatMul_7": (4, 6)}
    assert np.array_equal(model.params["layer/fc1.weight"], WEIGHTS["layer/fc1.weight"])


def test_a_symbol_is_in_the_rows():
    assert {layer.rows_text for layer in from_onnx(proto()).dense_layers()} == {"batch"}


def test_from_a_file(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(proto(), path)
    assert from_onnx(path).name == "net"
    assert load_model(path, {"x.1": (2, 8)}).dense_layers()[0].rows == 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (1, 8)}, r"names x, but the inputs of two_layers are x\.1"),
        ({"x.1": (8,)}, "has 2 dimensions, but input_shapes gives"),
        ({"x.1": (0, 8)}, "dimension 0, expected a positive number or a name"),
        ({"x.1": (1.5, 8)}, r"dimension 1\.5, expected"),
        ({"x.1": ("a b", 8)}, "dimension 'a b', expected"),
        ({"x.1": (1, 9)}, "two_layers"),
    ],
    ids=str,
)
def test_wrong_shapes(shapes, message):
    with pytest.raises(InputError, match=message):
        from_onnx(proto(), shapes)


def test_unnamed_dimensions_become_symbols():
    model = from_onnx(proto(shape=(None, 8)))
    (layer, _) = model.dense_layers()
    assert layer.rows is None and layer.rows_text == "x_1_0"


def test_an_unknown_operator_is_named():
    with pytest.raises(
        InputError,
        match=r"an ONNX operator that is not supported: Det \(node d \(Det\), number 5\)",
    ):
        from_onnx(_with_node("Det"), {"x.1": (3, 8)})


def _with_node(op):
    model = proto(shape=(8, 8))
    model.graph.node.append(helper.make_node(op, ["x.1"], ["d"]))
    model.graph.output.append(helper.make_tensor_value_info("d", 1, ()))
    return model


def test_an_invalid_graph():
    with pytest.raises(InputError, match="is not a valid ONNX model"):
        from_onnx(proto(op="NoSuchOperator"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.95], ids=lambda s: f"{s:.0%}")
@pytest.mark.parametrize("load", [from_onnx, load_model])
def test_truncated_files(tmp_path, share, load):
    data = proto().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"truncated|empty"):
        load(path)


def test_a_pickle_named_onnx(tmp_path):
    import pickle

    path = tmp_path / "model.onnx"
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(InputError, match="is a pickle"):
        from_onnx(path)


def test_missing_libraries_are_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(ToolchainError, match=r"needs onnx, .* pip install 'tvm-balanced\[onnx\]'"):
        from_onnx("model.onnx")


def lookups(shape):
    """``data`` (shape) looked up by ``index``, a matrix, in every way of ONNX."""
    data = helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)
    index = helper.make_tensor_value_info("index", TensorProto.INT64, (4, 2))
    operators = {"Gather": {"axis": 1}, "GatherElements": {"axis": 1}, "GatherND": {}}
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (None,) * r)
        for n, r in zip(operators, (3, 2, 1), strict=True)
    ]
    nodes = [
        helper.make_node(name, ["data", "index"], [name], **attributes)
        for name, attributes in operators.items()
    ]
    graph = helper.make_graph(nodes, "lookups", [data, index], outputs)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("shape", [(4, 5), (4, "n")], ids=str)
def test_indices_count_from_the_end_and_stay_in_the_tensor(shape):
    model = from_onnx(lookups(shape))
    machine = relax.VirtualMachine(tvm.compile(model.mod, tvm.target.Target("llvm")), tvm.cpu())
    data = RNG.standard_normal((4, 5)).astype(np.float32)
    index = np.array([[0, -1], [-4, 2], [3, 1], [-2, -3]])

    def look(index):
        return [o.numpy() for o in machine["main"](*map(tvm.runtime.tensor, [data, index]))]

    gather, elements, nd = look(index)
    np.testing.assert_array_equal(gather, data[:, index])
    np.testing.assert_array_equal(elements, np.take_along_axis(data, index, 1))
    np.testing.assert_array_equal(nd, data[index[:, 0], index[:, 1]])
    for out in look(index * 2**40 + 1):
        assert np.isin(out, data).all()
