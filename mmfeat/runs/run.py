"""Runs: a folder with the configuration and the results of one training, and the choice among such folders.

`run.json` is written last, so a folder that has it is complete:

    heads/RUN/run.json                     configuration, encoders, classes, version, leaderboard
    heads/RUN/folds.csv                    role of every sample in every fold
    heads/RUN/leaderboard.csv, .json       one row an entry, best first
    heads/RUN/HEAD-MODALITIES/             an entry: trials, final heads, out_of_fold.csv, metrics.json
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders, kept_for
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, EncoderError, RunError
from mmfeat.evaluation.protocol import check_splits, files_hash, has_splits
from mmfeat.runs.entry import PLACES, Entry, FinalHead, RunConfig, convert
from mmfeat.runs.leaderboard import LEADERBOARD, Leaderboard
from mmfeat.runs.record import BEGUN, CHECKSUM, OutOfFold, Record, checksum, entry_is_whole, read_out_of_fold
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.system.files import canonical_json, read_json, write_json
from mmfeat.system.locks import is_written
from mmfeat.system.notebook import Cells, Shown
from mmfeat.system.remote import absolute
from mmfeat.system.wording import head_label

if TYPE_CHECKING:
    from mmfeat.report.figures import Plots

RUN_FILE = "run.json"
ABLATION = "ablation.csv"
METRICS = "metrics.json"  # METRICS and CURVES lie in the folder of each entry
CURVES = "curves.csv"
_PLAIN = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Moved:
    """A tower that a second stage trained: how many `layers` and `parameters`, by which `path`, and the `reason`."""

    tower: str
    layers: int
    parameters: int
    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """The results of a run: classes, their counts, labelled samples, the width of each block by name, and the entries.

    `moving` holds the trained towers of a second stage, and `warning` says where such a training is doubtful;
    `recommended` names the entry that predicts where no head is named; `splits` is the hash of the files of the splits.
    """

    classes: tuple[str, ...]
    class_counts: dict[str, int]
    labelled: int
    widths: dict[str, int]
    leaderboard: tuple[Entry, ...]
    record: Record | None = None
    moving: tuple[Moved, ...] = ()
    warning: str = ""
    recommended: str = ""
    splits: str = ""

    def to_json(self) -> dict[str, Any]:
        leaderboard = [{**entry.to_json(), "seconds": entry.seconds} for entry in self.leaderboard]
        values = {**asdict(self), "leaderboard": leaderboard}
        return {name: value for name, value in values.items() if value is not None and value != () and value != ""}


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A complete run: its folder, configuration and results."""

    folder: Path
    config: RunConfig
    results: Results

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> Run:
        """Read a run from the values of `run.json`; raises `ValueError` or `ConfigError` that names the wrong field."""
        if not isinstance(values, Mapping):
            raise ValueError("not an object")
        run = cls(folder, RunConfig.from_json(values), convert(values, Results))
        if not run.leaderboard:
            raise ValueError("an empty leaderboard")
        if odd := [entry.name for entry in run.leaderboard if not _PLAIN.fullmatch(entry.name)]:
            raise ValueError(f"no head is called {odd[0]}")  # the name would be a path to another folder
        return run

    def to_json(self) -> dict[str, Any]:
        return {**self.config.to_json(), **self.results.to_json()}

    @property
    def name(self) -> str:
        """The name of the folder, resolved, so that a `folder` of `.` has a name as well."""
        return self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.results.classes

    @property
    def leaderboard(self) -> Leaderboard:
        return Leaderboard(self.results.leaderboard)

    def facts(self) -> list[str]:
        return [str(self.folder), *self.leaderboard.facts()]

    def cells(self) -> Cells:
        return self.leaderboard.cells()

    @property
    def plot(self) -> Plots:
        """Figures for notebooks and files: `run.plot.leaderboard()`, `.confusion()` and `.calibration()`."""
        plots: Plots = import_module("mmfeat.report.figures").Plots(self)  # by name, since reports import runs
        return plots

    @property
    def record(self) -> Record:
        """The record of the training; empty where an older run has none."""
        return self.results.record or Record()

    @property
    def towers(self) -> list[Tower]:
        return list(self.config.encoders)

    @property
    def fingerprints(self) -> set[str]:
        """Fingerprints of everything that the run reads from the cache: encoders, prefixes and fine-tuned towers."""
        finals = [(entry, final) for entry in self.leaderboard for final in entry.final]
        tuned = [tower for pair in finals for tower in self.tuned_towers(*pair).values()]
        return {tower.spec.fingerprint for tower in (*self.config.towers, *tuned)}

    def tuned_towers(self, entry: Entry, final: FinalHead) -> dict[str, Tower]:
        """Fine-tuned replacements of the run's encoders for one final head, by the name of the block they replace.

        One tuned encoder replaces the pooled vectors, tokens and views of the original one.
        """
        folder, tuned = self.head_folder(entry).resolve(), {}
        for moved in final.towers:
            for spec in (tower.spec for tower in self.towers):
                if replace(spec, output="pooled", pooling=moved.spec.pooling, view="none").folder_name == moved.slot:
                    new = replace(moved.spec, output=spec.output, pooling=spec.pooling, view=spec.view)
                    tuned[spec.folder_name] = Tower(f"finetuned:{folder / Path(moved.file).name}", new)
        return tuned

    @property
    def is_finetuned(self) -> bool:
        """Whether the run is a second stage, which started from another run."""
        return self.config.parent is not None

    @property
    def options(self) -> EncoderOptions:
        return self.config.options

    @property
    def comparable(self) -> tuple[str, str, str]:
        """Task, hash of the data and hash of the folds; scores of runs may be compared where all three are equal."""
        return self.config.task, self.config.data_hash, self.config.splits_hash

    @property
    def recommended(self) -> Entry:
        """The entry that the training recommended; in a run without a recommendation the first."""
        entries = [entry for entry in self.leaderboard if entry.name == self.results.recommended]
        return (entries or self.leaderboard)[0]

    @property
    def leaderboard_file(self) -> Path:
        return self.folder / f"{LEADERBOARD}.csv"

    def matching(self, head: str | None = None, modalities: str | None = None) -> list[Entry]:
        """Return the entries of a head and a modality set, best first; None means any."""
        return [
            entry for entry in self.leaderboard if head in (None, entry.head) and modalities in (None, entry.modalities)
        ]

    def score(self, head: str | None, modalities: str | None) -> float:
        """Return the score of the best entry of a head and a modality set, or -inf if the run has none."""
        return max((entry.headline.value for entry in self.matching(head, modalities)), default=-math.inf)

    def entry(self, head: str | None = None, modalities: str | None = None) -> Entry:
        """Return the best entry of a head and a modality set; raises `RunError` if the run has none."""
        if entries := self.matching(head, modalities):
            return entries[0]
        known = ", ".join(entry.label for entry in self.leaderboard)
        wanted = head_label(head or "head", modalities) if modalities else head
        spared = self.config.modalities and (head, modalities) in (self.config.pairs or ())
        remedy = f"; mmfeat heads --modalities both,{modalities} trains all heads on each" if spared else ""
        raise RunError(f"{self.folder}: no {wanted}; the run has {known}{remedy}")

    def predicting(self, head: str | None = None, modalities: str | None = None) -> Entry:
        """Return the entry that predicts: the recommended one where neither head nor modalities are named."""
        return self.entry(head, modalities) if head or modalities else self.recommended

    def is_whole(self, *files: str) -> bool:
        """Whether the leaderboards, `files`, splits and files of all entries exist, these with their hashes."""
        names = (f"{LEADERBOARD}.csv", f"{LEADERBOARD}.json", *files)
        parts = [(self.folder / name).is_file() for name in names]
        parts.append(self.results.splits in ("", files_hash(self.folder)))
        return all(parts) and all(entry_is_whole(self.head_folder(entry), entry) for entry in self.leaderboard)

    def head_folder(self, entry: Entry) -> Path:
        return self.folder / entry.name

    def out_of_fold(self, entry: Entry | None = None) -> OutOfFold:
        """Read the predictions of an entry, by default the best; raises `RunError` where they are not of this run."""
        check_splits(self.folder, self.results.splits)
        return read_out_of_fold(self.folder, entry or self.leaderboard[0], self.classes, self.config.task)


