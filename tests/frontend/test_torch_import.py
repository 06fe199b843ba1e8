"""What a module becomes: names, dtypes, tied weights, outputs; and one sentence for each mistake."""

import warnings

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

import tvm_balanced as tb
from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.frontend import from_torch
from tvm_balanced.frontend.torch_importer import to_numpy
from tvm_balanced.relay_passes.bound_indices import bound_indices
from tvm_balanced.relay_passes.bucket_functions import symbolic_dims
from tvm_balanced.support import optional


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, keep):
        hidden = torch.where(keep[..., None], self.table(ids), 0.0)
        return self.head(hidden), {"hidden": hidden, "sum": torch.cumsum(keep, 1)}


def run(model, *inputs):
    machine = relax.VirtualMachine(tvm.compile(model.mod, tvm.target.Target("llvm")), tvm.cpu())
    out = machine["main"](*map(tvm.runtime.tensor, [*inputs, *model.params.values()]))
    return [out.numpy()] if isinstance(out, tvm.runtime.Tensor) else [o.numpy() for o in out]


def operators(model):
    (block,) = model.mod["main"].body.blocks
    return [
        (getattr(b.value.op, "name", ""), b.var) for b in block.bindings if hasattr(b.value, "op")
    ]


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1, 4]])
    keep = torch.tensor([[True, False, True]])
    module = Tied()
    return module, (ids, keep), from_torch(module, (ids,), {"keep": keep})


def test_importing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        from_torch(nn.Linear(8, 4), (torch.randn(2, 8),))


def test_messages_of_libraries_become_part_of_a_sentence():
    def said(text):
        return optional.first_line(ValueError(text))

    assert said("one\ntwo") == "one"
    assert said("") == said(" \n ") == "ValueError"
    assert said("Check failed: (a != nullptr) is false: no b\ntrace") == "no b"
    assert said("[enforce fail at x.cc:340] . no b") == "no b"
    assert said("the name \x10a") == "the name ?a"
    assert len(said("x" * 5000)) < 250


def test_tied_weights_are_one_parameter(tied):
    _, _, model = tied
    assert len(model.params) == 1
    (layer,) = model.dense_layers()
    assert "tied" in layer.blocked


def test_inputs_keep_their_names_and_types(tied):
    params = tied[2].mod["main"].params
    assert [(p.name, str(p.ty.dtype)) for p in params[:2]] == [("ids", "int64"), ("keep", "bool")]
    assert int(tied[2].mod["main"].attrs["num_input"]) == 2


def test_nested_outputs_are_a_flat_tuple(tied):
    module, inputs, model = tied
    want, rest = module(*inputs)
    got = run(model, *[x.numpy() for x in inputs])
    for one, other in zip(got, [want, rest["hidden"], rest["sum"]], strict=True):
        assert one.dtype == to_numpy(other).dtype  # the sum of booleans is an integer
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-5, atol=1e-5)


