"""Tuning records on disk: MetaSchedule's JSON database, one folder per GPU or CPU, and how they are found.

A folder holds ``database_workload.json`` and ``database_tuning_record.json``, as TVM's ``JSONDatabase``
writes them, and ``environment.json``, which says what they were measured on. Estimates of a model lie in
a folder of their own below it (``estimates/``). TVM itself gives up at the first line it cannot read, and
takes the best record of any GPU; here a line that cannot be used is left alone and named, and only records
of the target that is compiled for count.

Files are replaced whole, under a lock that several tuners share, so that ``kill -9`` at any moment leaves
the old or the new file. Nothing here imports TVM.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_balanced.errors import InputError, OutputError

if TYPE_CHECKING:
    from tvm_balanced.targets import TargetSpec

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
ENVIRONMENT = "environment.json"
ESTIMATES = "estimates"
LOGS_VARIABLE = "TVM_BALANCED_LOGS"

FORMAT = "tvm-balanced tuning records"
FORMAT_VERSION = 1
METHODS = ("measured", "estimated")

# annotations by which a trace names one of our kernels and its knobs, or the default schedule
KERNEL_NOTE = "tvm_balanced.kernel"
KNOB_NOTE = "tvm_balanced.knob."
DEFAULT_KERNEL = "default"

# what must be the same in two targets for one's records to serve the other
_TARGET_KEYS = ("kind", "arch", "mcpu", "mattr", "num-cores", "max_shared_memory_per_block")

# times the best: what the default schedule may take and still be chosen. By turns in one process times are
# sure to one or two percent; kernels that were faster by so little made MiniLM slower (docs/tuning.md).
# Those of GPUs are predicted as yet, and the model cannot tell nearer ones apart
_NEAR = {"llvm": 1.05}
_NEAR_OTHERS = 1.1

_LOCK = ".lock"
_LOST = b"null"
_LOCK_SECONDS = 60.0
_TOLD = 3  # problems that a warning spells out


@dataclass(frozen=True)
class Record:
    """One measured (or estimated) schedule of one kernel.

    Parameters
    ----------
    workload : tuple of str
        Structural hash of the kernel before scheduling, and TVM's base64 of it.
    trace : list
        MetaSchedule's trace, as JSON.
    run_secs : tuple of float
        Seconds of each run.
    target : dict
        TVM's target, as JSON.
    args_info : list
        Kind, dtype and shape of each argument.
    """

    workload: tuple[str, str]
    trace: Any
    run_secs: tuple[float, ...]
    target: Mapping[str, Any]
    args_info: Any

    @staticmethod
    def from_json(workload: Sequence[Any], record: Sequence[Any]) -> Record:
        """From MetaSchedule's JSON of a workload and of a record of it.

        Raises
        ------
        ValueError
            When it is of another form, or a time is no positive number.
        """
        key, module = workload
        trace, run_secs, target, args_info = record
        if not (isinstance(key, str | int) and isinstance(module, str)):
            raise ValueError("a workload is not a hash and a module")
        instructions, decisions = trace
        if not (isinstance(instructions, list) and isinstance(decisions, list)):
            raise ValueError("its trace is not instructions and decisions")
        if not isinstance(target, dict) or not isinstance(args_info, list):
            raise ValueError("its target or its arguments are missing")
        seconds = tuple(float(value) for value in run_secs)
        if not seconds or not all(math.isfinite(value) and value > 0 for value in seconds):
            raise ValueError("its times are not positive numbers")
        return Record((str(key), module), trace, seconds, target, args_info)

    @property
    def trace_text(self) -> str:
        """The trace as one line; equal for the same decisions."""
        return json.dumps(self.trace, separators=(",", ":"))


@dataclass(frozen=True)
class Environment:
    """What the records of a folder were made on.

    Parameters
    ----------
    device : str
        Name of the folder: ``h100``, ``amd-epyc-znver3-2-cores``.
    model : str
        The GPU or CPU, as its driver or the system calls it.
    kind, arch : str
        Of the target.
    tvm : str
        Version of TVM, whose IR the records hold.
    method : str
        ``"measured"`` or ``"estimated"``.
    runs : tuple of dict
        One entry a tuning run: time, package and commit, driver, CUDA, clock, runner, caches, seed.
    """

    device: str
    model: str
    kind: str
    arch: str
    tvm: str
    method: str
    runs: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def read(path: Path) -> Environment:
        """Read and check an ``environment.json``.

        Raises
        ------
        ValueError
            With what is wrong with it.
        """
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
        # its words come back in messages
        if not text.replace("\n", "").isprintable():
            raise ValueError(f"{path} holds unprintable characters")
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT!r}")
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {document.get('format_version')!r}, expected {FORMAT_VERSION}"
            )
        names = ("device", "model", "kind", "arch", "tvm", "method")
        runs = document.get("runs")
        if not all(isinstance(document.get(name), str) for name in names) or not (
            isinstance(runs, list) and all(isinstance(run, dict) for run in runs)
        ):
            raise ValueError(f"{path} lacks {', '.join(names)} or runs")
        if document["method"] not in METHODS:
            raise ValueError(f"{path} has method {document['method']!r}, expected one of {METHODS}")
        return Environment(**{name: document[name] for name in names}, runs=tuple(runs))

    def text(self) -> str:
        """The contents of ``environment.json``."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(document, indent=2) + "\n"

    def difference(self, other: Environment) -> str | None:
        """Why records of ``other`` cannot stand beside these, in a few words; None where they can."""
        for name in ("device", "kind", "arch", "tvm", "method"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                what = "TVM" if name == "tvm" else name
                return f"was made for {what} {theirs}, not {own}"
        own, theirs = ({run.get("caches") for run in one.runs} for one in (self, other))
        # times with other caches are no reason to prefer a schedule
        if own and theirs and own != theirs:
            told = ["/".join(sorted(map(str, one))) for one in (theirs, own)]
            return f"was measured with --cache {told[0]}, not {told[1]}"
        return None


def tvm_version() -> str:
    """The installed TVM's version, without importing it."""
    from importlib.metadata import version

    return version("apache-tvm")


def slug(text: str) -> str:
    """Lower-case words joined by hyphens: a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def device_name(spec: TargetSpec) -> str:
    """The folder of a target's records: the GPU's name, or the CPU's with architecture and cores."""
    if spec.kind == "cuda":
        return slug(spec.gpu or spec.arch)
    from tvm_balanced.doctor import cpu_model

    return f"{slug(cpu_model())}-{slug(spec.arch)}-{spec.cores}-cores"


# --- reading


def read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    """Every record of a folder that can be read, and what is wrong with the others.

    Parameters
    ----------
    folder : pathlib.Path
        Holds the database's two files; either may be missing.

    Returns
    -------
    list of Record, list of str
        In the order of the file; problems name file and line.
    """
    workload_lines, record_lines = _read_lines(folder)
    return _parse(folder, workload_lines, record_lines)


def _read_lines(folder: Path) -> tuple[list[bytes], list[bytes]]:
    # records only ever refer to workloads that were written before them
    with _shared_lock(folder):
        records, workloads = (_lines(folder / name) for name in (RECORDS, WORKLOADS))
    return workloads, records


def _lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _parse(
    folder: Path, workload_lines: Sequence[bytes], record_lines: Sequence[bytes]
) -> tuple[list[Record], list[str]]:
    problems: list[str] = []
    workloads: list[Any] = []
    for number, line in enumerate(workload_lines, 1):
        found = _load(line)
        if not (isinstance(found, list) and len(found) == 2):
            problems.append(f"line {number} of {folder / WORKLOADS} is damaged")
            found = None
        workloads.append(found)
    records = []
    for number, line in enumerate(record_lines, 1):
        where = f"line {number} of {folder / RECORDS}"
        found = _load(line)
        if not (isinstance(found, list) and len(found) == 2 and isinstance(found[1], list)):
            problems.append(f"{where} is damaged")
            continue
        index, body = found
        if type(index) is not int or not 0 <= index < len(workloads) or workloads[index] is None:
            problems.append(f"{where} is of a kernel that {WORKLOADS} lacks")
            continue
        try:
            records.append(Record.from_json(workloads[index], body))
        except (TypeError, ValueError) as error:
            problems.append(f"{where} cannot be used ({error})")
    return records, problems


def _load(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


# --- writing


class RecordFolder:
    """A device's folder, to write to; several tuners may share it.

    Parameters
    ----------
    folder : pathlib.Path
        Made when the first records are written.
    environment : Environment
        Of the records that will be added; its runs are added to those that are there.

    Raises
    ------
    OutputError
        When the folder holds records of another device, TVM or format, which are never overwritten.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self.environment = environment
        self._begun = False
        self._check()

    def _check(self) -> Environment | None:
        path = self.folder / ENVIRONMENT
        way_out = "give another folder with --logs, or move this one away"
        if not path.exists():
            if any((self.folder / name).exists() for name in (WORKLOADS, RECORDS)):
                raise OutputError(
                    f"{self.folder} holds records but no {ENVIRONMENT}, so it is not known what made them; "
                    f"{way_out}"
                )
            return None
        try:
            there = Environment.read(path)
        except ValueError as error:
            raise OutputError(f"{error}; {way_out}") from error
        difference = self.environment.difference(there)
        if difference is not None:
            raise OutputError(f"{self.folder} {difference}; {way_out}")
        return there

    def read(self) -> tuple[list[Record], list[str]]:
        """As :func:`read_folder`."""
        return read_folder(self.folder)

    def append(self, records: Sequence[Record]) -> None:
        """Add records behind those that are there; all of them are on disk when this returns.

        Raises
        ------
        OutputError
            When the folder cannot be written, or became another device's.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder):
                there = self._check()
                self._begin(there)
                # what is there is kept byte by byte, damaged lines too; only a cut-off end is closed
                workloads = _lines(self.folder / WORKLOADS)
                lines = _lines(self.folder / RECORDS)
                # records of workloads that were cut off must not become those of the next ones
                workloads += [_LOST] * (
                    max(map(_workload_of, lines), default=-1) + 1 - len(workloads)
                )
                index = {line: i for i, line in enumerate(workloads)}
                for record in records:
                    workload = _dump(list(record.workload))
                    if workload not in index:
                        index[workload] = len(workloads)
                        workloads.append(workload)
                    lines.append(_record_line(index[workload], record))
                _replace(self.folder / WORKLOADS, workloads)
                _replace(self.folder / RECORDS, lines)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror or error}); give another folder with "
                "--logs"
            ) from error

    def _begin(self, there: Environment | None) -> None:
        if self._begun:
            return
        # under the lock nobody else writes: these are of a process that was killed
        for name in (WORKLOADS, RECORDS, ENVIRONMENT):
            for left in self.folder.glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        runs = (*(there.runs if there else ()), *self.environment.runs)
        merged = Environment(**{**asdict(self.environment), "runs": runs})
        _replace_text(self.folder / ENVIRONMENT, merged.text())
        self._begun = True


