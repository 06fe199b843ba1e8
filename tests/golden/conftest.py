"""``--update-golden`` writes golden files instead of comparing with them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files of tests/golden anew"
    )


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name, or write the file."""
    # pytest knows the option only where this folder is named on its command line
    update = request.config.getoption("--update-golden", default=False)

    def check(name: str, text: str) -> None:
        __tracebackhide__ = True
        path = HERE / name
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return
        stored = path.read_text() if path.is_file() else ""
        if text != stored:
            diff = difflib.unified_diff(
                stored.splitlines(), text.splitlines(), f"golden/{name}", "generated", lineterm=""
            )
            pytest.fail(
                "\n".join(diff) + "\nif the new text is meant: pytest tests/golden --update-golden",
                pytrace=False,
            )

    return check
