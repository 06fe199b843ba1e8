"""What a build leaves for an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_balanced.cuda.cubin import DeviceImage

# coverage of the kernels by tuning records, and which of these did not fit
Scheduled = tuple[list[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class ExportedLibrary:
    """What an export left behind.

    Attributes
    ----------
    path : pathlib.Path
        The shared library.
    cuda_source : str
        The translation unit NVRTC compiled; empty for llvm.
    images : tuple of DeviceImage
        The cubins in the library; empty for llvm.
    compiler : dict
        What compiled them, see :func:`tvm_balanced.cuda.nvrtc.compiler`; empty for llvm.
    reference : bytes
        The kernels before any schedule, which say what the compiled ones should compute: the PrimFuncs as
        TVM's JSON, compressed by gzip. Empty where another function than this package's built the library.
    coverage : tuple of dict
        How each kernel was scheduled, see :class:`tvm_balanced.schedules.tuned.Coverage`.
    problems : tuple of str
        Tuning records that did not fit their kernel.
    """

    path: Path
    cuda_source: str
    images: tuple[DeviceImage, ...]
    compiler: Mapping[str, Any] = field(default_factory=dict)
    reference: bytes = b""
    coverage: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()
