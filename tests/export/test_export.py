"""Exports: graphs give what mmfeat predicts, also for samples that lack a part; the card's example runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from mmfeat.cache.store import Cache
from mmfeat.encoders.onnx_file import largest_difference, run_onnx
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.export.build import build_graph, inputs_of, why_not_exportable
from mmfeat.export.export import CARD, HEAD, HEAD_FACTS, MODEL, MODEL_FACTS, export_run
from mmfeat.extraction.extract import extract_features, extract_samples
from mmfeat.heads.registry import HeadSettings
from mmfeat.prediction.final_heads import EntryPredictor, towers_of
from mmfeat.runs.run import Run, read_run
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.search import Plan
from tests.finetune.small_finetunes import ONCE, tune
from tests.sweep.small_sweeps import FLOAT32, sweep

HOLDOUT = Protocol("holdout", seeds=2)
KINDS = (("f1", "macro_f1"), ("accuracy", "accuracy"))
SHORT = Plan(HeadSettings(epochs=1))
BASELINES = ["prior", "knn", "ridge", "logistic", "svm", "kernel", "forest"]
EVERYTHING = {"fusion": ["all", "cross-attention"], "baselines": BASELINES, "modalities": ["both"]}


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Every head and ensemble on vectors."""
    return sweep(place, **EVERYTHING, attend="pooled", protocol=HOLDOUT, plan=SHORT).run


@pytest.fixture(scope="module")
def real(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_timm: Path) -> Path:
    """A run on torch encoders with tokens, and a second stage of it."""
    encoders, place = [f"bert:{tiny_bert}", f"timm:{tiny_timm}"], tmp_path_factory.mktemp("real")
    shutil.copytree(demo_folder, place / "demo")
    options = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "tokens"))
    extract_features(place / "demo", encoders, cache=place / "cache", options=options)
    heads = {"fusion": ["concat", "cross-attention"], "baselines": ["none"], "ensembles": False, "options": options}
    sweep(place, encoders, **heads, protocol=HOLDOUT, plan=SHORT)
    tune(place, settings=ONCE, head="concat")
    return place


def newest(place: Path, folder: str) -> Run:
    (found,) = [path for path in (place / folder).iterdir() if path.is_dir()]
    return read_run(found)


