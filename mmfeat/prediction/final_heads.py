"""Prediction with the final heads of a run: one entry or an ensemble, on features or on the samples of a data set."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmfeat.cache.explain import why_failed
from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders, kept_for
from mmfeat.errors import ConfigError, DataError, RunError, SubmissionError
from mmfeat.evaluation.blending import mean_logits
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_samples
from mmfeat.finetune.settings import EARLY
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import Predict, restore_heads
from mmfeat.heads.registry import NEEDS_TOKENS
from mmfeat.prediction.output_file import Predictions
from mmfeat.runs.entry import Entry, FinalHead, Rule, RunConfig
from mmfeat.runs.run import Run, checked_towers, is_same
from mmfeat.samples.contents import view_number
from mmfeat.samples.dataset import MODALITIES, PART, Sample, SampleSet, read_samples
from mmfeat.samples.folders import TEST_LIST, TRAIN_LIST
from mmfeat.samples.table_columns import COLUMNS, ROW_NUMBER, TABLE, TableColumn
from mmfeat.sweep.ensembles import combine
from mmfeat.system.files import file_sha256
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Progress


class EntryPredictor:
    """Predicts with one entry of a run's leaderboard, alone or an ensemble of several.

    The final heads are read, checked and built at the first prediction, and kept in memory.
    """

    def __init__(self, run: Run, entry: Entry, device: str = "cpu") -> None:
        self.run, self.entry, self.device = run, entry, device
        self._tensors: dict[Path, dict[str, np.ndarray]] = {}
        self._built: dict[tuple[Path, ...], Predict] = {}

    @property
    def towers(self) -> list[Tower]:
        return towers_of(self.run, self.entry)

    @property
    def widths(self) -> dict[str, int]:
        """Name -> D of each block that the entry may take. Fine-tuning does not change the width of a tower."""
        widths = dict(self.run.results.widths)
        for final in self.entry.final:
            for name, tower in self.run.tuned_towers(self.entry, final).items():
                widths[tower.spec.folder_name] = widths[name]
        return widths

    def predict(self, features: Features, samples: Sequence[Sample] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) bool choices and (N, C) probabilities.

        `samples` are the samples of `features`; only early fusion reads them, for the pixels of their photos.
        """
        try:
            early = self.entry.head == EARLY
            logits = self._early_logits(features, samples) if early else self._logits(features)
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise RunError(
                f"{self.run.folder}: not a whole run ({error!r}); delete the folder and run mmfeat "
                f"{_command(self.run)} again"
            ) from error
        return self.entry.decision.choose(logits), self.entry.decision.probabilities(logits)

    def _logits(self, features: Features) -> np.ndarray:
        """(N, C) log-probabilities or logits to which the entry's decision applies."""
        if not self.entry.is_ensemble:
            return self._head_logits(self.entry, features)
        parts = {
            member.name: member.decision.log_probabilities(self._head_logits(member, features))
            for member in members(self.run, self.entry)
        }
        unused = np.zeros_like(next(iter(parts.values())))  # a member with the weight 0 is not computed
        stack = np.stack([parts.get(name, unused) for name in self.entry.members])
        return combine(self.entry.rule or Rule(), stack, self.entry.decision)

    def _head_logits(self, entry: Entry, features: Features) -> np.ndarray:
        """(N, C) logits at the entry's temperature, whose probabilities are the means over the entry's final heads."""
        is_tuned = any(final.towers for final in entry.final)  # then each head sees vectors of its own towers
        groups = [[final] for final in entry.final] if is_tuned else [list(entry.final)]
        logits: list[np.ndarray] = []
        try:
            attend = self.run.config.attend if entry.fused_by == NEEDS_TOKENS else ""
            for finals in groups:
                inputs = head_features(self.run, entry, finals[0], features)
                data = HeadData(inputs, entry.modalities, self.device, attend)
                logits += self._built_heads(entry, finals, data)(data)
        except RunError:
            raise
        except Exception as error:  # a head of another shape may raise any error
            raise RunError(_not_whole(self.run, self.run.head_folder(entry), error)) from error
        return mean_logits(np.stack(logits), entry.decision)

    def _early_logits(self, features: Features, samples: Sequence[Sample]) -> np.ndarray:
        """(N, C) logits of early fusion, which reads the photos."""
        from mmfeat.finetune.model import early_model
        from mmfeat.finetune.processes import Team

        logits = []
        for final in self.entry.final:
            inputs = head_features(self.run, self.entry, final, features)
            model = early_model(
                inputs, samples, [], self.run.options.decoding, len(self.run.classes), Team(device=self.device)
            )
            path = _path(self.run, self.entry, final)
            if path not in self._tensors:
                self._tensors[path] = load_final(self.run, self.entry, final)
            model.load_head(self._tensors[path])
            logits.append(model.predict(np.arange(len(samples))))
        return mean_logits(np.stack(logits), self.entry.decision)

    def _built_heads(self, entry: Entry, finals: Sequence[FinalHead], data: HeadData) -> Predict:
        """The function from data to the (N, C) logits of each of `finals`, which see the same blocks."""
        paths = tuple(_path(self.run, entry, final) for final in finals)
        if paths not in self._built:
            tensors = [load_final(self.run, entry, final) for final in finals]
            classes = len(self.run.classes)
            self._built[paths] = restore_heads(entry.fused_by, finals[0].config, tensors, classes, data)
        return self._built[paths]