def write_run(run: Run) -> Run:
    """Write `run.json`, which declares the run complete."""
    values = run.to_json()
    write_json(run.folder / RUN_FILE, {**values, CHECKSUM: checksum(values)})
    return run


def read_run(folder: str | Path) -> Run:
    """Read the run in `folder`; raises `RunError` if there is none or it is not finished."""
    folder = Path(folder)
    try:
        run = Run.from_json(folder, values := read_json(folder / RUN_FILE))
        if CHECKSUM in values and values[CHECKSUM] != checksum(values):
            raise ValueError("its content is not what was saved")
        return run
    except FileNotFoundError:
        raise RunError(f"{folder}: no finished run here (no {RUN_FILE}); make one with mmfeat heads") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(
            f"{folder / RUN_FILE}: not a run of this version ({error}); delete the folder and run mmfeat heads again"
        ) from error


def reuse_run(folder: Path, config: RunConfig) -> Run:
    """Read the run in `folder`, record the paths that `config` names, and make it the newest run: submit takes it."""
    run = read_run(folder)
    moved = replace(run.config, **{name: getattr(config, name) for name in PLACES})
    if moved != run.config:
        run = write_run(replace(run, config=moved))
    os.utime(folder / RUN_FILE)
    if not is_written(folder):  # a call that was killed at its very end left it
        (folder / BEGUN).unlink(missing_ok=True)
    return run


