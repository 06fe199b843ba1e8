"""Linear layers of a PyTorch module: finding them, watching their inputs, copies that may be changed."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError

if TYPE_CHECKING:
    import torch


Batch = tuple[Any, ...]
Tell = Callable[[str], None]


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


class _Reached(Exception):
    """Everything that a pass was for has been seen."""


def find_linear(module: torch.nn.Module, batch: Batch) -> list[LinearLayer]:
    """Linear layers of a model, in the order in which it uses them on ``batch``.

    Parameters
    ----------
    module : torch.nn.Module
        Also that of an exported program, ``program.module()``.
    batch : tuple
        Positional inputs.

    Returns
    -------
    list of LinearLayer
        Each weight once; those that an embedding reads too, and those in no floating dtype, are blocked.

    Raises
    ------
    InputError
        When the model has no linear layer on this input, or does not run on it.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers: dict[int, LinearLayer] = {}
    inputs: list[Any] = []  # kept alive, so that no id is given twice
    tables: set[int] = set()

    def look(kind: str, data: Any, weight: Any) -> None:
        key = id(weight)
        if kind == "embedding":
            tables.add(key)
        elif key in layers:
            layers[key].uses += 1
        elif key in names and weight.ndim == 2:
            if not inputs or inputs[-1] is not data:
                inputs.append(data)
            layers[key] = LinearLayer(names[key], weight, len(inputs) - 1)

    with _eval(module), _no_grad(), _watch(look):
        _call(module, batch)
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

    Raises
    ------
    InputError
        When the first output of the teacher is no floating-point tensor.
    """
    import torch

    cosines = []
    with _eval(module), _eval(teacher), torch.no_grad():
        for batch in batches:
            result, expected = (
                torch.utils._pytree.tree_leaves(_call(part, batch))[0] for part in (module, teacher)
            )
            if not (isinstance(expected, torch.Tensor) and expected.is_floating_point()):
                raise InputError(
                    "the model's first output is no floating-point tensor, so no loss can be told; let "
                    "the model return its logits or embeddings first"
                )
            a, b = (x.flatten(1).double() if x.ndim > 1 else x[:, None] for x in (result, expected))
            cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=1))
    return float(torch.cat(cosines).mean())


def copy_of(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy to distil from, taken before the module is pruned."""
    return copy.deepcopy(module)


def _call(module: torch.nn.Module, batch: Batch) -> Any:
    try:
        return module(*batch)
    except _Reached:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        shapes = ", ".join(str(list(getattr(x, "shape", ()))) for x in batch)
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{type(module).__name__} does not run on calibration inputs of shapes {shapes} ({text}); "
            "give inputs of the shapes and dtypes it was made for"
        ) from error


def _no_grad() -> Any:
    import torch

    return torch.no_grad()


@contextlib.contextmanager
def _eval(module: torch.nn.Module) -> Iterator[None]:
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


def _watch(look: Callable[[str, Any, Any], None], take: Callable[[Any], None] | None = None) -> Any:
    """Tell ``look`` of every linear layer and embedding before it runs, ``take`` of a linear's output."""
    return _watch_class()(look, take)


@functools.cache
def _watch_class() -> Any:
    """Return the class behind :func:`_watch`; it derives from PyTorch, which is imported when it is used."""
    import torch
    from torch.overrides import TorchFunctionMode

    linear = (torch.nn.functional.linear, torch.ops.aten.linear.default)
    embedding = (torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default)

    class Watch(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __init__(self, look: Any, take: Any) -> None:
            super().__init__()
            self.look, self.take = look, take

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in linear:
                data = args[0] if args else kwargs["input"]
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                self.look("linear", data, weight)
                out = func(*args, **kwargs)
                if self.take is not None:
                    self.take(out)
                return out
            if func is embedding[0]:
                self.look("embedding", None, args[1] if len(args) > 1 else kwargs["weight"])
            elif func in embedding:
                self.look("embedding", None, args[0] if args else kwargs["weight"])
            return func(*args, **kwargs)

    return Watch
