"""Kinds of ONNX files that people have: imported, pruned, compiled, compared with ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_balanced as tb
from tvm_balanced.errors import InputError
from tvm_balanced.frontend import from_onnx

RNG = np.random.default_rng(0)
F, I64, I32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
node = helper.make_node


def rand(*shape):
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def balanced(n, k):
    """``(k, n)`` with 4 of every 16 along k."""
    w = rand(n, k)
    blocks = w.reshape(n, k // 16, 16)
    np.put_along_axis(blocks, np.argsort(np.abs(blocks), -1)[..., :12], 0, -1)
    return np.ascontiguousarray(w.T)


def make(nodes, inputs, outputs, weights, opset=17, domains=(), **more):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(np.array(a, order="C"), n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **more)


def by_runtime(model, feeds):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, feeds)


def check(model, *calls, sparse, prune=None, tol=2e-4, **more):
    """Compare every call; ``sparse`` names the layers that must run sparse."""
    ready, reference = from_onnx(model, **more), onnx.ModelProto()
    reference.CopyFrom(model)
    if prune:
        ready = tb.prune(ready, prune)
        stored = {tensor.name: tensor for tensor in reference.graph.initializer}
        for row in ready.pruned:
            if row.skipped is None:
                stored[row.name].CopyFrom(
                    numpy_helper.from_array(np.array(ready.params[row.name]), row.name)
                )
    library = tb.compile(ready, "llvm", policy="always", logs=False)
    assert {row.name for row in library.report if row.decision == "sparse"} == set(sparse)
    fixed = more.get("input_values", {})
    for feeds in calls:
        expected = by_runtime(reference, feeds)
        got = library(**{name: value for name, value in feeds.items() if name not in fixed})
        got = got if isinstance(got, tuple) else (got,)
        assert len(got) == len(expected)
        for value, right in zip(got, expected, strict=True):
            assert value.dtype == right.dtype
            np.testing.assert_allclose(value, right, rtol=tol, atol=tol)
    return library


def test_names_are_the_files():
    names = ["input.1", "serving_default_x:0", "onnx::Gather_0"]
    model = make(
        [
            node("MatMul", [names[0], "onnx::MatMul_581"], ["y"]),
            node("Add", ["y", names[1]], ["h"]),
            node("Gather", ["h", names[2]], ["out/z:0"]),
        ],
        [(names[0], F, ["n", 64]), (names[1], F, ["n", 32]), (names[2], I64, [1])],
        [("out/z:0", F, [1, 32])],
        {"onnx::MatMul_581": rand(64, 32)},
    )
    feeds = dict(zip(names, [rand(2, 64), rand(2, 32), np.array([1])], strict=True))
    library = check(model, feeds, sparse=["onnx::MatMul_581"], prune="4:16")
    (entry, *_) = library.manifest.functions
    assert [tensor.name for tensor in entry.inputs] == names
    assert [tensor.name for tensor in entry.outputs] == ["out/z:0"]
    with pytest.raises(InputError, match=r'no input "input_1"; the model takes 3 \(input\.1, '):
        library(input_1=feeds[names[0]])


def test_inputs_that_nothing_reads():
    model = make(
        [node("Gather", ["table", "ids"], ["e"]), node("MatMul", ["e", "w"], ["z"])],
        [("ids", I64, ["b", "s"]), ("token_type_ids", I64, ["b", "s"])],
        [("z", F, ["b", "s", 32])],
        {"table": rand(50, 64), "w": rand(64, 32)},
    )
    ids = RNG.integers(0, 50, (2, 5))
    check(model, {"ids": ids, "token_type_ids": ids * 0}, sparse=["w"], prune="4:16")


def heads():
    """Split into heads by shapes computed in the graph, batch and sequence dynamic."""
    nodes = [
        node("MatMul", ["x", "w"], ["q"]),
        node("Shape", ["q"], ["sh"]),
        node("Gather", ["sh", "i0"], ["b"]),
        node("Gather", ["sh", "i1"], ["s"]),
        node("Unsqueeze", ["b", "a0"], ["b1"]),
        node("Unsqueeze", ["s", "a0"], ["s1"]),
        node("Concat", ["b1", "s1", "heads", "dim"], ["to"], axis=0),
        node("Reshape", ["q", "to"], ["q4"]),
        node("Transpose", ["q4"], ["qt"], perm=[0, 2, 1, 3]),
        node("Transpose", ["q4"], ["kt"], perm=[0, 2, 3, 1]),
        node("MatMul", ["qt", "kt"], ["sc"]),
        # a table of masks cut to the length
        node("Slice", ["table", "a0", "s1", "a0"], ["rows"]),
        node("Slice", ["rows", "a0", "s1", "i1_"], ["mask"]),
        node("Where", ["mask", "sc", "far"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("MatMul", ["p", "qt"], ["o"]),
        node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        node("Concat", ["b1", "s1", "all"], ["back"], axis=0),
        node("Reshape", ["ot", "back"], ["z"]),
    ]
    weights = {"w": rand(64, 64), "i0": np.array(0), "i1": np.array(1), "a0": np.array([0])}
    weights |= {"i1_": np.array([1]), "heads": np.array([4]), "dim": np.array([16])}
    weights |= {"all": np.array([64]), "far": np.array(-1e9, np.float32)}
    weights |= {"table": np.tril(np.ones((8, 8), bool))}
    return make(nodes, [("x", F, ["batch", "seq", 64])], [("z", F, ["batch", "seq", 64])], weights)


def test_shapes_computed_in_the_graph_stay_dynamic():
    calls = [{"x": rand(2, 7, 64)}, {"x": rand(1, 3, 64)}]
    library = check(heads(), *calls, sparse=["w"], prune="4:16")
    # the table of masks has 8 rows
    with pytest.raises(InputError, match="at most 8"):
        library(rand(1, 9, 64))


def test_range_of_a_dynamic_length():
    nodes = [
        node("MatMul", ["x", "w"], ["y"]),
        node("Pow", ["y", "two"], ["p"]),
        node("ReduceMean", ["p"], ["m"], axes=[-1]),
        node("Add", ["m", "eps"], ["e"]),
        node("Sqrt", ["e"], ["s"]),
        node("Div", ["y", "s"], ["n"]),
        node("Shape", ["x"], ["sh"]),
        node("Gather", ["sh", "i1"], ["len"]),
        node("Range", ["i0", "len", "i1"], ["pos"]),
        node("Gather", ["table", "pos"], ["pe"]),
        node("Add", ["n", "pe"], ["z"]),
    ]
    weights = {"w": rand(64, 32), "two": np.array(2, np.float32), "eps": np.array(1e-6, np.float32)}
    weights |= {"i0": np.array(0), "i1": np.array(1), "table": rand(20, 32)}
    model = make(nodes, [("x", F, ["b", "s", 64])], [("z", F, ["b", "s", 32])], weights)
    check(model, {"x": rand(2, 7, 64)}, {"x": rand(1, 3, 64)}, sparse=["w"], prune="4:16")


def test_outputs_whose_size_depends_on_the_data():
    model = make([node("NonZero", ["x"], ["at"])], [("x", F, [3, 4])], [("at", I64, None)], {})
    library = check(model, {"x": np.eye(3, 4, dtype=np.float32)}, sparse=[])
    assert library.manifest.functions[0].outputs[0].shape == ("?", "?")


def test_an_output_without_shape():
    model = make(
        [node("MatMul", ["x", "w"], ["y"]), node("Relu", ["y"], ["z"])],
        [("x", F, [2, 64])],
        [("z", F, None)],
        {"w": rand(64, 64)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    check(model, {"x": rand(2, 64)}, sparse=["w"], prune="4:16")


def test_convolutions_only():
    nodes = [
        node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["y"], ["r"]),
        node("GlobalAveragePool", ["r"], ["z"]),
    ]
    model = make(
        nodes, [("x", F, [1, 3, 16, 16])], [("z", F, [1, 8, 1, 1])], {"w": rand(8, 3, 3, 3)}
    )
    check(model, {"x": rand(1, 3, 16, 16)}, sparse=[])
    with pytest.raises(InputError, match="no dense layer with a constant weight"):
        tb.prune(from_onnx(model), "4:16")


def test_sparse_initializers():
    w = balanced(32, 64)
    model = make([node("MatMul", ["x", "w"], ["z"])], [("x", F, [2, 64])], [("z", F, [2, 32])], {})
    at = np.flatnonzero(w)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(w.ravel()[at], "w"),
            numpy_helper.from_array(at.astype(np.int64), "i"),
            w.shape,
        )
    )
    check(model, {"x": rand(2, 64)}, sparse=["w"])


def test_functions_of_the_model():
    block = helper.make_function(
        "my.domain",
        "Block",
        ["a", "b"],
        ["c"],
        [node("MatMul", ["a", "b"], ["m"]), node("Relu", ["m"], ["c"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        node("Block", ["x", "w1"], ["y"], domain="my.domain"),
        node("Block", ["y", "w2"], ["z"], domain="my.domain"),
    ]
    weights = {"w1": rand(64, 64), "w2": rand(64, 32)}
    model = make(
        nodes,
        [("x", F, [2, 64])],
        [("z", F, [2, 32])],
        weights,
        17,
        ["my.domain"],
        functions=[block],
    )
    check(model, {"x": rand(2, 64)}, sparse=["w1", "w2"], prune="4:16")


def test_masks_left_in_the_graph():
    w = rand(64, 32)
    mask = (balanced(32, 64) != 0).astype(np.float32)
    nodes = [node("Mul", ["mask", "w"], ["masked"]), node("MatMul", ["x", "masked"], ["z"])]
    model = make(nodes, [("x", F, [2, 64])], [("z", F, [2, 32])], {"mask": mask, "w": w})
    check(model, {"x": rand(2, 64)}, sparse=["w"])


# ---- control flow ----


def loop(trips, condition="c"):
    body = helper.make_graph(
        [
            node("MatMul", ["h", "w"], ["m"]),
            node("Tanh", ["m"], ["h2"]),
            node("Less", ["i", "last"], ["going"]),
            node("Identity", ["c"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", I64, []),
            helper.make_tensor_value_info("c", BOOL, []),
            helper.make_tensor_value_info("h", F, [2, 64]),
        ],
        [
            helper.make_tensor_value_info("same" if condition == "c" else "going", BOOL, []),
            helper.make_tensor_value_info("h2", F, [2, 64]),
            helper.make_tensor_value_info("m", F, [2, 64]),
        ],
    )
    weights = {"w": rand(64, 64), "yes": np.array(True), "last": np.array(1)}
    inputs = [("x", F, [2, 64])]
    if trips is None:
        inputs.append(("n", I64, []))
    else:
        weights["n"] = np.array(trips)
    outputs = [("z", F, [2, 64]), ("all", F, ["t", 2, 64])]
    return make(
        [node("Loop", ["n", "yes", "x"], ["z", "all"], body=body)], inputs, outputs, weights
    )


@pytest.mark.parametrize("condition", ["c", "going"])
def test_loops_are_unrolled(condition):
    check(loop(3, condition), {"x": rand(2, 64)}, sparse=["w"], prune="4:16")


def test_a_loop_by_an_input_that_is_given():
    model = loop(None)
    with pytest.raises(InputError, match=r"control flow that depends on data: Loop .*input_values"):
        from_onnx(model)
    feeds = {"x": rand(2, 64), "n": np.array(2)}
    check(model, feeds, sparse=["w"], prune="4:16", input_values={"n": 2})


def test_long_loops_are_refused():
    with pytest.raises(InputError, match="has 1000000000 turns, and at most 4096 are unrolled"):
        from_onnx(loop(10**9))


def branches(test):
    then, other = (
        helper.make_graph(
            [node("MatMul", ["x", name], [f"o{name}"])],
            name,
            [],
            [helper.make_tensor_value_info(f"o{name}", F, [2, 32])],
        )
        for name in ("w1", "w2")
    )
    weights = {"w1": rand(64, 32), "w2": rand(64, 32), "rate": np.array(16000), "two": np.array(2)}
    nodes = [*test, node("If", ["c"], ["z"], then_branch=then, else_branch=other)]
    inputs = [("x", F, [2, 64]), ("sr", I64, [])]
    return make(nodes, inputs, [("z", F, [2, 32])], weights)


@pytest.mark.parametrize(("rate", "layer"), [(16000, "w1"), (8000, "w2")])
def test_a_branch_by_an_input_that_is_given(rate, layer):
    model = branches([node("Equal", ["sr", "rate"], ["c"])])
    with pytest.raises(InputError, match=r"control flow that depends on data: node z \(If\)"):
        from_onnx(model)
    with pytest.raises(InputError, match="input_values names rate_, but the inputs are x, sr"):
        from_onnx(model, input_values={"rate_": 1})
    feeds = {"x": rand(2, 64), "sr": np.array(rate)}
    check(model, feeds, sparse=[layer], prune="4:16", input_values={"sr": rate})


def test_a_branch_by_a_shape():
    test = [
        node("Abs", ["x"], ["a"]),
        node("Shape", ["a"], ["sh"]),
        node("ReduceMin", ["sh"], ["least"], keepdims=0),
        node("Equal", ["least", "two"], ["c"]),
    ]
    feeds = {"x": rand(2, 64), "sr": np.array(0)}
    check(branches(test), feeds, sparse=["w1"], prune="4:16")


# ---- recurrent layers ----


def recurrent(kind, gates, directions, steps=6, batch=2, width=64, hidden=64, **attrs):
    """One layer before a matrix product."""
    states = ["h0", "c0"] if kind == "LSTM" else ["h0"]
    outputs = ["y", "yh", "yc"][: 1 + len(states)]
    nodes = [
        node(
            kind,
            ["x", "W", "R", "b", attrs.pop("lengths", ""), *states],
            outputs,
            hidden_size=hidden,
            **attrs,
        ),
        node("Transpose", ["y"], ["t"], perm=[0, 2, 1, 3]),
        node("Reshape", ["t", "shape"], ["s"]),
        node("MatMul", ["s", "out"], ["z"]),
    ]
    shape = [directions, batch, hidden]
    inputs = [("x", F, [steps, batch, width]), *((s, F, shape) for s in states)]
    weights = {
        "W": rand(directions, gates * hidden, width),
        "R": rand(directions, gates * hidden, hidden),
        "b": rand(directions, 2 * gates * hidden),
        "shape": np.array([0, 0, -1]),
        "out": rand(directions * hidden, 32),
    }
    results = [("z", F, [steps, batch, 32]), *((o, F, shape) for o in outputs[1:])]
    size = [6 if isinstance(steps, str) else steps, 3 if isinstance(batch, str) else batch]
    feeds = {"x": rand(*size, width)}
    for state in states:
        feeds[state] = rand(directions, len(feeds["x"][0]), hidden)
    return make(nodes, inputs, results, weights), feeds


@pytest.mark.parametrize(
    ("kind", "gates", "directions", "attrs"),
    [
        ("LSTM", 4, 1, {}),
        ("LSTM", 4, 1, {"direction": "reverse"}),
        ("LSTM", 4, 2, {"direction": "bidirectional"}),
        ("LSTM", 4, 2, {"direction": "bidirectional", "batch": "n"}),
        ("GRU", 3, 1, {"linear_before_reset": 1}),
        ("GRU", 3, 1, {"linear_before_reset": 0}),
        ("GRU", 3, 2, {"linear_before_reset": 1, "direction": "bidirectional"}),
        ("RNN", 1, 1, {}),
        ("RNN", 1, 2, {"direction": "bidirectional", "activations": ["Relu", "Relu"]}),
    ],
    ids=str,
)
def test_recurrent_layers(kind, gates, directions, attrs):
    model, feeds = recurrent(kind, gates, directions, **attrs)
    check(model, feeds, sparse=["W", "R", "out"], prune="4:16", tol=1e-3)


def test_sequences_of_several_lengths():
    model, feeds = recurrent("LSTM", 4, 2, direction="bidirectional", lengths="lengths", batch=3)
    model.graph.input.append(helper.make_tensor_value_info("lengths", I32, [3]))
    feeds["lengths"] = np.array([6, 2, 4], np.int32)
    check(model, feeds, sparse=["W", "R", "out"], prune="4:16", tol=1e-3)


def test_what_recurrent_layers_lack_is_refused():
    model, _ = recurrent("LSTM", 4, 1, steps="time")
    with pytest.raises(InputError, match="the length time of its sequences is symbolic; give that"):
        from_onnx(model)
    with pytest.raises(InputError, match="runs over 5000 steps, and at most 1024 are unrolled"):
        from_onnx(model, {"x": (5000, 2, 64)})
    model.graph.node[0].input.append("p")
    model.graph.initializer.append(numpy_helper.from_array(rand(1, 3 * 64), "p"))
    with pytest.raises(InputError, match=r"it has peepholes \(operand P\)"):
        from_onnx(model, {"x": (4, 2, 64)})


# ---- quantised files ----


def test_quantised_weights_are_seen_sparse():
    w, v = balanced(32, 64), balanced(16, 32)
    scale = np.abs(w).max(0) / 127
    step = np.array(np.abs(v).max() / 127, np.float32)
    nodes = [
        node("DequantizeLinear", ["q", "s", "zp"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["y"]),
        node("DequantizeLinear", ["v", "vs"], ["v_"]),
        node("MatMul", ["y", "v_"], ["z"]),
    ]
    weights = {"q": np.round(w / scale).astype(np.int8), "s": scale.astype(np.float32)}
    weights |= {"zp": np.zeros(32, np.int8), "v": np.round(v / step).astype(np.int8), "vs": step}
    model = make(nodes, [("x", F, [2, 64])], [("z", F, [2, 16])], weights)
    check(model, {"x": rand(2, 64)}, sparse=["q", "v"])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("points", ["one", "per column"])
def test_dynamically_quantised_products(dtype, points):
    w = balanced(32, 64)
    zero = 0 if dtype is np.int8 else 128
    q = (np.round(w / np.abs(w).max() * 127) + zero).astype(dtype)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "q", "xz", "qz"], ["i"]),
        node("Cast", ["i"], ["f"], to=F),
        node("Mul", ["xs", "qs"], ["s"]),
        node("Mul", ["f", "s"], ["z"]),
    ]
    qz = np.array(zero, dtype) if points == "one" else np.full(32, zero, dtype)
    weights = {"q": q, "qz": qz, "qs": np.array(np.abs(w).max() / 127, np.float32)}
    model = make(nodes, [("x", F, ["n", 64])], [("z", F, ["n", 32])], weights)
    # the same integers, so no more than rounding differs
    check(model, {"x": rand(3, 64)}, sparse=["q"], tol=1e-5)


def test_products_of_quantised_tensors():
    w = balanced(32, 64)
    q = np.round(w / np.abs(w).max() * 127).astype(np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("QLinearMatMul", ["xq", "xs", "xz", "q", "qs", "qz", "ys", "yz"], ["y"]),
        node("DequantizeLinear", ["y", "ys", "yz"], ["z"]),
    ]
    weights = {"xs": np.array(0.01, np.float32), "xz": np.array(128, np.uint8), "q": q}
    weights |= {"qs": np.array(np.abs(w).max() / 127, np.float32), "qz": np.array(0, np.int8)}
    weights |= {"ys": np.array(0.02, np.float32), "yz": np.array(120, np.uint8)}
    model = make(nodes, [("x", F, [4, 64])], [("z", F, [4, 32])], weights)
    # one step of the result
    check(model, {"x": rand(4, 64)}, sparse=["q"], tol=0.0201)


def test_weights_of_four_bits():
    n, k, block = 32, 64, 32
    packed = RNG.integers(0, 256, (n, k // block, block // 2)).astype(np.uint8)
    nodes = [
        node(
            "MatMulNBits",
            ["x", "q", "s"],
            ["z"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=block,
        )
    ]
    weights = {"q": packed, "s": np.abs(rand(n * k // block)) + 0.01}
    model = make(nodes, [("x", F, [2, k])], [("z", F, [2, n])], weights, domains=["com.microsoft"])
    check(model, {"x": rand(2, k)}, sparse=[])
    assert from_onnx(model).params["q"].shape == (k, n)


# ---- what ONNX Runtime's optimizer writes ----

MS = {"domain": "com.microsoft"}


def transformer_block(mask):
    nodes = [
        node("Attention", ["x", "qkv", "qkvb", "mask"], ["a"], num_heads=4, **MS),
        node("MatMul", ["a", "wo"], ["o"]),
        node("SkipLayerNormalization", ["o", "x", "g", "beta", "bo"], ["h"], epsilon=1e-12, **MS),
        node("MatMul", ["h", "w1"], ["u"]),
        node("BiasGelu", ["u", "b1"], ["gl"], **MS),
        node("MatMul", ["gl", "w2"], ["d"]),
        node("SkipLayerNormalization", ["d", "h", "g", "beta"], ["z"], epsilon=1e-12, **MS),
    ]
    weights = {"qkv": rand(64, 192), "qkvb": rand(192), "wo": rand(64, 64), "bo": rand(64)}
    weights |= {
        "g": rand(64),
        "beta": rand(64),
        "w1": rand(64, 128),
        "b1": rand(128),
        "w2": rand(128, 64),
    }
    inputs = [("x", F, [2, 6, 64]), ("mask", I32, list(mask.shape))]
    return make(nodes, inputs, [("z", F, [2, 6, 64])], weights, domains=["com.microsoft"])


@pytest.mark.parametrize(
    "mask",
    [np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32), np.array([6, 4], np.int32)],
    ids=["mask", "lengths"],
)
def test_fused_attention(mask):
    layers = ["qkv", "wo", "w1", "w2"]
    feeds = {"x": rand(2, 6, 64), "mask": mask}
    check(transformer_block(mask), feeds, sparse=layers, prune="4:16", tol=1e-3)


def test_attention_of_several_heads_with_a_cache():
    nodes = [
        node("MatMul", ["x", "w"], ["q"]),
        node(
            "MultiHeadAttention",
            ["q", "x", "x", "", "", "", "pk", "pv"],
            ["z", "nk", "nv"],
            num_heads=4,
            unidirectional=1,
            **MS,
        ),
    ]
    past = ["b", 4, "past", 16]
    inputs = [("x", F, ["b", "s", 64]), ("pk", F, past), ("pv", F, past)]
    outputs = [("z", F, ["b", "s", 64]), ("nk", F, None), ("nv", F, None)]
    model = make(nodes, inputs, outputs, {"w": rand(64, 64)}, domains=["com.microsoft"])
    feeds = {"x": rand(2, 3, 64), "pk": rand(2, 4, 5, 16), "pv": rand(2, 4, 5, 16)}
    check(model, feeds, sparse=["w"], prune="4:16", tol=1e-3)


def test_grouped_queries_with_rotary_positions():
    angles = np.outer(np.arange(32), 1 / 100 ** (np.arange(8) / 8))
    nodes = [
        node("MatMul", ["x", "wq"], ["q"]),
        node("MatMul", ["x", "wk"], ["k"]),
        node(
            "GroupQueryAttention",
            ["q", "k", "k", "pk", "pv", "lengths", "total", "cos", "sin"],
            ["z", "nk", "nv"],
            num_heads=4,
            kv_num_heads=2,
            do_rotary=1,
            **MS,
        ),
    ]
    past = [1, 2, 5, 16]
    inputs = [("x", F, [1, 1, 64]), ("pk", F, past), ("pv", F, past), ("lengths", I32, [1])]
    outputs = [("z", F, [1, 1, 64]), ("nk", F, None), ("nv", F, None)]
    weights = {"wq": rand(64, 64), "wk": rand(64, 32), "total": np.array(6, np.int32)}
    weights |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    model = make(nodes, inputs, outputs, weights, domains=["com.microsoft"])
    feeds = {"x": rand(1, 1, 64), "pk": rand(*past), "pv": rand(*past)}
    feeds["lengths"] = np.array([5], np.int32)
    check(model, feeds, sparse=["wq", "wk"], prune="4:16", tol=1e-3)


@pytest.mark.parametrize(
    ("op", "more"),
    [("QuickGelu", {"alpha": 1.5}), ("FastGelu", {}), ("Gelu", {})],
    ids=str,
)
def test_activations_of_the_optimizer(op, more):
    model = make(
        [node(op, ["x"], ["z"], **MS, **more)],
        [("x", F, [4, 9])],
        [("z", F, [4, 9])],
        {},
        17,
        [MS["domain"]],
    )
    check(model, {"x": rand(4, 9) * 10}, sparse=[], tol=1e-3)


# ---- NaN and infinity, which a maximum would lose ----


@pytest.mark.parametrize(
    ("op", "more"),
    [
        ("Relu", []),
        ("Clip", [np.array(-1, np.float32), np.array(1, np.float32)]),
        ("Max", [np.array([0.5], np.float32)]),
        ("Min", [np.array([0.5], np.float32)]),
        ("Elu", []),
        ("Selu", []),
        ("Softplus", []),
        ("HardSigmoid", []),
        ("Mish", []),
        ("ReduceMax", [np.array([1])]),
        ("ReduceMin", [np.array([1])]),
        ("ReduceLogSumExp", [np.array([1])]),
        ("Pow", [np.array(2, np.float32)]),
        ("Pow", [np.array(3, np.int64)]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_numbers_that_are_none(op, more):
    from onnx.reference import ReferenceEvaluator

    inf = np.inf
    rows = [[np.nan, 1, -2], [inf, 0, 1], [-inf, -3, 200], [0.3, -0.1, 4], [inf] * 3, [-inf] * 3]
    # the reference makes NaN of the logarithm of infinity
    x = np.array(rows[:4] * 2 if op == "ReduceLogSumExp" else rows, np.float32)
    weights = {f"c{i}": value for i, value in enumerate(more)}
    model = make(
        [node(op, ["x", *weights], ["z"])], [("x", F, x.shape)], [("z", F, None)], weights, 18
    )
    library = tb.compile(from_onnx(model), "llvm", logs=False)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(library(x), expected, rtol=1e-5, atol=1e-6)
