"""What all passes share: each is an ``IRModule -> IRModule`` that ``tvm.transform.Sequential`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import tvm
from tvm import relax

Pass: TypeAlias = Callable[[tvm.IRModule], tvm.IRModule]


def module_pass(transform: Pass, name: str = "") -> Pass:
    """Make TVM's module pass of a function, with its docstring, and its name where none is given."""
    made: Pass = tvm.transform.module_pass(
        lambda mod, _context: transform(mod), opt_level=0, name=name or transform.__name__
    )
    made.__doc__ = transform.__doc__
    return made


def relax_functions(mod: tvm.IRModule) -> dict[tvm.ir.GlobalVar, relax.Function]:
    """Return the Relax functions of a module; kernels are left out."""
    functions = mod.functions_items()
    return {gvar: func for gvar, func in functions if isinstance(func, relax.Function)}
