"""PyTorch modules as they are with quantised layers: what a compiled library has to agree with."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tvm_balanced.format import int8

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default)


def run(
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    layers: Iterable[str],
    quantize: str,
    **export: Any,
) -> Any:
    """Run a module whose products with the weights named in ``layers`` are computed in ``quantize``."""
    program = torch.export.export(module, tuple(inputs), **export).run_decompositions()
    runnable = program.module()
    named = dict(runnable.named_parameters(remove_duplicate=False))
    weights = {named[name].untyped_storage().data_ptr() for name in layers}
    with torch.no_grad(), _Products(weights, quantize) as mode:
        result = runnable(*inputs)
    assert mode.seen == weights
    return result


class _Products(TorchDispatchMode):
    """Quantises both factors of matrix products with some weights, or the weight alone."""

    def __init__(self, weights: set[int], quantize: str) -> None:
        super().__init__()
        self.weights, self.quantize = weights, quantize
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            *rest, data, weight = args
            place = weight.untyped_storage().data_ptr()
            if place in self.weights:
                self.seen.add(place)
                if self.quantize == "int8":
                    data = tokens(data)
                args = (*rest, data, rows(weight.mT).mT)
        return func(*args, **(kwargs or {}))


def rows(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight ``(N, K)``, or copies of one, rounded to int8 and back."""
    if weight.ndim == 3:
        return rows(weight[0]).expand(weight.shape)
    values, scales = int8.quantize_weight(weight.float().numpy())
    return torch.from_numpy(values * scales[:, None]).to(weight.dtype)


def tokens(data: torch.Tensor) -> torch.Tensor:
    """Return activations ``(..., K)`` rounded to int8 and back."""
    values, scales = int8.quantize_tokens(data.reshape(-1, data.shape[-1]).float().numpy())
    return torch.from_numpy(values * scales[:, None]).to(data.dtype).reshape(data.shape)
