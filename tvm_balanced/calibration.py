"""One-shot pruning of a PyTorch model from a few hundred unlabelled inputs, and a short distillation.

Wanda (Sun et al., 2023, arXiv 2306.11695) scores a weight by its magnitude times the norm of its input;
SparseGPT (Frantar and Alistarh, 2023, arXiv 2301.00774) goes through a row from left to right, cuts where the
second-order error is least and lets the weights to the right make up for it. Both under the balanced
constraint: every block of a row keeps ``nnz``. Layers are pruned in the order of use, each from the inputs
that the layers before it, already pruned, give it.

A layer is a matrix that the model hands to ``torch.nn.functional.linear``, whether by a module or by an
exported program.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError, TvmBalancedError
from tvm_balanced.frontend.optional import need
from tvm_balanced.model import PrunedLayer
from tvm_balanced.pattern import BalancedPattern
from tvm_balanced.selection import per_layer, select
from tvm_balanced.training import largest_of_blocks

if TYPE_CHECKING:
    import torch

METHODS = ("magnitude", "wanda", "sparsegpt")

# of the mean of the second moments' diagonal, added to it: what SparseGPT does
_DAMPING = 0.01

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


@dataclass
class _Moments:
    """Second moments of a layer's input: ``(K, K)``, or only their diagonal ``(K,)``."""

    full: bool
    total: Any = None
    rows: int = 0

    def add(self, data: torch.Tensor) -> None:
        rows = data.detach().reshape(-1, data.shape[-1]).float()
        found = rows.T @ rows if self.full else rows.square().sum(dim=0)
        self.total = found if self.total is None else self.total.add_(found)
        self.rows += rows.shape[0]


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
    found: dict[int, LinearLayer] = {}
    inputs: list[Any] = []  # kept alive, so that no id is given twice
    tables: set[int] = set()

    def look(kind: str, data: Any, weight: Any) -> None:
        key = id(weight)
        if kind == "embedding":
            tables.add(key)
        elif key in found:
            found[key].uses += 1
        elif key in names and weight.ndim == 2:
            if not inputs or inputs[-1] is not data:
                inputs.append(data)
            found[key] = LinearLayer(names[key], weight, len(inputs) - 1)

    with _eval(module), _no_grad(), _watch(look):
        _call(module, batch)
    if not found:
        raise InputError(
            f"{type(module).__name__} calls no linear layer on these inputs, so there is nothing to prune; "
            "give a model with linear layers"
        )
    for key, layer in found.items():
        if key in tables:
            layer.blocked = "its weight is also read by an embedding"
        elif not layer.weight.is_floating_point():
            layer.blocked = f"its weight is {layer.weight.dtype}"
    return list(found.values())


def prune_calibrated(
    module: torch.nn.Module,
    pattern: str | BalancedPattern | Mapping[str, str],
    batches: Sequence[Batch],
    method: str = "sparsegpt",
    ignore: Iterable[str] = (),
    progress: Tell | None = None,
) -> list[PrunedLayer]:
    """Prune the linear layers of a model, in place, from what its layers get to see.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place; the module of an exported program too.
    pattern : str or BalancedPattern or Mapping
        ``"4:16"`` for every layer, or a mapping from layer names (or ``re:`` patterns) to patterns.
    batches : sequence of tuple
        Positional inputs, a few hundred samples in all; unlabelled, and best not padded.
    method : str
        ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``.
    ignore : iterable of str
        Layers to leave dense, by exact name or ``re:`` pattern.
    progress : callable, optional
        Told the name of each layer before it is pruned.

    Returns
    -------
    list of PrunedLayer
        What was done and skipped, in the order of use.

    Raises
    ------
    InputError
        For an unknown method, pattern or name, a block wider than a layer's K, no inputs, inputs on which
        the model does not run, or NaN or Inf in a weight or a layer's input. Nothing is changed then,
        unless the input of a later layer is at fault.

    Notes
    -----
    Memory: beside the model and one batch, for one group of layers with a common input, the second
    moments of that input and, for SparseGPT, their factor: ``(K, K)`` in float32 and three times in
    float64. Time: one pass over the inputs a group, each as far as the group. Sums run in float32.
    """
    torch = need("torch", "torch", "pruning with calibration")
    if method not in METHODS:
        raise InputError(f'method "{method}" is not known; choose {", ".join(METHODS)}')
    if not batches:
        raise InputError("there are no calibration inputs; give at least one batch")
    layers = find_linear(module, batches[0])
    wanted = check_patterns(layers, pattern, ignore)
    ignored = select(ignore, [layer.name for layer in layers])
    rows: list[PrunedLayer] = []
    for group in _groups(layers):
        todo = [layer for layer in group if layer.name in wanted]
        if method != "magnitude" and todo:
            moments = _moments(module, batches, todo, full=method == "sparsegpt")
        for layer in group:
            if layer.name not in wanted:
                why = layer.blocked or (
                    "ignored by name" if layer.name in ignored else "no pattern given"
                )
                rows.append(PrunedLayer(layer.name, layer.shape, None, 1.0, why))
                continue
            if progress is not None:
                progress(layer.name)
            form = wanted[layer.name]
            before = layer.weight.detach().float()
            if method == "magnitude":
                after = before * largest_of_blocks(before.abs(), form.nnz, form.block)
            elif method == "wanda":
                after = wanda(before, form, moments.total)
            else:
                after = sparsegpt(before, form, moments.total)
            with torch.no_grad():
                layer.weight.copy_(after)
            total = float(before.square().sum(dtype=torch.float64))
            kept = float(before[after != 0].square().sum(dtype=torch.float64))
            rows.append(
                PrunedLayer(
                    layer.name, layer.shape, str(form), kept / total if total else 1.0, None
                )
            )
    return rows


