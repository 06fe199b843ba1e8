"""Exceptions a user can meet, each with the exit code the command line ends with.

A message says in one sentence what was given, what was expected and a way out. Code that raises one of
these has written nothing yet.
"""

from __future__ import annotations


class TvmBalancedError(Exception):
    """Base class: the work was understood but failed (exit code 1)."""

    exit_code = 1


class InputError(TvmBalancedError, ValueError):
    """What the user gave is not what was expected: a pattern, a file, a shape (exit code 2)."""

    exit_code = 2


class OutputError(TvmBalancedError, OSError):
    """The place to write to exists, is not writable or is full (exit code 2)."""

    exit_code = 2


class ArtifactError(InputError):
    """A ``model.tvmb`` is damaged, changed, or made for another target or TVM (exit code 2)."""


class ToolchainError(TvmBalancedError, RuntimeError):
    """No such device, driver, compiler or library on this machine (exit code 3)."""

    exit_code = 3
