"""One tuning record, and the environment it was measured in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "tvm-balanced tuning records"
FORMAT_VERSION = 1
METHODS = ("measured", "estimated")


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
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
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
