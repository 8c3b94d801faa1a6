"""Joining a cluster: a place where there is none is told in seconds, and an interrupt is never lost in Ray's code."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmfeat.cli.main import app
from mmfeat.errors import ConfigError
from mmfeat.extraction.extract import extract_features
from mmfeat.system import ray_cluster as cluster
from mmfeat.system.ray_cluster import Interrupts, join_cluster, without_stderr

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="the engine needs the extra ray")


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """HOST:PORT of a server that answers one client like this, None: never."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as client:
                if answer is not None:
                    client.sendall(answer)
                ended.wait(10)

        ended = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
        thread.join(10)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no cluster answers there"),
        ("127.0.0.1", "this is no HOST:PORT"),
        ("127.0.0.1:99999", "no cluster answers there"),
        ("host.invalid:6379", "no cluster answers there"),
    ],
)
def test_a_place_without_a_cluster(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--ray-address {address}: {words}.*; give .*, or leave it out"):
        join_cluster(address)


@pytest.mark.parametrize(
    ("answer", "words"), [(b"HTTP/1.1 400 no\r\n\r\n", "what answers there is no Ray"), (None, "no cluster answers")]
)
def test_a_place_where_something_else_listens(
    answer: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.3)
    with server(answer) as address, pytest.raises(ConfigError, match=words):
        join_cluster(address)


def test_the_address_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127.0.0.1:1: no cluster answers there"):
        join_cluster(None)


@pytest.mark.parametrize("command", ["extract", "heads", "finetune"])
def test_an_address_without_the_engine_is_refused(command: str, demo_folder: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        extract_features(demo_folder, ["hashing"], cache="cache")
        flags = ["--encoders", "hashing"] if command == "extract" else []
        given = [command, "--data", str(demo_folder), *flags, "--ray-address", "127.0.0.1:1"]
        answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 1
    assert "mmfeat: --ray-address 127.0.0.1:1: only --engine ray uses a cluster" in answer.stderr


def test_what_is_complete_starts_no_ray(demo_folder: Path, tmp_path: Path) -> None:
    """It would not get far: there is no cluster."""
    data = Path(shutil.copytree(demo_folder, tmp_path / "demo"))
    made = extract_features(data, ["hashing"], cache=tmp_path / "cache")
    nowhere = {"engine": "ray", "ray_address": "127.0.0.1:1"}
    again = extract_features(data, ["hashing"], cache=tmp_path / "cache", **nowhere)
    assert again.nothing_to_do
    assert (again.stored, again.missing) == (made.new, made.missing)
    (data / "data" / "1001.txt").write_text("a text of its own")
    with pytest.raises(ConfigError, match="no cluster answers there"):
        extract_features(data, ["hashing"], cache=tmp_path / "cache", **nowhere)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_was_swallowed_is_raised_again(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "AGAIN_SECONDS", 60.0)  # on a busy machine it would come again before it is obeyed
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.obey()
        interrupts.leave()
        signal.raise_signal(number)  # what is being left is left in peace
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_that_nobody_obeys_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "AGAIN_SECONDS", 0.05)
    with Interrupts():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            threading.Event().wait(10)


def test_without_stderr_hides_what_is_written_past_python(capfd: pytest.CaptureFixture[str]) -> None:
    with without_stderr():
        os.write(2, b"noise\n")
    os.write(2, b"ours\n")
    assert capfd.readouterr().err == "ours\n"