def towers_of(run: Run, entry: Entry) -> list[Tower]:
    """The encoders whose vectors an entry takes: the run's, or fine-tuned ones instead."""
    modalities = {member.modalities for member in members(run, entry)}
    views = math.inf if entry.views is None else entry.views  # the stages may be trained on different numbers of views
    wanted = [
        tower
        for tower in run.towers
        if {"both", tower.spec.modality} & modalities and view_number(tower.spec.view) <= views
    ]
    finals = [run.tuned_towers(entry, final) for final in entry.final] or [{}]
    towers = [tuned.get(tower.spec.folder_name, tower) for tuned in finals for tower in wanted]
    return list({tower.spec: tower for tower in towers}.values())


ELSEWHERE = "; where it lies elsewhere now, name it with --encoders"


def with_places(run: Run, encoders: Sequence[str]) -> Run:
    """The run with these requests in place of its own for the same weights, which lie elsewhere now.

    Raises `ConfigError` for a request whose weights are none of the run's.
    """
    found = describe_encoders(list(encoders), kept_for(encoders, run.config.options)) if encoders else []
    for request in dict.fromkeys(tower.request for tower in found):
        if not any(is_same(tower, own) for tower in found if tower.request == request for own in run.towers):
            known = ", ".join(dict.fromkeys(tower.spec.name for tower in run.towers))
            raise ConfigError(f"--encoders {request}: not the weights of an encoder of {run.folder}, which has {known}")

    def placed(tower: Tower) -> Tower:
        return next((Tower(here.request, tower.spec) for here in found if is_same(here, tower)), tower)

    return replace(run, config=replace(run.config, encoders=tuple(map(placed, run.config.encoders))))


def head_features(run: Run, entry: Entry, final: FinalHead, features: Features) -> Features:
    """The features that one final head takes, in the order of the run's encoders."""
    if not final.towers:
        return features
    tuned = run.tuned_towers(entry, final)
    names = [tuned.get(tower.spec.folder_name, tower).spec.folder_name for tower in run.towers]
    return features.named(names)


def table_of(run: Run, entry: Entry) -> tuple[TableColumn, ...]:
    sees = {"both", TABLE} & {member.modalities for member in members(run, entry)}
    return run.config.table or () if sees and entry.head != EARLY else ()


def members(run: Run, entry: Entry) -> list[Entry]:
    """The members of an ensemble whose weight is not 0, or the entry itself where it is no ensemble."""
    if not entry.is_ensemble:
        return [entry]
    weights = entry.rule.weights if entry.rule and entry.rule.weights else [1.0] * len(entry.members)
    by_name = {other.name: other for other in run.leaderboard}
    return [by_name[name] for name, weight in zip(entry.members, weights, strict=True) if weight > 0]


def load_final(run: Run, entry: Entry, final: FinalHead) -> dict[str, np.ndarray]:
    """The tensors of one final head. Raises `RunError` where the file is not the saved one, byte for byte."""
    from safetensors.numpy import load_file

    path = _path(run, entry, final)
    try:
        if file_sha256(path) != final.sha256:
            raise ValueError(f"{path.name} is not what was saved")
        return load_file(path)
    except Exception as error:  # a broken file may raise any error of safetensors
        raise RunError(_not_whole(run, path.parent, error)) from error


def _path(run: Run, entry: Entry, final: FinalHead) -> Path:
    return run.head_folder(entry) / Path(final.file).name


def _command(run: Run) -> str:
    return "finetune" if run.is_finetuned else "heads"


def _not_whole(run: Run, folder: Path, error: Exception) -> str:
    return f"{folder}: not a whole head ({error}); the same mmfeat {_command(run)} trains it again"


@dataclass(frozen=True)
class Inference:
    """Predictions for N samples, with the extraction of their vectors.

    `lacking` maps modality of the entry -> (N,) bool, whether a vector of some encoder is missing; `without` lists the
    ids of samples without any vector; `notes` are lines about missing vectors and the reasons.
    """

    predictions: Predictions
    extraction: Extraction
    lacking: dict[str, np.ndarray]
    without: list[str]
    notes: list[str]


def read_for(data: str | Path, columns: Mapping[str, str] | None, config: RunConfig) -> SampleSet:
    """Read data as `_read_for` does, with the labels as the run of this configuration knows them."""
    return config.known(_read_for(data, columns, config.columns))


