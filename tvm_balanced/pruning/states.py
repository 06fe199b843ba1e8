"""Hidden states of a running model, how far two models' are apart, and rounding to int8 on the way."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from tvm_balanced.format.int8 import LARGEST, LEAST_MAGNITUDE
from tvm_balanced.pruning.watching import Product, Watch, matrix_of

# of vectors: how far from 1 the length of an embedding may be
_UNIT = 1e-3


class States(Watch):
    """Collects the hidden states of whatever runs, in ``values``.

    ``quantize`` rounds the products with the weights whose ids are ``quantized``, letting gradients pass.
    """

    def __init__(self, quantize: str = "none", quantized: Collection[int] = ()) -> None:
        super().__init__()
        self._quantize, self._quantized = quantize, quantized
        self._sums: list[torch.Tensor] = []
        self._products: list[torch.Tensor] = []

    @property
    def values(self) -> list[torch.Tensor]:
        """Sums of residual branches, normalised where a norm follows; without any, products."""
        return self._sums or self._products

    def state(self, data: torch.Tensor, before: torch.Tensor | None) -> None:
        """Collect a state, in place of the same one not normalised."""
        if before is not None and self._sums and self._sums[-1] is before:
            self._sums[-1] = data
        else:
            self._sums.append(data)

    def product(self, product: Product) -> torch.Tensor:
        """Compute a product, rounded where that is asked for."""
        weight, data = None, None
        if self._quantize != "none" and id(product.weight) in self._quantized:
            matrix = round_rows(matrix_of(product.weight, product.kind))
            weight = matrix.T if product.kind == "columns" else matrix
            data = round_tokens(product.data) if self._quantize == "int8" else None
        out = product.compute(weight, data)
        self._products.append(product.rows(out))
        return out


def round_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight (N, K) as int8 holds it; the gradient is that of the weight itself."""
    given = weight.detach()
    scale = given.abs().amax(dim=1, keepdim=True) / LARGEST
    divisor = torch.where(scale > 0, scale, torch.inf)
    # quotients in float64, as everywhere, so that ties go the same way
    values = (given.double() / divisor).round().clamp(-LARGEST, LARGEST).to(scale.dtype) * scale
    return weight + (values - given)


def round_tokens(data: torch.Tensor) -> torch.Tensor:
    """Return activations (..., K) as int8 holds them; the gradient is that of the activations."""
    given = data.detach()
    largest = given.abs().amax(dim=-1, keepdim=True).clamp_min(LEAST_MAGNITUDE)
    values = (given.double() * (LARGEST / largest)).round().to(given.dtype) * (largest / LARGEST)
    return data + (values - given)


def state_loss(given: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over states of the squared error, token by token as a share of the wanted one's."""
    return torch.stack([_share(a, b) for a, b in zip(given, wanted, strict=True)]).mean()


def output_loss(given: object, wanted: object, kind: str) -> torch.Tensor:
    """Return the loss of a model's outputs, of the kind that is said or that they are."""
    if kind == "auto":
        kind = _kind_of(wanted)
    if kind == "kl" and hasattr(wanted, "logits"):
        given, wanted = given.logits, wanted.logits  # type: ignore[attr-defined]
    pairs = list(zip(_floats(given), _floats(wanted), strict=True))
    one = {"cosine": _cosine, "kl": _divergence, "l2": _share}[kind]
    return torch.stack([one(a, b) for a, b in pairs]).mean()


def _kind_of(wanted: object) -> str:
    if hasattr(wanted, "logits"):
        return "kl"
    first = _floats(wanted)[0]
    lengths = first.norm(dim=-1) if first.ndim == 2 else torch.zeros(1)
    return "cosine" if bool(((lengths - 1).abs() < _UNIT).all()) else "l2"


def _floats(outputs: object) -> list[torch.Tensor]:
    flat = torch.utils._pytree.tree_leaves(outputs)
    return [x.float() for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _share(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # of the mean as well, as single tokens may be zeros
    power = b.float().square().sum(dim=-1)
    error = (a.float() - b.float()).square().sum(dim=-1)
    return (error / (power + 1e-3 * power.mean() + 1e-12)).mean()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows = [x.log_softmax(dim=-1).flatten(0, -2) for x in (a, b)]
    return torch.nn.functional.kl_div(*rows, reduction="batchmean", log_target=True)
