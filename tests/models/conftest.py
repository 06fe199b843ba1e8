"""Every module that a pass makes is checked for being well formed."""

import pytest

from tests.helpers.well_formed import every_pass_checked


@pytest.fixture(autouse=True)
def well_formed():
    with every_pass_checked():
        yield
