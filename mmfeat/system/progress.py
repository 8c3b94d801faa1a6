"""Progress: what a long step tells whoever started it. The library is silent by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Goes some steps on; `note` says what there is to say about them."""

    def __call__(self, steps: int, note: str = "") -> None: ...


class Progress(Protocol):
    """Opens a task of `total` steps, None: nobody can count them; the context gives a function that advances it."""

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]: ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        yield lambda steps, note="": None
