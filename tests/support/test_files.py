"""Whole or absent: what is left when writing fails half way."""

import errno
import os
import stat

import pytest

from tvm_balanced.errors import OutputError
from tvm_balanced.support import files


def fail(part):
    target = part / "half" if part.is_dir() else part
    target.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_whole_with_the_rights_of_a_new_one(tmp_path):
    path = tmp_path / "a"
    files.write_whole(path, lambda part: part.write_bytes(b"new"), overwrite=False)
    assert path.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(OutputError, match="exists; choose another path or add --overwrite"):
        files.write_whole(path, lambda part: part.write_bytes(b"other"), overwrite=False)
    files.write_whole(path, lambda part: part.write_bytes(b"other"), overwrite=True)
    assert path.read_bytes() == b"other"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OutputError, match="the disk is full"):
        files.write_whole(path, fail, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        files.replace_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "m"
    for text in ("old", "new"):
        files.write_whole_folder(path, lambda work, text=text: (work / text).write_text(text))
        assert os.listdir(path) == [text]
    with pytest.raises(OutputError, match="the disk is full"):
        files.write_whole_folder(path, fail)
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["m"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path):
    old = tmp_path / "m"
    old.mkdir()
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "missing", old)
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "is a folder, expected the name of a file"),
        ("missing/a", "make it first"),
        ("file/a", "choose another place"),
    ],
)
def test_what_cannot_be_written_is_refused_beforehand(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message):
        files.check_output(tmp_path / path, overwrite=True)


def test_synced_bytes(tmp_path):
    files.write_synced(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
