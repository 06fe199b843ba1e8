"""Every module that a pass makes is checked for being well formed: ours, and TVM's behind them."""

from collections.abc import Iterator
from contextlib import contextmanager

import tvm
from tvm import relax, s_tir


@tvm.instrument.pass_instrument
class WellFormed:
    """Checks Relax functions and kernels behind every pass."""

    def run_after_pass(self, mod, info):
        # both raise where something is wrong
        relax.analysis.well_formed(mod)
        s_tir.analysis.verify_well_formed(mod)


@contextmanager
def every_pass_checked() -> Iterator[None]:
    """Passes that run meanwhile, under this context or one within, must leave well-formed modules."""
    level = tvm.transform.PassContext.current().opt_level
    with tvm.transform.PassContext(opt_level=level, instruments=[WellFormed()]):
        yield
