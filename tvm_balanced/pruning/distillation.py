"""Training the kept weights on the answers of the dense module."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tvm_balanced.errors import InputError
from tvm_balanced.options import QUANTIZATIONS
from tvm_balanced.pruning.layers import (
    Batch,
    LinearLayer,
    Progress,
    call_model,
    evaluation_mode,
)
from tvm_balanced.selection import select
from tvm_balanced.support.optional import need
from tvm_balanced.support.words import check_word

if TYPE_CHECKING:
    import torch

    # of the pruned model's answer and the dense one's
    Loss: TypeAlias = Callable[[object, object], torch.Tensor]

LOSSES = ("auto", "cosine", "kl", "l2")

# of the schedule: the share in which the rate rises, and that after which int8 is trained with
_WARM_UP = 0.05
_QUANTIZED_FROM = 2 / 3
# evaluations of a training, and how many without a gain end it
_EVALUATIONS, _PATIENCE = 20, 6
# one batch in so many is held out, up to a number
_HELD_OUT, _MOST_HELD = 10, 8
# steps whose time is measured, and the fewest that are worth it
_MEASURED, _LEAST = 2, 10


@dataclass(frozen=True)
class Distillation:
    """What a distillation aims at.

    Parameters
    ----------
    loss : str or callable
        Of the model's outputs: ``"cosine"`` of embeddings, ``"kl"`` of logits, ``"l2"``, or ``"auto"`` for
        what the dense model's output is (vectors of length 1, an output named ``logits``, anything else);
        or a function of both models' outputs that returns a scalar tensor.
    quantize : str
        ``"int8"`` trains the last third with weights and activations rounded to int8 as the compiled
        layers round them, ``"w8"`` with weights alone, ``"none"`` without.
    held_out : sequence of tuple, optional
        Inputs by which the best weights are chosen; a tenth of the batches, and no more than eight, when
        left out, if there are ten.

    Raises
    ------
    InputError
        For an unknown word.
    """

    loss: str | Loss = "auto"
    quantize: str = "none"
    held_out: Sequence[Batch] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_word("loss", self.loss, LOSSES)
        check_word("quantize", self.quantize, QUANTIZATIONS)


def distill(
    module: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Sequence[Batch],
    steps: int | str,
    rate: float | None = None,
    ignore: Iterable[str] = (),
    progress: Progress | None = None,
    settings: Distillation | None = None,
) -> float:
    """Train a pruned model, in place, to answer as the dense one does; zeros of its weights stay zero.

    The loss is the squared error of every hidden state, token by token as a share of the dense model's,
    averaged, and that of the model's outputs. Hidden states are the sums of residual branches, normalised
    where a layer norm follows; in a model without them, what every linear layer gives. All parameters are
    trained, but no embedding.

    Parameters
    ----------
    module : torch.nn.Module
        The pruned model; its weights are changed in place.
    teacher : torch.nn.Module
        The same model before it was pruned.
    batches : sequence of tuple
        Positional inputs, used in turns.
    steps : int or str
        Number of Adam's steps, or the time they may take: ``"10m"``, ``"2h"``. The rate rises over the
        first twentieth and falls to zero in a cosine.
    rate : float, optional
        Largest learning rate; when left out it follows from the share of weights kept.
    ignore : iterable of str
        Layers to leave as they are, by exact name or ``re:`` pattern.
    progress : callable, optional
        Called with the loss of each step, in words.
    settings : Distillation, optional
        Loss, quantisation, and inputs to choose by.

    Returns
    -------
    float
        Loss on the held-out inputs of the best weights, which the model is left with; without held-out
        inputs that of the last round over the batches.

    Raises
    ------
    InputError
        For numbers out of range, a time too short for ten steps, or when the loss is no longer finite.
    """
    need("torch", "torch", "distillation")
    settings = settings or Distillation()
    if (isinstance(steps, int) and steps < 1) or (rate is not None and not 0 < rate < 1):
        raise InputError(
            f"steps={steps} and rate={rate} were given; give at least one step and a rate between 0 and 1"
        )
    if isinstance(steps, str):
        seconds_of(steps)
    if not batches:
        raise InputError("there are no inputs to distil from; give at least one batch")
    from tvm_balanced.pruning.finding import find_linear

    training = _Training(
        module, teacher, batches, settings, find_linear(module, batches[0]), ignore
    )
    with evaluation_mode(module), evaluation_mode(teacher), training.only():
        return training.run(steps, rate, progress or (lambda text: None))


def seconds_of(text: str) -> float:
    """Return a time such as ``"90s"``, ``"10m"`` or ``"2h"`` in seconds.

    Raises InputError for anything else.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f'"{text}" is no time; write for example 10m, 30m or 2h')
    return seconds