class Casting(nn.Module):
    """Half precision with an island of float32 that the model asks for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        y = self.fc(self.conv(x))
        return torch.softmax(y.float(), -1).to(y.dtype) * 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays(dtype):
    model = from_torch(Casting().to(dtype), (torch.randn(2, 4, 8).to(dtype),))
    half = str(dtype).removeprefix("torch.")
    assert {str(a.dtype) for a in model.params.values()} == {half}
    assert str(model.mod["main"].ret_ty.dtype) == half
    dtypes = {name: str(var.ty.dtype) for name, var in operators(model)}
    assert dtypes["relax.nn.conv1d"] == dtypes["relax.matmul"] == half
    assert dtypes["relax.nn.softmax"] == "float32"


def test_a_recurrent_weight_is_one_layer_per_matrix():
    torch.manual_seed(0)
    model = from_torch(nn.LSTM(8, 8, batch_first=True), (torch.randn(2, 3, 8),))
    uses = {layer.name: len(layer.uses) for layer in model.dense_layers()}
    assert uses == {"weight_ih_l0": 1, "weight_hh_l0": 3}


def test_a_model_does_not_change_with_its_module():
    module = nn.Linear(4, 4)
    model = from_torch(module, (torch.randn(1, 4),))
    before = model.params["weight"].copy()
    with torch.no_grad():
        module.weight.zero_()
    assert np.array_equal(model.params["weight"], before)


def test_training_mode_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4).eval())
    model = from_torch(module.train(), (torch.randn(2, 4),))
    assert module.training and module[1].training
    assert "relax.multiply" not in dict(operators(model))  # no dropout mask


@pytest.mark.parametrize("bound", [64, 8], ids=lambda b: f"table{b}")
def test_slices_by_a_symbolic_length(bound):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 4))

        def forward(self, x):
            n = x.shape[1]
            return x * self.table[:n] + self.table[2 : n + 2] - self.table[-1 - n + n :]

    torch.manual_seed(0)
    module = Positions()
    length = torch.export.Dim("length", min=2, max=min(bound, 62))
    x = torch.randn(2, 5, 4)
    model = from_torch(module, (x,), dynamic_shapes=({1: length},))
    for size in (2, 5, min(bound, 62)):
        x = torch.randn(2, size, 4)
        (got,) = run(model, x.numpy())
        np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


class Lookups(nn.Module):
    """Every way to index by data that models use; where PyTorch allows it, from the end too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x, ids, picks):
        ones = torch.ones(3)
        return (
            self.table(ids),
            x[:, -1],
            x[:, [0, -1]],
            x[ids - 3],
            x[ids - 3, ids - 2],
            torch.take(x, ids - 6),
            torch.index_select(x, 1, ids),
            torch.gather(x, 1, picks),
            torch.scatter(x, 1, picks, 0.0),
            torch.index_put(x, (ids - 3, ids), ones),
            torch.sort(x, 1)[0],
        )


@pytest.fixture(scope="module", params=["static", "dynamic"])
def lookups(request):
    torch.manual_seed(0)
    # a row of distinct columns each, for PyTorch scatters duplicates in any order
    picks = torch.rand(6, 5).argsort(1)[:, :3]
    inputs = (torch.randn(6, 5), torch.tensor([0, 2, 4]), picks)
    rows = torch.export.Dim("rows", min=3)
    dims = {"x": {0: rows}, "ids": None, "picks": {0: rows}} if request.param == "dynamic" else None
    module = Lookups()
    return module, inputs, from_torch(module, inputs, dynamic_shapes=dims)


def test_valid_indices_mean_what_they_mean_in_pytorch(lookups):
    module, inputs, model = lookups
    got = run(model, *[x.numpy() for x in inputs])
    for one, other in zip(got, module(*inputs), strict=True):
        np.testing.assert_array_equal(one, other.detach().numpy())


@pytest.mark.parametrize("wrong", [-(2**40), -8, 7, 2**31, 2**62], ids=str)
def test_indices_out_of_range_stay_in_the_tensor(lookups, wrong):
    module, (x, ids, picks), model = lookups
    ids = torch.full_like(ids, wrong)
    got = run(model, x.numpy(), ids.numpy(), torch.full_like(picks, wrong).numpy())
    rows = module.table.weight.detach().numpy()
    np.testing.assert_array_equal(got[0], rows[[0 if wrong < 0 else 6] * 3])
    for values in got[3:8]:
        assert np.isin(values, x.numpy()).all()


def test_no_index_is_taken_on_trust(lookups, capfd):
    model = lookups[2]
    modes = {
        str(b.value.attrs.mode)
        for b in model.mod["main"].body.blocks[0].bindings
        if getattr(getattr(b.value, "op", None), "name", "") == "relax.take"
    }
    assert modes == {"clip", "wrap"}
    relax.transform.LegalizeOps()(model.mod)
    assert "out-of-bounds" not in "".join(capfd.readouterr())
    tvm.ir.assert_structural_equal(bound_indices(model.mod), model.mod)


