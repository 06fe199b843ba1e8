"""Linear layers of a PyTorch module: finding them and watching what they read and return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.errors import InputError
from tvm_balanced.support.optional import first_line

if TYPE_CHECKING:
    import torch

Batch: TypeAlias = tuple[Any, ...]
Progress: TypeAlias = Callable[[str], None]


@dataclass
class LinearLayer:
    """A weight as the model uses it: in which order, on which input, and why it cannot be pruned."""

    name: str
    weight: torch.Tensor
    group: int  # layers that read one input, such as query, key and value, share a number
    uses: int = 1
    blocked: str | None = None
    kind: str = "linear"  # as of tvm_balanced.pruning.watching.Product
    biased: bool = False
    bias: torch.Tensor | None = None  # where it is a parameter that no other layer uses
    residual: bool = False  # whether its result is added to a residual, with nothing in between

    @property
    def matrix(self) -> torch.Tensor:
        """A view of the weight, rows being outputs: (N, K)."""
        from tvm_balanced.pruning.watching import matrix_of

        return matrix_of(self.weight, self.kind)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.matrix.shape
        return rows, columns


class EverythingSeen(Exception):
    """Raised by a watcher to end a model's run: what it was for has been seen."""


def agreement(module: torch.nn.Module, teacher: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cosine, sample by sample, of a model's first output to a teacher's.

    Raises InputError as :func:`first_outputs`.
    """
    import torch

    pairs = zip(first_outputs(module, batches), first_outputs(teacher, batches), strict=True)
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=1) for a, b in pairs]
    return float(torch.cat(cosines).mean())


def first_outputs(module: torch.nn.Module, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    """Yield a model's first output for every batch, (samples, values) float64.

    Raises InputError when it is no floating-point tensor.
    """
    import torch

    for batch in batches:
        with evaluation_mode(module), torch.no_grad():
            out = torch.utils._pytree.tree_leaves(call_model(module, batch))[0]
        if not (isinstance(out, torch.Tensor) and out.is_floating_point()):
            raise InputError(
                "the model's first output is no floating-point tensor, so no loss can be told; let "
                "the model return its logits or embeddings first"
            )
        yield out.double().flatten(1) if out.ndim > 1 else out.double()[:, None]


def call_model(module: torch.nn.Module, batch: Batch) -> object:
    """Run a model on positional inputs.

    Raises InputError when it does not run on them.
    """
    try:
        return module(*batch)
    except EverythingSeen:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        shapes = ", ".join(str(list(getattr(x, "shape", ()))) for x in batch)
        raise InputError(
            f"{type(module).__name__} does not run on calibration inputs of shapes {shapes} "
            f"({first_line(error)}); give inputs of the shapes and dtypes it was made for"
        ) from error


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode, and each part's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    # not eval(): the module of an exported program refuses it
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
