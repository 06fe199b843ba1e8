"""The Relax passes: what they match, what they leave alone, and that values stay right."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_balanced.build import pipeline
from tvm_balanced.errors import InputError
from tvm_balanced.format.layout import Layout, PackedFormat
from tvm_balanced.format.packing import pack
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.ops import OP_NAME, balanced_sparse_dense
from tvm_balanced.pruning.magnitude import prune_weight
from tvm_balanced.relay_passes.bucket_functions import bucket_dim, bucket_functions
from tvm_balanced.relay_passes.clean_names import clean_names
from tvm_balanced.relay_passes.find_dense import find_dense, main_bindings, split_params
from tvm_balanced.relay_passes.fold_weights import fold_weights
from tvm_balanced.relay_passes.merge_dense import merge_dense
from tvm_balanced.relay_passes.pack_weights import pack_weights
from tvm_balanced.relay_passes.rewrite_dense import rewrite_dense
from tvm_balanced.relay_passes.weight_chain import TRANSPOSE, call_name
from tvm_balanced.relay_passes.weight_sources import Source, weight_sources


def fmt_of(n, k, pattern="2:16", layout="r16v1", encoding="u8"):
    return PackedFormat(n, k, BalancedPattern(pattern), Layout.parse(layout), encoding)


def op_names(mod):
    return [call_name(value) for _, value in main_bindings(mod["main"])]


def weight_names(mod):
    return [var.name for var in split_params(mod)[1]]


def run(mod, inputs, params):
    """Evaluate on the CPU with TVM's defaults."""
    target = tvm.target.Target({"kind": "llvm"})
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    arrays = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in [*inputs, *params.values()]]
    return vm["main"](*arrays).numpy()


