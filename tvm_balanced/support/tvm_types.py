"""Names for nodes of TVM's trees, which mypy cannot see into: an annotation says at least which kind."""

from __future__ import annotations

from typing import Any, TypeAlias

Expr: TypeAlias = Any
Stmt: TypeAlias = Any
Buffer: TypeAlias = Any
Block: TypeAlias = Any
