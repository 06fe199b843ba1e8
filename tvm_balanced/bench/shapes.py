"""The layers that are benchmarked: shapes and patterns as data, and the order they are run in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.options import QUANTIZATIONS
from tvm_balanced.support.words import check_word


@dataclass(frozen=True)
class LayerShape:
    """One dense layer: N outputs, K inputs, and what it is part of."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class ShapeSet:
    """Layers that are benchmarked together, the most telling first, with rows of activations, M."""

    layers: tuple[LayerShape, ...]
    rows: tuple[int, ...]
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One multiplication to time: ``(m, k)`` by a balanced ``(n, k)``, computed in one of QUANTIZATIONS."""

    set: str
    layer: LayerShape
    m: int
    pattern: str
    dtype: str
    quantize: str = "none"


# the paper's seven shares of zeros, 50 to 93.75 %, in blocks of 16: its K of 8196 is padded to 8208
_PAPER_PATTERNS = ("4:16", "2:16", "8:16", "1:16", "6:16", "5:16", "3:16")

# decoder layers: attention and MLP of 7B, of 70B, and a square one between
_DECODERS = (
    LayerShape("square-8192", 8192, 8192),
    LayerShape("70b-up", 28672, 8192),
    LayerShape("70b-down", 8192, 28672),
    LayerShape("7b-attention", 4096, 4096),
)


def _encoder(name: str, width: int) -> ShapeSet:
    """Layers of an encoder: attention, and an MLP of four times the width."""
    shapes = {"attention": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    layers = tuple(LayerShape(f"{name}-{part}", *shape) for part, shape in shapes.items())
    return ShapeSet(layers, (1, 8, 32), ("4:16", "2:16"))


SETS: dict[str, ShapeSet] = {
    "llm": ShapeSet(
        (*_DECODERS, LayerShape("7b-up", 11008, 4096), LayerShape("7b-down", 4096, 11008)),
        (1, 2, 4, 8, 16),
        ("4:16", "2:16", "1:16"),
    ),
    # the same layers with rows enough for tensor cores, up to where dense wins
    "prefill": ShapeSet(
        _DECODERS,
        (16, 32, 64, 128, 256),
        ("8:16", "4:16", "2:16", "1:16", "8:32", "4:32"),
    ),
    # Yao et al., AAAI 2019: the kernel benchmark
    "paper": ShapeSet((LayerShape("paper", 16384, 8196),), (1, 8), _PAPER_PATTERNS),
    # the same paper: gates of the LSTM on PTB (hidden 1500), the fully connected layers of VGG-16
    "paper-models": ShapeSet(
        (
            LayerShape("lstm-gates", 6000, 1500),
            LayerShape("vgg16-fc6", 4096, 25088),
            LayerShape("vgg16-fc7", 4096, 4096),
            LayerShape("vgg16-fc8", 1000, 4096),
        ),
        (1, 8),
        ("4:16", "3:16", "1:16"),
    ),
    "minilm": _encoder("minilm", 384),
    "bert": _encoder("bert", 768),
}

# which rows a run that is cut off should have
_FIRST_ROWS = (1, 8)
_FIRST_PATTERNS = ("4:16", "2:16", "1:16")


def problems(
    names: Sequence[str],
    dtypes: Sequence[str],
    *,
    quantize: Sequence[str] = ("none",),
    rows: Iterable[int] | None = None,
    patterns: Iterable[str] | None = None,
    layers: Iterable[str] | None = None,
    most_weights: int | None = None,
) -> list[Problem]:
    """Every multiplication of some of the :data:`SETS`, the most telling first.

    First come M of 1 and 8 at the patterns 4:16, 2:16 and 1:16, in the first dtype; within the same
    importance, those of one weight follow each other. ``rows`` and ``patterns`` stand in the place of the
    sets' own. Layers can be limited by name, and to so many weights, N times K.

    Raises
    ------
    InputError
        For an unknown set, layer or quantisation, an M below 1 or a pattern that is none, or where nothing is
        left.
    """
    for name in names:
        check_word("set", name, SETS)
    for word in quantize or ("",):
        check_word("quantize", word, QUANTIZATIONS)
    given_rows = None if rows is None else list(rows)
    if given_rows is not None and (not given_rows or min(given_rows) < 1):
        raise InputError(f"M of {given_rows} was given; give whole numbers from 1")
    # a wider block than K is refused where the layer is, not here
    given_patterns = None if patterns is None else [str(BalancedPattern(p)) for p in patterns]
    wanted = None if layers is None else set(layers)
    known = {layer.name for name in names for layer in SETS[name].layers}
    if wanted is not None and wanted - known:
        raise InputError(
            f"layer {min(wanted - known)} is in none of the sets {', '.join(names)}; "
            f"their layers are {', '.join(sorted(known))}"
        )
    problems = [
        Problem(name, layer, m, pattern, dtype, quantized)
        for name in names
        for dtype in dtypes
        for layer in SETS[name].layers
        for pattern in given_patterns or SETS[name].patterns
        for m in given_rows or SETS[name].rows
        for quantized in quantize
        if (wanted is None or layer.name in wanted)
        and (most_weights is None or layer.n * layer.k <= most_weights)
        and BalancedPattern(pattern).block <= layer.k
    ]
    if not problems:
        raise InputError("no layer of the sets is left; allow more weights or a smaller block")
    return in_order(problems)


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Return the most telling first: see :func:`problems`. What is equal stays in the order given."""
    dtypes = list(dict.fromkeys(problem.dtype for problem in problems))
    groups = list(dict.fromkeys((p.set, p.layer, p.pattern) for p in problems))

    def rank(problem: Problem) -> tuple[int, int, int, int]:
        pattern = problem.pattern
        common = pattern in _FIRST_PATTERNS
        return (
            dtypes.index(problem.dtype),
            (problem.m not in _FIRST_ROWS) + (not common),
            _FIRST_PATTERNS.index(pattern) if common else len(_FIRST_PATTERNS),
            groups.index((problem.set, problem.layer, pattern)),
        )

    return sorted(problems, key=rank)
