"""Gradual balance-aware pruning inside a PyTorch training loop.

Three lines in a loop that exists already::

    pruner = GradualPruner(model, "2:16", begin=500, end=5000, frequency=50)
    for batch in data:
        ...
        optimizer.step()
        pruner.step()
    pruner.finalize()

Source: Algorithm 1 of Yao et al., AAAI 2019; the cubic schedule is that of Zhu and Gupta, "To prune, or not
to prune", 2017, arXiv 1710.01878.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.pruning.choice import choose_layers
from tvm_balanced.pruning.masks import kept_per_block, largest_of_blocks
from tvm_balanced.support.optional import need
from tvm_balanced.support.words import check_word

if TYPE_CHECKING:
    import torch


SCHEDULES = ("cubic", "linear")
_STATE_VERSION = 1


class MaskRule(Protocol):
    """A pattern of zeros: what :class:`GradualPruner` asks at every increase."""

    def mask(self, magnitude: torch.Tensor, left: float) -> torch.Tensor:
        """Return what to keep, (N, K) bool, of a weight's ``magnitude``, (N, K) float32.

        Magnitudes are -1 where a weight was cut before. ``left`` is the share of the way that is still to
        go: 1 keeps everything, 0 is the final pattern.
        """

    def fits(self, columns: int) -> bool:
        """Whether a weight of ``K = columns`` can follow the pattern."""


class BalancedRule:
    """The ``nnz`` largest of every block of a row, ``nnz`` falling from the whole block to the pattern's."""

    def __init__(self, pattern: BalancedPattern | str) -> None:
        self.pattern = BalancedPattern(pattern)

    def __str__(self) -> str:
        return str(self.pattern)

    def fits(self, columns: int) -> bool:
        """Whether a block is no wider than a row."""
        return self.pattern.block <= columns

    def mask(self, magnitude: torch.Tensor, left: float) -> torch.Tensor:
        """See :meth:`MaskRule.mask`."""
        return largest_of_blocks(magnitude, kept_per_block(self.pattern, left), self.pattern.block)


