"""Names for nodes of TVM's trees, which mypy cannot see into: an annotation says at least which kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Expr: TypeAlias = Any
Stmt: TypeAlias = Any
Buffer: TypeAlias = Any
Block: TypeAlias = Any

# MetaSchedule's candidates (a schedule and its arguments), and records of them before they are ours
Candidate: TypeAlias = Any
TuningRecord: TypeAlias = Any

# lists and dictionaries as TVM writes them into files
TraceJson: TypeAlias = Any
ArgsJson: TypeAlias = Any
TargetJson: TypeAlias = Mapping[str, Any]
