"""Every module that a pass makes is checked for being well formed."""

import pytest
import tvm
from tvm import relax


@pytest.fixture
def well_formed():
    def check(mod: tvm.IRModule) -> tvm.IRModule:
        relax.analysis.well_formed(mod)  # raises where something is wrong
        return mod

    return check
