"""Runs: a folder with everything one sweep of heads knew and made.

`run.json` is written last, so a folder that has it is complete:

    heads/RUN/run.json                     configuration, encoders, classes, version, leaderboard
    heads/RUN/folds.csv                    role of every sample in every fold
    heads/RUN/leaderboard.csv, .json       one line a head, best first
    heads/RUN/HEAD-MODALITIES/             weights by fold, out_of_fold.csv, metrics.json
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, RunError
from mmfeat.runs.entry import PLACES, Entry, FinalHead, RunConfig, convert
from mmfeat.runs.leaderboard import LEADERBOARD
from mmfeat.runs.record import Record
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.system.files import canonical_json, file_sha256, read_json, write_json
from mmfeat.system.remote import absolute
from mmfeat.system.wording import head_label

RUN_FILE = "run.json"
ABLATION = "ablation.csv"
METRICS = "metrics.json"  # in the folder of an entry, as CURVES
CURVES = "curves.csv"
_PLAIN = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Moved:
    """What a run says of a tower that a second stage trained."""

    tower: str
    layers: int
    parameters: int
    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What came of a configuration: classes and counts of the data, widths of the blocks (D by name), and entries."""

    classes: tuple[str, ...]
    class_counts: dict[str, int]
    labelled: int
    widths: dict[str, int]
    leaderboard: tuple[Entry, ...]
    record: Record | None = None
    moving: tuple[Moved, ...] = ()
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `run.json`."""
        values = {**asdict(self), "leaderboard": [entry.to_json() for entry in self.leaderboard]}
        return {name: value for name, value in values.items() if value is not None and value != () and value != ""}


@dataclass(frozen=True)
class Run:
    """A complete run: its folder, what it was asked for, and what came of it."""

    folder: Path
    config: RunConfig
    results: Results

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> Run:
        """The run in `folder` whose `run.json` holds `values`; raises `ValueError` or `ConfigError` that says which
        field is missing or wrong."""
        if not isinstance(values, Mapping):
            raise ValueError("not an object")
        run = cls(folder, RunConfig.from_json(values), convert(values, Results))
        if not run.leaderboard:
            raise ValueError("an empty leaderboard")
        if odd := [entry.name for entry in run.leaderboard if not _PLAIN.fullmatch(entry.name)]:
            raise ValueError(f"no head is called {odd[0]}")  # the name would be a path to another folder
        return run

    def to_json(self) -> dict[str, Any]:
        """The values of `run.json`."""
        return {**self.config.to_json(), **self.results.to_json()}

    @property
    def name(self) -> str:
        """The name of the folder, also where the folder is given as `.`."""
        return self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.results.classes

    @property
    def leaderboard(self) -> tuple[Entry, ...]:
        """Entries, best first."""
        return self.results.leaderboard

    @property
    def record(self) -> Record:
        """How the run came about; an empty record where an older run has none."""
        return self.results.record or Record()

    @property
    def towers(self) -> list[Tower]:
        """The encoders of the run, with the requests they came from."""
        return list(self.config.encoders)

    @property
    def fingerprints(self) -> set[str]:
        """Fingerprints of all that the run reads from the cache: encoders, prefixes, fine-tuned towers."""
        tuned = [
            tower.spec.fingerprint
            for entry in self.leaderboard
            for final in entry.final
            for tower in self.tuned_towers(entry, final).values()
        ]
        return {tower.spec.fingerprint for tower in self.config.towers} | set(tuned)

    def tuned_towers(self, entry: Entry, final: FinalHead) -> dict[str, Tower]:
        """Fine-tuned replacements of the run's encoders for one final head: block of the encoder -> tuned tower.

        The tokens and views of a tuned encoder are new as well.
        """
        folder, tuned = self.head_folder(entry).resolve(), {}
        for moved in final.towers:
            request = f"finetuned:{folder / Path(moved.file).name}"
            for spec in (tower.spec for tower in self.towers):
                if replace(spec, output="pooled", pooling=moved.spec.pooling, view="none").folder_name == moved.slot:
                    now = replace(moved.spec, output=spec.output, pooling=spec.pooling, view=spec.view)
                    tuned[spec.folder_name] = Tower(request, now)
        return tuned

    @property
    def is_finetuned(self) -> bool:
        """Whether the run is a second stage, on top of another run."""
        return self.config.parent is not None

    @property
    def options(self) -> EncoderOptions:
        return self.config.options

    @property
    def comparable(self) -> tuple[str, str, str]:
        """The task, the data and the folds; runs that agree in these have scores that may be compared."""
        return self.config.task, self.config.data_hash, self.config.splits_hash

    @property
    def best_score(self) -> float:
        """Macro-F1 of the first entry."""
        return self.leaderboard[0].macro_f1.value

    @property
    def leaderboard_file(self) -> Path:
        return self.folder / f"{LEADERBOARD}.csv"

    def matching(self, head: str | None = None, modalities: str | None = None) -> list[Entry]:
        """Entries of this head and modality, best first."""
        return [
            entry for entry in self.leaderboard if head in (None, entry.head) and modalities in (None, entry.modalities)
        ]

    def score(self, head: str | None, modalities: str | None) -> float:
        """macro-F1 of the best entry of this head and modality; below any score without one."""
        return max((entry.macro_f1.value for entry in self.matching(head, modalities)), default=-1.0)

    def entry(self, head: str | None = None, modalities: str | None = None) -> Entry:
        """The best entry, of one head or modality if named."""
        if entries := self.matching(head, modalities):
            return entries[0]
        known = ", ".join(entry.label for entry in self.leaderboard)
        asked = head_label(head or "head", modalities) if modalities else head
        raise RunError(f"{self.folder}: no {asked}; the run has {known}")

    def is_whole(self, *files: str) -> bool:
        """Whether the leaderboards, the `files` named and all final heads are there, the heads byte for byte."""
        names = (f"{LEADERBOARD}.csv", f"{LEADERBOARD}.json", *files)
        heads = ((self.head_folder(entry), entry.final) for entry in self.leaderboard)
        return all((self.folder / name).is_file() for name in names) and all(
            finals_are_whole(folder, finals) for folder, finals in heads
        )

    def head_folder(self, entry: Entry) -> Path:
        return self.folder / entry.name


def write_run(run: Run) -> Run:
    """Declare the run complete."""
    write_json(run.folder / RUN_FILE, run.to_json())
    return run


def read_run(folder: Path) -> Run:
    """The run in `folder`; raises `RunError` if there is none or it is not finished."""
    try:
        return Run.from_json(folder, read_json(folder / RUN_FILE))
    except FileNotFoundError:
        raise RunError(f"{folder}: no finished run here (no {RUN_FILE}); make one with mmfeat heads") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(
            f"{folder / RUN_FILE}: not a run of this version ({error}); delete the folder and run mmfeat heads again"
        ) from error


def reuse_run(folder: Path, config: RunConfig) -> Run:
    """The run in `folder`, told where its data are now, and made the latest again: submit goes on with it."""
    run = read_run(folder)
    places = {name: getattr(config, name) for name in PLACES}
    moved = replace(run.config, **places)
    if moved != run.config:
        run = write_run(replace(run, config=moved))
    os.utime(folder / RUN_FILE)
    return run


def best_run(root: Path, data: str | None = None, head: str | None = None, modalities: str | None = None) -> Run:
    """The run with the best head, or the best of that name, among those comparable with the newest one on `data`."""
    alike = comparable_runs(root, data)
    having = [run for run in alike if run.matching(head, modalities)] or alike
    return max(having, key=lambda run: run.score(head, modalities))


def comparable_runs(root: Path, data: str | None = None, accept: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """The runs comparable with the newest one on `data`, oldest first.

    Comparable are runs on the same labels, contents and folds: scores on others say nothing about each
    other. Folders that hold no readable run, or none that is accepted, are passed over.
    """
    runs = _finished_runs(root, data, accept)
    if not runs:
        on = f" on {data}" if data else ""
        raise RunError(f"{root}: no finished run{on}; make one with mmfeat heads, or name it with --run")
    return [run for run in runs if run.comparable == runs[-1].comparable]


def overlooked_run(run: Run, head: str | None = None, modalities: str | None = None) -> Run | None:
    """The run with the highest score above that of `run` on data of the same place, whose folds or contents differ.

    `best_run` never takes such a run, for its score may be higher by an easier split.
    """
    runs = _finished_runs(run.folder.parent, run.config.data, lambda other: other.config.task == run.config.task)
    others = [other for other in runs if other.comparable != run.comparable]
    best = max(others, key=lambda other: other.score(head, modalities), default=run)
    return best if best.score(head, modalities) > run.score(head, modalities) else None


def _finished_runs(root: Path, data: str | None, accept: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """All runs that can be read, on `data` if named, oldest first."""
    runs = []
    for file in sorted(root.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(RunError):
            runs += [run for run in [read_run(file.parent)] if accept(run)]
    return [run for run in runs if data is None or run.config.data == absolute(data)]


def finals_are_whole(folder: Path, finals: Sequence[FinalHead]) -> bool:
    """Whether the final heads of an entry are there, byte for byte, and the towers that were fine-tuned with them."""
    towers = [(tower.file, tower.sha256) for final in finals for tower in final.towers]
    saved = [*((final.file, final.sha256) for final in finals), *towers]
    files = [(folder / Path(name).name, digest) for name, digest in saved]
    return all(file.is_file() and file_sha256(file) == digest for file, digest in files)


def checked_towers(run: Run, wanted: list[Tower]) -> list[Tower]:
    """Some of the run's encoders; weights that have changed since raise `RunError`."""
    now = {t.spec.fingerprint: t for t in describe_encoders([t.request for t in wanted], run.config.options)}
    for tower in wanted:
        if tower.spec.fingerprint not in now:
            alike = [other for other in now.values() if other.spec.name == tower.spec.name]
            fields = ", ".join(tower.spec.differences(alike[0].spec)) if alike else "the name"
            raise RunError(
                f"{tower.request}: not the encoder that {run.folder} was trained on ({fields} changed); "
                "restore its weights, or run mmfeat extract and mmfeat heads again"
            )
    return wanted


def hash_data(samples: Sequence[Sample], keys: Mapping[str, ContentKeys]) -> str:
    """Ids, labels and contents of the labelled samples: what a run must not survive a change of."""
    digest = hashlib.sha256()
    for sample, text, image in zip(samples, keys["text"].keys.tolist(), keys["image"].keys.tolist(), strict=True):
        digest.update(canonical_json([sample.id, sample.label, text.decode(), image.decode()]).encode())
    return digest.hexdigest()


def data_changed(run: Run, labelled: Sequence[Sample], store: Cache) -> bool:
    """Whether ids, labels or contents of the labelled samples are other ones than the run was trained on."""
    keys = {modality: store.content_keys(labelled, modality) for modality in MODALITIES}
    return hash_data(labelled, keys) != run.config.data_hash
