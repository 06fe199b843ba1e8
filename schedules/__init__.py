"""TensorIR schedules of the balanced-sparse operator and of what surrounds it, one rule per file.

A rule is a module with ``apply(func, target) -> tvm.s_tir.Schedule | None``; None means "not my case" and
the next rule is asked. The order below is from the most special to the fallback.
"""
