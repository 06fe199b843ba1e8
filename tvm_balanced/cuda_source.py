"""A CUDA translation unit as TVM prints it, taken apart into kernels and put together again."""

from __future__ import annotations

import hashlib
import re

from tvm_balanced.errors import InputError

_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(', re.MULTILINE
)


# fusion joins the names of what it fused, to hundreds of characters; a file name holds 255
_MAX_STEM = 120


def file_stem(kernel: str) -> str:
    """Name of a kernel's file without its ending: the kernel's, a long one cut and with a digest.

    Parameters
    ----------
    kernel : str
        Name of the kernel, or a stem, which comes back as it is.
    """
    if len(kernel) <= _MAX_STEM:
        return kernel
    digest = hashlib.sha256(kernel.encode()).hexdigest()[:8]
    return f"{kernel[: _MAX_STEM - 9]}_{digest}"


def split_kernels(source: str) -> dict[str, str]:
    """Kernel name to its CUDA text, each a translation unit of its own.

    Parameters
    ----------
    source : str
        What TVM gave to the CUDA compiler; may be empty.

    Returns
    -------
    dict of str to str
        In the order of the file; what stands before the first kernel is in every text.
    """
    starts = list(_KERNEL.finditer(source))
    if not starts:
        return {}
    head = source[: starts[0].start()]
    ends = [start.start() for start in starts[1:]] + [len(source)]
    # forward declarations stand before the definitions: the last text of a name is the definition
    return {
        start[1]: head + source[start.start() : end].rstrip() + "\n"
        for start, end in zip(starts, ends, strict=True)
    }


def join_kernels(kernels: dict[str, str]) -> str:
    """One translation unit of texts that :func:`split_kernels` made, their common head once."""
    texts = list(kernels.values())
    if not texts:
        return ""
    first = _KERNEL.search(texts[0])
    head = len(texts[0][: first.start()]) if first else 0
    return texts[0][:head] + "\n".join(text[head:] for text in texts)


def kernel_source(source: str, name: str | None) -> str:
    """One kernel of a CUDA translation unit, or all of it.

    Raises
    ------
    InputError
        When there is no kernel of that name.
    """
    if name is None:
        return source
    kernels = split_kernels(source)
    for known in (name, f"{name}_kernel"):
        if known in kernels:
            return kernels[known]
    listed = ", ".join(kernels) or "none, as it was compiled for llvm"
    raise InputError(f'the library has no kernel "{name}"; its kernels are: {listed}')
