"""Opinions: out-of-fold probabilities of a run's recommended entry, and likely errors and noise of the labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.audit.label_errors import PLANTED, LabelErrors, estimate_noise, find_label_errors, planted_found
from mmfeat.errors import RunError
from mmfeat.runs.entry import Entry, RunConfig
from mmfeat.runs.run import Run, comparable_runs, find_run
from mmfeat.samples.labels import Targets

NUMBERS = "no label errors: {} predicts numbers; mmfeat report shows its largest errors"
NO_RUN = "none"  # value of --run


@dataclass(frozen=True)
class Opinions:
    """Out-of-fold probabilities (N, C), means over seeds, of one entry of a run, with ids and labels."""

    run: Run
    entry: Entry
    ids: tuple[str, ...]
    targets: Targets
    probabilities: np.ndarray

    @property
    def floor(self) -> float:
        """What the probabilities allow for labels that are wrong at random."""
        return floor_of(self.run, self.entry)


@dataclass(frozen=True)
class Suspicion:
    """A label that is likely wrong; in multi-label data `label` and `suggested` are about one class."""

    id: str
    label: str
    suggested: str
    probability: float
    self_confidence: float


def fitting_run(run: str | Path | None, heads: Path, fits: Callable[[RunConfig], bool]) -> tuple[Run | None, str]:
    """(run whose opinions are used, "") or (None, reason).

    Raises `RunError` for a named run on other labels or contents. Without a name, the best run in `heads` on exactly
    these labels and contents is used, as `best_run` has it.
    """
    if run == NO_RUN:
        return None, ""
    if run is not None:
        named = find_run(run, heads)
        if not fits(named.config):
            raise RunError(f"{run}: trained on other labels, texts or photos than these; name another --run, or none")
        return (None, NUMBERS.format(named.folder)) if named.config.is_regression else (named, "")
    try:
        runs = comparable_runs(heads, accept=lambda other: fits(other.config))
    except RunError:
        return None, (
            f"no label errors: no run in {heads} was trained on these labels, texts and photos; "
            "make one with mmfeat heads"
        )
    best = max(reversed(runs), key=lambda other: other.score(None, None))
    return (None, NUMBERS.format(best.folder)) if best.config.is_regression else (best, "")


def read_opinions(run: Run) -> Opinions:
    """Opinions of the run's recommended entry, as in its report, on samples that a fold tests.

    Raises `RunError` for a damaged file.
    """
    entry = run.recommended
    predictions = run.out_of_fold(entry)
    if not predictions.ids:
        raise RunError(f"{run.folder}: no sample was predicted out of fold; train it again, or name another with --run")
    return Opinions(run, entry, predictions.ids, predictions.targets, predictions.probabilities)


def floor_of(run: Run, entry: Entry) -> float:
    """The floor of an entry's decision, and of an ensemble also the mean floor of its members."""
    floors = [other.decision.floor for other in run.leaderboard if other.name in entry.members]
    return entry.decision.floor + (float(np.mean(floors)) if floors else 0.0)


def suspicions(opinions: Opinions) -> list[Suspicion]:
    """Likely label errors, the surest first. In multi-label data each class is judged alone."""
    targets, names = opinions.targets, opinions.targets.classes
    if not targets.multilabel:
        errors = find_label_errors(targets.numbers, opinions.probabilities)
        return _named(opinions, errors, targets.numbers, opinions.probabilities, names)
    suspected = []
    for column, name in enumerate(names):
        labels, probabilities = _of_class(opinions, column)
        errors = find_label_errors(labels, probabilities)
        suspected += _named(opinions, errors, labels, probabilities, (f"not {name}", name))
    return sorted(suspected, key=lambda suspicion: suspicion.self_confidence - suspicion.probability)


def judge_labels(opinions: Opinions, suspected: Sequence[Suspicion], seed: int = 42) -> dict[str, Any]:
    """The summary of label errors and noise, for JSON."""
    ways = Counter((suspicion.label, suspicion.suggested) for suspicion in suspected)
    return {
        "run": str(opinions.run.folder),
        "data_hash": opinions.run.config.data_hash,
        "head": opinions.entry.head,
        "modalities": opinions.entry.modalities,
        "macro_f1": asdict(opinions.entry.macro_f1),
        "accuracy": asdict(opinions.entry.accuracy),
        "samples": len(opinions.ids),
        "errors": len({suspicion.id for suspicion in suspected}),
        "ways": [{"label": a, "suggested": b, "count": count} for (a, b), count in ways.most_common()],
        "multilabel": opinions.targets.multilabel,
        "noise": _noise(opinions, seed),
    }


def _noise(opinions: Opinions, seed: int) -> dict[str, Any]:
    """Noise of all labels; in multi-label data noise of each class, since there is no joint distribution of all."""
    targets, names = opinions.targets, opinions.targets.classes
    if targets.multilabel:
        parts = [_of_class(opinions, column) for column in range(len(names))]
        found = [estimate_noise(*part, seed, floor=opinions.floor) for part in parts]
        classes = {name: asdict(noise.wrong) for name, noise in zip(names, found, strict=True) if noise.claimed}
        return {"claimed": bool(classes), "classes": classes}
    noise = estimate_noise(targets.numbers, opinions.probabilities, seed, floor=opinions.floor)
    planted = {"share": PLANTED, "found": planted_found(targets.numbers, opinions.probabilities, seed)}
    if not noise.claimed:
        return {"claimed": False, "planted": planted}
    by_class = dict(zip(names, map(asdict, noise.by_class), strict=True))
    overall = {name: asdict(getattr(noise, name)) for name in ("wrong", "accuracy", "macro_f1")}
    return {"claimed": True, "planted": planted, **overall, "classes": by_class, "joint": noise.joint.tolist()}


def _of_class(opinions: Opinions, column: int) -> tuple[np.ndarray, np.ndarray]:
    """One class against the rest: labels (N,) of 0 and 1, and their probabilities (N, 2)."""
    with_it = opinions.probabilities[:, column]
    return opinions.targets.matrix[:, column].astype(int), np.column_stack([1 - with_it, with_it])


def _named(
    opinions: Opinions, errors: LabelErrors, labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> list[Suspicion]:
    return [
        Suspicion(
            opinions.ids[row],
            names[labels[row]],
            names[better],
            float(probabilities[row, better]),
            float(probabilities[row, labels[row]]),
        )
        for row, better in zip(errors.rows.tolist(), errors.suggested.tolist(), strict=True)
    ]
