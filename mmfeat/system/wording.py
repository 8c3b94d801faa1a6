"""Paths, times, sizes and scores as people read them, and the progress of long steps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# What people call the scores.
SCORE_NAMES = {
    "macro_f1": "macro-F1", "kappa": "kappa", "accuracy": "accuracy", "weighted_f1": "weighted F1", "auroc": "AUROC",
    "log_loss": "log-loss", "calibration_error": "calibration error",
    "calibration_excess": "calibration error above chance", "classwise_excess": "class-wise error above chance",
    "micro_f1": "micro-F1", "r2": "R2", "mae": "MAE", "rmse": "RMSE",
    "spearman": "Spearman",
}  # fmt: skip
HIDDEN = "***"
# Secrets in a URL: a password between name and host, a token instead of a name, signatures in the query.
_PASSWORD = re.compile(r"(//[^/@:\s]*:)[^/\s]+@")
_TOKEN = re.compile(r"(//)[^/@:\s]+@")
_SIGNATURE = re.compile(r"([?&][\w-]*(?:sig|signature|token|secret|password|key|credential)[\w-]*=)[^&\s'\"]+", re.I)


def shown(text: str) -> str:
    """A path, alone or after `family:`, relative to the working folder if the path lies in the folder."""
    family, colon, path = text.rpartition(":") if not text.startswith("/") else ("", "", text)
    return f"{family}{colon}{os.path.relpath(path)}" if path.startswith(os.getcwd() + os.sep) else text


def without_passwords(text: str) -> str:
    """A text in which passwords, tokens and signatures of URLs are stars."""
    if "//" not in text:
        return text
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _TOKEN.sub(rf"\1{HIDDEN}@", _PASSWORD.sub(rf"\1{HIDDEN}@", text)))


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days for people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def counted(count: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_of(count: int) -> str:
    """Bytes for people."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:,.1f} {unit}"
    return f"{count} B"


class Estimate(Protocol):
    """A number with its 95 % interval; all are None for a number that is not defined."""

    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


def interval(score: Estimate, comma: str = ",") -> str:
    """`0.719 [.700,.738]`; "" for a score that is not defined."""
    if score.value is None:
        return ""
    value, low, high = (rounded(end or 0.0) for end in (score.value, score.low, score.high))
    return f"{value} [{low.removeprefix('0')}{comma}{high.removeprefix('0')}]"


def rounded(value: float) -> str:
    """Three digits after the point; of errors of numbers, which have a unit and may be larger, fewer."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.{1 if abs(value) < 1000 else 0}f}"


def gain(difference: Estimate, comma: str = ",") -> str:
    """`+0.055 [+0.040,+0.071]`: a difference that is defined."""
    return f"{difference.value:+.3f} [{difference.low:+.3f}{comma}{difference.high:+.3f}]"


def p_value(p: float) -> str:
    """Three digits after the point, and `<.001`."""
    return f"{p:.3f}" if p >= 0.001 else "<.001"


def head_label(head: str | None, modalities: str | None) -> str:
    """The name of a head for people, as in `concat on both`."""
    return f"{head} on {modalities}"


class Advance(Protocol):
    """Advances a step of work; `note` is a word about the last units, or lines, of which the first says most."""

    def __call__(self, steps: int, note: str = "") -> None: ...


def ignore(steps: int, note: str = "") -> None:
    """Show nothing of the progress of a step."""


def progress_line(title: str, done: int, total: int, seconds: float, note: str) -> str:
    """`encode texts: 34 of 120, 12.3/s, 7 s left`, and the note."""
    rate = done / max(seconds, 1e-9)
    figures = [rate_of(rate), time_left((total - done) / rate)] if done else []
    return ", ".join(filter(None, (f"{title}: {done:,} of {total:,}", *figures, note)))


def finished_line(done: int, total: int | None, seconds: float) -> str:
    """`120 in 9.8 s (12.3/s)`; `34 of 120 in ...` of a step that ended early; the time where units are not counted."""
    if total is None:
        return duration(seconds)
    count = f"{done:,}" if done == total else f"{done:,} of {total:,}"
    return f"{count} in {duration(seconds)} ({rate_of(done / max(seconds, 1e-9))})"


def rate_of(rate: float) -> str:
    """Units a second, or a minute where they are few."""
    if 0 < rate < 0.1:
        return f"{60 * rate:.1f}/min"
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


def time_left(seconds: float) -> str:
    """`7 s left`, `3.2 min left`."""
    return f"{f'{seconds:.0f} s' if seconds < 120 else duration(seconds)} left"


class Progress(Protocol):
    """Opens a step of work with `total` units (None: unknown); the context gives a function that advances the step."""

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]: ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        yield ignore
