"""``verify``: whether a compiled library is what its manifest says, and every kernel in it right.

Three questions, each answered for every part:

* Are the files, and the cubins inside ``lib.so``, those that the manifest names by their hashes?
* Does the recorded compiler make the same cubin of ``kernels/*.cu`` again?
* Does every kernel compute what its unscheduled TensorIR means? Each is called through the library's own
  host code with small seeded inputs and compared with a float64 reference
  (:mod:`tvm_balanced.verification.interpreter`); a CUDA kernel runs on the emulated device, checked for
  races, accesses out of bounds and reads of unwritten shared memory, its threads in a random order.

Calls of cuBLAS are not the library's code: they are listed by the layer's name, and not judged.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_balanced.artifact.folder import sha256
from tvm_balanced.artifact.manifest import (
    KERNELS,
    LIBRARY,
    REFERENCE,
    CompilerEntry,
    Manifest,
    read_manifest,
)
from tvm_balanced.errors import ArtifactError, InputError, ToolchainError
from tvm_balanced.report import WIDE, Printable

if TYPE_CHECKING:
    import tvm
    from rich.table import Table
    from tvm import tirx

    from tvm_balanced.cuda.emulator.device import Device, DeviceLaunch
    from tvm_balanced.runtime.library import Library
    from tvm_balanced.verification.arguments import KernelArguments

PASS, FAIL, UNCHECKED = "pass", "fail", "not checked"
# of a symbolic extent: small, odd, and more than one
SYMBOL = 3
# thread blocks of a kernel that are checked; the others run plain
BLOCKS = 6


@dataclass(frozen=True)
class PartCheck:
    """One file, cubin or recompilation."""

    part: str
    result: str  # ``"pass"``, ``"fail"`` or ``"not checked"``
    detail: str  # hashes, sizes, or what is wrong


@dataclass(frozen=True)
class KernelCheck:
    """One kernel function of the library, which may launch several CUDA kernels, or a call of cuBLAS."""

    name: str  # of the function, or of the layer that cuBLAS computes
    result: str  # ``"pass"``, ``"fail"`` or ``"not checked"``
    detail: str  # reason why it failed or was not checked; else empty
    kernels: tuple[str, ...] = ()  # CUDA kernels that it launched; empty on llvm
    # thread blocks launched, and how many of them were checked
    blocks: int = 0
    checked_blocks: int = 0
    # defects seen: races, accesses out of bounds or misaligned, reads of unwritten shared memory. None where
    # nothing is checked, on llvm
    races: int | None = None
    bounds: int | None = None
    unwritten: int | None = None
    # largest difference from the reference as a share of the output's scale, and what rounding explains; of
    # the output that is nearest to its limit. None where the kernel did not come to an end
    error: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Verification(Printable):
    """Result of :func:`verify`."""

    library: str  # its folder
    target: str
    device: str  # that its kernels ran on
    parts: tuple[PartCheck, ...]  # files, cubins and the recompilation
    kernels: tuple[KernelCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what was not checked does not fail."""
        return all(check.result != FAIL for check in self.checks)

    @property
    def checks(self) -> list[PartCheck | KernelCheck]:
        """Parts, then kernels."""
        return [*self.parts, *self.kernels]

    def to_json(self) -> dict[str, object]:
        """Plain values; numbers that are not finite are words."""
        document = asdict(self)
        for kernel in document["kernels"]:
            for field in ("error", "limit"):
                value = kernel[field]
                if value is not None and not math.isfinite(value):
                    kernel[field] = str(value)
        return {**document, "passed": self.passed}

    def tables(self, width: int = WIDE) -> list[Table]:
        """Two ``rich`` tables, of the parts and of the kernels."""
        from rich.table import Table

        parts = Table(title="parts", title_justify="left")
        for heading in ("part", "result", "detail"):
            parts.add_column(heading, overflow="fold")
        sources = [c for c in self.parts if c.part.startswith(f"{KERNELS}/") and c.result == PASS]
        for check in self.parts:
            if check not in sources:
                parts.add_row(check.part, check.result, check.detail)
        if sources:
            detail = f"{len(sources)} files with the manifest's SHA-256"
            parts.add_row(f"{KERNELS}/*.cu", PASS, detail)
        kernels = Table(title=f"kernels, on the {self.device}", title_justify="left")
        kernels.add_column("kernel", overflow="fold")
        for heading in ("blocks", "races", "bounds", "unwritten", "error", "limit"):
            kernels.add_column(heading, justify="right")
        kernels.add_column("result", overflow="fold")
        for k in self.kernels:
            blocks = f"{k.checked_blocks} of {k.blocks}" if k.blocks else "-"
            counts = ["-" if n is None else str(n) for n in (k.races, k.bounds, k.unwritten)]
            sizes = ["-" if x is None else f"{x:.1e}" for x in (k.error, k.limit)]
            result = f"{k.result}: {k.detail}" if k.detail else k.result
            kernels.add_row(k.name, blocks, *counts, *sizes, result)
        passed, left = (sum(k.result == r for k in self.kernels) for r in (PASS, UNCHECKED))
        unchecked = f", {left} not checked" if left else ""
        kernels.caption = (
            f"{passed} of {len(self.kernels)} kernels pass{unchecked}; blocks: checked of all; error "
            "and limit as shares of the output's scale"
        )
        return [parts, kernels]


