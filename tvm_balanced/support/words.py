"""Words that an option takes: a tuple which the library checks and the command line offers."""

from __future__ import annotations

from collections.abc import Iterable

from tvm_balanced.errors import InputError


def check_word(name: str, value: object, allowed: Iterable[str]) -> str:
    """``value``, when it is one of the words that the option ``name`` takes.

    Raises InputError when it is not; the message names the words.
    """
    words = list(allowed)
    if isinstance(value, str) and value in words:
        return value
    *most, last = words
    listed = f"{', '.join(most)} or {last}" if most else last
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    raise InputError(f"{name} {shown} is not known; choose {listed}")
