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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.cache.store import Cache, folder_name
from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import ConfigError, RunError
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.system.files import canonical_json, file_sha256, read_json, write_json
from mmfeat.system.remote import absolute

RUN_FILE = "run.json"
LEADERBOARD = "leaderboard"
ABLATION = "ablation.csv"
_PLAIN = re.compile(r"[\w-]+")
METRICS = "metrics.json"  # of an entry, as the next
CURVES = "curves.csv"
PLACES = ("data", "cache", "columns")  # where a run found things; they may move, and the run stays the same
TOWERS = ("encoders", "prefixes")  # each a request, which names a place, and a spec
NEEDED = ("task", "attend", "columns", "widths", "class_counts", "labelled")  # by submit, beside what `Run` names


@dataclass(frozen=True)
class Run:
    """A complete run and what its `run.json` says."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """That of the folder, also where it is given as `.`."""
        return self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def towers(self) -> list[Tower]:
        """The encoders of the run, with the requests they came from."""
        return [Tower(entry["request"], EncoderSpec.from_json(entry["spec"])) for entry in self.config["encoders"]]

    @property
    def fingerprints(self) -> set[str]:
        """Of all that the run reads from the cache: encoders, prefixes of fine-tuning, fine-tuned towers."""
        named = [*self.config["encoders"], *self.config.get("prefixes", [])]
        tuned = [
            tower.spec.fingerprint
            for entry in self.leaderboard
            for final in entry.get("final", [])
            for tower in self.successors(entry, final).values()
        ]
        return {EncoderSpec.from_json(each["spec"]).fingerprint for each in named} | set(tuned)

    def successors(self, entry: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, Tower]:
        """Block of one of the run's encoders -> the fine-tuned tower in its place for one final head, whose tokens and
        views are new as well."""
        place, found = self.head_folder(entry).resolve(), {}
        for each in final.get("towers", []):
            tuned, request = EncoderSpec.from_json(each["spec"]), f"finetuned:{place / Path(each['file']).name}"
            for spec in (tower.spec for tower in self.towers):
                if replace(spec, output="pooled", pooling=tuned.pooling, view="none").folder_name == each["slot"]:
                    now = replace(tuned, output=spec.output, pooling=spec.pooling, view=spec.view)
                    found[spec.folder_name] = Tower(request, now)
        return found

    @property
    def is_finetuned(self) -> bool:
        """Whether it is a second stage, on top of another run."""
        return "parent" in self.config

    @property
    def options(self) -> EncoderOptions:
        return EncoderOptions(**self.config["options"])

    @property
    def comparable(self) -> tuple[str, str, str]:
        """Runs whose scores may be compared agree in this: the task, the data and the folds."""
        return self.config["task"], self.config["data_hash"], self.config["splits_hash"]

    @property
    def leaderboard(self) -> list[dict[str, Any]]:
        """Entries, best first."""
        return list(self.config["leaderboard"])

    @property
    def best_score(self) -> float:
        """Macro-F1 of the first entry."""
        return self.leaderboard[0]["macro_f1"]["value"]

    @property
    def leaderboard_file(self) -> Path:
        return self.folder / f"{LEADERBOARD}.csv"

    def matching(self, head: str | None = None, modalities: str | None = None) -> list[dict[str, Any]]:
        """Entries of this head and modality, best first."""
        return [
            entry
            for entry in self.leaderboard
            if head in (None, entry["head"]) and modalities in (None, entry["modalities"])
        ]

    def score(self, head: str | None, modalities: str | None) -> float:
        """macro-F1 of the best entry of this head and modality; below any score without one."""
        return max((entry["macro_f1"]["value"] for entry in self.matching(head, modalities)), default=-1.0)

    def entry(self, head: str | None = None, modalities: str | None = None) -> dict[str, Any]:
        """The best entry, of one head or modality if named."""
        if found := self.matching(head, modalities):
            return found[0]
        known = ", ".join(f"{entry['head']} on {entry['modalities']}" for entry in self.leaderboard)
        asked = f"{head or 'head'} on {modalities}" if modalities else head
        raise RunError(f"{self.folder}: no {asked}; the run has {known}")

    def head_folder(self, entry: Mapping[str, Any]) -> Path:
        return self.folder / f"{entry['head']}-{entry['modalities']}"


def write_run(folder: Path, config: Mapping[str, Any]) -> Run:
    """Declare the run complete."""
    write_json(folder / RUN_FILE, config)
    return Run(folder, config)


def read_run(folder: Path) -> Run:
    """The run in `folder`; raises `RunError` if there is none or it is not finished."""
    try:
        run = Run(folder, read_json(folder / RUN_FILE))
        run.towers, run.options, run.classes, run.comparable, run.best_score, [run.config[name] for name in NEEDED]
        names = [str(run.head_folder(each).relative_to(folder)) for each in run.leaderboard]
        if odd := [name for name in names if not _PLAIN.fullmatch(name)]:  # it would be another folder
            raise ValueError(f"no head is called {odd[0]}")
    except FileNotFoundError:
        raise RunError(f"{folder}: no finished run here (no {RUN_FILE}); make one with mmfeat heads") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, ConfigError) as error:
        raise RunError(
            f"{folder / RUN_FILE}: not a run of this version ({error}); delete the folder and run mmfeat heads again"
        ) from error
    return run


def run_name(config: Mapping[str, Any], label: str) -> str:
    """Readable, and different for every configuration. Where the data and weights lie does not count."""
    counted = {key: value for key, value in config.items() if key not in (*PLACES, *TOWERS, "trials")}
    counted |= {name: [entry["spec"] for entry in config[name]] for name in TOWERS if name in config}
    digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()[:8]
    return f"{folder_name(config['dataset'])}-{label}-{digest}"


def reuse_run(folder: Path, config: Mapping[str, Any]) -> Run:
    """The run that is there, told where its data are now, and the latest again: submit goes on with it."""
    run = read_run(folder)
    places = {name: config[name] for name in PLACES}
    if any(run.config[name] != place for name, place in places.items()):
        run = write_run(folder, {**run.config, **places})
    os.utime(folder / RUN_FILE)
    return run


def best_run(root: Path, data: str | None = None, head: str | None = None, modalities: str | None = None) -> Run:
    """The run with the best head, or the best of that name, among those comparable with the newest one on `data`."""
    alike = comparable_runs(root, data)
    having = [run for run in alike if run.matching(head, modalities)] or alike
    return max(having, key=lambda run: run.score(head, modalities))


def comparable_runs(root: Path, data: str | None = None, accept: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """Those comparable with the newest run on `data`, oldest first.

    Comparable are runs on the same labels, contents and folds: scores on others say nothing about each
    other. Folders that hold no readable run, or none that is accepted, are passed over.
    """
    runs = _finished_runs(root, data, accept)
    if not runs:
        on = f" on {data}" if data else ""
        raise RunError(f"{root}: no finished run{on}; make one with mmfeat heads, or name it with --run")
    return [run for run in runs if run.comparable == runs[-1].comparable]


def overlooked_run(run: Run, head: str | None = None, modalities: str | None = None) -> Run | None:
    """The run with the highest score above that of `run` on data of the same place, whose folds or contents are others:
    `best_run` never takes it, for its score may be higher by an easier split."""
    found = _finished_runs(
        run.folder.parent, run.config["data"], lambda each: each.config["task"] == run.config["task"]
    )
    others = [each for each in found if each.comparable != run.comparable]
    best = max(others, key=lambda each: each.score(head, modalities), default=run)
    return best if best.score(head, modalities) > run.score(head, modalities) else None


def _finished_runs(root: Path, data: str | None, accept: Callable[[Run], bool] = lambda run: True) -> list[Run]:
    """All that can be read, on `data` if named, oldest first."""
    runs = []
    for file in sorted(root.glob(f"*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(RunError):
            runs += [run for run in [read_run(file.parent)] if accept(run)]
    return [run for run in runs if data is None or run.config["data"] == absolute(data)]


def finals_are_whole(folder: Path, finals: list[dict[str, Any]]) -> bool:
    """Whether the final heads of an entry are there, byte for byte, and the towers that were fine-tuned with them."""
    everything = [each for final in finals for each in (final, *final.get("towers", []))]
    files = [(folder / Path(each["file"]).name, each["sha256"]) for each in everything]
    return all(file.is_file() and file_sha256(file) == digest for file, digest in files)


def checked_towers(run: Run, wanted: list[Tower]) -> list[Tower]:
    """Some of the run's encoders; weights that have changed since raise `RunError`."""
    now = {t.spec.fingerprint: t for t in describe_encoders([t.request for t in wanted], run.options)}
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
    return hash_data(labelled, keys) != run.config["data_hash"]
