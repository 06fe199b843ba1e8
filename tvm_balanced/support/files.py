"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tvm_balanced.errors import OutputError


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written, before any work.

    Raises
    ------
    OutputError
        When ``path`` exists (without ``overwrite``), is a folder, or its folder is not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, expected the name of a file; choose another")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; choose another path or add --overwrite")
    if not path.parent.is_dir():
        way_out = "choose another place" if os.path.lexists(path.parent) else "make it first"
        raise OutputError(f"{path.parent} is not a folder, so {path} cannot be made; {way_out}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{path.parent} is not writable, so {path} cannot be made; choose another"
        )


def write_whole(path: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Let ``write`` make a file under a temporary name, and rename it when it is whole.

    Raises
    ------
    OutputError
        When it cannot be written; nothing is left behind.
    """
    check_output(path, overwrite)
    part: Path | None = None
    try:
        # a sibling: only within one file system is a rename atomic
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        part = Path(name)
        os.close(handle)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path} could not be written ({'the disk is full' if full else error.strerror or error}) "
            "and nothing was left there; free space or choose another place"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