@pytest.fixture(scope="module")
def batched():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    return module, torch.export.export(module, (torch.randn(2, 32),), dynamic_shapes=shapes)


def test_dimensions_keep_their_names(batched):
    model = from_torch(batched[1])
    assert symbolic_dims(model.mod) == ["batch"]
    assert dict(model.mod["main"].attrs["tir_var_upper_bound"]) == {"batch": 64}


def test_buckets_go_by_the_name_of_the_dimension(batched):
    module, program = batched
    lib = tb.compile(from_torch(program), "llvm", buckets={"batch": [1, 4]})
    for size in (1, 3, 4):
        x = torch.randn(size, 32)
        np.testing.assert_allclose(lib(x), module(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    names = {entry.name for entry in lib.manifest.functions}
    assert names == {"main", "main_batch_1", "main_batch_4"}
    with pytest.raises(InputError, match="the symbolic dimensions are batch"):
        tb.compile(from_torch(program), "llvm", buckets={"rows": [1]})


class Columns(nn.Module):
    def forward(self, x, y):
        return x + y[:, 1:]


def test_a_derived_dimension():
    length = torch.export.Dim("length")
    dims = ({1: length}, {1: length + 1})
    model = from_torch(Columns(), (torch.randn(2, 5), torch.randn(2, 6)), dynamic_shapes=dims)
    assert symbolic_dims(model.mod) == ["length"]
    for size in (5, 3):
        x, y = torch.randn(2, size), torch.randn(2, size + 1)
        np.testing.assert_array_equal(run(model, x.numpy(), y.numpy())[0], Columns()(x, y).numpy())


def test_a_dimension_that_cannot_be_solved_for():
    half = torch.export.Dim("half")
    with pytest.raises(InputError, match="input is computed from half, which is no dimension"):
        from_torch(nn.Linear(4, 2), (torch.randn(6, 4),), dynamic_shapes=({0: 2 * half},))


def test_a_dimension_without_a_name():
    auto = torch.export.Dim.AUTO
    model = from_torch(nn.Linear(4, 2), (torch.randn(6, 4),), dynamic_shapes=({0: auto},))
    (name,) = symbolic_dims(model.mod)
    assert name.isidentifier()


def test_names_stay_apart():
    """A name that PyTorch gives another dimension: two dimensions must not become one."""

    class Sum(nn.Module):
        def forward(self, x, y):
            return x.sum() + y.sum()

    inputs = (torch.randn(6), torch.randn(5))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Sum(), inputs, dynamic_shapes=({0: auto}, {0: auto}))
    taken = symbolic_dims(from_torch(program).mod)[1]
    mod = from_torch(Sum(), inputs, dynamic_shapes=({0: torch.export.Dim(taken)}, {0: auto})).mod
    assert len(symbolic_dims(mod)) == 2


def test_export_is_not_repeated():
    program = torch.export.export(nn.Linear(4, 2), (torch.randn(3, 4),))
    assert list(from_torch(program, name="fc").params) == ["weight", "bias"]
    with pytest.raises(InputError, match="already exported"):
        from_torch(program, (torch.randn(3, 4),))


def test_no_example_inputs():
    with pytest.raises(InputError, match="no example inputs for Linear; give a tuple of tensors"):
        from_torch(nn.Linear(4, 2))


def test_wrong_example_inputs():
    with pytest.raises(InputError, match="cannot export Linear with these inputs"):
        from_torch(nn.Linear(4, 2), (torch.randn(3, 5),))


def test_something_else():
    with pytest.raises(InputError, match="cannot import a dict"):
        from_torch({"weight": torch.randn(2, 2)})


def test_an_unknown_operator_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(InputError, match=r"the operator aten\.special_bessel_j0\.default"):
        from_torch(Odd(), (torch.randn(3),))


def test_control_flow_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    with pytest.raises(InputError, match="control flow"):
        from_torch(Branch(), (torch.randn(3),))


def test_missing_libraries_are_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(ToolchainError, match=r"pip install 'tvm-balanced\[torch\]'"):
        from_torch("model.pt2")