def check_patterns(
    layers: Sequence[LinearLayer],
    pattern: str | BalancedPattern | Mapping[str, str],
    ignore: Iterable[str] = (),
) -> dict[str, BalancedPattern]:
    """Layer name to pattern, of those that are to be pruned.

    Raises
    ------
    InputError
        As :func:`prune_calibrated`.
    """
    import torch

    names = [layer.name for layer in layers]
    ignored = select(ignore, names)
    text = str(pattern) if isinstance(pattern, BalancedPattern) else pattern
    asked = {n: BalancedPattern(p) for n, p in per_layer(text, names, "pattern").items()}
    wanted: dict[str, BalancedPattern] = {}
    for layer in layers:
        if layer.name not in asked or layer.name in ignored or layer.blocked is not None:
            continue
        form = asked[layer.name]
        if form.block > layer.shape[1]:
            raise InputError(
                f"pattern {form} has blocks of {form.block}, but layer {layer.name} has only "
                f"K={layer.shape[1]} columns; choose a smaller block or ignore this layer"
            )
        if not bool(torch.isfinite(layer.weight).all()):
            raise InputError(
                f"the weight of layer {layer.name} holds NaN or Inf; mend the model or ignore this layer"
            )
        wanted[layer.name] = form
    if not wanted:
        raise InputError("every linear layer is ignored or cannot be pruned; ignore fewer layers")
    return wanted


def wanda(weight: torch.Tensor, pattern: BalancedPattern, moments: torch.Tensor) -> torch.Tensor:
    """Keep what is largest by magnitude times the norm of its input.

    Parameters
    ----------
    weight : (N, K) float32
        Not changed.
    pattern : BalancedPattern
        What to keep.
    moments : (K,) float32
        Sums of the squared inputs.

    Returns
    -------
    (N, K) float32
    """
    # an input that is always zero decides nothing: there the magnitude does, behind all others
    score = weight.abs() * moments.sqrt()
    tie = weight.abs() / weight.abs().max().clamp_min(1e-30)
    score = score + 1e-12 * score.max() * tie
    return weight * largest_of_blocks(score, pattern.nnz, pattern.block)


