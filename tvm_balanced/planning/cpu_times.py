"""Times of this package's kernels on one CPU, measured once by ``calibrate`` and kept in the user's cache.

A file holds the samples themselves. A layer of another shape is taken to need as long for each multiplication
as the samples around it: between them, and in patterns between theirs, logarithms are interpolated; beyond
them the nearest counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar, get_args

import msgspec
import numpy as np

from tvm_balanced.errors import InputError
from tvm_balanced.format.pattern import BalancedPattern
from tvm_balanced.records.lookup import slug
from tvm_balanced.report import WIDE, Printable, table_of
from tvm_balanced.support.files import as_output_error, check_output, user_cache, write_whole
from tvm_balanced.support.groups import grouped
from tvm_balanced.targets import host

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_balanced.targets.resolve import TargetSpec

VERSION = 1
# of a machine that counts as idle
MOST_LOAD = 0.5

_Number = TypeVar("_Number", int, float)
Kernel: TypeAlias = Literal["dense", "sparse", "dense int8", "sparse int8"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

_Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class Sample:
    """One kernel at one shape, from float32 activations to float32 results.

    Parameters
    ----------
    kernel : str
        One of :data:`KERNELS`.
    pattern : str or None
        The weight's pattern (``"4:16"``); None for a dense kernel.
    n, k : int
        Shape of the weight.
    rows : int
        Rows of activations, M.
    us : float
        Microseconds, of calls that nothing else disturbed.
    """

    kernel: Kernel
    pattern: str | None
    n: _Count
    k: _Count
    rows: _Count
    us: Annotated[float, msgspec.Meta(gt=0, le=1e9)]

    @property
    def density(self) -> float:
        """Share of the weight that is multiplied."""
        return 1.0 if self.pattern is None else BalancedPattern(self.pattern).density

    @property
    def us_per_product(self) -> float:
        """Microseconds for each multiplication."""
        return self.us / (self.rows * self.n * self.k * self.density)


@dataclass(frozen=True)
class CpuTimes(Printable):
    """What ``calibrate`` measured, and on what.

    Parameters
    ----------
    version : int
        Version of the file's format, :data:`VERSION`.
    cpu : str
        What the system calls the CPU.
    arch : str
        What LLVM calls it (``mcpu``).
    features : tuple of str
        Features that the kernels may use, by LLVM's names.
    threads : int
        Threads that ran the kernels.
    load : float
        Mean number of other threads that ran in the minute before.
    samples : tuple of Sample
        At least one for each of :data:`KERNELS`.
    """

    version: int
    cpu: str
    arch: str
    features: tuple[str, ...]
    threads: _Count
    load: Annotated[float, msgspec.Meta(ge=0)]
    samples: tuple[Sample, ...]

    @property
    def disturbed(self) -> bool:
        """Whether others ran on the cores, so that times may be too long."""
        return self.load > MOST_LOAD

    def us(self, kernel: Kernel, rows: int, n: int, k: int, density: float = 1.0) -> float:
        """Microseconds of a kernel on ``(rows, K) @ (K, N)``, where ``density`` of the weight is kept."""
        samples = [sample for sample in self.samples if sample.kernel == kernel]
        by_density = {
            share: _interpolated(
                {size: _over_rows(alike, rows) for size, alike in grouped(same, _size).items()},
                n * k,
            )
            for share, same in grouped(samples, lambda sample: sample.density).items()
        }
        return _interpolated(by_density, density) * rows * n * k * density

    def tables(self, width: int = WIDE) -> Sequence[Table]:
        """One table, a row for each kernel and shape."""
        rows = sorted({sample.rows for sample in self.samples})
        table = table_of(f"us on {self.cpu}, threads: {self.threads}", ("kernel",), no_wrap=True)
        for heading in ("pattern", "N x K", *(f"M = {m}" for m in rows)):
            table.add_column(heading, justify="right", no_wrap=True)
        groups = grouped(self.samples, lambda s: (s.kernel, s.pattern or "-", f"{s.n} x {s.k}"))
        for words, alike in groups.items():
            times = {sample.rows: f"{sample.us:.1f}" for sample in alike}
            table.add_row(*words, *(times.get(m, "-") for m in rows))
        return [table]

    def to_json(self) -> dict[str, object]:
        """Plain values, as they stand in the file."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return plain

    def problem(self, spec: TargetSpec) -> str | None:
        """Why these are not the times of a target's CPU; None where they are.

        InputError for a pattern that is none.
        """
        if (self.cpu, self.arch, self.features) != (host.cpu_model(), spec.arch, spec.features):
            return f"it was measured on {self.cpu} ({self.arch}), expected {host.cpu_model()} ({spec.arch})"
        if self.threads != spec.cores:
            return f"it was measured with threads: {self.threads}, expected {spec.cores}"
        if missing := sorted(set(KERNELS) - {sample.kernel for sample in self.samples}):
            return f"it lacks {', '.join(missing)}"
        for sample in self.samples:
            if (sample.pattern is None) != sample.kernel.startswith("dense"):
                return f"a {sample.kernel} kernel has the pattern {sample.pattern}"
            if sample.pattern is not None:
                BalancedPattern(sample.pattern)
        return None

    def save(self, path: Path) -> None:
        """Write a file, in the place of one that may be there; OutputError where that fails."""
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        data = msgspec.json.format(msgspec.json.encode(self), indent=1)
        write_whole(path, lambda part: part.write_bytes(data), overwrite=True)


@dataclass(frozen=True)
class _Header:
    """What files of every version have."""

    version: int


def place(arch: str, features: Sequence[str], threads: int) -> Path:
    """Where times lie: a file in ``$XDG_CACHE_HOME/tvm-balanced/cpu_times``.

    It is named for this machine's CPU, and the architecture, features and threads of a target.
    """
    short = hashlib.sha256(",".join(features).encode()).hexdigest()[:8]
    name = f"{slug(host.cpu_model())}-{slug(arch)}-{short}-{threads}-threads.json"
    return user_cache() / "cpu_times" / name


def load(path: Path, spec: TargetSpec) -> CpuTimes:
    """Read a file; InputError where it is damaged, of another version, or not of the target's CPU."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Header).version
        if version == VERSION:
            times = msgspec.json.decode(data, type=CpuTimes)
            problem = times.problem(spec)
        else:
            problem = f"it has format version {version}, expected {VERSION}"
    except (OSError, ValueError, RecursionError, InputError) as error:
        problem = f"it cannot be read: {error}"
    if problem is not None:
        raise InputError(f"{path} cannot be used ({problem}); run tvm-balanced calibrate again")
    return times


def make_room(path: Path, spec: TargetSpec) -> None:
    """Make the folder of a file, and remove one that :func:`load` would refuse.

    Raises OutputError where the file could not be written.
    """
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                load(path, spec)
            except InputError:
                path.unlink()
    check_output(path, overwrite=True)


def _size(sample: Sample) -> int:
    return sample.n * sample.k


def _over_rows(samples: Sequence[Sample], rows: int) -> float:
    return _interpolated({sample.rows: sample.us_per_product for sample in samples}, rows)


def _interpolated(points: Mapping[_Number, float], at: float) -> float:
    """Value at ``at`` on straight lines through ``points`` where both axes are logarithms."""
    xs = sorted(points)
    logs = [math.log(points[x]) for x in xs]
    return math.exp(float(np.interp(math.log(at), [math.log(x) for x in xs], logs)))
