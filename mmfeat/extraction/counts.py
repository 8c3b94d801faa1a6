"""Counts of an extraction, and the clocks that tell where its time goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = ("read", "decode", "encode", "write")
WORTH_NAMING = 0.15  # share of the wall time that encoders wait for another step
MAX_FAILURES = 1000  # failures that are listed one by one; the rest is only counted


@dataclass
class Clocks:
    """Seconds that each step of one modality worked; reading and decoding are sums over `workers` readers.

    Encoders are `starved` while they wait for readers, and `blocked` while they wait for the writer.
    """

    workers: int = 1
    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    starved: float = 0.0
    blocked: float = 0.0
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
        """Add the seconds of other blocks or of another worker; sums over several workers include the wall time."""
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
    def seconds(self) -> dict[str, float]:
        """Seconds of work by step."""
        return {step: getattr(self, step) for step in STEPS}

    @property
    def shares(self) -> dict[str, float]:
        """Share of its available time that each step worked, from 0 to 1."""
        available = {step: self.wall * (self.workers if step in ("read", "decode") else 1) for step in STEPS}
        return {step: spent / available[step] if available[step] else 0.0 for step, spent in self.seconds.items()}

    def __str__(self) -> str:
        return " ".join(f"{step} {share:.0%}" for step, share in self.shares.items())


@dataclass
class Counts:
    """Counts of samples, and of vectors by the cache folder of their encoder.

    `stored` vectors were in the cache before, `new` ones were committed; `unreadable` rows hold an error, old or new.
    `missing` maps modality -> reason -> number of samples, `examples` maps the same to the id of one such sample.
    `failed` counts what could not be read or encoded this time, `failures` lists the first as (sample id, reason).
    """

    stored: Counter[str] = field(default_factory=Counter)
    new: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    missing: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    clocks: dict[str, Clocks] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists of all fields."""
        return {**vars(self), "clocks": {modality: asdict(clocks) for modality, clocks in self.clocks.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Counts:
        """The counts whose `to_json` went through JSON."""
        counters = {name: Counter(values[name]) for name in ("stored", "new", "unreadable")}
        missing = {modality: Counter(reasons) for modality, reasons in values["missing"].items()}
        failures = [(id, reason) for id, reason in values["failures"]]
        clocks = {modality: Clocks(**seconds) for modality, seconds in values["clocks"].items()}
        return cls(**{**values, **counters, "missing": missing, "failures": failures, "clocks": clocks})

    def add_failure(self, failure: tuple[str, str]) -> None:
        """Count one (sample id, reason) that could not be read or encoded."""
        self.failed += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(failure)

    def add_rows(self, folder: str, committed: int, failed: int, found: int) -> None:
        """Count the rows of one encoder: committed, holding an error, and found in the cache by then."""
        self.new[folder] += committed
        self.stored[folder] += found
        self.unreadable[folder] += failed

    def add(self, other: Counts) -> None:
        """Add the counts of another block or worker."""
        self.stored.update(other.stored)
        self.new.update(other.new)
        self.unreadable.update(other.unreadable)
        for modality, reasons in other.missing.items():
            self.missing.setdefault(modality, Counter()).update(reasons)
            self.examples[modality] = {**other.examples[modality], **self.examples.get(modality, {})}
        for modality, clocks in other.clocks.items():
            self.clocks.setdefault(modality, Clocks(0)).add(clocks)
        self.failed += other.failed
        self.failures += other.failures[: MAX_FAILURES - len(self.failures)]
