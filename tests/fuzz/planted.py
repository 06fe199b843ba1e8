"""Readers with faults of every class, to see that the runner sees them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.fuzz.corpus import Kind
from tvm_balanced.errors import InputError


def _make(folder: Path) -> None:
    (folder / "sample").mkdir()
    (folder / "sample" / "file").write_bytes(bytes(range(256)))


def _damaged(path: Path, whole: Path) -> bool:
    return (path / "file").read_bytes() != (whole / "file").read_bytes()


def _abort(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        os.abort()


def _exit(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        os._exit(3)


def _hang(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        time.sleep(60)


def _raw(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        raise KeyError("name")


def _dump(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        raise InputError("the file is damaged\n  at inline_container.cc:340")


def _wrong(path: Path, whole: Path, _number: int) -> None:
    assert not _damaged(path, whole), "another answer"


def _refused(path: Path, whole: Path, _number: int) -> None:
    if _damaged(path, whole):
        raise InputError("the file is damaged; copy it again")


def _refused_whole(_path: Path, _whole: Path, _number: int) -> None:
    raise InputError("the file is damaged; copy it again")


PLANTED = {
    "abort": Kind(_make, _abort),
    "exit": Kind(_make, _exit),
    "hang": Kind(_make, _hang),
    "raw": Kind(_make, _raw),
    "dump": Kind(_make, _dump),
    "wrong": Kind(_make, _wrong),
    "refused": Kind(_make, _refused),
}
REFUSED_WHOLE = {"refused": Kind(_make, _refused_whole)}
