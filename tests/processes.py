"""Commands as processes of their own, to be killed or interrupted, that do not import everything anew each time: a
server that has imported `tests.imports` forks them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

LIMIT = 120  # seconds until a test gives up waiting


class Command:
    """A running `mmfeat ...` in a folder, and the files that hold what the command prints. The code `before` is run
    first, in the process and in this environment."""

    def __init__(self, arguments: Iterable[object], folder: Path, before: str = "", **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        _start_server()
        self._out, self._err = tempfile.NamedTemporaryFile("r"), tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        texts = [str(argument) for argument in arguments]
        self._process = context.Process(
            target=_run, args=(texts, folder, self._out.name, self._err.name, before, environment)
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the number of the signal that ended the process, None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = LIMIT) -> tuple[str, str]:
        """What the command printed to stdout and stderr, once it has ended."""
        self._process.join(seconds)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            pytest.fail(f"still running: {self._out.read()} {self._err.read()}")
        return self._out.read(), self._err.read()

    def wait_for(self, folder: Path, pattern: str) -> None:
        """Wait until a file of that pattern is in the folder."""
        end = time.monotonic() + LIMIT
        while not any(folder.glob(pattern)):
            if self.returncode is not None or time.monotonic() > end:
                pytest.fail(f"no {pattern}: {self.wait(0)}")
            time.sleep(0.005)  # looking more often takes the time of what is waited for

    def wait_for_line(self, beginning: str) -> str:
        """The first line that begins so, once it is there."""
        end = time.monotonic() + LIMIT
        while True:
            for name in (self._out.name, self._err.name):
                for line in Path(name).read_text().splitlines():
                    if line.startswith(beginning):
                        return line
            if self.returncode is not None or time.monotonic() > end:
                pytest.fail(f"no line {beginning}: {self.wait(0)}")
            time.sleep(0.01)


def _start_server() -> None:
    """Start the server, once for all tests of this process, where it finds the package `tests`."""
    multiprocessing.set_forkserver_preload(["tests.imports"])
    before = Path.cwd()
    os.chdir(Path(__file__).parents[1])
    multiprocessing.forkserver.ensure_running()
    os.chdir(before)


def _run(arguments: list[str], folder: Path, out: str, err: str, before: str, environment: dict[str, str]) -> None:
    from mmfeat.cli.main import main

    # A shell that runs its job in the background has it ignore Ctrl-C, which processes inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    exec(before, {})
    os.chdir(folder)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["mmfeat", *arguments]
    main()
