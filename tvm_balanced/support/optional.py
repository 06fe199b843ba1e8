"""Libraries that only a frontend needs: installed, or one sentence that says how."""

from __future__ import annotations

import importlib
import re
from typing import Any

from tvm_balanced.errors import ToolchainError


def need(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Parameters
    ----------
    module : str
        What to import.
    extra : str
        The extra of this package that installs it.
    purpose : str
        What it is needed for, as it stands in the message.

    Returns
    -------
    module

    Raises
    ------
    ToolchainError
        When it is not installed.
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
    text = "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else ""
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]} ..."
    return text or type(error).__name__
