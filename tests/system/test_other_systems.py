"""What Linux has and other systems lack is not needed: every module is imported and data are extracted without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, os, pkgutil, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("O_DIRECTORY", "preadv", "pread", "sched_getaffinity", "getuid", "geteuid", "fork"):
    delattr(os, name)
del signal.pthread_kill, signal.SIGKILL
import mmfeat
for module in pkgutil.walk_packages(mmfeat.__path__, "mmfeat."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from mmfeat.cli.main import app
app(["demo", "--pairs", "60"], standalone_mode=False)
app(["extract", "--data", "demo", "--encoders", "hashing,hog"], standalone_mode=False)
"""


def test_nothing_of_linux_alone_is_needed(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "wrote 1" in answer.stdout
    names = [path.name for path in (tmp_path / "cache").rglob("*")]
    assert len([name for name in names if name.endswith(".h5")]) == 2
    assert not [name for name in names if name.endswith((".lock", ".tmp"))]
