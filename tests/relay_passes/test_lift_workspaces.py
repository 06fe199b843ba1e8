"""Memory of scheduled kernels that becomes part of the Relax program, and what stays inside of them."""

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx
from tvm.ir import assert_structural_equal
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_balanced.build.pipeline import lower_passes
from tvm_balanced.relay_passes.find_dense import main_bindings
from tvm_balanced.relay_passes.lift_workspaces import lift_workspaces, with_signatures_of
from tvm_balanced.relay_passes.weight_chain import call_name
from tvm_balanced.verification.arguments import seeded_arguments


@I.ir_module(s_tir=True)
class Before:
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4, 8), "float32"), y: T.Buffer((4,), "float32")):
        sums = T.sblock_alloc_buffer((4, 8))
        held = T.sblock_alloc_buffer((4, 8), scope="shared")
        for i, k in T.grid(4, 8):
            with T.sblock("hold"):
                at, ak = T.axis.remap("SS", [i, k])
                held[at, ak] = x[at, ak]
        for i, k in T.grid(4, 8):
            with T.sblock("sums"):
                at, ak = T.axis.remap("SS", [i, k])
                sums[at, ak] = held[at, ak] + T.float32(1)
        for i in range(4):
            with T.sblock("y"):
                at = T.axis.spatial(4, i)
                y[at] = sums[at, 0] + sums[at, 7]

    @R.function
    def main(x: R.Tensor((4, 8), "float32")) -> R.Tensor((4,), "float32"):
        cls = Before
        with R.dataflow():
            y = R.call_tir(cls.kernel, (x,), out_ty=R.Tensor((4,), "float32"))
            R.output(y)
        return y


@I.ir_module(s_tir=True)
class After:
    @T.prim_func(private=True, s_tir=True)
    def kernel(
        x: T.Buffer((4, 8), "float32"),
        y: T.Buffer((4,), "float32"),
        sums: T.Buffer((4, 8), "float32"),
    ):
        held = T.sblock_alloc_buffer((4, 8), scope="shared")
        for i, k in T.grid(4, 8):
            with T.sblock("hold"):
                at, ak = T.axis.remap("SS", [i, k])
                held[at, ak] = x[at, ak]
        for i, k in T.grid(4, 8):
            with T.sblock("sums"):
                at, ak = T.axis.remap("SS", [i, k])
                sums[at, ak] = held[at, ak] + T.float32(1)
        for i in range(4):
            with T.sblock("y"):
                at = T.axis.spatial(4, i)
                y[at] = sums[at, 0] + sums[at, 7]

    @R.function
    def main(x: R.Tensor((4, 8), "float32")) -> R.Tensor((4,), "float32"):
        cls = After
        with R.dataflow():
            both = R.call_tir(
                cls.kernel,
                (x,),
                out_ty=[R.Tensor((4,), "float32"), R.Tensor((4, 8), "float32")],
            )
            y = both[0]
            R.output(y)
        return y


def two_results(n, factor):
    """Sums over rows and their doubles, through memory of their own; ``n`` may be symbolic."""
    x = te.placeholder((n, 8), "float32", "x")
    r = te.reduce_axis((0, 8), "r")
    between = te.compute((n, 8), lambda i, j: x[i, j] + factor, "between")
    sums = te.compute((n,), lambda i: te.sum(between[i, r], axis=r), "sums")
    twice = te.compute((n,), lambda i: sums[i] * 2.0, "twice")
    return te.create_prim_func([x, sums, twice]).without_attr("global_symbol")


