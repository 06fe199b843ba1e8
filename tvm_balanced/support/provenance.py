"""What made a result: when, the commit it was made at, and the versions of packages."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def now() -> str:
    """Return this moment in UTC to the second, as ISO 8601 writes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit(whole: bool = False) -> str:
    """Return the commit of this checkout; empty where it is none.

    Ten digits, with ``+`` where a file was changed, or the ``whole`` hash alone. ``TVM_BALANCED_COMMIT``
    says it where the code was installed from a checkout that is not there.
    """
    given = os.environ.get("TVM_BALANCED_COMMIT")
    if given is not None:
        return given
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # an installed copy below some other repository is no checkout of this one
        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return ""
        if whole:
            return git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def package_version(package: str) -> str | None:
    """Return the version of a package without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tvm_version() -> str:
    """Return the installed TVM's version, without importing it."""
    return version("apache-tvm")


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    known = {package: package_version(package) for package in packages}
    return {package: number for package, number in known.items() if number is not None}