def is_run_folder(path: Path) -> bool:
    """Whether a path is a real folder, no link, that mmfeat made for a run, finished or not."""
    if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
        return False
    with contextlib.suppress(OSError):
        # Splits alone may be somebody's own; with trials beside them they are a run that was begun without a note.
        noted = (path / RUN_FILE).is_file() or (path / BEGUN).is_file()
        return noted or (has_splits(path) and next(path.glob("*/trials"), None) is not None)
    return False


def find_run(name: str | Path, heads: str | Path = "heads") -> Run:
    """Read a run by its path, its name in `heads`, or the beginning or end that only one name in `heads` has."""
    if (Path(name) / RUN_FILE).exists() or os.path.dirname(name):
        return read_run(Path(name))
    root, part = Path(heads), str(name)
    if (root / part).is_dir():
        return read_run(root / part)
    names = [path.name for path in root.iterdir() if is_run_folder(path)] if root.is_dir() else []
    alike = [name for name in names if part and (name.startswith(part) or name.endswith(part))]
    if len(alike) != 1:
        several = f"{len(alike)} runs are called like that: {', '.join(sorted(alike)[:5])}" if alike else "no such run"
        raise RunError(f"{part}: {several} in {root}; mmfeat runs ls lists them")
    return read_run(root / alike[0])


def choose_run(
    run: str | Path | None,
    heads: str | Path,
    data: str | Path | None = None,
    head: str | None = None,
    modalities: str | None = None,
) -> Run:
    """Find the run by its name (`find_run`) if `run` is given, otherwise by its score (`best_run`).

    Without a run on `data` the best one comparable with the newest run is taken.
    """
    if run:
        return find_run(run, heads)
    if data:
        with contextlib.suppress(RunError):
            return best_run(Path(heads), str(data), head, modalities)
    return best_run(Path(heads), None, head, modalities)


def best_run(root: Path, data: str | None = None, head: str | None = None, modalities: str | None = None) -> Run:
    """Find the run with the best entry of a head and a modality set among those comparable with the newest on `data`.

    Of runs that are equally good the newest is returned, which a repeated command makes of its run.
    """
    return max(reversed(comparable_runs(root, data)), key=lambda run: run.score(head, modalities))


