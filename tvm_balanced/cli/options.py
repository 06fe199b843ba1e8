"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from tvm_balanced.cli.output import Output, set_up_logging
from tvm_balanced.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


POLICIES = ("auto", "always", "never")


ENCODINGS = ("auto", "u8", "u4", "u3", "u2", "bitmap")


DENSE_KERNELS = ("dlight", "cublas")


def with_output(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--json``, ``-v`` and ``-q``; the command gets an :class:`Output` as first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout.")
    @click.option("-v", "--verbose", is_flag=True, help="Say what is done; tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="Only results and errors.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(
        ctx: click.Context, /, *args: Any, as_json: bool, verbose: bool, quiet: bool, **rest: Any
    ) -> None:
        if verbose and quiet:
            raise click.UsageError("-v and -q contradict each other; give one of them")
        output = Output(as_json, 1 if verbose else -1 if quiet else 0)
        if ctx.obj is not None:
            ctx.obj["verbosity"] = output.verbosity
        set_up_logging(output)
        function(output, *args, **rest)

    return wrapper


def model_argument(function: F) -> F:
    """``MODEL`` and ``--input-shape``."""
    function = click.option(
        "--input-shape",
        "input_shapes",
        multiple=True,
        metavar="NAME=1,128",
        help="Shape of an input of an ONNX model; repeatable. A word is a symbolic extent.",
    )(function)
    return click.argument("model", type=click.Path())(function)


def pattern_option(required: bool, text: str) -> Callable[[F], F]:
    """``--pattern``."""
    return click.option("--pattern", required=required, metavar="NNZ:BLOCK", help=text)


def target_option(function: F) -> F:
    """``--target``."""
    return click.option(
        "--target",
        default="llvm",
        show_default=True,
        metavar="NAME",
        help="llvm, cuda, cuda-sm_90, h100, ...; tvm-balanced doctor lists them.",
    )(function)


def layer_options(function: F) -> F:
    """``--ignore`` and ``--policy``."""
    function = click.option(
        "--policy",
        "policies",
        multiple=True,
        metavar="auto|always|never|LAYER=...",
        help="Which layers run sparse; repeatable for single layers. Default: auto.",
    )(function)
    return ignore_option(function)


def ignore_option(function: F) -> F:
    """``--ignore``."""
    return click.option(
        "--ignore",
        multiple=True,
        metavar="LAYER",
        help='Leave a layer dense: exact name or "re:" and a regular expression; repeatable.',
    )(function)


def buckets_option(function: F) -> F:
    """``--buckets``."""
    return click.option(
        "--buckets",
        metavar="1,8,16",
        help="Sizes of the symbolic dimension that get functions of their own.",
    )(function)


def encoding_option(function: F) -> F:
    """``--encoding``."""
    return click.option(
        "--encoding",
        default="auto",
        show_default=True,
        type=click.Choice(ENCODINGS),
        help="How indices are stored; auto takes the fewest bytes that the target likes.",
    )(function)


def dense_option(function: F) -> F:
    """``--dense``."""
    return click.option(
        "--dense",
        type=click.Choice(DENSE_KERNELS),
        default="dlight",
        show_default=True,
        help="What runs dense matrix products on a GPU; cublas must be installed where the library runs.",
    )(function)


def repeated(option: str, values: Sequence[str]) -> str:
    """A repeatable option as it is typed, with a space before it; empty where it was not given."""
    return "".join(f" {option} {shlex.quote(value)}" for value in values)


def parse_shapes(given: Sequence[str]) -> dict[str, tuple[int | str, ...]] | None:
    """``["x=1,128"]`` to ``{"x": (1, 128)}``; None when nothing was given.

    Raises
    ------
    InputError
        For text of another form.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    for text in given:
        name, equals, extents = text.rpartition("=")
        words = [word.strip() for word in extents.split(",")]
        if not (name and equals) or not all(re.fullmatch(r"\d+|[A-Za-z_]\w*", w) for w in words):
            raise InputError(
                f'--input-shape "{text}" is not of the form NAME=1,128; '
                "write the name of the input and its extents"
            )
        if "0" in words:
            raise InputError(f'--input-shape "{text}" has an extent of 0; give at least 1')
        if name in shapes:
            raise InputError(f"--input-shape was given twice for {name}; give it once")
        shapes[name] = tuple(int(word) if word.isdigit() else word for word in words)
    return shapes or None


def parse_buckets(given: str | None) -> list[int] | None:
    """``"1,8"`` to ``[1, 8]``, in order and without repeats.

    Raises
    ------
    InputError
        For anything but whole numbers of at least 1.
    """
    if given is None:
        return None
    words = [word.strip() for word in given.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise InputError(
            f'--buckets "{given}" is not of the form 1,8,16; give whole numbers from 1'
        )
    return sorted({int(word) for word in words})


def parse_policies(given: Sequence[str]) -> str | dict[str, str]:
    """``["always"]`` to ``"always"``, ``["never", "fc1=always"]`` to a mapping.

    Raises
    ------
    InputError
        For a word that is no policy, or several policies for all layers.
    """
    general: list[str] = []
    single: dict[str, str] = {}
    for text in given:
        name, equals, policy = text.rpartition("=")
        if policy not in POLICIES or (equals and not name):
            raise InputError(
                f'--policy "{text}" is not known; give auto, always or never, or LAYER=always'
            )
        if equals:
            single[name] = policy
        else:
            general.append(policy)
    if len(general) > 1:
        raise InputError(f"--policy was given as {' and as '.join(general)}; give it once")
    rest = general[0] if general else "auto"
    # of a mapping the later entries win
    return {"re:.*": rest, **single} if single else rest
