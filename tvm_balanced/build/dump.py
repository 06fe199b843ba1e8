"""``dump_ir``: what every phase of a compilation made, as numbered files of one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_balanced.errors import OutputError

if TYPE_CHECKING:
    import tvm


def start_dump(folder: Path) -> None:
    """Make the folder that files are to be dumped into.

    Raises OutputError when it cannot be made, or holds files already, which numbers could not be told
    from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        raise OutputError(
            f"the IR cannot be written to {folder} ({error.strerror}); give another folder"
        ) from error
    if taken is not None:
        raise OutputError(
            f"{folder} holds {taken.name} already, expected a new or an empty folder for the IR; "
            "empty it or give another"
        )


def dump(folder: Path | None, name: str, text: str) -> None:
    """Write ``text`` as the folder's next file, ``03-NAME``; without a folder do nothing.

    Raises OutputError when the file cannot be written.
    """
    if folder is None:
        return
    # counted in the folder, as a build goes on in another process
    file = folder / f"{len(list(folder.glob('[0-9][0-9]-*'))) + 1:02}-{name}"
    try:
        file.write_text(text)
    except OSError as error:
        raise OutputError(
            f"the IR cannot be written to {file} ({error.strerror}); give another folder"
        ) from error


def run_passes(
    mod: tvm.IRModule, passes: Sequence[tvm.transform.Pass], folder: Path | None
) -> tvm.IRModule:
    """Apply passes in order, and dump what each made under its own name."""
    for each in passes:
        mod = each(mod)
        if folder is not None:
            dump(folder, f"{each.info.name}.py", mod.script())
    return mod


def device_sources(module: tvm.runtime.Module, kind: str, form: str) -> list[str]:
    """Return the text, as ``form``, of every part of a built module whose kind is ``kind``."""
    sources = []
    pending, seen = [module], set()
    while pending:
        current = pending.pop(0)
        if hash(current) in seen:
            continue
        seen.add(hash(current))
        if current.kind == kind:
            sources.append(str(current.inspect_source(form)))
        pending.extend(current.imports)
    return sources
