"""Files and folders written whole: the earlier content or the new one, and nothing left of a killed writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmfeat.errors import WriteError
from mmfeat.system.files import canonical_json, new_folder, write_atomic


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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with new_folder(tmp_path / "a" / "export") as place:
            (place / content).write_text(content)
        assert names(tmp_path / "a") == ["export"]
        assert names(tmp_path / "a" / "export") == [content]


def test_what_fails_leaves_the_earlier_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "export") as place:
        (place / "one").write_text("")
    with pytest.raises(WriteError, match="No such file"), new_folder(tmp_path / "export") as place:
        (place / "two" / "three").write_text("")
    assert names(tmp_path) == ["export"]
    assert names(tmp_path / "export") == ["one"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"), new_folder(tmp_path / "file" / "export"):
        pass


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom mmfeat.system.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as place:\n"
        "    (place / 'half').write_text('')\n    print('there', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "export")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        with new_folder(tmp_path / "export"):  # of one that lives, nothing is touched
            assert len(names(tmp_path)) == 2
        os.kill(child.pid, signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    with new_folder(tmp_path / "export") as place:
        (place / "whole").write_text("")
    assert names(tmp_path) == ["export"]
    assert names(tmp_path / "export") == ["whole"]


def test_a_folder_that_was_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    """Killed at each of the two renames: before the new folder is there, the old one counts."""
    script = (
        "import os, sys, pathlib\nfrom mmfeat.system.files import new_folder\n"
        "left = int(sys.argv[2])\nplain = pathlib.Path.rename\n"
        "def rename(path, target):\n"
        "    global left\n    left -= 1\n    if left < 0: os._exit(9)\n    return plain(path, target)\n"
        "pathlib.Path.rename = rename\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as place:\n    (place / 'new').write_text('')\n"
    )
    for renames in (0, 1):
        folder = tmp_path / str(renames) / "export"
        with new_folder(folder) as place:
            (place / "old").write_text("")
        assert subprocess.run([sys.executable, "-c", script, folder, str(renames)], check=False).returncode == 9
        with pytest.raises(WriteError), new_folder(folder) as place:
            (place / "no" / "file").write_text("")
        assert names(folder.parent) == ["export"]
        assert names(folder) == ["old"]
