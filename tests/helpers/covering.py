"""All-pairs selections: few cases in which every two values that can go together do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

Chosen = Mapping[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Chosen) -> set[Pair]:
    """Pairs of (axis, value) in a case, axes in the case's order."""
    return set(itertools.combinations(case.items(), 2))


def _complete(
    axes: Mapping[str, Sequence[Any]],
    allowed: Callable[[Chosen], bool],
    chosen: dict[str, Any],
    order: Callable[[str, dict[str, Any]], Iterable[Any]],
) -> dict[str, Any] | None:
    """Fill the axes that ``chosen`` leaves open, trying values in ``order``; None when impossible."""
    open_axes = [axis for axis in axes if axis not in chosen]
    if not open_axes:
        return {axis: chosen[axis] for axis in axes}
    axis = open_axes[0]
    for value in order(axis, chosen):
        longer = {**chosen, axis: value}
        if allowed(longer):
            got = _complete(axes, allowed, longer, order)
            if got is not None:
                return got
    return None


def possible_pairs(
    axes: Mapping[str, Sequence[Any]], allowed: Callable[[Chosen], bool]
) -> list[Pair]:
    """Every two values that some whole case holds."""
    got = []
    for first, second in itertools.combinations(axes, 2):
        for a, b in itertools.product(axes[first], axes[second]):
            start = {first: a, second: b}
            if allowed(start) and _complete(axes, allowed, start, lambda axis, _: axes[axis]):
                got.append(((first, a), (second, b)))
    return got


def all_pairs(
    axes: Mapping[str, Sequence[Any]], allowed: Callable[[Chosen], bool], tries: int = 8
) -> list[dict[str, Any]]:
    """A greedy selection of cases that holds every possible pair; the same every time.

    Parameters
    ----------
    axes : mapping of str to sequence
        Values of each axis.
    allowed : callable
        Whether values chosen so far, by axis, can go together.
    tries : int
        Cases made up for each one taken, which is the one with the most new pairs.
    """
    missing = dict.fromkeys(possible_pairs(axes, allowed))
    rng, names, cases = random.Random(0), list(axes), []

    def new_pairs(chosen: Chosen, axis: str, value: Any) -> int:
        given = [((a, v), (axis, value)) for a, v in chosen.items()]
        return sum(p in missing or p[::-1] in missing for p in given)

    def best_first(axis: str, chosen: dict[str, Any]) -> list[Any]:
        scored = [(-new_pairs(chosen, axis, v), rng.random(), v) for v in axes[axis]]
        return [value for *_, value in sorted(scored, key=lambda entry: entry[:2])]

    while missing:
        best: dict[str, Any] = {}
        for _ in range(tries):
            start = dict(rng.choice(list(missing)))
            rest = [name for name in names if name not in start]
            rng.shuffle(rest)
            order = {axis: axes[axis] for axis in [*start, *rest]}
            got = _complete(order, allowed, start, best_first)
            assert got is not None
            case = {axis: got[axis] for axis in names}
            if not best or _count(case, missing) > _count(best, missing):
                best = case
        cases.append(best)
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return cases


def each_value(axes: Mapping[str, Sequence[Any]], times: int = 1) -> list[dict[str, Any]]:
    """The fewest cases that hold every value of every axis, axes going round at their own lengths.

    Parameters
    ----------
    axes : mapping of str to sequence
        Values of each axis.
    times : int
        How often values of the longest axis come.
    """
    count = times * max(map(len, axes.values()))
    return [{axis: values[i % len(values)] for axis, values in axes.items()} for i in range(count)]


def grid(
    axes: Mapping[str, Sequence[Any]], always: Sequence[Chosen] | None = None
) -> pytest.MarkDecorator:
    """Parametrize a test over a whole grid, of which all but ``always`` (every pair) is ``large``."""
    kept = all_pairs(axes, lambda _: True) if always is None else always
    params = []
    for values in itertools.product(*axes.values()):
        marks = () if dict(zip(axes, values, strict=True)) in kept else (pytest.mark.large,)
        params.append(pytest.param(*values, marks=marks))
    return pytest.mark.parametrize(list(axes), params)


def _count(case: Chosen, missing: Mapping[Pair, None]) -> int:
    return sum(pair in missing for pair in pairs_of(case))
