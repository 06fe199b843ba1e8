"""Which layers are pruned, to which pattern, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.selection import per_layer, select

# one for every layer, or a mapping from layer names (or "re:" patterns)
Patterns: TypeAlias = str | BalancedPattern | Mapping[str, str]
Rule = TypeVar("Rule")


def choose_layers(
    pattern: str | BalancedPattern | Mapping[str, Any],
    blocked: Mapping[str, str | None],
    ignore: Iterable[str],
    rule: Callable[[Any], Rule],
) -> tuple[dict[str, Rule], dict[str, str]]:
    """Divide layers into those to prune, by name what ``rule`` makes of their pattern, and the others.

    ``blocked`` names all layers in the model's order, and says why one cannot be pruned; of the others,
    those that ``ignore`` or no entry of ``pattern`` names stay dense too, and the second dictionary says
    why. Raises InputError for an unknown pattern, or a name that matches nothing.
    """
    names = list(blocked)
    ignored = select(ignore, names)
    setting = str(pattern) if isinstance(pattern, BalancedPattern) else pattern
    asked = per_layer(setting, names, "pattern")
    skipped = {
        name: why or ("ignored by name" if name in ignored else "no pattern given")
        for name, why in blocked.items()
        if why or name in ignored or name not in asked
    }
    rules = {name: rule(asked[name]) for name in names if name in asked}
    return {name: made for name, made in rules.items() if name not in skipped}, skipped


def leave_narrow(
    setting: Patterns, patterns: dict[str, BalancedPattern], columns: Mapping[str, int]
) -> dict[str, str]:
    """Take layers that are narrower than a block out of ``patterns``; returned is why, by name.

    Raises InputError where ``setting`` names such a layer, or where no other is left.
    """
    narrow = {
        name: f"K={columns[name]} is less than a block of {pattern}"
        for name, pattern in patterns.items()
        if pattern.block > columns[name]
    }
    if narrow and (isinstance(setting, Mapping) or len(narrow) == len(patterns)):
        name, why = next(iter(narrow.items()))
        raise InputError(
            f"layer {name} cannot follow its pattern, as {why}; choose a smaller block or ignore this layer"
        )
    for name in narrow:
        del patterns[name]
    return narrow
