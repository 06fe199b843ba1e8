"""One tuning record, and the environment it was measured in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tvm_balanced.support.tvm_types import ArgsJson, TargetJson, TraceJson

FORMAT = "tvm-balanced tuning records"
FORMAT_VERSION = 1
Method = Literal["measured", "estimated"]


class _Body(msgspec.Struct, array_like=True, frozen=True):
    """A record as MetaSchedule writes it, behind the number of its workload."""

    trace: tuple[list[Any], list[Any]]
    run_secs: Annotated[
        list[Annotated[float, msgspec.Meta(gt=0, le=1e9)]], msgspec.Meta(min_length=1)
    ]
    target: dict[str, Any]
    args_info: list[Any]


@dataclass(frozen=True)
class Record:
    """One measured (or estimated) schedule of one kernel; what is TVM's is its JSON.

    Parameters
    ----------
    workload : tuple of str
        Structural hash of the kernel before scheduling, and TVM's base64 of it.
    trace : list
        MetaSchedule's instructions and decisions.
    run_secs : tuple of float
        Seconds of each run.
    target : dict
        The target it was made for.
    args_info : list
        Kind, dtype and shape of each argument.
    """

    workload: tuple[str, str]
    trace: TraceJson
    run_secs: tuple[float, ...]
    target: TargetJson
    args_info: ArgsJson

    @staticmethod
    def from_json(workload: Sequence[Any], record: Sequence[Any]) -> Record:
        """Return MetaSchedule's record of a workload; a ValueError says what is wrong with one."""
        key, module = msgspec.convert(workload, tuple[str | int, str])
        body = msgspec.convert(record, _Body)
        trace = [list(part) for part in body.trace]
        return Record((str(key), module), trace, tuple(body.run_secs), body.target, body.args_info)

    @property
    def trace_text(self) -> str:
        """The trace as one line; equal for the same decisions."""
        return trace_text(self.trace)


def trace_text(trace: TraceJson) -> str:
    """MetaSchedule's JSON of a trace as one line; numbers may still be TVM's nodes."""
    return json.dumps(trace, separators=(",", ":"), default=lambda node: node.value)


@dataclass(frozen=True)
class Environment:
    """What the records of a folder were made on.

    Parameters
    ----------
    device : str
        Name of the folder: ``h100``, ``amd-epyc-znver3-2-cores``.
    model : str
        Name of the GPU or CPU that its driver or the system gives.
    kind, arch : str
        Kind and architecture of the target.
    tvm : str
        The version of TVM whose IR the records hold.
    method : str
        ``"measured"`` or ``"estimated"``.
    runs : tuple of dict
        One entry for each tuning run: time, package and commit, clock, runner, caches, seed.
    """

    device: str
    model: str
    kind: str
    arch: str
    tvm: str
    method: Method
    runs: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def read(path: Path) -> Environment:
        """Read an ``environment.json``; a ValueError says what is wrong with one."""
        try:
            data = path.read_bytes()
            document = msgspec.json.decode(data, type=dict[str, Any])
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
        # its words come back in messages
        if not data.decode().replace("\n", "").isprintable():
            raise ValueError(f"{path} holds unprintable characters")
        for name, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
            if document.get(name) != expected:
                what = name.replace("_", " ")
                raise ValueError(f"{path} has {what} {document.get(name)!r}, expected {expected!r}")
        try:
            return msgspec.convert(document, Environment)
        except msgspec.ValidationError as error:
            raise ValueError(f"{path} is not as written ({error})") from error

    def text(self) -> str:
        """Return the contents of ``environment.json``."""
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
            before, now = ("/".join(sorted(map(str, caches))) for caches in (theirs, own))
            return f"was measured with --cache {before}, not {now}"
        return None