def prune(folder: Path, keep: int) -> tuple[int, int]:
    """Keep the best ``keep`` schedules of each kernel and target, and the default schedule.

    Parameters
    ----------
    folder : pathlib.Path
        A device's folder.
    keep : int
        At least 1.

    Returns
    -------
    before, after : int
        Records that there were, and are.

    Raises
    ------
    InputError
        When the folder holds no records.
    OutputError
        When a line cannot be read: pruning would lose it.
    """
    if not (folder / RECORDS).is_file():
        raise InputError(f"{folder} holds no {RECORDS}; give the folder of one GPU or CPU")
    with _lock(folder):
        lines = _lines(folder / RECORDS)
        records, problems = _parse(folder, _lines(folder / WORKLOADS), lines)
        if problems:
            raise OutputError(
                f"pruning would lose what cannot be read: {problems[0]}; remove such lines first"
            )
        chosen: set[tuple[tuple[str, str], str]] = set()
        for key, group in _by_kernel(records).items():
            ranked = rank(group)
            chosen |= {(key, entry.record.trace_text) for entry in ranked[:keep]}
            chosen |= {(key, e.record.trace_text) for e in ranked if is_default(e.record.trace)}
        # each kernel keeps a record, so the workloads stay as they are: one file changes, in one step
        kept = [
            line
            for record, line in zip(records, lines, strict=True)
            if (_kernel(record), record.trace_text) in chosen
        ]
        _replace(folder / RECORDS, kept)
    return len(records), len(kept)


