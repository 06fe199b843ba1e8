"""Records of one kernel in order of their times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tvm_balanced.records.record import Record
from tvm_balanced.records.traces import is_default
from tvm_balanced.support.groups import grouped

# times the best: what the default schedule may take and still be chosen. By turns in one process times are
# sure to one or two percent; kernels that were faster by so little made MiniLM slower (docs/tuning.md).
# Those of GPUs are predicted as yet, and the model cannot tell nearer ones apart
_NEAR = {"llvm": 1.05}
_NEAR_OTHERS = 1.1


@dataclass(frozen=True)
class Ranked:
    """One schedule of a kernel: its first record, and how often it was measured.

    ``seconds`` is the median of its runs, those of the first record left out where there are more.
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
    ranked = [
        Ranked(
            group[0],
            statistics.median([v for record in group[1:] or group for v in record.run_secs]),
            len(group),
        )
        for group in grouped(records, lambda record: record.trace_text).values()
    ]
    ranked.sort(key=lambda entry: (entry.times < 2, entry.seconds))
    for entry in ranked[1:]:
        near = _NEAR.get(str(entry.record.target.get("kind")), _NEAR_OTHERS)
        if is_default(entry.record.trace) and entry.seconds <= ranked[0].seconds * near:
            ranked.remove(entry)
            return [entry, *ranked]
    return ranked
