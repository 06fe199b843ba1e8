"""English prose that a machine carries: to calibrate on, and of another source to judge by."""

from __future__ import annotations

import ast
import gzip
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LARGEST = 600_000  # characters of a file


def calibration_prose() -> Iterator[str]:
    """Docstrings of Python and its packages, and documents of the system's packages."""
    paths = sysconfig.get_paths()
    for folder in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).parts
            if not {"site-packages", "tests", "test", "testing"} & set(inner):
                yield from _docstrings(path)
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if path.is_file() and "changelog" not in path.name.lower():
            body = _read(path)
            yield re.sub(r"<[^>]+>", " ", body) if path.suffix.startswith(".htm") else body


def judged_prose() -> Iterator[str]:
    """Manual pages, whose markup is taken out; none of Perl, whose manual is made of its documents."""
    for path in sorted(Path("/usr/share/man").glob("man[1-8]/*")):
        if "perl" in path.name or "::" in path.name or not path.is_file():
            continue
        body = re.sub(r"\\f(\[\w*\]|\(\w\w|\w)", "", _read(path))
        for marked, plain in ((r"\-", "-"), (r"\&", ""), (r"\(aq", "'"), (r"\(dq", '"')):
            body = body.replace(marked, plain)
        body = re.sub(
            r"^\.[BI][RI]? (.*)$", lambda line: line[1].replace('"', ""), body, flags=re.M
        )
        yield re.sub(r"^[.'].*$", "\n", body, flags=re.M)


def _docstrings(path: Path) -> Iterator[str]:
    source = _read(path)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield re.sub(r"``?([^`]*)``?_*", r"\1", ast.get_docstring(node) or "")


def _read(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", errors="ignore") as file:
                return file.read(_LARGEST)
        return path.read_text(errors="ignore")[:_LARGEST]
    except OSError:
        return ""