def _kernel(record: Record) -> tuple[str, str]:
    return record.workload[0], json.dumps(target_key(record.target))


def _by_kernel(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault(_kernel(record), []).append(record)
    return groups


def _workload_of(line: bytes) -> int:
    """Which workload a line of a record refers to; -1 for a damaged one."""
    found = re.match(rb"\[(\d{1,6}),", line)
    return int(found[1]) if found else -1


def _record_line(index: int, record: Record) -> bytes:
    return _dump([index, [record.trace, list(record.run_secs), record.target, record.args_info]])


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    _replace_bytes(path, b"".join(line + b"\n" for line in lines))


def _replace_text(path: Path, text: str) -> None:
    _replace_bytes(path, text.encode())


def _replace_bytes(path: Path, data: bytes) -> None:
    # a sibling: only within one file system is a rename atomic
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import filelock

    # the system frees it when its process ends, however that ends
    try:
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_SECONDS):
            yield
    except filelock.Timeout as error:
        raise OutputError(
            f"{folder / _LOCK} has been held by another process for {_LOCK_SECONDS:.0f} s; end it first"
        ) from error


@contextlib.contextmanager
def _shared_lock(folder: Path) -> Iterator[None]:
    """The lock, where the folder is one that a tuner could be writing to."""
    if (folder / _LOCK).exists() and os.access(folder / _LOCK, os.W_OK):
        with _lock(folder):
            yield
    else:
        yield