def verify(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    symbol: int = SYMBOL,
    blocks: int = BLOCKS,
    kernels: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Check a compiled library, its kernels one by one.

    Needs a C++ compiler and no GPU. Recompiling needs NVRTC (extra ``cuda``) in the recorded version; where
    it is not there, that part is not checked, and says so.

    Parameters
    ----------
    path : path-like
        A ``model.tvmb`` folder, or the library itself.
    seed : int
        Seed of the inputs and of the order of threads.
    symbol : int
        Value of symbolic extents.
    blocks : int
        Thread blocks of each launch that are checked, spread over the grid; all blocks run. 0 checks all.
    kernels : sequence of str
        The only kernel functions to run, by name; all where empty.
    progress : callable, optional
        Function that is called with a few words on what is done next.

    Raises
    ------
    ArtifactError
        If the folder is no ``.tvmb``, its manifest is damaged, or it was compiled with another TVM.
    InputError
        For a kernel that the library does not have.
    ToolchainError
        When there is no C++ compiler, or this process has loaded a real CUDA driver.
    """
    path = Path(path)
    tell = progress or (lambda _: None)
    manifest = read_manifest(path)
    tell("files")
    parts = list(_check_files(path, manifest))
    cuda = manifest.target.kind == "cuda"
    device = "emulated CUDA device" if cuda else "CPU"
    if any(check.result != PASS for check in parts):
        # code that is not what was built is not run
        parts.append(PartCheck("kernels", UNCHECKED, "files are not as they were built"))
        return Verification(str(path), manifest.target.name, device, tuple(parts), ())
    emulated: Device | None = None
    if cuda:
        # before anything imports TVM, which would take a real driver where there is one
        from tvm_balanced.cuda.emulator.device import install

        emulated = install(manifest.target.arch)
        device = emulated.name
    from tvm_balanced.runtime.library import Library

    library = Library(path, "emulated" if cuda else None)
    library.check()
    if cuda:
        tell("recompile")
        parts.append(_check_recompilation(library))
    rows = tuple(_check_kernels(library, emulated, seed, symbol, blocks, kernels, tell))
    if not kernels:
        rows += tuple(_cublas_rows(manifest))
        if cuda:
            parts.append(_check_coverage(library, rows))
    return Verification(str(path), manifest.target.name, device, tuple(parts), rows)


def _check_files(path: Path, manifest: Manifest) -> Iterator[PartCheck]:
    from tvm_balanced.cuda.cubin import cubin_images

    for name, expected in manifest.files.items():
        try:
            digest = sha256(path / name)
        except OSError as error:
            yield PartCheck(name, FAIL, f"cannot be read ({error.strerror})")
            continue
        if digest == expected:
            yield PartCheck(name, PASS, f"SHA-256 {digest[:12]}")
        else:
            detail = f"SHA-256 {digest[:12]}, the manifest says {expected[:12]}"
            yield PartCheck(name, FAIL, detail)
    known = {cubin.sha256 for cubin in manifest.cubins}
    try:
        images = cubin_images(path / LIBRARY)
    except OSError:
        return  # a failed part already
    for image in images:
        detail = f"{image.num_bytes} bytes, SHA-256 {image.sha256[:12]}"
        result = PASS if image.sha256 in known else FAIL
        if result == FAIL:
            detail += ", which the manifest does not name"
        yield PartCheck(f"cubin {image.arch} in {LIBRARY}", result, detail)
    missing = known - {image.sha256 for image in images}
    for digest in sorted(missing):
        yield PartCheck(f"cubin in {LIBRARY}", FAIL, f"SHA-256 {digest[:12]} is not there")


def _check_recompilation(library: Library) -> PartCheck:
    """Whether the recorded compiler makes the recorded cubin of the sources."""
    from tvm_balanced.cuda import nvrtc

    part = "cubin made again of kernels/*.cu"
    recorded = library.manifest.compiler
    if recorded is None:
        return PartCheck(part, UNCHECKED, "the library has no CUDA kernel")
    compiler = f"{recorded.name} {recorded.version}"
    try:
        here = CompilerEntry.of(nvrtc.compiler())
    except ToolchainError as error:
        return PartCheck(part, UNCHECKED, f"recorded {compiler}; {error}")
    if here != recorded:
        other = f"{here.name} {here.version}"
        return PartCheck(part, UNCHECKED, f"recorded {compiler}, here is {other}")
    try:
        made = nvrtc.compile_cubin(library.source(), library.manifest.target.arch).cubin
    except ToolchainError as error:
        return PartCheck(part, FAIL, str(error))
    digest = hashlib.sha256(made).hexdigest()
    if digest in {cubin.sha256 for cubin in library.manifest.cubins}:
        return PartCheck(part, PASS, f"{compiler}, SHA-256 {digest[:12]}")
    wrong = f"{compiler} gives SHA-256 {digest[:12]}: the cubin is not its source's"
    return PartCheck(part, FAIL, wrong)


def _check_coverage(library: Library, rows: Sequence[KernelCheck]) -> PartCheck:
    """Whether every CUDA kernel of the library was launched."""
    from tvm_balanced.cuda.source import file_stem

    launched = {file_stem(kernel) for row in rows for kernel in row.kernels}
    left = [kernel for kernel in library.kernels if kernel not in launched]
    if not left:
        return PartCheck("kernels run", PASS, f"{len(launched)} CUDA kernels")
    return PartCheck("kernels run", UNCHECKED, f"not launched: {', '.join(left)}")


def _cublas_rows(manifest: Manifest) -> Iterator[KernelCheck]:
    """List what nobody judges here: each layer or product once, though several functions call it."""
    products: dict[str, dict[str, None]] = {}
    for call in manifest.cublas:
        products.setdefault(call.name, {})[call.product] = None
    for name, shapes in products.items():
        yield KernelCheck(name, UNCHECKED, f"computed by cuBLAS: {'; '.join(shapes)}")


def read_reference(path: Path) -> dict[str, tirx.PrimFunc]:
    """Read the unscheduled kernels of a ``model.tvmb`` folder: name of a function to its PrimFunc.

    Raises
    ------
    ArtifactError
        When they are not there, or cannot be read.
    """
    import tvm

    from tvm_balanced import ops  # noqa: F401  registers the operator

    file = path / REFERENCE
    if not file.is_file():
        raise ArtifactError(
            f"{path} has no {REFERENCE}, with which its kernels are compared; compile the model again"
        )
    try:
        mod = tvm.ir.load_json(gzip.decompress(file.read_bytes()).decode())
    except Exception as error:
        raise ArtifactError(
            f"{file} cannot be read ({str(error).strip().splitlines()[0]}); compile the model again"
        ) from error
    return {gvar.name_hint: func for gvar, func in mod.functions_items()}


def _check_kernels(
    library: Library,
    emulated: Device | None,
    seed: int,
    symbol: int,
    blocks: int,
    wanted: Sequence[str],
    tell: Callable[[str], None],
) -> Iterator[KernelCheck]:
    import tvm

    functions = read_reference(library.path)
    for name in wanted:
        if name not in functions:
            raise InputError(
                f'the library has no kernel function "{name}"; it has {", ".join(sorted(functions))}'
            )
    chosen = {name: functions[name] for name in (wanted or functions)}
    device = tvm.cpu()
    if emulated is not None:
        device = tvm.cuda(0)
        emulated.reset()
        emulated.forget()
        emulated.mode(check=True, order="random", seed=seed + 1, max_blocks=blocks)
        if not wanted:
            tell("compile for the emulated device")
            emulated.prepare(library.source(), instrument=True)
    module = tvm.runtime.load_module(str(library.path / LIBRARY))
    runner = KernelRunner(module, device, emulated, seed)
    try:
        for name, func in chosen.items():
            tell(name)
            values = _symbols(func, symbol)
            rows = [runner.check(name, func, value) for value in values]
            yield _together(rows, values)
    finally:
        if emulated is not None:
            emulated.mode()


def _symbols(func: tirx.PrimFunc, symbol: int) -> list[int]:
    """Values of symbolic extents that a kernel is called with, several where M decides what is launched.

    The least of each range of M that the schedule tells apart, but ``symbol`` for the range that it is in.
    """
    from tvm_balanced.schedules.balanced_block import find
    from tvm_balanced.schedules.rules import ROWS_FROM
    from tvm_balanced.verification.arguments import Facts, symbols_of

    block = find(func) if func.attrs is not None and ROWS_FROM in func.attrs else None
    if block is None:
        return [symbol]
    firsts = [int(first) for first in func.attrs[ROWS_FROM]]
    lead = list(block.data.shape[:-2])
    numbers = dict.fromkeys(symbols_of(func), 1)
    facts = Facts(func, numbers)

    def range_of(value: int) -> int:
        numbers.update(dict.fromkeys(numbers, value))
        rows = math.prod(facts.number(extent) for extent in lead)
        return sum(first <= rows for first in firsts)

    by_range = {range_of(value): value for value in range(firsts[-1], 0, -1)}
    return [value for _, value in sorted({**by_range, range_of(symbol): symbol}.items())]


def _together(rows: Sequence[KernelCheck], values: Sequence[int]) -> KernelCheck:
    """One row of a kernel that was called several times, with symbolic extents of ``values``."""
    if len(rows) == 1:
        return rows[0]
    worst = min(rows, key=lambda row: (FAIL, UNCHECKED, PASS).index(row.result))

    def total(name: str) -> int | None:
        counts = [count for row in rows if (count := getattr(row, name)) is not None]
        return sum(counts) if counts else None

    judged = [row for row in rows if row.error is not None and row.limit]
    nearest = max(judged, key=lambda row: (row.error or 0.0) / (row.limit or 1.0), default=worst)
    value = values[rows.index(worst)]
    return replace(
        worst,
        detail=f"symbolic extents of {value}: {worst.detail}" if worst.detail else "",
        kernels=tuple(dict.fromkeys(kernel for row in rows for kernel in row.kernels)),
        blocks=total("blocks") or 0,
        checked_blocks=total("checked_blocks") or 0,
        races=total("races"),
        bounds=total("bounds"),
        unwritten=total("unwritten"),
        error=nearest.error,
        limit=nearest.limit,
    )


@dataclass(frozen=True)
class KernelRunner:
    """Calls the kernels of a loaded library on a device."""

    module: tvm.runtime.Module
    device: tvm.runtime.Device
    emulated: Device | None
    seed: int

    def check(self, name: str, func: tirx.PrimFunc, symbol: int) -> KernelCheck:
        """Call a kernel with seeded inputs, symbolic extents of ``symbol``, and judge its outputs."""
        import tvm

        from tvm_balanced.verification.arguments import seeded_arguments
        from tvm_balanced.verification.tensorir import KernelReferenceError

        row = KernelCheck(name, FAIL, "")
        try:
            given = seeded_arguments(func, self.seed, symbol)
        except KernelReferenceError as error:
            return replace(row, result=UNCHECKED, detail=str(error))
        tensors: list[Any] = [
            tvm.runtime.tensor(array, self.device) if isinstance(array, np.ndarray) else array
            for array in given.arrays
        ]
        problem = ""
        try:
            self.module.get_function(name, query_imports=True)(*tensors)
            if self.emulated is not None:
                self.emulated.synchronize()
        except Exception as error:
            problem = str(error).strip().splitlines()[-1]
        if self.emulated is not None:
            launches = self.emulated.launches()
            self.emulated.forget()
            row = _with_launches(row, launches)
            problem = next((launch.error for launch in launches if launch.error), problem)
            if not launches and not problem and any(tensors[i].numpy().size for i in given.outputs):
                # the emulated device's memory is the host's, a GPU's is not
                problem = "no CUDA kernel was launched: the host would write to the GPU's memory"
            if problem:
                # before the tensors are freed, which a failed device refuses
                self.emulated.reset()
        if problem:
            return replace(row, detail=problem)
        return _compare(row, func, given, tensors, symbol)


def _compare(
    row: KernelCheck,
    func: tirx.PrimFunc,
    given: KernelArguments,
    tensors: Sequence[Any],
    symbol: int,
) -> KernelCheck:
    """Add the error and the result to the row."""
    from tvm_balanced.verification.interpreter import evaluate
    from tvm_balanced.verification.tensorir import KernelReferenceError
    from tvm_balanced.verification.tolerance import difference, tolerance

    try:
        expected, limits = evaluate(func, given.arrays), tolerance(func, symbol)
    except KernelReferenceError as error:
        return replace(row, result=UNCHECKED, detail=str(error))
    if any(np.isnan(array).any() for array in expected.values() if array.dtype.kind == "f"):
        # agreement in what is no number would say nothing
        return replace(row, result=UNCHECKED, detail="the seeded inputs have no finite result")
    problems, nearest = [], -1.0
    for position in given.outputs:
        limit = limits[position]
        deviation = difference(tensors[position].numpy(), expected[position])
        if not deviation.within(limit):
            problems.append("the result is wrong")
        largest = deviation.largest
        share = largest / limit.largest if limit.largest else float(largest > 0)
        if share > nearest or row.error is None:
            nearest = share
            row = replace(row, error=largest, limit=limit.largest)
    defects = {
        "race": row.races,
        "access out of bounds": row.bounds,
        "read of unwritten shared memory": row.unwritten,
    }
    problems += [defect for defect, count in defects.items() if count]
    if not problems:
        return replace(row, result=PASS, detail="")
    details = [row.detail, *dict.fromkeys(problems)]
    return replace(row, result=FAIL, detail="; ".join(part for part in details if part))


def _with_launches(row: KernelCheck, launches: Sequence[DeviceLaunch]) -> KernelCheck:
    """Add what the emulated device saw to the row."""
    counts: dict[str, Any] = dict.fromkeys(
        ("races", "bounds", "unwritten", "blocks", "checked_blocks"), 0
    )
    first = ""
    for launch in launches:
        if launch.report is None:
            continue
        grid = math.prod(launch.grid)
        counts["blocks"] += grid
        counts["checked_blocks"] += round(grid / launch.report.scale)
        for issue in launch.report.issues:
            race, unwritten = issue.kind.startswith("race"), "uninitialised" in issue.kind
            counts["races" if race else "unwritten" if unwritten else "bounds"] += issue.count
            first = first or f"{issue.kind} at line {issue.line} of {launch.kernel}: {issue.source}"
    names = tuple(dict.fromkeys(launch.kernel for launch in launches))
    return replace(row, kernels=names, detail=first, **counts)
