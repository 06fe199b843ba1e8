"""Libraries that only a frontend needs: installed, or one sentence that says how."""

from __future__ import annotations

import importlib
import re
from typing import Any

from tvm_balanced.errors import ToolchainError


def need(module: str, extra: str, purpose: str) -> Any:
    """Import ``module``, which the package's ``extra`` installs and ``purpose`` (for the message) needs.

    Raises ToolchainError when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there but broken: that message says more
        raise ToolchainError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed; "
            f"run: pip install 'tvm-balanced[{extra}]'"
        ) from None


# what PyTorch and TVM put before a message: the place in their sources, the condition that did not hold
_INTERNALS = re.compile(r"\[enforce fail at [^\]]*\][ .]*|Check failed: \(.*?\) is false: ")
_LONGEST = 240  # characters; some libraries print the whole object they fail at


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as part of a sentence, or its class where it has none."""
    lines = _INTERNALS.sub("", str(error)).strip().splitlines()
    # a damaged file's names come back in messages about them
    text = printable(lines[0]) if lines else ""
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    return text or type(error).__name__


def printable(text: str) -> str:
    """Return a text with question marks in the place of what would not print."""
    return "".join(c if c.isprintable() else "?" for c in text)