# --- choosing


@dataclass(frozen=True)
class Ranked:
    """One schedule of a kernel with all of its times.

    Parameters
    ----------
    record : Record
        The first record of it.
    seconds : float
        Median of its runs, those of the first record left out where there are more.
    times : int
        How often it was measured.
    """

    record: Record
    seconds: float
    times: int


def rank(records: Iterable[Record]) -> list[Ranked]:
    """Schedules of one kernel, best first.

    One that was measured again stands before any that was measured once, and its first time, by which it
    was chosen to be, no longer counts: the shortest of hundreds of single measurements is usually luck. The
    default schedule stands before what is hardly faster.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.trace_text, []).append(record)
    ranked = [
        Ranked(
            group[0],
            statistics.median([v for record in group[1:] or group for v in record.run_secs]),
            len(group),
        )
        for group in groups.values()
    ]
    ranked.sort(key=lambda entry: (entry.times < 2, entry.seconds))
    for entry in ranked[1:]:
        near = _NEAR.get(str(entry.record.target.get("kind")), _NEAR_OTHERS)
        if is_default(entry.record.trace) and entry.seconds <= ranked[0].seconds * near:
            ranked.remove(entry)
            return [entry, *ranked]
    return ranked


def is_default(trace: Any) -> bool:
    """Whether a trace stands for the default schedule: it only says so in an annotation."""
    instructions = trace[0]
    return any(
        isinstance(step, list)
        and len(step) == 4
        and step[0] == "Annotate"
        and step[2] == [KERNEL_NOTE]
        and step[1][1:] == [f'"{DEFAULT_KERNEL}"']
        for step in instructions
    )


def sampled_knobs(trace: Any) -> tuple[str, dict[str, int]] | None:
    """Kernel and knobs that a trace samples; None where it is a trace of TVM's own rules."""
    instructions, decisions = trace
    drawn = dict(decisions)
    values: dict[str, int] = {}
    kernel: str | None = None
    knobs: dict[str, int] = {}
    for position, (name, inputs, attrs, outputs) in enumerate(instructions):
        if name == "SampleCategorical" and position in drawn:
            values[outputs[0]] = attrs[0][drawn[position]]
        elif name == "Annotate" and attrs[0] == KERNEL_NOTE:
            kernel = str(inputs[1]).strip('"')
        elif name == "Annotate" and str(attrs[0]).startswith(KNOB_NOTE):
            knobs[attrs[0][len(KNOB_NOTE) :]] = values.get(inputs[1], inputs[1])
    return None if kernel is None else (kernel, knobs)


def target_key(target: Mapping[str, Any]) -> dict[str, Any]:
    """What of a target decides whether a record serves it."""
    return {name: target[name] for name in _TARGET_KEYS if target.get(name) not in (None, "", [])}


@dataclass(frozen=True)
class Choice:
    """The best schedule that is known for a kernel; plain values, to be handed to another process.

    Parameters
    ----------
    workload : tuple of str
        As in :class:`Record`.
    trace, args_info : JSON
        As in :class:`Record`.
    seconds : float
        Median, measured or estimated.
    method : str
        ``"measured"`` or ``"estimated"``.
    folder : str
        Where it comes from.
    """

    workload: tuple[str, str]
    trace: Any
    args_info: Any
    seconds: float
    method: str
    folder: str


