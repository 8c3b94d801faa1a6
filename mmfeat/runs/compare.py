"""Comparison of runs: which settings differ, which scores they got, and whether that is more than noise.

Runs are tested against each other only where they are about the same data and folds: scores on other rows, or of heads
that were trained on other rows, say nothing about each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.significance import LEVEL, Difference, holm, majority, mcnemar, paired_difference
from mmfeat.runs.entry import Entry, RunConfig
from mmfeat.runs.out_of_fold import read_predictions
from mmfeat.runs.run import Run
from mmfeat.system.wording import head_label

MISSING = "-"  # stands where a run has no such setting
# Fields that say where data lie, or that a comparison tells otherwise.
PLACES = ("data", "cache", "columns", "splits_hash", "data_hash", "folds")


@dataclass(frozen=True)
class RunTest:
    """One run's entry against the first run's on the `samples` that both have out of fold: macro-F1 of this one less
    that of the first, paired bootstrap; p-values of all tests adjusted together (Holm)."""

    difference: Difference
    p_holm: float
    mcnemar: float
    mcnemar_holm: float
    samples: int

    @property
    def tie(self) -> bool:
        """Whether the difference may be noise."""
        return self.p_holm >= LEVEL


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side, one entry of each, everything in the order of `runs`.

    `settings` has only what differs, by dotted name; `tests` one for each run, None for the first and for those that
    are not comparable with it, of which `reasons` says why ("" where they are).
    """

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    settings: Mapping[str, tuple[str, ...]]
    tests: tuple[RunTest | None, ...]
    reasons: tuple[str, ...]
    named: bool  # the entries were, beforehand; otherwise each is the best of its run by these very scores

    @property
    def fair(self) -> bool:
        """Whether all runs can be compared."""
        return not any(self.reasons)


def compare_runs(
    runs: Sequence[Run], head: str | None = None, modalities: str | None = None, seed: int = 42
) -> Comparison:
    """Compare the best entries of runs, or the best of this head and modalities, with that of the first run.

    An entry that is the best of its run was chosen by the very scores that are compared; name `head` and `modalities`
    for a test of what was planned. Raises `RunError` for fewer than two runs or predictions that cannot be read.
    """
    if len(runs) < 2:
        raise RunError("one run alone has nothing to be compared with; name two or more")
    entries = [run.entry(head, modalities) for run in runs]
    reasons = ["", *(why_not_comparable(runs[0], run) for run in runs[1:])]
    places = [number for number, reason in enumerate(reasons) if number and not reason]
    found = {place: _paired(runs[0], entries[0], runs[place], entries[place], seed) for place in places}
    adjusted = holm([difference.p for difference, _, _ in found.values()])
    disagreement = holm([p for _, p, _ in found.values()])
    tests: list[RunTest | None] = [None] * len(runs)
    for number, (place, (difference, p, samples)) in enumerate(found.items()):
        tests[place] = RunTest(difference, float(adjusted[number]), p, float(disagreement[number]), samples)
    named = head is not None
    return Comparison(tuple(runs), tuple(entries), _differences(runs), tuple(tests), tuple(reasons), named)


def why_not_comparable(one: Run, other: Run) -> str:
    """Why the scores of two runs say nothing about each other; "" where they do."""
    if one.config.task != other.config.task:
        return f"another task ({other.config.task})"
    if one.config.data_hash != other.config.data_hash:
        return "other data: labels, texts or photos of the labelled samples differ"
    if one.config.splits_hash != other.config.splits_hash:
        seeds = [run.config.protocol.seeds for run in (one, other)]
        if one.config.folds == other.config.folds and seeds[0] != seeds[1]:
            return (
                f"other folds or validation rows ({seeds[0]} and {seeds[1]} seeds); --split-dir makes runs share them"
            )
        return "other folds; --split-dir makes runs share them"
    return ""


def flat_settings(config: RunConfig) -> dict[str, str]:
    """Dotted name -> text of all that a run was asked for, without results and places."""
    found: dict[str, str] = {}
    for name, value in config.to_json().items():
        if name in ("encoders", "prefixes"):
            found[name] = ", ".join(_encoder(each) for each in value)
        elif name not in PLACES:
            found |= _flat(name, value)
    return found


def _paired(one: Run, entry: Entry, other: Run, its: Entry, seed: int) -> tuple[Difference, float, int]:
    """Macro-F1 of the other less that of the first, McNemar's p, and on how many samples."""
    first, second = read_predictions(one, entry), read_predictions(other, its)
    place = {id: number for number, id in enumerate(second.ids)}
    shared = [(number, place[id]) for number, id in enumerate(first.ids) if id in place]
    if not shared:
        raise RunError(f"{other.folder}: no sample out of fold is one of {one.folder}; train one of them again")
    rows, their_rows = map(np.array, zip(*shared, strict=True))
    targets = first.targets.take(rows)
    mine, theirs = first.chosen[:, rows], second.chosen[:, their_rows]
    right, their_right = (majority((each == targets.matrix).all(-1)) for each in (mine, theirs))
    return paired_difference(targets, theirs, mine, seed), mcnemar(their_right, right), len(rows)


def _differences(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    everything = [flat_settings(run.config) for run in runs]
    names = list(dict.fromkeys(name for each in everything for name in each))
    rows = {name: tuple(each.get(name, MISSING) for each in everything) for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {inner: text for key, each in value.items() for inner, text in _flat(f"{name}.{key}", each).items()}
    if name == "pairs":
        return {"heads": ", ".join(head_label(head, modality) for head, modality in value)}
    return {name: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


def _encoder(record: Mapping[str, Any]) -> str:
    from mmfeat.encoders.spec import EncoderSpec

    spec = EncoderSpec.from_json(record["spec"])
    return f"{spec.name} {spec.fingerprint[:8]}"
