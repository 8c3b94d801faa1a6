"""Stage 2 away from the plain case: views, tokens, other heads and protocols, early fusion; what was validated is what
submit predicts with."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features, extract_samples
from mmfeat.finetune.cells import blended
from mmfeat.finetune.finetune import Finetuned, finetune_heads
from mmfeat.finetune.prepare import prepare
from mmfeat.finetune.processes import Execution
from mmfeat.finetune.settings import FinetuneArguments
from mmfeat.finetune.stage_one import best_parent
from mmfeat.heads.registry import HeadSettings
from mmfeat.prediction.final_heads import EntryPredictor, towers_of
from mmfeat.prediction.model import load
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.run import Run, comparable_runs, read_run, write_run
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.search import Plan
from mmfeat.sweep.trials import load_outcome, save_outcome
from mmfeat.system.files import file_sha256
from mmfeat.system.wording import Advance
from tests.finetune.small_finetunes import ONCE, show_few_pixels, tune, weights
from tests.sweep.small_sweeps import FLOAT32, make_place, sweep

BOTH = replace(ONCE, unfreeze=(("text", 1), ("image", 1)))
HEADS = {"fusion": ["concat", "cross-attention"], "baselines": ["none"], "ensembles": False}


@pytest.fixture(scope="module")
def pairs(small_demo_folder: Path, tiny_bert: Path, tiny_timm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data with token states and an augmented view, and cross-attention and concat trained on them."""
    encoders = [f"bert:{tiny_bert}", f"timm:{tiny_timm}"]
    place, options = tmp_path_factory.mktemp("pairs"), replace(FLOAT32, outputs=("pooled", "tokens"), views=1)
    shutil.copytree(small_demo_folder, place / "demo")
    extract_features(place / "demo", encoders, cache=place / "cache", options=options)
    sweep(place, encoders, options=options, **HEADS)
    return place


def predictions(run: Run, entry: str = "stage-2-both") -> np.ndarray:
    """(N, C) probabilities out of fold."""
    rows = list(csv.reader((run.folder / entry / "out_of_fold.csv").open()))[1:]
    return np.array([[float(cell) for cell in row[-3:]] for row in rows])


def live_probabilities(place: Path, found: Finetuned, settings: Any, **asked: Any) -> np.ndarray:
    """(N, C) of the final stage 2 as it was trained: its own parameters in its own model."""
    run, (entry,) = found.run, found.run.matching("stage-2")
    parent = read_run(place / "heads" / run.config.parent)
    arguments = FinetuneArguments(settings, out=run.folder.parent, seeds=1, **asked)
    experiment = prepare(parent, arguments, Execution())
    assert experiment.folder == run.folder
    model, place = experiment.model(), run.head_folder(entry)
    state = {f"head.{name}": value[None] for name, value in load_file(place / entry.final[0].file).items()}
    for number, each in enumerate(entry.final[0].towers):
        state |= {f"{number}.{name}": value for name, value in load_file(place / each.file).items()}
    model.load(state)
    logits = model.predict(np.arange(len(experiment.problem.targets)))
    return entry.decision.probabilities(logits)


def submitted_probabilities(found: Finetuned) -> np.ndarray:
    """(N, C) of the same rows on the way that submit takes: fine-tuned towers as encoders, cached vectors."""
    run, (entry,) = found.run, found.run.matching("stage-2")
    samples = read_samples(run.config.data)
    labelled = replace(samples, samples=samples.labelled)
    towers = towers_of(run, entry)
    extract_samples(labelled, towers, cache=run.config.cache)
    features = Cache(run.config.cache, samples.name).load(labelled.samples, [tower.spec for tower in towers])
    return EntryPredictor(run, entry).predict(features)[1]


def open_gate(run: Run) -> Run:
    """The run with a final head that lets much of what cross-attention sees through."""
    config = json.loads((run.folder / "run.json").read_text())
    (entry,) = [entry for entry in config["leaderboard"] if entry["head"] == "stage-2"]
    path = run.folder / "stage-2-both" / entry["final"][0]["file"]
    tensors = load_file(path)
    gates = [name for name in tensors if "gate" in name]
    assert gates
    save_file({name: torch.full_like(value, 2.0) if name in gates else value for name, value in tensors.items()}, path)
    entry["final"][0]["sha256"] = file_sha256(path)
    return write_run(Run.from_json(run.folder, config))