def _read_for(data: str | Path, columns: Mapping[str, str] | None, run_columns: Mapping[str, str]) -> SampleSet:
    """Read data with the names in `columns`, else with those in `run_columns`, with or without the column of labels,
    else with the default names."""
    check_columns(data, columns)
    if run_columns.get("id") == ROW_NUMBER:  # other data may have a column of ids
        run_columns = {name: column for name, column in run_columns.items() if name != "id"}
    if columns and not set(COLUMNS) & set(columns):
        columns = {**run_columns, **columns}
    try:
        return read_samples(data, columns or run_columns)
    except DataError:
        if columns or not run_columns:
            raise
        unlabelled = {name: column for name, column in run_columns.items() if name != "label"}
        names_only = {name: column for name, column in run_columns.items() if name in COLUMNS}
        for names in (unlabelled, names_only, {name: unlabelled[name] for name in COLUMNS if name in unlabelled}, {}):
            with contextlib.suppress(DataError):
                return read_samples(data, names)
        raise


def check_columns(data: str | Path, columns: Mapping[str, str] | None) -> None:
    """Raise `ConfigError` for names of columns of a folder with lists, which has no columns."""
    named = {name: column for name, column in (columns or {}).items() if name in COLUMNS}
    lists = [os.path.join(data, name) for name in (TRAIN_LIST, TEST_LIST)] if os.path.isdir(data) else []
    if named and any(map(os.path.exists, lists)):
        given = ",".join(f"{name}={column}" for name, column in named.items())
        raise ConfigError(
            f"--columns {given}: {data} is a folder and has no columns; to name those of the file written, list them, "
            "as in --columns guid,tag"
        )


def infer(
    run: Run,
    entry: Entry,
    samples: SampleSet,
    cache: str | Path,
    settings: ExtractSettings | None = None,
    progress: Progress | None = None,
) -> Inference:
    """Extract missing vectors with the encoders of the run, and predict.

    Raises `RunError` where an encoder has changed since the run, `DataError` where columns of the table are not there.
    """
    table = table_of(run, entry)
    if table and not samples.table:
        raise DataError(
            f"{samples.source}: no column {', '.join(column.name for column in table)}, which {entry.label} sees; name "
            f"yours with --columns {TABLE}=..., or another head with --modalities"
        )
    settings = settings or ExtractSettings()
    predictor = EntryPredictor(run, entry, resolve_device(settings.device))
    towers = checked_towers(run, predictor.towers, ELSEWHERE)
    extraction = extract_samples(samples, towers, cache=cache, settings=settings, progress=progress)
    specs = [tower.spec for tower in towers]
    store = Cache(cache, samples.name)
    features = store.load(samples.samples, specs).with_table(table, samples.samples)
    predictions = predict_features(predictor, features, samples.samples)
    lacking = _lacking(features)

    def why(modality: str, sample: Sample) -> str:
        return why_failed(store, sample, [spec for spec in specs if spec.modality == modality])

    return Inference(predictions, extraction, lacking, unseen(features), _lacking_notes(samples, lacking, why))


def predict_features(predictor: EntryPredictor, features: Features, samples: Sequence[Sample]) -> Predictions:
    """Predictions of an entry from features. Raises `SubmissionError` where probabilities are not finite."""
    run, features = predictor.run, features.widened(predictor.widths)
    chosen, probabilities = predictor.predict(features, samples)
    if not np.isfinite(probabilities).all():
        raise SubmissionError(f"{run.folder}: its head gives no finite predictions; train it again")
    return Predictions(features.ids, chosen, probabilities, run.classes, run.config.is_multilabel)


def unseen(features: Features) -> list[str]:
    present = np.any(list(features.masks.values()), axis=0)
    return [features.ids[row] for row in np.flatnonzero(~present)]


def _lacking_notes(
    samples: SampleSet, lacking: Mapping[str, np.ndarray], why: Callable[[str, Sample], str]
) -> list[str]:
    """Lines about texts and photos that are missing or cannot be read; `why` maps (modality, sample) -> reason."""
    lines = []
    for modality, gaps in lacking.items():
        absent = [sample for sample in samples if getattr(sample, modality) is None]
        if absent:
            reason = getattr(absent[0], f"{modality}_error")
            lines.append(
                f"{len(absent):,} of {len(samples):,} samples predicted without {PART[modality]} "
                f"(first: {absent[0].id}, {reason})"
            )
        pairs = zip(samples, gaps.tolist(), strict=True)
        if broken := [sample for sample, gap in pairs if gap and getattr(sample, modality) is not None]:
            lines.append(
                f"{len(broken):,} of {len(samples):,} samples have a {PART[modality]} that cannot be read and counts "
                f"as missing (first: {broken[0].id}, {why(modality, broken[0])})"
            )
    return lines


def unseen_note(without: Sequence[str], count: int, modalities: Iterable[str]) -> list[str]:
    """A line about samples without any input of the head; no line without such samples."""
    if not without:
        return []
    wanted = " nor ".join(PART[modality] for modality in modalities)
    return [
        f"{len(without):,} of {count:,} samples have no {wanted}, which is what this head sees (first: {without[0]}): "
        "they are predicted from nothing"
    ]


def _lacking(features: Features) -> dict[str, np.ndarray]:
    """Modality -> (N,) bool, whether a vector of some encoder is missing."""
    blocks: list[Block | MappedBlock] = [*features.blocks, *features.mapped]
    return {
        modality: ~np.all([block.mask for block in blocks if block.modality == modality], axis=0)
        for modality in MODALITIES
        if any(block.modality == modality for block in blocks)
    }
