"""Clocks of an extraction: where the time goes, and what would save some."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STEPS = ("read", "decode", "encode", "write")
WORTH_NAMING = 0.15  # of the wall time that encoders wait for somebody else

# By step: what would help, and what there has to be room for, "" for nothing.
REMEDIES = {
    "read": {"a faster disk": "local", "more --workers": "remote"},
    "decode": {"more --workers": "workers", "--draft for large JPEGs": "draft", "--engine ray": "ray"},
    "tokenize": {"--engine ray (a tokenizer takes one thread)": "ray"},
    "encode": {
        "a GPU (--device cuda)": "cuda",
        "a GPU (--device mps)": "mps",
        "half precision (--dtype auto)": "half",
        "--engine ray": "ray",
    },
    "write": {"a faster disk for --cache": ""},
}


def advice(step: str, room: Collection[str]) -> str:
    """What would save some time of a step, empty where nothing is known; `room` is what is not used up yet."""
    found = [words for words, need in REMEDIES[step].items() if not need or need in room]
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else "".join(found)


@dataclass
class Clocks:
    """Seconds of work by step, summed over `workers` readers, and the seconds that encoders waited, of one modality."""

    workers: int = 1
    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    starved: float = 0.0  # waiting for the readers
    blocked: float = 0.0  # waiting for the writer
    wall: float = 0.0

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add the seconds that the context takes to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, step, getattr(self, step) + time.perf_counter() - start)

    def add(self, other: Clocks) -> None:
        """Take over the times of other work, also of another worker: then they are sums over all workers."""
        for name in (*STEPS, "starved", "blocked", "wall"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.workers = max(self.workers, other.workers)

    @property
    def bottleneck(self) -> str:
        """The step that the others wait for."""
        if self.blocked > max(self.starved, WORTH_NAMING * self.wall):
            return "write"
        if self.starved > WORTH_NAMING * self.wall:
            return "read" if self.read > self.decode else "decode"
        return "encode"

    @property
    def shares(self) -> dict[str, float]:
        """How busy each step was, of the time that it had: 1 is always."""
        had = {step: self.wall * (self.workers if step in ("read", "decode") else 1) for step in STEPS}
        return {step: getattr(self, step) / had[step] if had[step] else 0.0 for step in STEPS}

    def __str__(self) -> str:
        return " ".join(f"{step} {share:.0%}" for step, share in self.shares.items())