class _Training:
    """The parameters that are trained, their zeros, and the loss."""

    def __init__(
        self,
        module: torch.nn.Module,
        teacher: torch.nn.Module,
        batches: Sequence[Batch],
        settings: Distillation,
        layers: Sequence[LinearLayer],
        ignore: Iterable[str],
    ) -> None:
        self.module, self.teacher, self.settings = module, teacher, settings
        self.held = list(settings.held_out)
        self.batches = list(batches)
        if not self.held and len(batches) >= _HELD_OUT:
            apart = range(0, len(batches), max(_HELD_OUT, -(-len(batches) // _MOST_HELD)))
            self.held = [batches[i] for i in apart]
            self.batches = [x for i, x in enumerate(batches) if i not in apart]
        frozen = {layer.name for layer in layers if layer.blocked is not None}
        frozen |= select(ignore, [layer.name for layer in layers])
        # a convolution that was pruned by name is trained too
        trained = [layer for layer in layers if layer.name not in frozen]
        self.masks = {layer.weight: layer.weight == 0 for layer in trained}
        self.quantized = {
            id(layer.weight) for layer in layers if layer.kind in ("linear", "columns")
        }
        self.parameters = [
            parameter
            for name, parameter in module.named_parameters()
            if name not in frozen and (parameter.ndim < 2 or parameter in self.masks)
        ]

    @contextlib.contextmanager
    def only(self) -> Iterator[None]:
        """Let gradients reach the trained parameters alone; afterwards all are as they were."""
        before = {parameter: parameter.requires_grad for parameter in self.module.parameters()}
        self.module.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, needed in before.items():
                parameter.requires_grad_(needed)
                parameter.grad = None

    def usual_rate(self) -> float:
        """Return what served best on MiniLM: 2e-4 with half of the weights, 8e-4 with a quarter."""
        zeros = sum(int(zero.sum()) for zero in self.masks.values())
        kept: float = 1 - zeros / max(1, sum(zero.numel() for zero in self.masks.values()))
        fewer: float = 0.5 / max(kept, 0.1)
        return min(1e-3, 2e-4 * fewer * fewer)

    def run(self, steps: int | str, rate: float | None, progress: Progress) -> float:
        """Train, and leave the best weights; returns their loss."""
        import torch

        begin = time.perf_counter()
        rate = self.usual_rate() if rate is None else rate
        optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=(0.9, 0.98))
        seconds, total = (
            (math.inf, steps) if isinstance(steps, int) else self._plan(steps, progress)
        )
        often = max(_LEAST, total // _EVALUATIONS)
        best = _Best(self.parameters)
        losses: list[float] = []
        rounded = False
        for step in range(total):
            done = max(step / total, (time.perf_counter() - begin) / seconds)
            if done >= 1:
                break
            if self.settings.quantize != "none" and done >= _QUANTIZED_FROM and not rounded:
                rounded, best = True, _Best(self.parameters)
            for group in optimizer.param_groups:
                group["lr"] = rate * _share_of_rate(done)
            losses.append(self._step(optimizer, self.batches[step % len(self.batches)], rounded))
            if not math.isfinite(losses[-1]):
                raise InputError(
                    f"the distillation's loss is {losses[-1]} at step {step}; lower the rate {rate}"
                )
            progress(f"step {step + 1} of {total}, loss {losses[-1]:.4f}")
            if self.held and ((step + 1) % often == 0 or step + 1 == total):
                best.take(self.evaluate(rounded))
                progress(f"step {step + 1} of {total}, held-out loss {best.last:.4f}")
                if best.waited >= _PATIENCE and (rounded or self.settings.quantize == "none"):
                    break
        if self.held:
            return best.restore()
        last = losses[-len(self.batches) :]
        return sum(last) / len(last)

    def _plan(self, budget: str, progress: Progress) -> tuple[float, int]:
        """Return a budget in seconds, and how many steps that are measured fit in."""
        seconds, begin = seconds_of(budget), time.perf_counter()
        for number in range(_MEASURED):
            self.loss(self.batches[number % len(self.batches)], False).backward()
        each = (time.perf_counter() - begin) / _MEASURED
        # a held-out batch takes about a third of a step, which has a backward pass too
        pause = _EVALUATIONS * len(self.held) * each / 3
        total = int((seconds - pause - _MEASURED * each) / each)
        if total < _LEAST:
            raise InputError(
                f"{budget} is too short: a step takes {each:.2g} s and the held-out inputs {pause:.2g} s; "
                f"give at least {math.ceil(pause + (_LEAST + _MEASURED + 1) * each)}s, or smaller batches"
            )
        progress(f"{budget}: {total} steps of {each:.2g} s, {len(self.held)} batches held out")
        return seconds, total

    def _step(self, optimizer: torch.optim.Optimizer, batch: Batch, rounded: bool) -> float:
        import torch

        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch, rounded)
        loss.backward()
        with torch.no_grad():
            for weight, zero in self.masks.items():
                if weight.grad is not None:
                    weight.grad.masked_fill_(zero, 0)
        optimizer.step()
        return float(loss.detach())

    def evaluate(self, rounded: bool) -> float:
        """Return the mean loss on the held-out inputs."""
        import torch

        with torch.no_grad():
            return sum(float(self.loss(batch, rounded)) for batch in self.held) / len(self.held)

    def loss(self, batch: Batch, rounded: bool) -> torch.Tensor:
        """Return the loss on a batch, ``rounded`` to int8 where the settings say so."""
        import torch

        from tvm_balanced.pruning.states import States, output_loss, state_loss

        with torch.no_grad(), States() as dense:
            wanted = call_model(self.teacher, batch)
        quantize = self.settings.quantize if rounded else "none"
        with States(quantize, self.quantized) as states:
            given = call_model(self.module, batch)
        own = self.settings.loss
        of_outputs = output_loss(given, wanted, own) if isinstance(own, str) else own(given, wanted)
        return state_loss(states.values, dense.values) + of_outputs


@dataclass
class _Best:
    """The weights of the least held-out loss."""

    parameters: Sequence[torch.nn.Parameter]
    loss: float = math.inf
    last: float = math.inf
    waited: int = 0
    weights: list[torch.Tensor] = field(default_factory=list)

    def take(self, loss: float) -> None:
        """Take in a loss, and the weights if it is the least."""
        self.last = loss
        self.waited += 1
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.weights = [parameter.detach().clone() for parameter in self.parameters]

    def restore(self) -> float:
        """Write the best weights back; returns their loss."""
        import torch

        with torch.no_grad():
            for parameter, weight in zip(self.parameters, self.weights, strict=False):
                parameter.copy_(weight)
        return self.loss


def _share_of_rate(done: float) -> float:
    """Return the share of the largest rate when a share of the schedule is done."""
    if done < _WARM_UP:
        return (done + 1e-3) / (_WARM_UP + 1e-3)
    return max(1e-3, 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))))