def comparable_runs(root: Path, data: str | None = None, accept: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """Read the runs that are comparable with the newest run on `data`, oldest first.

    Runs are comparable where labels, contents and folds of their samples are the same: other scores say nothing about
    each other. Folders without a readable run and runs that `accept` refuses are passed over.
    """
    if not (runs := _finished_runs(root, data, accept)):
        on = f" on {data}" if data else ""
        raise RunError(f"{root}: no finished run{on}; make one with mmfeat heads, or name its folder")
    return [run for run in runs if run.comparable == runs[-1].comparable]


def overlooked_run(run: Run, head: str | None = None, modalities: str | None = None) -> Run | None:
    """Find the best run with a higher score than `run` on the same path of data, but with other folds or contents.

    `best_run` never takes such a run: its split may be easier. A better score on the folds of another seed is luck.
    """
    data, seed = run.config.data_hash, run.config.protocol.seed
    runs = _finished_runs(run.folder.parent, run.config.data, lambda other: other.config.task == run.config.task)
    runs = [other for other in runs if other.config.data_hash != data or other.config.protocol.seed == seed]
    others = [other for other in runs if other.comparable != run.comparable]
    best = max(others, key=lambda other: other.score(head, modalities), default=run)
    return best if best.score(head, modalities) > run.score(head, modalities) else None


def _finished_runs(root: Path, data: str | None, accept: Callable[[Run], bool]) -> list[Run]:
    """Read all finished runs in `root`, only those on `data` if it is given, oldest first."""
    runs = []
    for file in sorted(root.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(RunError):
            runs += [run for run in [read_run(file.parent)] if accept(run)]
    return [run for run in runs if data is None or run.config.data == absolute(data)]


def checked_towers(run: Run, wanted: list[Tower], remedy: str = "") -> list[Tower]:
    """Return `wanted`, encoders of the run.

    Raises `RunError`, which ends with `remedy`, where weights are gone or have changed since the training.
    """
    outside = [tower for tower in wanted if not tower.spec.weights.startswith("builtin:")]  # mmfeat keeps all of these
    requests = [tower.request for tower in outside]
    try:
        described = describe_encoders(requests, kept_for(requests, run.config.options)) if outside else []
    except EncoderError as error:
        raise RunError(f"{error}{remedy}") from error
    for tower in outside:
        if not any(is_same(other, tower) for other in described):
            alike = [other for other in described if other.spec.name == tower.spec.name]
            fields = ", ".join(tower.spec.differences(alike[0].spec)) if alike else "the name"
            if "remote_code" in fields:
                verb = "add" if tower.spec.remote_code else "leave out"
                raise RunError(f"{tower.request}: {verb} --trust-remote-code, as in the training of {run.folder}")
            raise RunError(
                f"{tower.request}: not the encoder that {run.folder} was trained on ({fields} changed); "
                f"restore its weights, or run mmfeat extract and mmfeat heads again{remedy}"
            )
    return wanted


def is_same(one: Tower, other: Tower) -> bool:
    """Whether two towers are one: they differ in no more than the name of their checkpoint, and in the arithmetic."""
    return replace(one.spec.computed_in(other.spec.arithmetic), variant=other.spec.variant) == other.spec


def hash_data(samples: Sequence[Sample], keys: Mapping[str, ContentKeys]) -> str:
    """Hash ids, labels and content keys of the labelled samples. A run is trained anew where the hash has changed."""
    digest = hashlib.sha256()
    for sample, text, image in zip(samples, keys["text"].keys.tolist(), keys["image"].keys.tolist(), strict=True):
        digest.update(canonical_json([sample.id, sample.label, text.decode(), image.decode()]).encode())
    return digest.hexdigest()


def hash_table(samples: Sequence[Sample]) -> str | None:
    """Hash ids and cells of the table of the labelled samples, apart from the rest: runs with a table and without one
    are comparable. None without a table."""
    rows = [[sample.id, sample.table] for sample in samples if sample.table]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest() if rows else None


def data_changed(run: Run, labelled: Sequence[Sample], store: Cache) -> bool:
    """Whether ids, labels (the data's own, or corrected) or contents of the labelled samples differ from the run's."""
    keys = {modality: store.content_keys(labelled, modality) for modality in MODALITIES}
    has_table = hash_table(labelled) not in (None, run.config.table_hash)
    return has_table or hash_data(labelled, keys) not in (run.config.data_hash, run.config.given_hash)
