import errno
import os
from pathlib import Path

import pytest

from mmfeat.errors import WriteError
from mmfeat.system.files import canonical_json, write_atomic


def test_exclusive_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    assert write_atomic(path, b"one", exclusive=True)
    assert not write_atomic(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    write_atomic(path, b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(path.parent) == ["a"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    write_atomic(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"cannot write .*a: No space left on device; free some space"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    assert write_atomic(tmp_path / "a", b"one", exclusive=True)
    assert not write_atomic(tmp_path / "a", b"two", exclusive=True)
    assert (tmp_path / "a").read_bytes() == b"one"


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'
