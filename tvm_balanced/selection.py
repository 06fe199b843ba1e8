"""Choosing layers by name: exact names or ``re:`` patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from tvm_balanced.errors import InputError


def short_name(name: str) -> str:
    """Return a weight's name as people say it: ``lm_head`` for ``lm_head.weight``."""
    return name.removesuffix(".weight")


def matches(pattern: str, name: str) -> bool:
    """Whether a name, or ``re:`` and a regular expression (else InputError), means weight ``name``."""
    if not pattern.startswith("re:"):
        return pattern in (name, short_name(name))
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise InputError(
            f'"{pattern}" is not a regular expression ({error}); '
            'write for example "re:.*gate$", or a layer\'s exact name'
        ) from None
    return any(expression.fullmatch(form) for form in (name, short_name(name)))


def select(patterns: Iterable[str], names: Sequence[str], what: str = "ignore") -> set[str]:
    """Names that any of ``patterns`` means; InputError for one that means none, as by a typing mistake."""
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[str] = set()
    for pattern in patterns:
        meant = {name for name in names if matches(pattern, name)}
        if not meant:
            shown = ", ".join(short_name(n) for n in names[:5]) + (
                ", ..." if len(names) > 5 else ""
            )
            raise InputError(
                f'{what} "{pattern}" matches none of the {len(names)} dense layers ({shown}); '
                'give an exact name or "re:" and a regular expression for whole names'
            )
        chosen |= meant
    return chosen


def per_layer(setting: str | Mapping[str, str], names: Sequence[str], what: str) -> dict[str, str]:
    """Spread one setting, or a mapping from names or ``re:`` patterns to settings, over layers.

    Later entries of a mapping win; layers that none matches are absent from the result. InputError for a
    setting of another kind, or a name that matches nothing.
    """
    if isinstance(setting, str):
        return dict.fromkeys(names, setting)
    if not isinstance(setting, Mapping):
        raise InputError(
            f"{what} is a {type(setting).__name__}, expected a string or a mapping from layer names "
            "to strings; write it as text"
        )
    chosen: dict[str, str] = {}
    for pattern, value in setting.items():
        chosen.update(dict.fromkeys(select([pattern], names, what), value))
    return chosen