class GradualPruner:
    """Raises the share of zeros step by step while a model trains, and keeps the zeros zero.

    Parameters
    ----------
    model : torch.nn.Module
        What is trained; also one that ``torch.compile`` returned. Weights of ``nn.Linear``, of recurrent
        layers and cells and of ``nn.MultiheadAttention`` are pruned, rows being outputs. Embeddings,
        norms and biases are left alone, and so is a weight that an embedding shares. A weight shared by
        several layers counts once.
    pattern : str, BalancedPattern, MaskRule or Mapping
        ``"2:16"`` for every weight, or a mapping from weight names (or ``re:`` patterns) to patterns;
        weights that no entry names stay dense.
    begin, end : int
        Calls of :meth:`step` after which the first weights are cut and the pattern is reached.
    frequency : int
        Calls between two increases.
    schedule : str
        ``"cubic"`` cuts most early, ``"linear"`` the same share every time.
    ignore : iterable of str
        Weights to leave dense, by exact name or ``re:`` pattern.
    convolutions : bool
        Whether to prune ``nn.Conv1d`` to ``nn.Conv3d`` too, each as one matrix of output channels by
        everything else, as the paper does. The compiler keeps convolutions dense.

    Attributes
    ----------
    patterns, skipped : dict of str to str
        Weight name to the pattern it will follow, and to the reason why it stays dense.

    Raises
    ------
    InputError
        For an unknown pattern or schedule, steps out of order, a name that matches nothing, a block wider
        than a weight's rows, or when nothing is left to prune.
    ToolchainError
        When PyTorch is not installed.

    Notes
    -----
    Masks are applied after the optimiser's step, so they hold whatever it does: momentum, weight decay
    and second moments may move a cut weight, and it is zero again before the next forward pass. Weights
    once cut stay cut. Weights are read anew at every step, so casting or moving the model is fine;
    sharded weights (FSDP) are not supported.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        pattern: str | BalancedPattern | MaskRule | Mapping[str, Any],
        *,
        begin: int = 0,
        end: int,
        frequency: int = 1,
        schedule: str = "cubic",
        ignore: Iterable[str] = (),
        convolutions: bool = False,
    ) -> None:
        need("torch", "torch", "pruning while training")
        for name, value, least in (
            ("begin", begin, 0),
            ("end", end, 1),
            ("frequency", frequency, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"{name} is {value!r}, expected a whole number of at least {least}"
                )
        if end <= begin:
            raise InputError(
                f"pruning would begin at step {begin} and end at step {end}; let it end later"
            )
        check_word("schedule", schedule, SCHEDULES)
        self._begin, self._end = begin, end
        self._frequency, self._schedule = frequency, schedule
        self._places, self.skipped = _find_weights(model, convolutions)
        if not self._places:
            raise InputError(
                f"{type(model).__name__} has no linear or recurrent weight, so there is nothing to prune; "
                "give a model with linear layers"
            )
        if not isinstance(pattern, str | BalancedPattern | Mapping):
            pattern = {"re:.*": pattern}
        self._rules, skipped = choose_layers(pattern, dict.fromkeys(self._places), ignore, _as_rule)
        self.skipped |= skipped
        if not self._rules:
            raise InputError("every weight is ignored or has no pattern; ignore fewer")
        for name, rule in self._rules.items():
            columns = _matrix(self._weight(name)).shape[1]
            if not rule.fits(columns):
                raise InputError(
                    f"pattern {rule} does not fit {name}, whose rows have {columns} weights; choose a "
                    "smaller block or ignore this weight"
                )
        self.patterns = {n: str(rule) for n, rule in self._rules.items()}
        self._masks: dict[str, torch.Tensor] = {}
        self._step = 0

    def __repr__(self) -> str:
        return (
            f"GradualPruner({len(self.patterns)} weights, step {self._step} of {self._end}, "
            f"{self.density():.1%} kept)"
        )

    @property
    def finished(self) -> bool:
        """Whether the final pattern is reached."""
        return self._step >= self._end

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """Weight name to its mask, of the weight's shape, True where kept; empty before ``begin``."""
        return dict(self._masks)

    def density(self) -> float:
        """Share of the weights under a pattern that is kept now, 0 to 1."""
        kept = total = 0
        for name in self._rules:
            size = self._weight(name).numel()
            total += size
            kept += int(self._masks[name].sum()) if name in self._masks else size
        return kept / total

    def step(self) -> None:
        """Call after every step of the optimiser: cuts weights when it is time, and zeroes what is cut.

        Raises
        ------
        InputError
            When weights are to be cut and one of them is NaN or Inf.
        """
        self._step += 1
        after = self._step - self._begin
        due = after >= 0 and after % self._frequency == 0
        if self._step == self._end or (due and self._step < self._end):
            self._increase()
        self._apply()

    def finalize(self) -> dict[str, str]:
        """Make sure that the weights are plain dense ones with zeros, and forget the masks.

        The model holds nothing of the pruner: save it, export it or import it as it is.

        Returns
        -------
        dict of str to str
            Weight name to its pattern.

        Raises
        ------
        InputError
            When training stopped before the final pattern was reached.
        """
        if not self.finished:
            raise InputError(
                f"pruning is at step {self._step} of {self._end}, so the final pattern is not reached; "
                "train on, or give a smaller end"
            )
        self._apply()
        self._masks.clear()
        return dict(self.patterns)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: numbers, text and tensors, which ``weights_only`` loading admits."""
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "settings": self._settings(),
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model's weights are loaded by the caller.

        Raises
        ------
        InputError
            When the state is of other settings or another model.
        """
        if state.get("version") != _STATE_VERSION:
            raise InputError(
                f"the state has version {state.get('version')!r}, expected {_STATE_VERSION}; "
                "load it with the release that wrote it"
            )
        mine, theirs = self._settings(), state["settings"]
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise InputError(
                    f"the state was saved with {key}={_short(theirs.get(key))}, but this pruner has "
                    f"{key}={_short(value)}; give the same settings to go on"
                )
        for name, mask in state["masks"].items():
            shape = self._weight(name).shape
            if mask.shape != shape:
                raise InputError(
                    f"the mask of {name} is {list(mask.shape)} in the state, but the weight is "
                    f"{list(shape)}; load the state of this model"
                )
        self._step = int(state["step"])
        self._masks = {
            name: mask.to(self._weight(name).device).clone()
            for name, mask in state["masks"].items()
        }
        self._apply()

    def _settings(self) -> dict[str, object]:
        return {
            "begin": self._begin,
            "end": self._end,
            "frequency": self._frequency,
            "schedule": self._schedule,
            "patterns": self.patterns,
        }

    def _weight(self, name: str) -> torch.Tensor:
        module, attribute = self._places[name]
        weight: torch.Tensor = getattr(module, attribute)
        return weight

    def _increase(self) -> None:
        import torch

        left = 1 - min(1.0, (self._step - self._begin) / (self._end - self._begin))
        if self._schedule == "cubic":
            left = left**3
        with torch.no_grad():
            fresh = {}
            for name, rule in self._rules.items():
                weight = self._weight(name)
                magnitude = _matrix(weight.detach()).abs().float()
                if not bool(torch.isfinite(magnitude).all()):
                    raise InputError(
                        f"{name} holds NaN or Inf at step {self._step}, so it cannot be pruned; "
                        "lower the learning rate or go back to an earlier checkpoint"
                    )
                if name in self._masks:
                    magnitude[~_matrix(self._masks[name].to(weight.device))] = -1
                fresh[name] = rule.mask(magnitude, left).reshape(weight.shape)
            self._masks = fresh

    def _apply(self) -> None:
        import torch

        with torch.no_grad():
            for name, mask in self._masks.items():
                weight = self._weight(name)
                if mask.device != weight.device:
                    mask = self._masks[name] = mask.to(weight.device)
                # not a product: an optimiser may have made a cut weight infinite
                weight.masked_fill_(~mask, 0)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _as_rule(pattern: Any) -> MaskRule:
    rule: MaskRule = pattern if hasattr(pattern, "mask") else BalancedRule(pattern)
    return rule


