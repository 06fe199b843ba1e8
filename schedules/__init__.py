"""TensorIR schedules of the balanced-sparse operator and of what surrounds it, one rule per file.

A rule is a module with ``apply(func, target) -> tvm.s_tir.Schedule | None``; None means "not my case" and
the next rule is asked. ``dispatch.py`` says which rules serve which target, and in which order.
"""

from __future__ import annotations
