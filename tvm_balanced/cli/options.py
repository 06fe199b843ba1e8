"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from tvm_balanced.cli.output import Output, set_up_logging
from tvm_balanced.errors import InputError
from tvm_balanced.options import (
    DENSE_KERNELS,
    ENCODINGS,
    POLICIES,
    QUANTIZATIONS,
    CompileOptions,
)

if TYPE_CHECKING:
    from tvm_balanced.model import Model

Command: TypeAlias = Callable[..., None]
Decorator: TypeAlias = Callable[[Command], Command]
Shapes: TypeAlias = dict[str, tuple[int | str, ...]]


def with_output(function: Command) -> Command:
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
        output.arguments(str(ctx.command.name), ctx.params)
        function(output, *args, **rest)

    return wrapper


def with_default(flag: str, default: object, kind: click.ParamType[Any], text: str) -> Decorator:
    """Return an option with a default, which its help shows."""
    return click.option(flag, default=default, show_default=True, type=kind, help=text)


def repeatable(flag: str, name: str, metavar: str, text: str) -> Decorator:
    """Return an option that may be given several times."""
    return click.option(flag, name, multiple=True, metavar=metavar, help=text)


library_argument = click.argument("library", type=click.Path())

shapes_option = repeatable(
    "--input-shape",
    "input_shapes",
    "NAME=1,128",
    "Shape of an input of an ONNX model; repeatable. A word is a symbolic extent.",
)

target_option = click.option(
    "--target",
    default="llvm",
    show_default=True,
    metavar="NAME",
    help="llvm, cuda, cuda-sm_90, h100, ...; tvm-balanced doctor lists them.",
)

ignore_option = repeatable(
    "--ignore",
    "ignore",
    "LAYER",
    'Leave a layer dense: exact name or "re:" and a regular expression; repeatable.',
)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what exists there.")


def parse_shapes(given: Sequence[str]) -> Shapes | None:
    """``["x=1,128"]`` to ``{"x": (1, 128)}``, else InputError; None when nothing was given."""
    shapes: Shapes = {}
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


