"""Training the kept weights on the answers of the dense module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tvm_balanced.errors import InputError
from tvm_balanced.pruning.layers import (
    Batch,
    Progress,
    call_model,
    evaluation_mode,
    find_linear,
    watch,
)
from tvm_balanced.selection import select
from tvm_balanced.support.optional import need

if TYPE_CHECKING:
    import torch


def distill(
    module: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Sequence[Batch],
    steps: int,
    rate: float = 5e-4,
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
) -> float:
    """Train a pruned model, in place, to answer as the dense one does; zeros of its weights stay zero.

    The loss is the squared error of every linear layer's output, as a share of the teacher's variance, and
    of the model's own outputs, averaged: each layer learns from every row of activations, so that few
    inputs suffice. All parameters are trained, but no embedding.

    Parameters
    ----------
    module : torch.nn.Module
        The pruned model; its weights are changed in place.
    teacher : torch.nn.Module
        The same model before it was pruned.
    batches : sequence of tuple
        Positional inputs, used in turns.
    steps : int
        Number of Adam's steps; the rate rises over the first tenth and falls to zero in a cosine.
    rate : float
        Largest learning rate.
    ignore : iterable of str
        Layers to leave as they are, by exact name or ``re:`` pattern.
    progress : callable, optional
        Called with the loss of each step, in words.

    Returns
    -------
    float
        Loss of the last round over the batches, or of all steps where they are fewer.

    Raises
    ------
    InputError
        For numbers out of range, or when the loss is no longer finite.
    """
    torch = need("torch", "torch", "distillation")
    if steps < 1 or not 0 < rate < 1:
        raise InputError(
            f"steps={steps} and rate={rate} were given; give at least one step and a rate between 0 and 1"
        )
    layers = find_linear(module, batches[0])
    frozen = {layer.name for layer in layers if layer.blocked is not None}
    frozen |= select(ignore, [layer.name for layer in layers])
    masks = {layer.weight: layer.weight == 0 for layer in layers if layer.name not in frozen}
    parameters = [
        parameter
        for name, parameter in module.named_parameters()
        if name not in frozen and (parameter.ndim < 2 or parameter in masks)
    ]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    with evaluation_mode(module), evaluation_mode(teacher), _training_only(module, parameters):
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(module, teacher, batches[step % len(batches)])
            if not bool(torch.isfinite(loss)):
                raise InputError(
                    f"the distillation's loss is {float(loss)} at step {step}; lower the rate {rate}"
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for weight, zero in masks.items():
                    weight.masked_fill_(zero, 0)
            losses.append(loss.item())
            if progress is not None:
                progress(f"step {step + 1} of {steps}, loss {losses[-1]:.4f}")
    last = losses[-len(batches) :]
    return sum(last) / len(last)


@contextlib.contextmanager
def _training_only(
    module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]
) -> Iterator[None]:
    """Let gradients reach ``parameters`` alone; afterwards every one is as it was, without a gradient."""
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
            parameter.grad = None


def _loss(module: torch.nn.Module, teacher: torch.nn.Module, batch: Batch) -> torch.Tensor:
    import torch

    with torch.no_grad():
        expected = _outputs(teacher, batch)
    errors = [
        (a - b).square().mean() / b.square().mean().clamp_min(1e-12)
        for a, b in zip(_outputs(module, batch), expected, strict=True)
    ]
    return torch.stack(errors).mean()


def _outputs(module: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Return outputs of all linear layers, in order, then the model's own; all in float32."""
    import torch

    outputs: list[torch.Tensor] = []
    with watch(take=outputs.append):
        answer = call_model(module, batch)
    flat = torch.utils._pytree.tree_leaves(answer)
    outputs += [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [x.float() for x in outputs]
