"""Libraries that only a frontend needs: installed, or one sentence that says how."""

from __future__ import annotations

import importlib
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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
