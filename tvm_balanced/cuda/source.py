"""A CUDA translation unit as TVM prints it, taken apart into kernels and put together again."""

from __future__ import annotations

import hashlib
import re

_KERNEL = re.compile(r'^extern "C" __global__ void (?:\w+\([\d, ]+\) )*(\w+)\(', re.MULTILINE)
_DECLARATION = re.compile(r"[^;{]*;\n?")
# TVM prints the left ones under tirx.enable_fast_math or when a schedule names them
_PRECISE = {
    **{f"__{name}f": f"{name}f" for name in ("exp", "exp10", "log", "log2", "log10", "pow")},
    **{f"__{name}f": f"{name}f" for name in ("sin", "cos", "sincos", "tan", "tanh")},
    "__fdividef": "__fdiv_rn",
    "htanh_approx": "htanh",
    "h2tanh_approx": "h2tanh",
}
_FAST = re.compile(rf"\b({'|'.join(_PRECISE)})(?=\s*\()")
# fusion joins the names of what it fused, to hundreds of characters; a file name holds 255
_MAX_STEM = 120


def file_stem(kernel: str) -> str:
    """Name a kernel's file without its ending: a long name is cut, with a digest; a stem stays as it is."""
    if len(kernel) <= _MAX_STEM:
        return kernel
    digest = hashlib.sha256(kernel.encode()).hexdigest()[:8]
    return f"{kernel[: _MAX_STEM - 9]}_{digest}"


def precise_math(source: str) -> str:
    """CUDA text with fast intrinsics replaced by what they approximate: ``__expf(x)`` by ``expf(x)``."""
    return _FAST.sub(lambda match: _PRECISE[match[1]], source)


def normal_form(source: str) -> str:
    """Bring a translation unit into the form in which it is compiled and kept.

    Without fast intrinsics and forward declarations, the kernels in the order of their files' names:
    exactly what :func:`join_kernels` makes of them, so that the files of an artifact are the source of
    its cubin, byte by byte. Text without a kernel comes back but for its intrinsics.
    """
    source = precise_math(source)
    return join_kernels(split_kernels(source)) or source


def split_kernels(source: str) -> dict[str, str]:
    """Kernel name to its CUDA text, each a translation unit of its own, in the order of the files' names.

    What stands before the kernels is in every text.
    """
    starts = list(_KERNEL.finditer(source))
    if not starts:
        return {}
    head = source[: starts[0].start()]
    ends = [start.start() for start in starts[1:]] + [len(source)]
    definitions: dict[str, str] = {}
    for start, end in zip(starts, ends, strict=True):
        text = source[start.start() : end]
        declaration = _DECLARATION.match(text)
        if declaration is None:
            definitions[start[1]] = text.rstrip() + "\n"
        else:
            # what follows a declaration and is no kernel is there for all of them
            head += text[declaration.end() :]
    return {name: head + definitions[name] for name in sorted(definitions, key=file_stem)}


def join_kernels(kernels: dict[str, str]) -> str:
    """One translation unit of texts that :func:`split_kernels` made, their common head once."""
    texts = list(kernels.values())
    if not texts:
        return ""
    first = _KERNEL.search(texts[0])
    head = first.start() if first else 0
    return texts[0][:head] + "\n".join(text[head:] for text in texts)