def compared(run: Run, entry: Any) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Probabilities and choices of the graph and of mmfeat, for all samples, some of which lack a part."""
    samples = read_samples(run.config.data, run.config.columns)
    towers = towers_of(run, entry)
    features = Cache(run.config.cache, samples.name).load(samples.samples, [tower.spec for tower in towers])
    features = features.widened(EntryPredictor(run, entry).widths)
    chosen, probabilities = EntryPredictor(run, entry).predict(features, samples.samples)
    assert not all(mask.all() for mask in features.masks.values())
    graph, ports = build_graph(run, entry, towers, features)
    with torch.no_grad():
        found = graph(inputs_of(ports, features))
    return *(each.numpy() for each in found), probabilities, chosen


def test_graphs_of_all_heads_and_ensembles_predict_as_mmfeat_does(run: Run) -> None:
    seen = set()
    for entry in run.leaderboard:
        if why_not_exportable(run, entry):
            continue
        seen.add(entry.head)
        found, decided, probabilities, chosen = compared(run, entry)
        if "knn" not in json.dumps([entry.head, *entry.members]):  # torch's order of equals is its own
            assert largest_difference(found, probabilities) < 1e-5, entry.head
            assert (decided == chosen).all(), entry.head
    assert seen >= {"late", "concat", "gated", "film", "film-concat", "cross-attention", "prior", "knn", "ridge"}
    assert seen >= {"logistic", "svm", "kernel"}


def test_neighbours_of_one_modality_are_those_of_mmfeat_where_it_is_missing(place: Path, tmp_path: Path) -> None:
    """The whole data are checked, of which some lack the text and some the photo; ensembles have such members."""
    few = {"fusion": ["none"], "baselines": ["knn"], "modalities": ["text", "image"]}
    run = sweep(place, **few, out=tmp_path / "heads", protocol=HOLDOUT, plan=SHORT).run
    for head, modalities in (("knn", "text"), ("knn", "image"), ("mean", "ensemble")):
        result = export_run(run.folder, head=head, modalities=modalities, out=tmp_path / "out")
        assert result.difference < 1e-5


def test_trees_are_refused_by_name_and_passed_over(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="forest on both cannot be exported: decision trees cannot be written") as caught:
        export_run(run.folder, head="forest", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    ensemble = next(entry for entry in run.leaderboard if entry.head == "stacking")
    assert re.match("forest on both is in it, and decision trees", why_not_exportable(run, ensemble))


def test_multilabel_and_views(demo_folder: Path, tmp_path: Path) -> None:
    place = tmp_path
    shutil.copytree(demo_folder, place / "demo")
    lines = (place / "demo" / "train.txt").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    second = ["|neutral" if number % 3 == 0 and tag != "neutral" else "" for number, (_, tag) in enumerate(rows)]
    twice = [f"{id},{tag}{more}" for (id, tag), more in zip(rows, second, strict=True)]
    (place / "demo" / "train.txt").write_text("\n".join([lines[0], *twice, ""]))
    options = EncoderOptions(dtype="float32", cleaning="tweet", views=1)
    extract_features(place / "demo", ["hashing", "hog"], cache=place / "cache", options=options)
    few = {"fusion": ["concat"], "baselines": ["ridge", "svm"], "modalities": ["both"]}
    run = sweep(place, **few, task="multilabel", options=options, protocol=HOLDOUT, plan=SHORT).run
    for entry in run.leaderboard:
        found, decided, probabilities, chosen = compared(run, entry)
        assert largest_difference(found, probabilities) < 1e-5, entry.head
        assert (decided == chosen).all(), entry.head


def test_a_head_is_written_whole_with_a_card_whose_example_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    result = export_run(run.folder, head="concat", modalities="both", out=out)
    assert sorted(path.name for path in out.iterdir()) == sorted([HEAD, HEAD_FACTS, CARD])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert result.rows == 120
    assert result.difference < 1e-5
    assert result.no_model == "hog is no torch model"
    facts = json.loads((out / HEAD_FACTS).read_text())
    assert [each["name"] for each in facts["inputs"]] == ["hog", "hashing"]
    names = [name for each in facts["inputs"] for name in (each["name"], each["mask"])]
    inputs = [torch.zeros(5, facts["inputs"][0]["width"]), torch.zeros(5, dtype=torch.bool)]
    inputs += [torch.zeros(5, facts["inputs"][1]["width"]), torch.ones(5, dtype=torch.bool)]
    probabilities, chosen = run_onnx(out / HEAD, names, inputs)
    assert probabilities.shape == chosen.shape == (5, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    card = (out / CARD).read_text()
    about = ModelCard(card).data  # as the hub reads the header
    assert (about.library_name, about.license, about.model_name) == ("mmfeat", "unknown", run.name)
    assert about.tags == ["onnx", "multimodal", "image-classification", "text-classification"]
    scores = {score.metric_type: score.metric_value for score in about.eval_results or []}
    assert scores == pytest.approx(
        {name: run.entry("concat", "both").score(key).value for name, key in KINDS}, abs=1e-4
    )
    assert "## Licence\n\nUnknown" in card
    entry = run.entry("concat", "both")
    low, high = (f"{getattr(entry.macro_f1, end):.3f}".removeprefix("0") for end in ("low", "high"))
    assert f"| macro-F1 | {entry.macro_f1.value:.3f} [{low},{high}] |" in card
    assert all(f"| {name} | {count} |" in card for name, count in run.results.class_counts.items())
    assert all(tower.spec.fingerprint[:16] in card for tower in run.towers)
    assert str(run.folder.parent) not in card + json.dumps(facts)
    onnx, own = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(onnx.splitlines()) <= 14
    given = f"RUN = {str(run.folder)!r}\n"
    monkeypatch.chdir(out)
    for code in (onnx, given + own):
        exec(code, {})
    assert "'positive'" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten_but_for_an_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="not empty and no earlier export"):
        export_run(run.folder, head="prior", out=tmp_path / "mine")
    first, second = (export_run(run.folder, head=head, out=tmp_path / "out") for head in ("prior", "ridge"))
    assert (first.head, second.head) == ("prior", "ridge")
    assert json.loads((tmp_path / "out" / HEAD_FACTS).read_text())["head"] == "ridge"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    card = (tmp_path / "out" / CARD).read_bytes()
    (tmp_path / "out" / CARD).write_text("# mine")
    with pytest.raises(RunError, match="not empty and no earlier export"):
        export_run(run.folder, head="prior", out=tmp_path / "out")
    (tmp_path / "out" / CARD).write_bytes(card)
    (tmp_path / "out" / "tokenizer.json").write_text("mine, too")
    with pytest.raises(RunError, match="not empty and no earlier export"):
        export_run(run.folder, head="prior", out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine, too"


def test_a_graph_that_differs_is_not_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfeat.export.export.TOLERANCE", -1.0)
    with pytest.raises(RunError, match=r"head.onnx: onnxruntime differs from mmfeat by .*; nothing was written"):
        export_run(run.folder, head="prior", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_encoders_and_head_as_one_graph(real: Path, tmp_path: Path) -> None:
    result = export_run(newest(real, "heads").folder, head="concat", modalities="both", out=tmp_path / "out")
    assert result.no_model == ""
    assert result.model_difference is not None
    assert result.model_difference < 1e-5
    assert {MODEL, MODEL_FACTS} < set(result.files)
    about = json.loads((tmp_path / "out" / MODEL_FACTS).read_text())["encoders"]
    assert about["timm"]["resample"] == "BILINEAR"
    assert about["timm"]["crop"] == [64, 64]
    assert about["bert"]["cleaning"] == FLOAT32.cleaning


def test_tokens_go_into_a_graph_and_a_second_stage_does(real: Path, tmp_path: Path) -> None:
    attended = export_run(newest(real, "heads").folder, head="cross-attention", modalities="both", out=tmp_path / "a")
    assert attended.difference < 1e-5
    assert attended.no_model.startswith("the head reads tokens of")
    tuned = newest(real, "tuned")
    extract_samples(read_samples(real / "demo"), towers_of(tuned, tuned.entry("stage-2")), cache=real / "cache")
    found, decided, probabilities, chosen = compared(tuned, tuned.entry("stage-2"))
    assert largest_difference(found, probabilities) < 1e-5
    assert (decided == chosen).all()


def test_a_graph_cuts_the_expected_class_as_an_ordinal_run_does(place: Path, tmp_path: Path) -> None:
    ordered = {"task": "ordinal", "order": ["negative", "neutral", "positive"], "modalities": ["text"]}
    run = sweep(place, **{"fusion": ["none"], "baselines": ["logistic"], **ordered}, protocol=HOLDOUT, plan=SHORT).run
    entry = run.leaderboard[0]
    export_run(run.folder, out=tmp_path / "out", model=False)
    samples = read_samples(place / "demo").samples
    features = Cache(place / "cache", "demo").load(samples, [tower.spec for tower in towers_of(run, entry)])
    _, ports = build_graph(run, entry, towers_of(run, entry), features)
    facts = json.loads((tmp_path / "out" / HEAD_FACTS).read_text())
    names = [name for each in facts["inputs"] for name in (each["name"], each["mask"])]
    _, chosen = run_onnx(tmp_path / "out" / HEAD, names, inputs_of(ports, features))
    wanted, _ = EntryPredictor(run, entry).predict(features, samples)
    np.testing.assert_array_equal(chosen, wanted)
    assert "the expected number of the class" in (tmp_path / "out" / CARD).read_text()
