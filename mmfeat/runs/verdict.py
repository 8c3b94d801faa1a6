"""The verdict on runs in sentences: which entry is best and which to take, what several modalities bring, how a run
stands to another one, and the step that a careful colleague would take next."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmfeat.encoders.registry import Tower
from mmfeat.errors import MmfeatError, RunError
from mmfeat.evaluation.significance import LEVEL
from mmfeat.extraction.requests import test_of
from mmfeat.runs.compare import Comparison, RunTest, compare_runs
from mmfeat.runs.entry import TOGETHER, Entry, PairedTest
from mmfeat.runs.leaderboard import MODALITY_SETS
from mmfeat.runs.run import Run, best_run, comparable_runs, read_run
from mmfeat.samples.dataset import read_samples
from mmfeat.system.wording import interval, p_value, rounded, shown

PARTS = {"text": "text", "image": "photo", "table": "table"}  # what people call the modalities
ERRORS = 2 * 1.96  # standard errors in a 95 % interval
EVEN = 0.0005  # smaller differences of scores are printed as 0.000


def near_best(entries: Sequence[Entry]) -> list[Entry]:
    """The entries within one standard error of the first, which is the best."""
    best = entries[0].headline
    least = best.value - (best.high - best.low) / ERRORS
    return [entries[0], *(entry for entry in entries[1:] if entry.headline.value >= least)]


def recommend(leaderboard: Sequence[Entry], encoders: Sequence[Tower]) -> Entry:
    """The cheapest entry that ties with the best and lies within one standard error of it (Breiman et al., 1984).

    A head is cheaper than an ensemble, few modalities and encoders are than many, and last count the whole minutes of
    training; of entries that cost the same, the better one.
    """

    def cost(entry: Entry) -> tuple[bool, int, float]:
        whole = entry.modalities in (MODALITY_SETS[0], TOGETHER)
        return (
            entry.is_ensemble,
            sum(whole or tower.spec.modality == entry.modalities for tower in encoders),
            entry.seconds // 60,
        )

    ties = [entry for entry in near_best(leaderboard) if entry.tie]
    return min(ties or leaderboard[:1], key=cost)


def verdict(run: Run) -> list[str]:
    """The best entry of a run, the recommended one, and what several modalities bring, a sentence each."""
    first, taken = run.leaderboard[0], run.recommended
    sentences = [best(first, sum(bool(entry.tie) for entry in run.leaderboard[1:]))]
    if (picked := first.picked) and picked.value < first.headline.value - EVEN:
        value = interval(picked, ", ")
        sentences.append(f"Expect {value} of the best on new samples: a winner is partly lucky.")
    if run.results.recommended:
        why = "" if taken == first else f", a tie at {rounded(taken.headline.value)} that costs less"
        sentences.append(f"Recommended: {taken.label}{why}; {_submission(run)} uses it.")
    gains = [(entry, entry.gain) for entry in run.leaderboard if entry.gain]
    return sentences + [_together(run, *pair) for pair in gains[:1]]


def _submission(run: Run) -> str:
    """The command that predicts with a run, which names it where a bare `submit` takes a better one beside it."""
    with contextlib.suppress(RunError):
        if best_run(run.folder.parent).name != run.name:
            return f"submit --run {shlex.quote(shown(str(run.folder)))}"
    return "submit"


def best(entry: Entry, ties: int = 0, number: str = "") -> str:
    """`Best: film on both, macro-F1 0.903 [.880, .925], accuracy 0.909; 7 tie.`"""
    second = entry.main_names[1]
    tied = f"; {ties} {'ties' if ties == 1 else 'tie'}" if ties else ""
    scores = f"{entry.headline_title} {interval(entry.headline, ', ')}, {entry.titles[second]}"
    return f"Best: {number}{entry.label}, {scores} {rounded(entry.score(second).value or 0.0)}{tied}."


def _together(run: Run, entry: Entry, gain: PairedTest) -> str:
    seen = {tower.spec.modality for tower in run.towers} | ({"table"} if run.config.table else set())
    all_of_them = " and ".join(name for modality, name in PARTS.items() if modality in seen)
    verb, by = ("beat" if gain.value > 0 else "are worse than"), f"by {abs(gain.value):.3f}"
    if gain.p_holm >= LEVEL:
        verb, by = "tie with", f"at {gain.value:+.3f}"
    together = f"{all_of_them} together {verb} the {PARTS[str(gain.over)]} alone {by} (p {p_value(gain.p_holm)})."
    return together.capitalize() if entry == run.leaderboard[0] else f"With {entry.head}, {together}"


def standing(test: RunTest, one: str, other: str) -> str:
    """`[2] is better than [1] by 0.012 (p 0.010).`, or `[2] ties with [1] at +0.012.`"""
    value = test.difference.value
    if test.tie:
        return f"{one} ties with {other} at {value:+.3f}."
    return f"{one} is {'better' if value > 0 else 'worse'} than {other} by {abs(value):.3f} (p {p_value(test.p_holm)})."


def verdict_on(comparison: Comparison) -> list[str]:
    """The best of the runs that can be compared, and how it stands to the first one, a sentence each."""
    fair = [index for index, test in enumerate(comparison.tests) if test or not index]
    if len(fair) < 2:
        return ["No verdict: the runs cannot be compared."]
    order = sorted(fair, key=lambda index: -comparison.entries[index].headline.value)
    other = order[0] or order[1]
    test = comparison.tests[other]
    assert test
    first = best(comparison.entries[order[0]], number=f"[{order[0] + 1}] ")
    return [first, standing(test, f"[{other + 1}]", "[1]")]


def previous_run(run: Run) -> Run | None:
    """The newest other run beside `run` that is comparable with it."""

    def fits(other: Run) -> bool:
        return other.comparable == run.comparable and other.name != run.name

    with contextlib.suppress(RunError):
        return comparable_runs(run.folder.resolve().parent, accept=fits)[-1]
    return None


def parent_run(run: Run) -> Run | None:
    """The run that a second stage came from; None where it is gone."""
    with contextlib.suppress(RunError):
        return read_run(Path(os.path.normpath(run.folder.parent / run.record.parents / str(run.config.parent))))
    return None


def against(run: Run, other: Run) -> RunTest | None:
    """The test of the best entry of `run` over that of `other`; None where they cannot be compared."""
    with contextlib.suppress(RunError):
        return compare_runs((other, run)).tests[1]
    return None


def over_parent(run: Run, parent: Run) -> tuple[str, RunTest | None]:
    """(name of the best entry that stage 2 trained, its test over the best entry of the run it came from)."""
    tuned = tuple(entry for entry in run.leaderboard if entry.over_stage_1)
    return tuned[0].label, against(replace(run, results=replace(run.results, leaderboard=tuned)), parent)


def prediction_step(run: Run) -> str:
    """The command that predicts with a run: a submission where samples wait for a label, else one for other data."""
    folder, config = shlex.quote(shown(str(run.folder))), run.config
    with contextlib.suppress(MmfeatError, OSError):
        if test_of(config.cache, config.data) or read_samples(config.data, config.columns).unlabelled:
            return f"mmfeat submit --run {folder}"
    return f"mmfeat predict --run {folder} --data test.csv"
