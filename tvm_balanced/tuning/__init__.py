"""Tuning: better knobs than the default ones, found by MetaSchedule and kept as records.

:func:`tvm_balanced.tuning.run.tune` is what to call; ``docs/tuning.md`` says how it works.
"""

from __future__ import annotations
