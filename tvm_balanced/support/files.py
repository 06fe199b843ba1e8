"""Files and folders that are whole or absent, and that are on the disk when they are there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tvm_balanced.errors import OutputError


def user_cache() -> Path:
    """Return this package's part of the user's cache: ``$XDG_CACHE_HOME/tvm-balanced``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tvm-balanced"


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written, before any work.

    Raises OutputError when ``path`` exists (without ``overwrite``), is a folder, or its folder is not
    writable.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, expected the name of a file; choose another")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another path or add --overwrite")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Refuse a path in whose folder nothing can be made.

    Raises OutputError when that folder is missing or not writable.
    """
    if not path.parent.is_dir():
        way_out = "choose another place" if os.path.lexists(path.parent) else "make it first"
        raise OutputError(f"{path.parent} is not a folder, so {path} cannot be made; {way_out}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path.parent} is not writable, so {path} cannot be made; choose another"
        )


def write_whole(path: Path, write: Callable[[Path], object], overwrite: bool) -> None:
    """Let ``write`` make a file under a temporary name, and rename it when it is whole.

    Raises OutputError when it cannot be written; nothing is left behind.
    """
    check_output(path, overwrite)
    with as_output_error(path):
        replace_file(path, write)


def replace_file(path: Path, write: Callable[[Path], object], mode: int | None = None) -> None:
    """As :func:`write_whole` in the place of whatever is there, with the system's errors.

    Without ``mode`` the file has the permissions that the user gives to new ones.
    """
    # a sibling: only within one file system is a rename atomic
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o666 & ~_umask() if mode is None else mode)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` fill an empty folder under a temporary name, and put it in the place of ``path``.

    Raises OutputError when it cannot be written; nothing is left behind, and a folder that was there is
    as it was.
    """
    check_parent(path)
    with as_output_error(path):
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            work.chmod(0o777 & ~_umask())
            fill(work)
            sync(work)
            replace_folder(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def replace_folder(work: Path, path: Path) -> None:
    """Rename a folder to ``path``, in the place of one that may be there; both lie in one file system."""
    if path.exists():
        # folders cannot be exchanged in one step by portable means: the old one steps aside first
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        try:
            path.rename(aside / path.name)
            try:
                work.rename(path)
            except OSError:
                (aside / path.name).rename(path)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        work.rename(path)
    sync(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise what the system says of a path that cannot be written as one of our errors."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path} could not be written ({'the disk is full' if full else error.strerror or error}) "
            "and nothing was left there; free space or choose another place"
        ) from error
