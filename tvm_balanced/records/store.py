"""Tuning records on disk: MetaSchedule's JSON database, one folder per GPU or CPU, and how they are found.

A folder holds ``database_workload.json`` and ``database_tuning_record.json``, as TVM's ``JSONDatabase``
writes them, and ``environment.json``, which says what they were measured on. Estimates of a model lie in
a folder of their own below it (``estimates/``). TVM itself gives up at the first line it cannot read, and
takes the best record of any GPU; here a line that cannot be used is left alone and named, and only records
of the target that is compiled for count.

Lines are appended and synced under a lock that several tuners share, so that ``kill -9`` at any moment costs
at most the line that was being written. Nothing here imports TVM.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import msgspec

from tvm_balanced.errors import InputError, OutputError
from tvm_balanced.records.ranking import rank
from tvm_balanced.records.record import Environment, Record
from tvm_balanced.records.traces import is_default
from tvm_balanced.support.files import replace_file, sync
from tvm_balanced.support.groups import grouped
from tvm_balanced.support.tvm_types import TargetJson

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
ENVIRONMENT = "environment.json"

# what must be the same in two targets for one's records to serve the other
_TARGET_KEYS = ("kind", "arch", "mcpu", "mattr", "num-cores", "max_shared_memory_per_block")
_LOCK = ".lock"
_LOST = b"null"
_LOCK_SECONDS = 60.0
SPELT_OUT = 3  # problems that a warning gives in full


# --- reading


def read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a folder in the order of the file, and what is wrong with its other lines.

    Either of the database's two files may be missing; problems name file and line.
    """
    # records only ever refer to workloads that were written before them
    with _shared_lock(folder):
        records, workloads = (_lines(folder / name) for name in (RECORDS, WORKLOADS))
    return _parse(folder, workloads, records)


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
    workloads = [_pair(line) for line in workload_lines]
    for number, workload in enumerate(workloads, 1):
        if workload is None:
            problems.append(f"line {number} of {folder / WORKLOADS} is damaged")
    records = []
    for number, line in enumerate(record_lines, 1):
        where = f"line {number} of {folder / RECORDS}"
        pair = _pair(line)
        if pair is None:
            problems.append(f"{where} is damaged")
            continue
        index, body = pair
        known = type(index) is int and 0 <= index < len(workloads)
        workload = workloads[index] if known else None
        if workload is None:
            problems.append(f"{where} is of a kernel that {WORKLOADS} lacks")
            continue
        try:
            records.append(Record.from_json(workload, body))
        except ValueError as error:
            problems.append(f"{where} cannot be used ({error})")
    return records, problems


def _pair(line: bytes) -> list[Any] | None:
    """Return the two values of a line; None for a damaged one."""
    try:
        value = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and len(value) == 2 else None


# --- writing


class RecordFolder:
    """A device's folder, to write to; several tuners may share it.

    Parameters
    ----------
    folder : pathlib.Path
        The folder, which is made when the first records are written.
    environment : Environment
        What the records that will be added were made on; its runs are added to those that are there.

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
                self._begin(self._check())
                self._append(records)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror or error}); give another folder with "
                "--logs"
            ) from error

    def _append(self, records: Sequence[Record]) -> None:
        known = _lines(self.folder / WORKLOADS)
        last = max(map(_workload_of, _lines(self.folder / RECORDS)), default=-1)
        # records of workloads that were cut off must not become those of the next ones
        workloads = [_LOST] * (last + 1 - len(known))
        index = {line: i for i, line in enumerate([*known, *workloads])}
        lines = []
        for record in records:
            workload = msgspec.json.encode(record.workload)
            if workload not in index:
                index[workload] = len(known) + len(workloads)
                workloads.append(workload)
            body = (record.trace, record.run_secs, record.target, record.args_info)
            lines.append(msgspec.json.encode((index[workload], body)))
        # a record never refers to a workload that is not on disk
        _append_lines(self.folder / WORKLOADS, workloads)
        _append_lines(self.folder / RECORDS, lines)

    def _begin(self, there: Environment | None) -> None:
        if self._begun:
            return
        # under the lock nobody else writes: these are of a process that was killed
        for name in (WORKLOADS, RECORDS, ENVIRONMENT):
            for left in self.folder.glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        runs = (*(there.runs if there else ()), *self.environment.runs)
        merged = replace(self.environment, runs=runs)
        _replace(self.folder / ENVIRONMENT, merged.text().encode())
        self._begun = True


def prune(folder: Path, keep: int) -> tuple[int, int]:
    """Keep the best ``keep`` schedules of each kernel and target, and the default schedule.

    Returns how many records there were in the device's folder, and are.

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
        for key, group in grouped(records, _kernel).items():
            ranked = rank(group)
            chosen |= {
                (key, entry.record.trace_text)
                for place, entry in enumerate(ranked)
                if place < keep or is_default(entry.record.trace)
            }
        # each kernel keeps a record, so the workloads stay as they are: one file changes, in one step
        kept = [
            line
            for record, line in zip(records, lines, strict=True)
            if (_kernel(record), record.trace_text) in chosen
        ]
        _replace(folder / RECORDS, b"".join(line + b"\n" for line in kept))
    return len(records), len(kept)


def _kernel(record: Record) -> tuple[str, str]:
    return record.workload[0], json.dumps(target_key(record.target))


def _workload_of(line: bytes) -> int:
    """Which workload a line of a record refers to; -1 for a damaged one."""
    match = re.match(rb"\[(\d{1,6}),", line)
    return int(match[1]) if match else -1


def _append_lines(path: Path, lines: Sequence[bytes]) -> None:
    if not lines:
        return
    with path.open("a+b") as file:
        # what is there stays byte by byte, damaged lines too; only a cut-off end is closed
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(b"".join(line + b"\n" for line in lines))
    sync(path)


def _replace(path: Path, data: bytes) -> None:
    # others may read the folder whatever this user's mask is
    replace_file(path, lambda part: part.write_bytes(data), mode=0o644)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
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
    """Hold the lock, where the folder is one that a tuner could be writing to."""
    if (folder / _LOCK).exists() and os.access(folder / _LOCK, os.W_OK):
        with _lock(folder):
            yield
    else:
        yield


def target_key(target: TargetJson) -> dict[str, Any]:
    """Return what of a target decides whether a record serves it."""
    return {name: target[name] for name in _TARGET_KEYS if target.get(name) not in (None, "", [])}
