"""Reproduction: train a run again from its `run.json`, and compare both runs bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfeat.cache.store import Cache
from mmfeat.errors import RunError
from mmfeat.finetune.settings import finetune_arguments
from mmfeat.runs.record import machine
from mmfeat.runs.run import Run, checked_towers, data_changed, read_run
from mmfeat.samples.corrections import read_corrected
from mmfeat.sweep.arguments import heads_arguments
from mmfeat.system.files import file_sha256
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress
from mmfeat.version import ENCODING, TRAINING, versions

# Files that are compared byte by byte; files with times in them are compared by their scores.
COMPARED = (
    "folds.csv",
    "*_split.csv",
    "*/out_of_fold.csv",
    "*/curves.csv",
    "*/*.safetensors",
    "*/trials/*.safetensors",
)
UNCOUNTED = ("cores", "threads")  # facts of a machine that change no number of a run


@dataclass(frozen=True)
class Reproduction:
    """An `original` run and the `run` that was trained from its configuration, now or in an earlier call (`reused`).

    `files` is the number of files compared byte by byte, predictions, curves and weights; `different` names the files
    that differ or that one run lacks. `scores` maps entry -> score in both runs, `changed` maps each version or
    fact of the machine that differs -> its values for both runs.
    """

    original: Run
    run: Run
    reused: bool
    files: int
    different: tuple[str, ...]
    scores: Mapping[str, tuple[float | None, float | None]]
    changed: Mapping[str, tuple[str, str]]
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        return not self.different and all(before == after for before, after in self.scores.values())


def reproduce_run(
    run: str | Path | Run,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    command: str = "",
) -> Reproduction:
    """Train the configuration of `run` again into the folder `out`, and compare both runs.

    The vectors come from the run's cache, or another `cache`; a second stage starts from the same parent.
    Raises `RunError` where data, weights or parent have changed.
    """
    original = run if isinstance(run, Run) else read_run(Path(run))
    if Path(out).resolve() == original.folder.resolve().parent:
        raise RunError(f"--out {out}: the run itself lies there; name another folder")
    arguments = (finetune_arguments if original.is_finetuned else heads_arguments)(original)
    arguments |= {"cache": cache} if cache else {}
    checked_towers(original, original.towers)
    samples, given = read_corrected(original.config.data, original.config.reading)
    labelled = original.config.known(samples, given).labelled
    if data_changed(original, labelled, Cache(arguments["cache"], samples.name)):
        where = f"{original.folder}: labels, texts or photos of {samples.source}"
        raise RunError(f"{where} changed since; restore them first")
    arguments |= {"out": out, "device": device, "workers": workers, "command": command}
    arguments["progress"] = progress or usual_progress()
    if original.is_finetuned:
        from mmfeat.finetune.finetune import finetune_heads

        tuned = finetune_heads(**arguments)
        return compare_files(original, tuned.run, tuned.reused)
    from mmfeat.sweep.train import train_heads

    sweep = train_heads(**arguments)
    return compare_files(original, sweep.run, sweep.reused)


def compare_files(original: Run, run: Run, reused: bool = False) -> Reproduction:
    old, new = _files(original.folder), _files(run.folder)
    different = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    before, after = _scores(original), _scores(run)
    scores = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    notes = []
    if any(entry.search_over is False for entry in original.leaderboard):
        notes.append("the search of the run was cut short by time, so another call tries other settings")
    if original.results.record is None:
        notes.append("the run has no record of its versions and machine")
    return Reproduction(
        original, run, reused, len({*old, *new}), tuple(different), scores, _changed(original, run), tuple(notes)
    )


def _files(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the files that are compared byte by byte."""
    paths = {path for pattern in COMPARED for path in folder.glob(pattern)}
    return {str(path.relative_to(folder)): file_sha256(path) for path in paths}


def _scores(run: Run) -> dict[str, float]:
    return {entry.name: entry.headline.value for entry in run.leaderboard}


def _changed(original: Run, run: Run) -> dict[str, tuple[str, str]]:
    before: dict[str, Any] = {**original.record.versions, **original.record.machine}
    after: dict[str, Any] = {**run.record.versions, **run.record.machine}
    after = after or {**versions((*ENCODING, *TRAINING)), **machine("cpu")}
    names = [name for name in {**before, **after} if name not in UNCOUNTED]
    pairs = {name: (str(before.get(name, "?")), str(after.get(name, "?"))) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
