"""Linear layers of a PyTorch module: finding them and watching what they read and return."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tvm_balanced.errors import InputError
from tvm_balanced.support.optional import first_line

if TYPE_CHECKING:
    import torch
    from torch.overrides import TorchFunctionMode

    # ("linear", its input, its weight) or ("embedding", None, its table)
    Look: TypeAlias = Callable[[str, torch.Tensor | None, torch.Tensor], None]

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

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.weight.shape[0], self.weight.shape[1]


class EverythingSeen(Exception):
    """Raised by a watcher to end a model's run: what it was for has been seen."""


def find_linear(module: torch.nn.Module, batch: Batch) -> list[LinearLayer]:
    """Linear layers of a model, in the order in which it uses them on the positional inputs ``batch``.

    Each weight is listed once; those that an embedding reads too, and those in no floating dtype, are
    blocked. ``module`` may be that of an exported program, ``program.module()``. Raises InputError when
    the model has no linear layer on this input, or does not run on it.
    """
    import torch

    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers: dict[int, LinearLayer] = {}
    inputs: list[torch.Tensor | None] = []  # kept alive, so that no id is given twice
    tables: set[int] = set()

    def look(kind: str, data: torch.Tensor | None, weight: torch.Tensor) -> None:
        key = id(weight)
        if kind == "embedding":
            tables.add(key)
        elif key in layers:
            layers[key].uses += 1
        elif key in names and weight.ndim == 2:
            if not inputs or inputs[-1] is not data:
                inputs.append(data)
            layers[key] = LinearLayer(names[key], weight, len(inputs) - 1)

    with evaluation_mode(module), torch.no_grad(), watch(look):
        call_model(module, batch)
    if not layers:
        raise InputError(
            f"{type(module).__name__} calls no linear layer on these inputs, so there is nothing to prune; "
            "give a model with linear layers"
        )
    for key, layer in layers.items():
        if key in tables:
            layer.blocked = "its weight is also read by an embedding"
        elif not layer.weight.is_floating_point():
            layer.blocked = f"its weight is {layer.weight.dtype}"
    return list(layers.values())


def agreement(module: torch.nn.Module, teacher: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cosine, sample by sample, of a model's first output to a teacher's.

    Raises InputError when the first output of the teacher is no floating-point tensor.
    """
    import torch

    cosines = []
    with evaluation_mode(module), evaluation_mode(teacher), torch.no_grad():
        for batch in batches:
            result, expected = (
                torch.utils._pytree.tree_leaves(call_model(part, batch))[0]
                for part in (module, teacher)
            )
            if not (isinstance(expected, torch.Tensor) and expected.is_floating_point()):
                raise InputError(
                    "the model's first output is no floating-point tensor, so no loss can be told; let "
                    "the model return its logits or embeddings first"
                )
            a, b = (x.flatten(1).double() if x.ndim > 1 else x[:, None] for x in (result, expected))
            cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=1))
    return float(torch.cat(cosines).mean())


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


def watch(
    look: Look | None = None, take: Callable[[torch.Tensor], None] | None = None
) -> TorchFunctionMode:
    """Show ``look`` every linear layer and embedding before it runs, ``take`` a linear layer's output."""
    mode: TorchFunctionMode = _watch_class()(look, take)
    return mode


@functools.cache
def _watch_class() -> Callable[..., TorchFunctionMode]:
    """Return the class behind :func:`watch`; it derives from PyTorch, which is imported when it is used."""
    import torch
    from torch.overrides import TorchFunctionMode

    linear = (torch.nn.functional.linear, torch.ops.aten.linear.default)
    embedding = (torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default)

    class Watch(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __init__(self, look: Look | None, take: Callable[[torch.Tensor], None] | None) -> None:
            super().__init__()
            self.look = look or (lambda kind, data, weight: None)
            self.take = take or (lambda out: None)

        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> torch.Tensor:
            kwargs = kwargs or {}

            def argument(place: int, name: str) -> torch.Tensor:
                value: torch.Tensor = args[place] if len(args) > place else kwargs[name]
                return value

            if func in linear:
                self.look("linear", argument(0, "input"), argument(1, "weight"))
            elif func in embedding:
                # the function of torch.nn takes the indices first, the operators the table
                self.look("embedding", None, argument(int(func is embedding[0]), "weight"))
            out = func(*args, **kwargs)
            if func in linear:
                self.take(out)
            return out

    return Watch
