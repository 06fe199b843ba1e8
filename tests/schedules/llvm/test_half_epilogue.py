"""Element-wise work behind sparse layers of 16-bit floats: float32 arithmetic, rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tvm_balanced as tb


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 40)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x)) + torch.tanh(residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_results_are_as_exact_as_their_type(dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _Layer().eval().to(dtype)
    inputs = (torch.randn(rows, 48, dtype=dtype), torch.randn(rows, 40, dtype=dtype))
    model = tb.prune(tb.from_torch(module, inputs), "4:16")
    with torch.no_grad():
        weight = np.array(model.params["linear.weight"], np.float32)
        module.linear.weight.copy_(torch.from_numpy(weight))
    folder = tmp_path / "ir"
    lib = tb.compile(model, "llvm", policy="always", dump_ir=str(folder))
    # one call for each element, where it is not written out
    (text,) = (path.read_text() for path in folder.glob("*device.ll"))
    assert "@erff" not in text
    with torch.no_grad():
        wide = [x.float() for x in inputs]
        expected = module.float()(*wide)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(lib(*inputs).float(), expected, rtol=step, atol=step / 8)
