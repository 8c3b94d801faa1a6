"""The user's consent to code that a checkpoint brings along.

The consent belongs to the process. It is in no request, run or cache, so nobody else's file can give it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_trusted = False


def is_trusted() -> bool:
    """Whether the user lets checkpoints run their own code."""
    return _trusted


def trust(value: bool) -> None:
    """Let checkpoints run their own code in this process from now on, or not."""
    global _trusted
    _trusted = value


@contextlib.contextmanager
def trust_remote_code() -> Iterator[None]:
    """Let checkpoints run their own code inside the context, as `--trust-remote-code` does. Read that code before."""
    before = _trusted
    trust(True)
    try:
        yield
    finally:
        trust(before)