def parse_buckets(given: str | None) -> list[int] | dict[str, list[int]] | None:
    """``"1,8"`` to ``[1, 8]``, ``"batch=1,8"`` to ``{"batch": [1, 8]}``, else InputError."""
    if given is None:
        return None
    name, _, numbers = given.rpartition("=")
    words = [word.strip() for word in numbers.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise InputError(
            f'--buckets "{given}" is not of the form 1,8,16 or batch=1,8; give whole numbers from 1'
        )
    sizes = [int(word) for word in words]
    return {name: sizes} if name else sizes


def parse_words(option: str, known: Sequence[str], given: Sequence[str]) -> str | dict[str, str]:
    """Turn ``["always"]`` to ``"always"``, ``["never", "fc1=always"]`` to a mapping, else InputError.

    Without a word for all layers, the others get the first of the ``known`` ones.
    """
    general: list[str] = []
    single: dict[str, str] = {}
    for text in given:
        name, equals, word = text.rpartition("=")
        if word not in known or (equals and not name):
            *most, last = known
            raise InputError(
                f'{option} "{text}" is not known; give {", ".join(most)} or {last}, or LAYER={known[1]}'
            )
        if equals:
            single[name] = word
        else:
            general.append(word)
    if len(general) > 1:
        raise InputError(f"{option} was given as {' and as '.join(general)}; give it once")
    rest = general[0] if general else known[0]
    # of a mapping the later entries win
    return {"re:.*": rest, **single} if single else rest


def _as_words(option: str, setting: str | Mapping[str, str]) -> list[str]:
    if isinstance(setting, str):
        return [option, setting]
    return [word for name, choice in setting.items() for word in (option, f"{name}={choice}")]


def _bucket_words(buckets: Sequence[int] | Mapping[str, Sequence[int]]) -> list[str]:
    if isinstance(buckets, Mapping):
        return ["--buckets", *(f"{n}={','.join(map(str, s))}" for n, s in buckets.items())]
    return ["--buckets", ",".join(map(str, buckets))]


def repeated(option: str, values: Sequence[str]) -> list[str]:
    """Return a repeatable option as words of a command line."""
    return [word for value in values for word in (option, value)]


@dataclass(frozen=True)
class _Knob:
    """One field of :class:`CompileOptions` on the command line: click's option, and both directions."""

    option: Decorator
    words: Callable[[Any], list[str]]
    parse: Callable[[Any], Any] = lambda given: given


# by field; what is compiled can be asked for here and said again from here
KNOBS = {
    "policy": _Knob(
        repeatable(
            "--policy",
            "policy",
            "auto|always|never|LAYER=...",
            "Which layers run sparse; repeatable for single layers. Default: auto.",
        ),
        functools.partial(_as_words, "--policy"),
        functools.partial(parse_words, "--policy", POLICIES),
    ),
    "ignore": _Knob(ignore_option, functools.partial(repeated, "--ignore")),
    "quantize": _Knob(
        repeatable(
            "--quantize",
            "quantize",
            "none|int8|w8|LAYER=...",
            "Linear layers in int8 on a CPU: weights and activations, or (w8) weights of sparse layers; "
            "repeatable for single layers. Default: none.",
        ),
        functools.partial(_as_words, "--quantize"),
        functools.partial(parse_words, "--quantize", QUANTIZATIONS),
    ),
    "quantize_bound": _Knob(
        with_default(
            "--quantize-bound",
            0.1,
            click.FLOAT,
            "Error of a layer in int8 above which it stays floating point, where --calibration measures it.",
        ),
        lambda bound: ["--quantize-bound", str(bound)],
    ),
    "buckets": _Knob(
        click.option(
            "--buckets",
            metavar="1,8,16",
            help="Sizes of the first symbolic dimension, or NAME=1,8 of another, that get functions of "
            "their own.",
        ),
        _bucket_words,
        parse_buckets,
    ),
    "encoding": _Knob(
        with_default(
            "--encoding",
            "auto",
            click.Choice(ENCODINGS),
            "How indices are stored; auto takes the fewest bytes that the target likes.",
        ),
        lambda encoding: ["--encoding", encoding],
    ),
    "dense": _Knob(
        with_default(
            "--dense",
            "dlight",
            click.Choice(DENSE_KERNELS),
            "What runs dense matrix products on a GPU; cublas must be installed where the library runs.",
        ),
        lambda dense: ["--dense", dense],
    ),
    "cuda_graph": _Knob(
        with_default(
            "--cuda-graph/--no-cuda-graph",
            True,
            click.BOOL,
            "Replay kernels of static shapes as CUDA graphs.",
        ),
        lambda wanted: ["--cuda-graph" if wanted else "--no-cuda-graph"],
    ),
    "logs": _Knob(
        click.option(
            "--logs",
            metavar="DIR|none",
            help="Tuning records: where tune writes and compile looks first; none for no records.",
        ),
        lambda logs: ["--logs", "none" if logs is False else logs],
        lambda given: False if given == "none" else given,
    ),
    "dump_ir": _Knob(
        click.option("--dump-ir", metavar="DIR", help="Write the IR after every phase here."),
        lambda folder: ["--dump-ir", folder],
    ),
}


def options_words(options: CompileOptions) -> list[str]:
    """Return the words of a command line that ask for these options."""
    words = []
    for field in fields(CompileOptions):
        value = getattr(options, field.name)
        if value != field.default:
            words += KNOBS[field.name].words(value)
    return words


@dataclass(frozen=True)
class Request:
    """What a command is asked to compile, or to look at as if it were compiled."""

    model: str  # its file
    input_shapes: tuple[str, ...]  # as given
    target: str
    pattern: str | None  # to prune to, on the way or in thought
    options: CompileOptions

    def __post_init__(self) -> None:
        # wrong words are told before anything is imported
        parse_shapes(self.input_shapes)

    def load(self, tell: Callable[[str], None], weights: str | None = None) -> Model:
        """Return the imported model, with the weights of a checkpoint where one is given."""
        from tvm_balanced.frontend import load_model
        from tvm_balanced.frontend.checkpoint import with_weights

        tell("import the model")
        model = load_model(self.model, parse_shapes(self.input_shapes))
        if weights is None:
            return model
        tell("read the weights")
        return with_weights(model, Path(weights))

    def load_pruned(self, tell: Callable[[str], None], weights: str | None = None) -> Model:
        """As :meth:`load`, pruned to the pattern where one is given."""
        from tvm_balanced.format.pattern import BalancedPattern
        from tvm_balanced.pruning.prune import prune

        # before minutes of importing
        form = None if self.pattern is None else BalancedPattern(self.pattern)
        model = self.load(tell, weights)
        if form is None:
            return model
        return prune(model, form, self.options.ignore, progress=lambda name: tell(f"prune {name}"))

    def command(self, verb: str, *more: str) -> str:
        """Return a command line that asks another command for the same."""
        words = ["tvm-balanced", verb, self.model, *repeated("--input-shape", self.input_shapes)]
        words += ["--target", self.target]
        words += [] if self.pattern is None else ["--pattern", self.pattern]
        return shlex.join([*words, *options_words(self.options), *more])


def requesting(pattern_help: str) -> Decorator:
    """Add MODEL and all options of a compilation; the command gets them as ``request``."""
    asked = ("model", "input_shapes", "target", "pattern")

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> None:
            values = {name: knob.parse(given.pop(name)) for name, knob in KNOBS.items()}
            what = {name: given.pop(name) for name in asked}
            function(*args, request=Request(**what, options=CompileOptions(**values)), **given)

        decorated: Command = wrapper
        pattern_option = click.option("--pattern", metavar="NNZ:BLOCK", help=pattern_help)
        added: list[Decorator] = [pattern_option, target_option, shapes_option]
        for option in (*(knob.option for knob in reversed(KNOBS.values())), *added):
            decorated = option(decorated)
        return click.argument("model", type=click.Path())(decorated)

    return decorate
