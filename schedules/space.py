"""The knobs of a kernel that a tuner may set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import s_tir


class MismatchError(Exception):
    """A record does not fit the kernel it is looked up for."""


@dataclass(frozen=True)
class Space:
    """The knobs of one of our kernels for one workload."""

    kernel: str  # the schedule rule's name
    choices: Mapping[str, tuple[int, ...]]  # of each knob
    valid: Callable[[Mapping[str, int]], bool]
    build: Callable[[Mapping[str, int]], s_tir.Schedule | None]

    def points(self) -> list[dict[str, int]]:
        """List every combination of values that goes together, in order."""
        combined: list[dict[str, int]] = [{}]
        for name, values in self.choices.items():
            combined = [{**point, name: value} for point in combined for value in values]
        return [point for point in combined if self.valid(point)]


def powers(limit: int) -> tuple[int, ...]:
    """List the powers of two up to ``limit``, or 1."""
    return tuple(1 << i for i in range(max(1, limit).bit_length()))
