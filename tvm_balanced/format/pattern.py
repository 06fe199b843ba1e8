"""The balanced pattern: every block of a weight row keeps the same number of non-zeros.

Source: Yao et al., "Balanced Sparsity for Efficient DNN Inference on GPU", AAAI 2019, arXiv 1811.00206.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm_balanced.errors import InputError

MAX_BLOCK = 256  # indices within a block are one byte
_SPEC = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*", re.ASCII)


@dataclass(frozen=True, order=True, init=False)
class BalancedPattern:
    """At most ``nnz`` non-zeros in every ``block`` consecutive weights of a row, written ``nnz:block``.

    Parameters
    ----------
    spec : str or int or BalancedPattern
        ``"4:16"``, or ``nnz`` when ``block`` is given too.
    block : int, optional
        Weights in a block, 2 to 256.

    Raises
    ------
    InputError
        When ``spec`` is not ``nnz:block`` with ``1 <= nnz <= block`` and ``2 <= block <= 256``.

    Examples
    --------
    >>> BalancedPattern("4:16").density
    0.25
    """

    nnz: int
    block: int

    def __init__(self, spec: str | int | BalancedPattern, block: int | None = None) -> None:
        if isinstance(spec, BalancedPattern):
            nnz, size = spec.nnz, spec.block
        elif isinstance(spec, str) and block is None:
            match = _SPEC.fullmatch(spec)
            if match is None:
                raise InputError(
                    f'pattern "{spec}" is not of the form nnz:block; write for example "4:16", '
                    "which keeps 4 of every 16 weights"
                )
            nnz, size = int(match[1]), int(match[2])
        elif isinstance(spec, int) and isinstance(block, int):
            nnz, size = spec, block
        else:
            raise InputError(
                f"pattern {spec!r} is neither text nor two whole numbers; "
                'write BalancedPattern("4:16") or BalancedPattern(4, 16)'
            )
        if not 2 <= size <= MAX_BLOCK:
            raise InputError(
                f"pattern {nnz}:{size} has a block of {size}; a block holds 2 to {MAX_BLOCK} weights"
            )
        if not 1 <= nnz <= size:
            raise InputError(
                f"pattern {nnz}:{size} keeps {nnz} of {size} weights; keep at least 1 and at most {size}"
            )
        object.__setattr__(self, "nnz", nnz)
        object.__setattr__(self, "block", size)

    @property
    def density(self) -> float:
        """Share of weights kept, ``nnz / block``."""
        return self.nnz / self.block

    def coarsen(self, block: int) -> BalancedPattern:
        """Read the pattern in blocks of ``block``, a multiple of this one's: 1:4 is also 4:16.

        Weights balanced in the finer pattern are balanced in the coarser one too, so a kernel may use
        the block size that suits its registers.
        """
        if block % self.block:
            raise InputError(
                f"pattern {self} cannot be read in blocks of {block}; "
                f"that needs a multiple of {self.block}"
            )
        factor = block // self.block
        return BalancedPattern(self.nnz * factor, block)

    def __str__(self) -> str:
        return f"{self.nnz}:{self.block}"
