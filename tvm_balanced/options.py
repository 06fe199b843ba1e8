"""What a compilation is asked for: one object that every stage reads and a library remembers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

from tvm_balanced.errors import InputError
from tvm_balanced.report import JsonObject
from tvm_balanced.support.words import check_word

if TYPE_CHECKING:
    from typing_extensions import Unpack

POLICIES = ("auto", "always", "never")
ENCODINGS = ("auto", "u8", "u4", "u3", "u2", "bitmap")
DENSE_KERNELS = ("dlight", "cublas")
QUANTIZATIONS = ("none", "int8", "w8")


class CompileKeywords(TypedDict, total=False):
    """The fields of :class:`CompileOptions` as keywords, for type checkers."""

    policy: str | Mapping[str, str]
    ignore: Iterable[str]
    quantize: str | Mapping[str, str]
    quantize_bound: float
    buckets: Sequence[int] | Mapping[str, Sequence[int]] | None
    encoding: str
    dense: str
    cuda_graph: bool
    logs: str | os.PathLike[str] | bool | None
    dump_ir: str | os.PathLike[str] | None


@dataclass(frozen=True)
class CompileOptions:
    """What a model is compiled with, checked when it is made.

    ``plan``, ``tune`` and ``compile`` take the same object: kernels that were tuned are found again by equal
    options only.

    Parameters
    ----------
    policy : str or Mapping
        ``"auto"`` (sparse where predicted faster), ``"always"``, ``"never"``, or one of these per layer.
    ignore : iterable of str
        Layers that stay dense, by exact name or ``re:`` pattern.
    quantize : str or Mapping
        What linear layers are computed in: ``"none"`` (the dtype of the weight), ``"int8"`` (weights with a
        scale a row and activations with one a token, sparse and dense layers alike), ``"w8"`` (sparse layers'
        weights in int8, activations as they are), or one of these per layer. For CPUs.
    quantize_bound : float
        Error of a layer in int8 above which it stays in floating point: the norm of its results' error over
        theirs, as :func:`tvm_balanced.smooth` measured it; without measurement there is no bound.
    buckets : sequence of int or Mapping, optional
        Sizes of a symbolic dimension that get a function with static shapes beside the generic one: of the
        first symbolic dimension, or ``{"batch": [1, 8]}``.
    encoding : str
        How indices are stored: ``"auto"`` (the fewest bits that the target's schedules like), or ``"u8"``,
        ``"u4"``, ``"u3"``, ``"u2"`` for blocks up to 256, 16, 8, 4, or ``"bitmap"``.
    dense : str
        What runs the matrix products that stay dense on a GPU: ``"dlight"``, kernels that TVM generates, or
        ``"cublas"``, which then must be installed where the library runs (``pip install nvidia-cublas``).
    cuda_graph : bool
        Whether kernels with static shapes are captured into CUDA graphs at a thread's first call, and
        replayed from then on; does nothing on llvm.
    logs : path-like or False, optional
        A folder of tuning records: ``tune`` writes there, ``compile`` looks there first, before
        ``$TVM_BALANCED_LOGS``, the user's and those shipped. False for no records at all.
    dump_ir : path-like, optional
        A folder that gets the IR after every phase as numbered files.

    Raises
    ------
    InputError
        For a value that no compilation can take.
    """

    policy: str | Mapping[str, str] = "auto"
    ignore: Iterable[str] = ()
    quantize: str | Mapping[str, str] = "none"
    quantize_bound: float = 0.1
    buckets: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    encoding: str = "auto"
    dense: str = "dlight"
    cuda_graph: bool = True
    logs: str | os.PathLike[str] | bool | None = None
    dump_ir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        plain = {
            "policy": _words("policy", self.policy, POLICIES),
            "quantize": _words("quantize", self.quantize, QUANTIZATIONS),
            "ignore": _ignore(self.ignore),
            "buckets": _buckets(self.buckets),
            "encoding": check_word("encoding", self.encoding, ENCODINGS),
            "dense": check_word("dense", self.dense, DENSE_KERNELS),
            "logs": self.logs if self.logs is False else _path("logs", self.logs),
            "dump_ir": _path("dump_ir", self.dump_ir),
        }
        if not isinstance(self.quantize_bound, int | float) or not self.quantize_bound > 0:
            raise InputError(
                f"quantize_bound is {self.quantize_bound!r}, expected a share above 0; give for example 0.1"
            )
        if not isinstance(self.cuda_graph, bool):
            raise InputError(f"cuda_graph is {self.cuda_graph!r}, expected True or False; give one")
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def dimension(self) -> str | None:
        """The symbolic dimension that the buckets are sizes of; None for the first one."""
        return next(iter(self.buckets)) if isinstance(self.buckets, Mapping) else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The buckets, in order."""
        if isinstance(self.buckets, Mapping):
            return tuple(next(iter(self.buckets.values())))
        return tuple(self.buckets or ())

    @property
    def record_folder(self) -> str | None:
        """The folder of tuning records that was given."""
        return self.logs if isinstance(self.logs, str) else None

    def to_json(self) -> JsonObject:
        """Plain values; the inverse is :meth:`from_json`."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> CompileOptions:
        """From what :meth:`to_json` made; see :func:`make_options` for the errors."""
        return make_options(None, **document)


def make_options(
    options: CompileOptions | None, **keywords: Unpack[CompileKeywords]
) -> CompileOptions:
    """Return the options that a verb was called with: an object, or the plain keywords of one.

    InputError for both, an unknown keyword, or a value that does not fit.
    """
    if options is None:
        known = [field.name for field in fields(CompileOptions)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise InputError(
                    f'there is no option "{name}"; '
                    + (f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}")
                )
        return CompileOptions(**keywords)
    if not isinstance(options, CompileOptions):
        raise InputError(
            f"options is a {type(options).__name__}, expected CompileOptions; make one with "
            "tvm_balanced.CompileOptions(...)"
        )
    if keywords:
        raise InputError(
            f"options and also {', '.join(keywords)} were given; put everything into the options"
        )
    return options


def _words(name: str, value: str | Mapping[str, str], known: Sequence[str]) -> str | dict[str, str]:
    """One of some words, or one a layer."""
    if isinstance(value, str):
        return check_word(name, value, known)
    if not isinstance(value, Mapping):
        raise InputError(
            f"{name} is a {type(value).__name__}, expected a string or a mapping from layer names to "
            "strings; write it as text"
        )
    return {str(n): check_word(f"{name} for layer {n}", word, known) for n, word in value.items()}


def _ignore(value: Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"ignore holds {name!r}, expected names of layers; give them as text")
    return names


def _buckets(
    value: Sequence[int] | Mapping[str, Sequence[int]] | None,
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    if isinstance(value, Mapping):
        if len(value) > 1:
            raise InputError(
                f"buckets were given for {', '.join(value)}; give them for one dimension"
            )
        return {str(name): _sizes(sizes) for name, sizes in value.items() if sizes} or None
    return _sizes(value) or None if value is not None else None


def _sizes(value: Sequence[int]) -> tuple[int, ...]:
    sizes = []
    for size in value if isinstance(value, Iterable) else [value]:
        try:
            # what is no whole number has no index, and a bool is no size
            sizes.append(0 if isinstance(size, bool) else size.__index__())
        except AttributeError:
            raise InputError(
                f"buckets {value!r} are not whole numbers; give for example [1, 8]"
            ) from None
    if sizes and min(sizes) < 1:
        raise InputError(f"buckets {list(sizes)} hold a size below 1; give sizes from 1")
    return tuple(sorted(set(sizes)))


def _path(name: str, value: str | os.PathLike[str] | bool | None) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        way_out = "give a folder, or leave it out" + (", or False for none" * (name == "logs"))
        raise InputError(f"{name} is {value!r}; {way_out}")
    return os.fspath(value)
