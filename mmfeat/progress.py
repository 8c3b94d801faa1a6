"""Progress: what a long step tells whoever started it. The library is silent by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Opens a task of `total` steps; the context gives a function that advances it."""

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None
