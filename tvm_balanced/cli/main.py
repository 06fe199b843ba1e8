"""The ``tvm-balanced`` command: its commands by name, and what becomes of an error."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from tvm_balanced._version import __version__
from tvm_balanced.errors import TvmBalancedError

COMMANDS = {
    "doctor": "What this machine has, and which targets work.",
    "demo": "Two models from training to a library: one good, one real.",
    "calibrate": "Measure this package's kernels on this CPU, once, for plan and compile.",
    "plan": "Which layers would run sparse, before anything is changed.",
    "prune": "Prune the dense layers of a model to a balanced pattern.",
    "tune": "Find faster schedules for a model's kernels; compile then uses them.",
    "compile": "Compile a model into a library to deploy.",
    "run": "Run a compiled library.",
    "bench": "Time the operator against cuBLAS, int4, cuSPARSE, 2:4, Triton, TVM's dense.",
    "verify": "Is a library what its manifest says, and is every kernel right?",
    "inspect": "What is in a library, a model or a checkpoint.",
}

INTERRUPTED = 130


class _Commands(click.Group):
    """Imports a command when it is asked for: ``--help`` must not wait for the others' imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tvm_balanced.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tvm-balanced")
def cli() -> None:
    """Compile PyTorch and ONNX models into libraries whose linear layers run balanced-sparse.

    \b
    tvm-balanced plan model.onnx --target h100 --pattern 4:16
    tvm-balanced prune model.onnx --pattern 4:16 -o sparse.onnx
    tvm-balanced compile sparse.onnx --target h100 -o model.tvmb
    tvm-balanced run model.tvmb --random

    Exit codes: 0 ok, 1 failed, 2 usage or bad input, 3 no such device or toolchain.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv``, or the arguments of the process; return the exit code."""
    logger = logging.getLogger("tvm_balanced")
    before = logger.handlers, logger.propagate, logger.level
    try:
        # a command sets up logging and warnings for itself, not for the process that calls it
        with warnings.catch_warnings():
            return _run(argv)
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names of files and layers may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    state: dict[str, int] = {}
    try:
        code = cli.main(arguments, prog_name="tvm-balanced", standalone_mode=False, obj=state)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read the results has what they wanted; the interpreter must not complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TvmBalancedError as error:
        return _fail(_sentence(error), error, state, error.exit_code)
    except Exception as error:
        message = f"{type(error).__name__}: {_sentence(error)}"
        if state.get("verbosity", 0) <= 0:
            message += " (this is not expected; run with -v for the whole story)"
        return _fail(message, error, state, 1)


def _fail(message: str, error: Exception, state: dict[str, int], code: int) -> int:
    if state.get("verbosity", 0) > 0:
        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return code


def _sentence(error: Exception) -> str:
    """Return the message on one line; of what others raise, its last line, which says most."""
    text = str(error).strip()
    if isinstance(error, TvmBalancedError):
        return " ".join(text.split())
    lines = text.splitlines()
    return lines[-1].strip() if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
