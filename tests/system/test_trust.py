"""No command opens a connection that nobody asked for, nor leaves an id of the machine behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmfeat.system.trust import SILENT, keep_private

# Ends the process, and any that it starts, at the system call that makes a socket of the internet, also where a library
# in C makes it (seccomp).
GUARD = """
import ctypes, platform, struct, sys
call = {"x86_64": 41, "aarch64": 198}.get(platform.machine())
code = [(0x20, 0, 0, 0), (0x15, 0, 3, call or 0), (0x20, 0, 0, 16), (0x15, 2, 0, 2), (0x15, 1, 0, 10)]
code += [(6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x80000000)]  # allow; kill the process, for AF_INET and AF_INET6
lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
program, libc = Program(len(code), ctypes.addressof(lines)), ctypes.CDLL(None)
if call is None or libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit("unguarded")
"""
SCRIPT = """
import os, socket, sys
from mmfeat.cli.main import main
data, bert = sys.argv[1:]
commands = [
    f"extract --data {data} --encoders hashing,hog,bert:{bert} --dtype float32",
    "heads --fusion concat --baselines ridge --folds 2 --seeds 1 --epochs 1 --modalities both",
    "predict --text a", "submit", "report", f"audit --data {data}", "export --head concat --out out",
]
for command in commands:
    sys.argv = ["mmfeat", *command.split()]
    try:
        main()
    except SystemExit as end:
        print("ended", command.split()[0], end.code, flush=True)
from huggingface_hub import constants
print("silent", constants.HF_HUB_DISABLE_TELEMETRY, flush=True)
socket.socket()
print("not guarded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_no_command_opens_a_connection(small_demo_folder: Path, tiny_bert: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in SILENT}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    answer = subprocess.run(
        [sys.executable, "-c", GUARD + SCRIPT, str(small_demo_folder), str(tiny_bert)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "unguarded" in answer.stderr:
        pytest.skip("this system lets no process be guarded by seccomp")
    ended = [line for line in answer.stdout.splitlines() if line.startswith(("ended ", "silent ", "not guarded"))]
    names = ["extract", "heads", "predict", "submit", "report", "audit", "export"]
    assert ended == [*(f"ended {name} 0" for name in names), "silent True"], answer.stdout[-800:] + answer.stderr[-800:]
    assert answer.returncode == -signal.SIGSYS  # at the socket that the script itself opens at the end
    assert not [path for path in home.rglob("*") if "microsoft" in str(path).lower() or "deviceid" in path.name]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    keep_private()
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["DO_NOT_TRACK"]) == ("1", "1")
