"""A Ray cluster: joining and leaving it without its delays, its messages and its answers to signals."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.system.trust import keep_private
from mmfeat.version import install_command

ANSWER_SECONDS = 5.0
AGAIN_SECONDS = 1.0  # seconds until an interrupt without effect is sent again
# The first bytes of an HTTP/2 client, with empty settings; a server, such as a Ray cluster, answers with its settings.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME, _SETTINGS = 9, 4  # bytes of a frame's head, and the frame type of settings, which stands in the fourth byte


def join_cluster(address: str | None) -> tuple[Any, bool]:
    """(Ray, whether this call joined or started a cluster, which the caller then leaves with `leave_cluster`).

    Raises `ConfigError` if no cluster answers within a few seconds, and `KeyboardInterrupt` after a signal to end.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray warns of arguments that this process holds anyway
    flag = f"--ray-address {address}" if address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    if "ray" in sys.modules and (ray := _import_ray()).is_initialized():
        return ray, False
    # The check comes first because importing Ray takes seconds.
    _check_answer(address or os.environ.get("RAY_ADDRESS", "local"), flag)
    ray = _import_ray()
    with Interrupts() as interrupts:
        try:
            with _own_sigterm(), without_stderr():
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            interrupts.obey()
        except (ValueError, ConnectionError) as error:
            raise ConfigError(f"{flag}: no cluster there ({error}); give HOST:PORT, or leave it out") from error
        except (KeyboardInterrupt, SystemExit):  # Ray's own answer to SIGTERM
            interrupts.leave()
            leave_cluster(ray)
            raise KeyboardInterrupt from None
    return ray, True


def leave_cluster(ray: Any) -> None:
    """Leave the cluster of `join_cluster`, in whatever state Ray is; Ray's last messages are not shown."""
    with _own_sigterm(), without_stderr():
        ray.shutdown()


def _import_ray() -> Any:
    keep_private()
    try:
        with without_stderr():
            import ray
    except ImportError as error:
        raise ConfigError(f"--engine ray needs Ray; {install_command('ray')}") from error
    return ray


def _check_answer(address: str, flag: str) -> None:
    """Raise `ConfigError` unless a cluster answers at `address` within seconds; Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{flag}: this is no HOST:PORT; give one, or leave it out")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            if "RAY_USE_TLS" in os.environ:  # the cluster waits for a handshake
                return
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_HELLO)
            answer = connection.recv(_FRAME)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{flag}: no cluster answers there ({error}); give HOST:PORT, or leave it out") from error
    if len(answer) < _FRAME or answer[3] != _SETTINGS:
        raise ConfigError(f"{flag}: what answers there is no Ray cluster; give HOST:PORT, or leave it out")


class Interrupts:
    """A context for Ctrl-C and SIGTERM while Ray's code runs: an exception that Ray's code swallows is raised again.

    `obey` raises a swallowed exception; after `leave` there is nothing to interrupt.
    """

    def __enter__(self) -> Interrupts:
        self._heard = self._left = False
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {kind: signal.signal(kind, self._hear) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        if self._main:
            for kind, handler in self._before.items():
                signal.signal(kind, handler)

    def obey(self) -> None:
        if self._heard and not self._left:
            raise KeyboardInterrupt

    def leave(self) -> None:
        self._left = True

    def _hear(self, *_: object) -> None:
        if self._left:  # a second interrupt would stop the leaving of Ray half done
            return
        if not self._heard:
            self._heard = True
            threading.Thread(target=self._insist, args=(threading.get_ident(),), daemon=True).start()
        raise KeyboardInterrupt

    def _insist(self, thread: int) -> None:
        while not self._left:
            time.sleep(AGAIN_SECONDS)
            if not self._left:
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(thread, signal.SIGINT)
                else:
                    _thread.interrupt_main()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM: Ray's is an exit or a crash, and vectors and messages would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if ours is not None:  # a handler that was not set from Python is None
            signal.signal(signal.SIGTERM, ours)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Silence the file descriptor of stderr, to which Ray's C++ parts write whatever the settings say."""
    try:
        saved = os.dup(2)
    except OSError:  # this process has no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