@I.ir_module
class Linear:
    @R.function
    def main(
        x: R.Tensor((3, 32), "float32"),
        w: R.Tensor((48, 32), "float32"),
        b: R.Tensor((48,), "float32"),
    ) -> R.Tensor((3, 48), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            wt = R.permute_dims(w, axes=[1, 0])
            y = R.matmul(x, wt)
            z = R.add(y, b)
            R.output(z)
        return z


@I.ir_module
class Plain:
    @R.function
    def main(x: R.Tensor((3, 32), "float32"), w: R.Tensor((32, 48), "float32")) -> R.Tensor(
        (3, 48), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class Behind:
    @R.function
    def main(x: R.Tensor((3, 32), "float32"), w: R.Tensor((4, 12, 32), "float16")) -> R.Tensor(
        (3, 48), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            flat = R.reshape(w, (48, 32))
            full = R.astype(flat, "float32")
            wt = R.permute_dims(full, axes=[1, 0])
            y = R.matmul(x, wt)
            R.output(y)
        return y


@I.ir_module
class Tied:
    @R.function
    def main(ids: R.Tensor((3,), "int32"), w: R.Tensor((48, 32), "float32")) -> R.Tensor(
        (3, 48), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(w, ids, axis=0)
            wt = R.permute_dims(w, axes=[1, 0])
            y = R.matmul(x, wt)
            R.output(y)
        return y


@I.ir_module
class Computed:
    @R.function
    def main(x: R.Tensor((3, 32), "float32"), y: R.Tensor((32, 3), "float32")) -> R.Tensor(
        (3, 3), "float32"
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            z = R.matmul(x, y)
            R.output(z)
        return z


@I.ir_module
class Recurrent:
    @R.function
    def main(x: R.Tensor((3, 32), "float32"), w: R.Tensor((32, 32), "float32")) -> R.Tensor(
        (3, 32), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            wt = R.permute_dims(w, axes=[1, 0])
            h1 = R.matmul(x, wt)
            h2 = R.matmul(h1, wt)
            R.output(h2)
        return h2


@I.ir_module
class Attention:
    @R.function
    def main(
        x: R.Tensor((2, 3, 32), "float32"),
        q: R.Tensor((48, 32), "float32"),
        qb: R.Tensor((48,), "float32"),
        k: R.Tensor((16, 32), "float32"),
        kb: R.Tensor((16,), "float32"),
    ) -> R.Tensor((2, 3, 64), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            qt = R.permute_dims(q, axes=[1, 0])
            q1 = R.matmul(x, qt)
            q2 = R.add(qb, q1)
            kt = R.permute_dims(k, axes=[1, 0])
            k1 = R.matmul(x, kt)
            k2 = R.add(kb, k1)
            out = R.concat((q2, k2), axis=2)
            R.output(out)
        return out


@I.ir_module
class Gated:
    """The MLP of a Llama layer up to its second product, as torch.export leaves it."""

    @R.function
    def main(
        x: R.Tensor((1, 3, 32), "float32"),
        gate: R.Tensor((48, 32), "float32"),
        up: R.Tensor((48, 32), "float32"),
    ) -> R.Tensor((1, 3, 48), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            flat = R.reshape(x, (3, 32))
            gt = R.permute_dims(gate, axes=[1, 0])
            g1 = R.matmul(flat, gt)
            g2 = R.reshape(g1, (1, 3, 48))
            open = R.sigmoid(g2)
            silu = R.multiply(g2, open)
            again = R.reshape(x, (3, 32))
            ut = R.permute_dims(up, axes=[1, 0])
            u1 = R.matmul(again, ut)
            u2 = R.reshape(u1, (1, 3, 48))
            out = R.multiply(silu, u2)
            R.output(out)
        return out


@pytest.mark.parametrize(
    ("module", "chain"),
    [
        (Linear, ["permute_dims"]),
        (Plain, []),
        (Behind, ["reshape", "astype", "permute_dims"]),
    ],
    ids=["permuted", "plain", "behind-casts"],
)
def test_find_dense_in_every_form(module, chain):
    (layer,) = find_dense(module)
    assert (layer.name, layer.out_features, layer.in_features) == ("w", 48, 32)
    assert layer.blocked is None
    assert layer.rows == 3
    assert [step.kind for step in layer.chain] == chain


def test_tied_embedding_is_found_and_blocked():
    (layer,) = find_dense(Tied)
    assert layer.blocked is not None
    assert "take" in layer.blocked
    assert rewrite_dense({"w": fmt_of(48, 32)})(Tied).same_as(Tied)


def test_operands_that_are_computed_are_no_layer():
    assert find_dense(Computed) == []


def test_rewrite_dense_linear():
    fmt = fmt_of(48, 32)
    after = rewrite_dense({"w": fmt})(Linear)
    assert weight_names(after) == ["b", "w.values", "w.indices"]

    x = relax.Var("x", relax.TensorType((3, 32), "float32"))
    b = relax.Var("b", relax.TensorType((48,), "float32"))
    values = relax.Var("values", relax.TensorType(fmt.values_shape, "float32"))
    indices = relax.Var("indices", relax.TensorType(fmt.indices_shape, "uint8"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, b, values, indices], attrs={"num_input": 1}):
        with bb.dataflow():
            y = bb.emit(balanced_sparse_dense(x, values, indices, fmt))
            z = bb.emit_output(relax.op.add(y, b))
        bb.emit_func_output(z)
    plain = after["main"].without_attr("weight_sources")
    assert_structural_equal(plain, bb.get()["main"])
    assert weight_sources(after) == {"w.values": (Source("w", (TRANSPOSE, TRANSPOSE)),)}


@pytest.mark.parametrize("module", [Linear, Plain, Behind, Recurrent, Attention])
def test_rewriting_twice_changes_nothing(module):
    formats = {
        layer.name: fmt_of(layer.out_features, layer.in_features) for layer in find_dense(module)
    }
    once = rewrite_dense(formats)(module)
    assert OP_NAME in op_names(once)
    assert "relax.matmul" not in op_names(once)
    assert rewrite_dense(formats)(once).same_as(once)


def test_shared_weight_is_packed_once():
    after = rewrite_dense({"w": fmt_of(32, 32)})(Recurrent)
    assert op_names(after).count(OP_NAME) == 2
    assert weight_names(after) == ["w.values", "w.indices"]


@pytest.mark.parametrize("module", [Linear, Plain, Behind, Recurrent, Attention, Gated])
@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_values_after_all_passes(module, merge):
    rng = np.random.default_rng(0)
    func = module["main"]
    x = rng.standard_normal([int(d) for d in func.params[0].ty.shape]).astype("float32")
    params = {}
    for var in func.params[1:]:
        array = rng.standard_normal([int(d) for d in var.ty.shape]).astype(str(var.ty.dtype))
        params[var.name] = array
    layers = {layer.name: layer for layer in find_dense(module)}
    for name in layers:
        if name == "w" and module is Plain:
            params[name] = np.ascontiguousarray(prune_weight(params[name].T.copy(), "2:16").T)
        else:
            flat = params[name].reshape(-1, params[name].shape[-1])
            params[name] = prune_weight(flat, "2:16").reshape(params[name].shape)
    expected = run(module, [x], params)
    formats = {n: fmt_of(layer.out_features, layer.in_features) for n, layer in layers.items()}
    mod = rewrite_dense(formats)(module)
    if merge:
        mod = merge_dense(lambda data, n: True)(mod)
        assert op_names(mod).count(OP_NAME) == (2 if module is Recurrent else 1)
    mod = fold_weights()(mod)
    packed = pack_weights(mod, params)
    assert list(packed) == weight_names(mod)
    got = run(mod, [x], packed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_merge_adds_joined_bias_once():
    formats = {"q": fmt_of(48, 32), "k": fmt_of(16, 32)}
    merged = merge_dense(lambda data, n: n == 64)(rewrite_dense(formats)(Attention))
    assert weight_names(merged) == ["q + k.values", "q + k.indices", "qb + kb"]
    assert weight_sources(merged) == {
        "q + k.values": tuple(Source(name, (TRANSPOSE, TRANSPOSE)) for name in "qk"),
        "qb + kb": (Source("qb"), Source("kb")),
    }
    assert op_names(merged) == [
        OP_NAME,
        "relax.add",
        "relax.strided_slice",
        "relax.strided_slice",
        "relax.concat",
    ]
    assert merge_dense(lambda data, n: True)(merged).same_as(merged)


def test_gate_and_up_are_one_kernel_and_one_behind_it():
    """One product for both; SiLU, the product of the halves and their slices in the other kernel."""
    rewrite = rewrite_dense(dict.fromkeys(("gate", "up"), fmt_of(48, 32)))
    apart, merged = (
        tvm.transform.Sequential([*passes, *pipeline.fuse_passes()])(Gated)
        for passes in ([rewrite], [rewrite, merge_dense(lambda data, n: True)])
    )
    calls = [
        [v for _, v in main_bindings(m["main"]) if call_name(v) == "relax.call_tir"]
        for m in (apart, merged)
    ]
    products = [["balanced" in call.args[0].name_hint for call in each] for each in calls]
    assert sum(products[0]) == 2
    # the first is the reshape of the activations, which costs nothing
    assert products[1][-2:] == [True, False] and not any(products[1][:-2])
    assert len(products[1]) <= 3


def test_a_weight_that_was_packed_before_the_import_stays_as_it_is():
    rng = np.random.default_rng(0)
    fmt = fmt_of(48, 32)
    weight = prune_weight(rng.standard_normal((48, 32)).astype("f4"), "2:16")
    packed = pack(weight, fmt.pattern, fmt.layout, fmt.encoding)
    arrays = {"a": packed.values, "b": packed.indices, "w": np.eye(48, dtype="f4")}
    x = relax.Var("x", relax.TensorType((3, 32), "float32"))
    a, b, w = (relax.Var(n, relax.TensorType(v.shape, str(v.dtype))) for n, v in arrays.items())
    bb = relax.BlockBuilder()
    with bb.function("main", [x, a, b, w], attrs={"num_input": 1}):
        with bb.dataflow():
            y = bb.emit(balanced_sparse_dense(x, a, b, fmt))
            z = bb.emit(balanced_sparse_dense(x, a, b, fmt))
            out = bb.emit_output(relax.op.matmul(relax.op.add(y, z), w))
        bb.emit_func_output(out)
    passes = [rewrite_dense({}), merge_dense(lambda data, n: True), fold_weights()]
    mod = tvm.transform.Sequential(passes)(bb.get())
    values = pack_weights(mod, arrays)
    assert all(values[name] is array for name, array in arrays.items())
    data = rng.standard_normal((3, 32)).astype("f4")
    np.testing.assert_allclose(run(mod, [data], values), 2 * data @ weight.T, rtol=1e-4, atol=1e-4)


def test_merge_is_left_out_where_it_does_not_pay():
    formats = {"q": fmt_of(48, 32), "k": fmt_of(16, 32)}
    mod = rewrite_dense(formats)(Attention)
    assert merge_dense(lambda data, n: False)(mod).same_as(mod)


def test_merge_needs_rows_without_padding():
    formats = {"q": fmt_of(48, 32, layout="r32v1"), "k": fmt_of(16, 32, layout="r32v1")}
    mod = rewrite_dense(formats)(Attention)
    assert merge_dense(lambda data, n: True)(mod).same_as(mod)


def test_fold_weights_computes_chains_once():
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((4, 12, 32)).astype("float16")}
    folded = fold_weights()(Behind)
    values = pack_weights(folded, params)
    assert op_names(folded) == ["relax.matmul"]
    assert values["w"].shape == (32, 48)
    assert values["w"].dtype == np.float32
    np.testing.assert_array_equal(values["w"], params["w"].reshape(48, 32).astype("f4").T)
    assert fold_weights()(folded).same_as(folded)


def test_fold_weights_keeps_a_weight_with_two_readers():
    assert fold_weights()(Tied).same_as(Tied)


def symbolic_module():
    from tvm import tirx

    batch = tirx.Var("batch", "int64")
    x = relax.Var("x", relax.TensorType((batch, 32), "float32"))
    w = relax.Var("w", relax.TensorType((32, 48), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, w], attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(relax.op.matmul(x, w))
        bb.emit_func_output(out)
    return bb.get()


def test_bucket_functions():
    mod = symbolic_module()
    mod = bucket_functions(bucket_dim(mod, None, [8, 1, 8]), [8, 1, 8])(mod)
    assert {gvar.name_hint for gvar in mod.functions} == {"main", "main_batch_1", "main_batch_8"}
    assert [int(d) for d in mod["main_batch_8"].params[0].ty.shape] == [8, 32]
    target = tvm.target.Target({"kind": "llvm"})
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    w = np.random.default_rng(0).standard_normal((32, 48)).astype("float32")
    for name, rows in (("main", 3), ("main_batch_1", 1), ("main_batch_8", 8)):
        x = np.random.default_rng(rows).standard_normal((rows, 32)).astype("float32")
        got = vm[name](tvm.runtime.tensor(x), tvm.runtime.tensor(w)).numpy()
        np.testing.assert_allclose(got, x @ w, rtol=1e-4, atol=1e-4)


def test_buckets_of_a_model_with_constants_can_be_fused():
    from tvm import tirx

    x = relax.Var("x", relax.TensorType((tirx.Var("batch", "int64"), 32), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x], attrs={"num_input": 1}):
        with bb.dataflow():
            one = bb.emit(relax.const(1.0, "float32"))
            out = bb.emit_output(relax.op.add(relax.op.exp(x), one))
        bb.emit_func_output(out)
    mod = bucket_functions("batch", [4])(bb.get())
    target = tvm.target.Target({"kind": "llvm"})
    vm = relax.VirtualMachine(pipeline.build(mod, target), tvm.cpu())
    data = np.arange(128, dtype="float32").reshape(4, 32) / 64
    for name in ("main", "main_batch_4"):
        got = vm[name](tvm.runtime.tensor(data)).numpy()
        np.testing.assert_allclose(got, np.exp(data) + 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "dim", "sizes", "says"),
    [
        (lambda: Plain, None, [1], "every input shape of the model is fixed"),
        (symbolic_module, "sequence", [1], 'given for "sequence"'),
        (symbolic_module, "batch", [0], "below 1"),
    ],
)
def test_bucket_functions_refuse(module, dim, sizes, says):
    with pytest.raises(InputError, match=says):
        bucket_dim(module(), dim, sizes)


def recurrent_pair(steps):
    """Two weights that read the same state at every one of ``steps`` steps, and perhaps one apart."""
    x = relax.Var("x", relax.TensorType((1, 32), "float32"))
    a = relax.Var("a", relax.TensorType((32, 32), "float32"))
    b = relax.Var("b", relax.TensorType((32, 32), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, a, b], attrs={"num_input": 1}):
        with bb.dataflow():
            state = x
            for _ in range(steps):
                left = bb.emit(relax.op.matmul(state, a))
                right = bb.emit(relax.op.matmul(state, b))
                state = bb.emit(relax.op.add(left, right))
            out = bb.emit_output(relax.op.nn.relu(state))
        bb.emit_func_output(out)
    return bb.get()


def test_groups_over_the_same_weights_share_the_joined_parameters():
    formats = {"a": fmt_of(32, 32), "b": fmt_of(32, 32)}
    merged = merge_dense(lambda data, n: True)(rewrite_dense(formats)(recurrent_pair(3)))
    assert weight_names(merged) == ["a + b.values", "a + b.indices"]
    assert op_names(merged).count(OP_NAME) == 3


def test_equal_reshapes_of_the_activations_are_the_same():
    """As torch.export leaves query, key and value; another shape of the same values is not."""
    x = relax.Var("x", relax.TensorType((2, 3, 32), "float32"))
    a, b, c = (relax.Var(name, relax.TensorType((32, 32), "float32")) for name in "abc")
    bb = relax.BlockBuilder()
    with bb.function("main", [x, a, b, c], attrs={"num_input": 1}):
        with bb.dataflow():
            left, right = (
                bb.emit(relax.op.matmul(bb.emit(relax.op.reshape(x, (6, 32))), w)) for w in (a, b)
            )
            other = bb.emit(relax.op.matmul(bb.emit(relax.op.reshape(x, (3, 2, 32))), c))
            total = bb.emit(relax.op.add(left, right))
            out = bb.emit_output(relax.op.add(total, relax.op.reshape(other, (6, 32))))
        bb.emit_func_output(out)
    rng = np.random.default_rng(0)
    weights = {
        name: prune_weight(rng.standard_normal((32, 32)).astype("f4"), BalancedPattern("2:16")).T
        for name in "abc"
    }
    formats = dict.fromkeys("abc", fmt_of(32, 32))
    merged = merge_dense(lambda data, n: True)(rewrite_dense(formats)(bb.get()))
    assert op_names(merged).count(OP_NAME) == 2
    assert {"a + b.values", "c.values"} <= set(weight_names(merged))
    data = rng.standard_normal((2, 3, 32)).astype("f4")
    got = run(merged, [data], pack_weights(merged, weights))
    expected = sum(data.reshape(6, 32) @ weight for weight in weights.values())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_used_apart_is_not_merged():
    mod = recurrent_pair(1)
    func = mod["main"]
    x, a, b = func.params
    bb = relax.BlockBuilder()
    with bb.function("main", [x, a, b], attrs={"num_input": 1}):
        with bb.dataflow():
            left = bb.emit(relax.op.matmul(x, a))
            right = bb.emit(relax.op.matmul(x, b))
            out = bb.emit_output(relax.op.matmul(relax.op.add(left, right), b))
        bb.emit_func_output(out)
    formats = {"a": fmt_of(32, 32), "b": fmt_of(32, 32)}
    rewritten = rewrite_dense(formats)(bb.get())
    assert merge_dense(lambda data, n: True)(rewritten).same_as(rewritten)


def test_fold_weights_leaves_transposes_that_kernels_like():
    assert fold_weights(["w"])(Linear).same_as(Linear)
    folded = fold_weights()(Linear)
    assert op_names(folded) == ["relax.matmul", "relax.add"]
    assert weight_sources(folded) == {"w": (Source("w", (TRANSPOSE,)),)}


def test_kernel_parameters_get_names_that_c_accepts():
    x = relax.Var("in/put + 1", relax.TensorType((4, 8), "float32"))
    y = relax.Var("a + b", relax.TensorType((4, 8), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, y]):
        with bb.dataflow():
            out = bb.emit_output(relax.op.nn.relu(relax.op.add(x, y)))
        bb.emit_func_output(out)
    mod = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )(bb.get())
    clean = clean_names(mod)
    names = [
        param.name
        for _, func in clean.functions_items()
        if isinstance(func, tvm.tirx.PrimFunc)
        for param in func.params
    ]
    assert names[:2] == ["in_put_1", "a_b"]
    assert clean_names(clean).same_as(clean)
    a, b = np.full((4, 8), -3.0, "float32"), np.full((4, 8), 5.0, "float32")
    np.testing.assert_array_equal(run(clean, [a], {"b": b}), np.full((4, 8), 2.0))