def _find_weights(
    model: torch.nn.Module, convolutions: bool
) -> tuple[dict[str, tuple[torch.nn.Module, str]], dict[str, str]]:
    """Weight name to the module that holds it and its attribute, each weight once; and what is skipped."""
    from torch import nn

    places: dict[str, tuple[nn.Module, str]] = {}
    skipped: dict[str, str] = {}
    # what torch.compile returns wraps the module under another name
    model = getattr(model, "_orig_mod", model)
    modules = list(model.named_modules())
    tables = {
        id(module.weight)
        for _, module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    seen = set()
    for prefix, module in modules:
        for attribute in _candidates(module, convolutions):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if attribute not in module._parameters:
                skipped[name] = "it is computed (parametrized), not a parameter"
                continue
            weight = module._parameters[attribute]
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            if id(weight) in tables:
                skipped[name] = "it is shared with an embedding"
            else:
                places[name] = (module, attribute)
    return places, skipped


def _candidates(module: torch.nn.Module, convolutions: bool) -> Iterator[str]:
    """Attributes of a module that hold a matrix it multiplies by."""
    from torch import nn

    if isinstance(module, nn.Linear):
        yield "weight"
    elif isinstance(module, nn.RNNBase):
        yield from (name for name in module._flat_weights_names if name.startswith("weight_"))
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")
    elif isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            yield "in_proj_weight"
        else:
            yield from ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif convolutions and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield "weight"