def chain(n, kernels):
    """``main`` that passes the doubles of each kernel's sums on, broadcast to rows."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((n, 8), "float32"))
    one = relax.TensorType((n,), "float32")
    with bb.function("main", [x]):
        with bb.dataflow():
            state = x
            for i, kernel in enumerate(kernels):
                gvar = bb.add_func(kernel, f"kernel_{i}")
                both = bb.emit(relax.call_tir(gvar, relax.Tuple([state]), [one, one]))
                twice = bb.emit(relax.TupleGetItem(both, 1))
                state = bb.emit(relax.op.broadcast_to(relax.op.reshape(twice, (n, 1)), (n, 8)))
            out = bb.emit_output(state)
        bb.emit_func_output(out)
    return relax.transform.LegalizeOps()(bb.get())


def outs(mod):
    """Number of results of every ``call_tir`` of a kernel that is not TVM's own."""
    return [
        len(value.ty.fields)
        for _, value in main_bindings(mod["main"])
        if call_name(value) == "relax.call_tir" and isinstance(value.ty, relax.TupleType)
    ]


def test_global_memory_becomes_a_result():
    after = lift_workspaces(Before)
    assert_structural_equal(after, After)
    assert_structural_equal(lift_workspaces(after), after)


def test_several_results_keep_their_places():
    mod = chain(4, [two_results(4, 1.0), two_results(4, -3.0)])
    after = lift_workspaces(mod)
    assert outs(mod) == [2, 2]
    assert outs(after) == [3, 3]
    x = np.random.default_rng(0).standard_normal((4, 8)).astype("f4")
    vm = relax.VirtualMachine(tvm.compile(after, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    first = 2 * (x + 1).sum(1)
    expected = np.broadcast_to(2 * 8 * (first - 3)[:, None], (4, 8))
    np.testing.assert_allclose(vm["main"](tvm.runtime.tensor(x)).numpy(), expected, rtol=1e-5)


def test_symbolic_sizes_stay_inside():
    n = tirx.Var("n", "int64")
    mod = chain(n, [two_results(n, 1.0)])
    assert lift_workspaces(mod).same_as(mod)


def test_kernels_that_are_referred_to_otherwise_keep_their_signature():
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    gvar = bb.add_func(two_results(4, 1.0), "kernel")
    one = relax.TensorType((4,), "float32")
    with bb.function("main", [x], pure=False):
        both = bb.emit(relax.call_tir(gvar, relax.Tuple([x]), [one, one]))
        bb.emit(relax.Call(gvar, [x, both[0], both[1]], ty_args=[relax.TupleType([])]))
        bb.emit_func_output(both)
    mod = bb.get()
    assert lift_workspaces(mod).same_as(mod)


def test_workspaces_share_planned_memory():
    """One kernel's workspace is free for the next one's, and neither is left to the kernel."""
    mod = lift_workspaces(chain(4, [two_results(4, float(i)) for i in range(4)]))
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
    config = {"relax.backend.use_cuda_graph": False}
    with target, tvm.transform.PassContext(config=config):
        mod = tvm.transform.Sequential(lower_passes(target)[:5])(mod)
    storages = [
        value
        for block in mod["main"].body.blocks
        for value in (binding.value for binding in block.bindings)
        if call_name(value) == "relax.memory.alloc_storage"
    ]
    # four workspaces and the rows between kernels take two, and their eight results of (4,) two
    sizes = sorted(int(value.args[0].values[0]) for value in storages)
    assert sizes == [16, 16, 128, 128]


@pytest.mark.parametrize(
    ("mod", "name"),
    [(Before, "kernel"), (chain(4, [two_results(4, 1.0)]), "kernel_0")],
    ids=["one_result", "two_results"],
)
def test_unscheduled_kernels_get_the_same_signature(mod, name):
    lifted = lift_workspaces(mod)
    func = with_signatures_of(mod, lifted)[name]
    types = [[param.ty for param in kernel.params] for kernel in (func, lifted[name])]
    assert_structural_equal(*types)
    # what the scheduled kernel has to write before it reads holds NaN, as results do
    given = seeded_arguments(func, 0, 3)
    assert np.isnan(given.arrays[-1]).all()
    assert given.outputs == tuple(range(1, len(types[0]) - 1))