@pytest.mark.parametrize(("head", "views"), [("concat", 1), ("cross-attention", 0)])
def test_both_towers_move_with_views_or_tokens(pairs: Path, head: str, views: int, tmp_path: Path) -> None:
    """Tokens of a moving tower move along; the plain photo and its view are trained on from their cached prefixes."""
    found = tune(pairs, str(tmp_path), settings=BOTH, head=head, views=views)
    run = found.run
    assert [(tower.path, tower.layers) for tower in run.results.moving] == [("cached", 1)] * 2
    assert {each.spec.view for each in run.config.prefixes} == ({"none", "train:1"} if views else {"none"})
    assert len(list((run.folder / "stage-2-both").glob("*-0-0.safetensors"))) == 2
    if head == "cross-attention":
        found = replace(found, run=open_gate(run))
    live = live_probabilities(pairs, found, BOTH, head=head, views=views)
    assert np.abs(live - submitted_probabilities(found)).max() < 0.005
    assert write_submission(run.folder, head="stage-2", out=tmp_path / "submission.csv").rows > 0
    read = {tower.spec.fingerprint for entry in run.leaderboard for tower in towers_of(run, entry)}
    assert read <= run.fingerprints  # so that `cache gc` keeps them


def test_tokens_of_views_are_refused(pairs: Path) -> None:
    """Nobody caches them, so submit could not look at them."""
    with pytest.raises(ConfigError, match="name --views 0"):
        tune(pairs, settings=BOTH, head="cross-attention", views=1)


