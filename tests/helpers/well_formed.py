"""Every module that a pass makes is checked for being well formed: ours, and TVM's of the same pipeline.

TVM's lowering of scheduled kernels is left out: it leaves extents of buffers to variables of the host, and
defines a variable in both operands of an expression.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import tvm
from tvm import relax, s_tir

LOWERING = ("tirx.", "s_tir.", "_pipeline", "sequential")  # single passes of a sequence are checked


@tvm.instrument.pass_instrument
class WellFormed:
    """Checks Relax functions and kernels behind every pass."""

    def run_after_pass(self, mod, info):
        if info.name.startswith(LOWERING):
            return
        # both raise where something is wrong
        relax.analysis.well_formed(mod)
        s_tir.analysis.verify_well_formed(mod)


@contextmanager
def every_pass_checked() -> Iterator[None]:
    """Passes that run meanwhile, under this context or one within, must leave well-formed modules."""
    level = tvm.transform.PassContext.current().opt_level
    with tvm.transform.PassContext(opt_level=level, instruments=[WellFormed()]):
        yield
