"""What a module becomes: names, dtypes, tied weights, outputs; and one sentence for each mistake."""

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from tvm_balanced.errors import InputError, ToolchainError
from tvm_balanced.frontend import from_torch, optional
from tvm_balanced.frontend.torch_importer import to_numpy


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