@pytest.fixture(scope="module")
def coarse(small_demo_folder: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose vectors are bfloat16, as on most GPUs, of a model that may be changed."""
    place, options = tmp_path_factory.mktemp("coarse"), EncoderOptions(dtype="bfloat16", cleaning="tweet")
    shutil.copytree(tiny_bert, place / "tiny-bert")
    shutil.copytree(small_demo_folder, place / "demo")
    encoders = [f"bert:{place / 'tiny-bert'}"]
    extract_features(place / "demo", encoders, cache=place / "cache", options=options)
    sweep(place, encoders, options=options, ensembles=False, baselines=["none"], modalities=["text"])
    return place


def test_small_steps_survive_where_vectors_are_coarse(coarse: Path) -> None:
    """bfloat16 would round most of what stage 2 learned away."""
    settings = replace(ONCE, lr_encoder=1e-4)
    found = tune(coarse, settings=settings)
    (entry,) = found.run.matching("stage-2")
    assert [tower.spec.arithmetic for tower in towers_of(found.run, entry)] == ["float32"]
    assert np.abs(live_probabilities(coarse, found, settings) - submitted_probabilities(found)).max() < 0.01


def test_other_weights_than_the_run_s_are_refused(coarse: Path, tmp_path: Path) -> None:
    """Before a prefix of them gets into the cache under the old name."""
    model = coarse / "tiny-bert" / "model.safetensors"
    before, cached = model.read_bytes(), sorted((coarse / "cache").rglob("*.h5"))
    save_file({name: value + 1e-3 for name, value in load_file(model).items()}, model, metadata={"format": "pt"})
    try:
        with pytest.raises(RunError, match="not the encoder that"):
            tune(coarse, str(tmp_path), ONCE)
    finally:
        model.write_bytes(before)
    assert sorted((coarse / "cache").rglob("*.h5")) == cached


class Impatient:
    """Progress that presses Ctrl-C after some steps of stage 2."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Advance]:
        def advance(steps: int, note: str = "") -> None:
            self.left -= steps if "fine-tuning" in title else 0
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(
    "changes",
    [{"lora": 2}, {"amp": "float16", "accumulate": 3}, {"gradual": True, "unfreeze": (("text", 2), ("image", 1))}],
    ids=["lora", "float16", "gradual"],
)
def test_an_interrupted_training_ends_in_the_same_weights(pairs: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    settings, head = replace(ONCE, epochs=2, **changes), {"head": "concat", "views": 0, "checkpoint_seconds": 0}
    whole = tune(pairs, str(tmp_path / "whole"), settings, **head)
    for steps in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            tune(pairs, str(tmp_path / "cut"), settings, progress=Impatient(steps), workers=1, **head)
    again = tune(pairs, str(tmp_path / "cut"), settings, **head)
    assert not again.reused
    assert weights(again.run) == weights(whole.run)


def test_tokens_move_on_the_full_path_too(pairs: Path) -> None:
    runs = [
        tune(pairs, settings=replace(ONCE, path=path), head="cross-attention", views=0).run
        for path in ("cached", "full")
    ]
    assert np.abs(predictions(runs[0]) - predictions(runs[1])).max() < 0.01


def test_what_cross_attention_sees_of_pooled_vectors_moves(pairs: Path, tmp_path: Path) -> None:
    encoders = [tower.request for tower in read_run(next((pairs / "heads").iterdir())).towers]
    encoders = list(dict.fromkeys(encoders))
    place = tmp_path / "place"
    place.mkdir()
    pooled = {**HEADS, "fusion": ["cross-attention"], "attend": "pooled"}
    run = sweep(place, encoders, data=pairs / "demo", cache=pairs / "cache", **pooled).run
    assert run.config.attend == "pooled"
    found = tune(place, settings=ONCE)
    live = live_probabilities(place, found, ONCE)
    assert np.abs(live - submitted_probabilities(found)).max() < 0.005
    full = tune(place, settings=replace(ONCE, path="full")).run
    assert np.abs(predictions(found.run) - predictions(full)).max() < 0.01


@pytest.mark.parametrize("views", [0, 2])
def test_each_stage_predicts_with_the_views_it_was_trained_on(pairs: Path, views: int, tmp_path: Path) -> None:
    found = tune(pairs, settings=BOTH, head="concat", views=views)
    entries = {entry.head: entry for entry in found.run.leaderboard}
    for name, count in (("stage-1", 1), ("stage-2", views)):
        towers = towers_of(found.run, entries[name])
        assert {tower.spec.view for tower in towers} == {"none", *(f"train:{n + 1}" for n in range(count))}
        assert write_submission(found.run.folder, head=name, out=tmp_path / "submission.csv").rows > 0
    live = live_probabilities(pairs, found, BOTH, head="concat", views=views)
    assert np.abs(live - submitted_probabilities(found)).max() < 0.005
    usual = tune(pairs, settings=BOTH, head="concat").run
    assert (predictions(usual, "stage-1-both") == predictions(found.run, "stage-1-both")).all()


def test_fresh_augmentation_needs_pixels(pairs: Path) -> None:
    run = tune(pairs, settings=replace(ONCE, augment=True, batch_size=32), head="concat", views=0).run
    paths = {tower.tower.split(":")[0]: tower for tower in run.results.moving}
    assert paths["bert"].path == "cached"
    assert paths["timm"].path == "full"
    assert "--augment" in paths["timm"].reason


def test_early_fusion_trains_on_pixels_and_predicts(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_few_pixels(monkeypatch)
    settings = replace(ONCE, unfreeze=(("text", 1),), batch_size=32)
    run = tune(pairs, settings=settings, head="concat", fusion="early", views=0).run
    entries = {entry.head: entry for entry in run.leaderboard}
    assert set(entries) == {"stage-1", "early"}
    assert "train" not in entries["stage-1"].scores  # nobody looked
    write_submission(run.folder, head="early", out=tmp_path / "submission.csv", proba=True)
    written = np.array([row[2:] for row in csv.reader((tmp_path / "submission.csv").open())][1:], float)
    samples, loaded = read_samples(run.config.data).unlabelled, load(run.folder, head="early")
    assert np.abs(loaded.predict_samples(samples)[0].probabilities - written).max() < 1e-5
    with pytest.raises(ConfigError, match="--unfreeze image: the head sees no such modality"):
        tune(pairs, settings=BOTH, head="concat", fusion="early")


def test_models_side_by_side_hold_the_frozen_weights_once(pairs: Path, tmp_path: Path) -> None:
    parent = read_run(next((pairs / "heads").iterdir()))
    experiment = prepare(parent, FinetuneArguments(BOTH, out=tmp_path, head="concat"), Execution())
    one, other = experiment.model(), experiment.model()
    before = one.predict(np.arange(8))
    other.share_frozen(one)
    for first, second in zip(one.towers, other.towers, strict=True):
        assert first.frozen
        assert all(first.frozen[name].data_ptr() == each.data_ptr() for name, each in second.frozen.items())
        assert not {each.data_ptr() for each in first.parameters.values()} & {
            each.data_ptr() for each in second.parameters.values()
        }
    other.load(one.first)
    np.testing.assert_array_equal(other.predict(np.arange(8)), before)


def test_interpolated_adapters_are_a_share_of_their_product() -> None:
    down, up = "0.layer.lora_A.default.weight", "0.layer.lora_B.default.weight"
    second = {down: torch.rand(2, 3), up: torch.rand(4, 2)}
    part = blended({down: torch.rand(2, 3), up: torch.zeros(4, 2)}, second, 0.25)
    torch.testing.assert_close(part[up] @ part[down], 0.25 * second[up] @ second[down])


@pytest.fixture(scope="module")
def texts(small_demo_folder: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A holdout of multi-label samples, and a head on them."""
    place = tmp_path_factory.mktemp("texts")
    encoders = [f"bert:{tiny_bert}", "hog"]
    make_place(small_demo_folder, place, ["hog"])
    table = place / "demo.csv"
    samples = read_samples(place / "demo")
    lines = [
        [sample.id, json.dumps(sample.text or ""), f"demo/data/{sample.image.name}" if sample.image else "", label]
        for number, sample in enumerate(samples.samples)
        for label in ["" if sample.label is None else sample.label + ("|odd" if number % 2 else "")]
    ]
    table.write_text("\n".join(["id,text,image,label", *(f'{a},"{b[1:-1]}",{c},{d}' for a, b, c, d in lines)]))
    extract_features(table, encoders, cache=place / "cache", options=FLOAT32)
    several = {"task": "multilabel", "protocol": Protocol("holdout", seeds=2), "modalities": ["text"]}
    sweep(place, encoders, data=table, **several, ensembles=False, baselines=["none"])
    return place


def test_several_labels_and_a_holdout(texts: Path, tmp_path: Path) -> None:
    """`all` takes what can move: the head sees text alone."""
    settings = replace(ONCE, unfreeze=(("all", -1),))
    run = tune(texts, settings=settings, seeds=None).run
    entries = {entry.head: entry for entry in run.leaderboard}
    assert set(entries) == {"stage-1", "stage-2", "wise-ft"}
    assert len(entries["stage-2"].final) == 2
    assert "odd" in run.classes
    assert [tower.layers for tower in run.results.moving] == [-1]
    assert write_submission(run.folder, head="wise-ft", out=tmp_path / "submission.csv").rows > 0


def test_a_run_that_lost_a_file_is_trained_again(texts: Path, tmp_path: Path) -> None:
    run = tune(texts, str(tmp_path), ONCE).run
    for lost in ("stage-2-text/bert-0-0.safetensors", "leaderboard.csv"):
        (run.folder / lost).unlink()
        assert not tune(texts, str(tmp_path), ONCE).reused
        assert (run.folder / lost).is_file()
    (run.folder / "cells").mkdir()
    assert tune(texts, str(tmp_path), ONCE).reused
    assert not (run.folder / "cells").exists()


def test_other_folds_than_the_run_s_are_refused(texts: Path, tmp_path: Path) -> None:
    shutil.copytree(texts / "heads", tmp_path / "heads")
    (folder,) = (tmp_path / "heads").iterdir()
    files = [folder / f"{name}_split.csv" for name in ("train", "test")]
    train, test = (file.read_text().splitlines() for file in files)
    train[-1], test[-1] = test[-1], train[-1]
    for file, lines in zip(files, (train, test), strict=True):
        file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match="changed since"):
        tune(tmp_path, settings=ONCE)
    for file in folder.glob("*_split.csv"):
        file.unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(RunError, match="are gone; run mmfeat heads again"):
        tune(tmp_path, settings=ONCE)
    assert sorted(folder.iterdir()) == before


def test_data_and_cache_may_have_moved(texts: Path, tmp_path: Path) -> None:
    for name in ("demo", "cache", "heads"):
        shutil.copytree(texts / name, tmp_path / name)
    shutil.copy(texts / "demo.csv", tmp_path / "demo.csv")
    (folder,) = (tmp_path / "heads").iterdir()
    run = finetune_heads(
        folder, data=tmp_path / "demo.csv", cache=tmp_path / "cache", out=tmp_path / "tuned", settings=ONCE, seeds=1
    ).run
    assert run.config.data == str(tmp_path / "demo.csv")
    assert run.config.cache == str(tmp_path / "cache")


def test_the_parent_is_the_run_with_the_best_fusion(texts: Path, tmp_path: Path) -> None:
    """Whatever its scores on a few validation rows."""
    heads = tmp_path / "heads"
    for name, score in (("good", 0.9), ("lucky", 0.1)):
        shutil.copytree(next((texts / "heads").iterdir()), heads / name)
        path = next((heads / name).glob("*/trials/*.json")).with_suffix("")
        outcome = load_outcome(path)
        assert outcome is not None
        save_outcome(replace(outcome, scores=np.full_like(outcome.scores, score)), path)
        config = json.loads((heads / name / "run.json").read_text())
        del config["sha256"]
        config["leaderboard"][0]["macro_f1"]["value"] = 1 - score
        (heads / name / "run.json").write_text(json.dumps(config))
    assert best_parent(comparable_runs(heads), None, None).folder.name == "lucky"


def test_a_linear_head_from_class_names_is_trained_again(
    small_demo_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Its run sees photos alone, while the text tower encodes the class names."""
    asked = [f"clip:{tiny_clip}"]
    place = make_place(small_demo_folder, tmp_path / "work", asked)
    plan = Plan(HeadSettings(epochs=1, init="zero-shot"))
    heads = {"fusion": ["linear"], "baselines": ["none"], "modalities": ["image"], "plan": plan}
    parent = sweep(place, asked, **heads, ensembles=False).run.leaderboard[0]
    tuned = tune(place, settings=replace(ONCE, unfreeze=(("image", 1),)), seeds=None)
    first = next(entry for entry in tuned.run.leaderboard if entry.head == "stage-1")
    assert first.macro_f1 == parent.macro_f1
    assert first.log_loss.value == pytest.approx(parent.log_loss.value, abs=1e-4)