@dataclass
class Lookup:
    """What was found for a target.

    Attributes
    ----------
    choices : dict
        By the kernel's structural hash.
    problems : list of str
        Records and folders that were passed over, and why.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def warning(self) -> str | None:
        """All problems in one sentence; None where there are none."""
        if not self.problems:
            return None
        told = "; ".join(self.problems[:_TOLD])
        more = len(self.problems) - _TOLD
        return f"tuning records were passed over: {told}" + (
            f"; and {more} more" if more > 0 else ""
        )


def user_logs() -> Path:
    """The user's own records: ``$XDG_CACHE_HOME/tvm-balanced/tuning_logs``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tvm-balanced" / "tuning_logs"


def default_place() -> Path:
    """Where tuning writes unless told otherwise: the first place that ``compile`` looks at by itself."""
    variable = os.environ.get(LOGS_VARIABLE)
    return Path(variable) if variable else user_logs()


def shipped_logs() -> Path:
    """The records that come with the package."""
    from importlib.resources import files

    return Path(str(files("tvm_balanced.tuning_logs")))


def places(logs: str | Path | None = None) -> list[Path]:
    """Where records are looked up, first match first.

    Parameters
    ----------
    logs : path-like, optional
        A folder of device folders, looked at first.

    Raises
    ------
    InputError
        When ``logs`` is no folder.
    """
    found = []
    if logs is not None:
        if not Path(logs).is_dir():
            raise InputError(
                f"logs is {logs}, which is no folder; give one that tvm-balanced tune wrote, or leave it out"
            )
        found.append(Path(logs))
    variable = os.environ.get(LOGS_VARIABLE)
    if variable:
        found.append(Path(variable))
    return [*found, user_logs(), shipped_logs()]


def find(spec: TargetSpec, where: Sequence[Path], target: Mapping[str, Any]) -> Lookup:
    """The best record of each kernel for a target.

    A measured record of a later place stands before an estimate of an earlier one. A target named by its
    architecture (``cuda-sm_90``) takes records of any GPU of it.

    Parameters
    ----------
    spec : TargetSpec
        The target.
    where : sequence of pathlib.Path
        From :func:`places`.
    target : mapping
        TVM's JSON of the target.
    """
    lookup = Lookup()
    for below in ("", ESTIMATES):
        for place in where:
            for folder in _device_folders(spec, place):
                _add(lookup, spec, folder / below if below else folder, target)
    return lookup


def _device_folders(spec: TargetSpec, place: Path) -> list[Path]:
    own = place / device_name(spec)
    if not spec.name.startswith("cuda-sm_"):
        return [own]
    others = sorted(folder for folder in place.glob("*") if folder.is_dir() and folder != own)
    return [own, *(folder for folder in others if _arch(folder) == spec.arch)]


def _arch(folder: Path) -> str | None:
    try:
        return Environment.read(folder / ENVIRONMENT).arch
    except ValueError:
        return None


def _add(lookup: Lookup, spec: TargetSpec, folder: Path, target: Mapping[str, Any]) -> None:
    if not any((folder / name).exists() for name in (RECORDS, WORKLOADS, ENVIRONMENT)):
        return
    try:
        environment = Environment.read(folder / ENVIRONMENT)
    except ValueError as error:
        lookup.problems.append(str(error))
        return
    expected = Environment(
        folder.parent.name if folder.name == ESTIMATES else folder.name,
        environment.model,
        spec.kind,
        spec.arch,
        tvm_version(),
        "estimated" if folder.name == ESTIMATES else "measured",
    )
    difference = expected.difference(environment)
    if difference is not None:
        lookup.problems.append(f"{folder} {difference}")
        return
    try:
        records, problems = read_folder(folder)
    except OSError as error:
        lookup.problems.append(f"{folder} cannot be read ({error.strerror or error})")
        return
    lookup.problems += problems
    wanted = target_key(target)
    others = 0
    groups: dict[str, list[Record]] = {}
    for record in records:
        if target_key(record.target) != wanted:
            others += 1
            continue
        groups.setdefault(record.workload[0], []).append(record)
    if others:
        lookup.problems.append(f"{others} records in {folder} are of another target")
    for key, group in groups.items():
        chosen = rank(group)[0]
        lookup.choices.setdefault(
            key,
            Choice(
                chosen.record.workload,
                chosen.record.trace,
                chosen.record.args_info,
                chosen.seconds,
                environment.method,
                str(folder),
            ),
        )