def sparsegpt(
    weight: torch.Tensor, pattern: BalancedPattern, moments: torch.Tensor
) -> torch.Tensor:
    """Cut where the output changes least, and let the weights to the right make up for it.

    Parameters
    ----------
    weight : (N, K) float32
        Not changed.
    pattern : BalancedPattern
        What to keep.
    moments : (K, K) float32
        ``X.T @ X`` of the inputs.

    Returns
    -------
    (N, K) float32
    """
    import torch

    factor = _inverse_factor(moments)
    diagonal = factor.diagonal()
    work = weight.double()
    columns = work.shape[1]
    mask = torch.empty_like(weight, dtype=torch.bool)
    for start in range(0, columns, pattern.block):
        stop = min(start + pattern.block, columns)
        # where the weights are by now: those to the left have pushed their errors over here
        score = (work[:, start:stop] / diagonal[start:stop]).square()
        mask[:, start:stop] = largest_of_blocks(score, pattern.nnz, pattern.block)
        errors = torch.zeros_like(work[:, start:stop])
        for column in range(start, stop):
            error = work[:, column] / diagonal[column]
            error = error.masked_fill(mask[:, column], 0)
            work[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work.float().masked_fill(~mask, 0)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with ``U.T @ U`` the inverse of the damped moments, in float64."""
    import torch

    damped = moments.double()
    diagonal = damped.diagonal()
    # an input that is always zero would leave the matrix singular; any number does
    diagonal[diagonal == 0] = 1
    step = _DAMPING * float(diagonal.mean())
    for _ in range(6):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return upper
        step *= 10
    raise TvmBalancedError(
        "the second moments of a layer's input cannot be inverted, however much they are damped; "
        "give more calibration inputs, or use the method wanda"
    )


def distill(
    module: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Sequence[Batch],
    steps: int,
    rate: float = 5e-4,
    ignore: Iterable[str] = (),
    progress: Tell | None = None,
) -> float:
    """Train a pruned model, in place, to answer as the dense one does; zeros of its weights stay zero.

    The loss is the squared error of every linear layer's output, as a share of the teacher's variance, and
    of the model's own outputs, averaged: each layer learns from every row of activations, so that few
    inputs suffice. All parameters are trained, but no embedding.

    Parameters
    ----------
    module : torch.nn.Module
        Pruned; changed in place.
    teacher : torch.nn.Module
        The same model before it was pruned.
    batches : sequence of tuple
        Positional inputs, gone through in turns.
    steps : int
        Steps of Adam; the rate rises over the first tenth and falls to zero in a cosine.
    rate : float
        Largest learning rate.
    ignore : iterable of str
        Names or ``re:`` patterns of layers to leave as they are.
    progress : callable, optional
        Told the loss of each step.

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
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    losses: list[float] = []
    try:
        with _eval(module), _eval(teacher):
            for step in range(steps):
                batch = batches[step % len(batches)]
                with torch.no_grad():
                    expected = _outputs(teacher, batch)
                optimizer.zero_grad(set_to_none=True)
                found = _outputs(module, batch)
                errors = [
                    (a - b).square().mean() / b.square().mean().clamp_min(1e-12)
                    for a, b in zip(found, expected, strict=True)
                ]
                loss = torch.stack(errors).mean()
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
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
            parameter.grad = None
    last = losses[-len(batches) :]
    return sum(last) / len(last)


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
            found, expected = (
                torch.utils._pytree.tree_leaves(_call(part, batch))[0] for part in (module, teacher)
            )
            if not (isinstance(expected, torch.Tensor) and expected.is_floating_point()):
                raise InputError(
                    "the model's first output is no floating-point tensor, so no loss can be told; let "
                    "the model return its logits or embeddings first"
                )
            a, b = (x.flatten(1).double() if x.ndim > 1 else x[:, None] for x in (found, expected))
            cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=1))
    return float(torch.cat(cosines).mean())


def copy_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy to distil from, taken before the module is pruned."""
    return copy.deepcopy(module)


def _groups(layers: Sequence[LinearLayer]) -> Iterator[list[LinearLayer]]:
    group: list[LinearLayer] = []
    for layer in layers:
        if group and layer.group != group[0].group:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _moments(
    module: torch.nn.Module, batches: Sequence[Batch], group: Sequence[LinearLayer], full: bool
) -> _Moments:
    """Second moments of the group's input over all batches."""
    import torch

    moments = _Moments(full)
    # one layer of the group stands for all: they read one input
    first = group[0]
    for batch in batches:
        with contextlib.suppress(_Reached), _eval(module), _no_grad():
            left = first.uses

            def look(kind: str, data: Any, weight: Any) -> None:
                nonlocal left
                if kind == "linear" and weight is first.weight:
                    moments.add(data)
                    left -= 1
                    if left == 0:
                        raise _Reached

            with _watch(look):
                _call(module, batch)
    if moments.total is None or not bool(torch.isfinite(moments.total).all()):
        raise InputError(
            f"the input of layer {first.name} is NaN or Inf, or missing, on some calibration inputs; "
            "look at them"
        )
    return moments


def _outputs(module: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Outputs of all linear layers, in order, then the model's own; all in float32."""
    import torch

    found: list[torch.Tensor] = []
    with _watch(lambda kind, data, weight: None, found.append):
        answer = _call(module, batch)
    flat = torch.utils._pytree.tree_leaves(answer)
    found += [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [x.float() for x in found]


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
    """Evaluation mode, and each part's own mode afterwards."""
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
    """The class behind :func:`_watch`; it derives from PyTorch, which is imported when it is used."""
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
