"""Heads that read class names: zero-shot equals open_clip's classifier, the linear head starts from its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders import registry
from mmfeat.encoders.registry import Tower, describe_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, HeadError
from mmfeat.export.export import TOLERANCE, export_run
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.data import HeadData
from mmfeat.heads.registry import BASELINES, HeadSettings, load_fusion
from mmfeat.prediction.final_heads import load_final
from mmfeat.prediction.predict import predict_data
from mmfeat.reproduce import reproduce_run
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.run import Run, read_run
from mmfeat.sweep.class_names import class_texts, parse_class_names, two_towers, with_class_vectors
from mmfeat.sweep.search import Plan
from mmfeat.sweep.train import Sweep
from mmfeat.system.wording import Silent
from tests.encoders.tiny_hf import write_hf
from tests.heads.toy_features import TARGETS
from tests.sweep.small_sweeps import FLOAT32, QUICK, make_place, run_of, sweep

CLASSES = ("negative", "neutral", "positive")
NAMES = {"positive": "a happy photo"}
TEXTS = {"negative": "negative", "neutral": "neutral", "positive": "a happy photo"}
ZERO_SHOT: dict[str, Any] = {"fusion": ["none"], "baselines": ["zero-shot"], "modalities": ["both", "text", "image"]}


@pytest.fixture(scope="module")
def place(demo_folder: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_place(demo_folder, tmp_path_factory.mktemp("names"), [f"clip:{tiny_clip}", "hashing"])
    shutil.copytree(tiny_clip, made / "tiny-clip")
    return made


def clip_sweep(place: Path, **changes: Any) -> Sweep:
    return sweep(place, [f"clip:{place / 'tiny-clip'}", "hashing"], **{**ZERO_SHOT, "class_names": NAMES, **changes})


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return clip_sweep(
        place,
        fusion=["linear", "concat"],
        baselines=["prior", "ridge", "zero-shot"],
        plan=Plan(HeadSettings(epochs=2, init="zero-shot")),
    ).run


def towers(place: Path, **options: Any) -> list[registry.Tower]:
    return describe_encoders(
        [f"clip:{place / 'tiny-clip'}", "hashing"],
        EncoderOptions(**{"dtype": "float32", "cleaning": "tweet", **options}),
    )


def config(place: Path, templates: str) -> RunConfig:
    where = {"cache": str(place / "cache"), "dataset": "demo"}
    return run_of(place, TARGETS, [], class_names=TEXTS, templates=templates, **where).config


def open_clip_weights(place: Path, templates: str = "OPENAI_IMAGENET_TEMPLATES") -> np.ndarray:
    """(D, C) by open_clip's own function."""
    import open_clip
    from open_clip import zero_shot_metadata

    model = open_clip.create_model(f"local-dir:{place / 'tiny-clip'}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{place / 'tiny-clip'}")
    chosen = getattr(zero_shot_metadata, templates)
    return open_clip.build_zero_shot_classifier(model, tokenizer, list(TEXTS.values()), chosen).double().numpy()


@pytest.mark.parametrize(
    ("templates", "theirs"), [("openai", "OPENAI_IMAGENET_TEMPLATES"), ("simple", "SIMPLE_IMAGENET_TEMPLATES")]
)
def test_logits_are_those_of_open_clip(place: Path, templates: str, theirs: str) -> None:
    """On photos 100 * image @ weights, as open_clip documents; on texts the same, on both the mean."""
    from mmfeat.baselines.zero_shot import ZeroShot
    from mmfeat.cache.store import Cache
    from mmfeat.heads.jobs import View
    from mmfeat.samples.dataset import read_samples

    described, samples = towers(place), read_samples(place / "demo").labelled
    store = Cache(place / "cache", "demo")
    seen = store.load(samples, [tower.spec for tower in described])
    seen = with_class_vectors(seen, config(place, templates), described, "cpu", Silent())
    assert len(seen.classes) == 2  # both towers of CLIP, not hashing
    weights = open_clip_weights(place, theirs)
    wanted = {}
    for block in seen.blocks:
        vectors = block.vectors.astype(np.float64)
        if block.name in seen.classes:
            wanted[block.modality] = 100 * vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ weights
    wanted["both"] = (wanted["image"] + wanted["text"]) / 2
    for modality, logits in wanted.items():
        data = HeadData(seen, modality)
        rows = np.flatnonzero(np.isfinite(logits).all(1))[::-1]
        found = ZeroShot(data.classes, False).logits(View(data), rows)
        np.testing.assert_allclose(found, logits[rows], rtol=1e-6, atol=1e-5)  # theirs are sums of float32
    gone = np.flatnonzero(~np.isfinite(wanted["image"]).all(1))
    if len(gone):  # the text alone counts where the photo is missing
        both = ZeroShot(HeadData(seen).classes, False).logits(View(HeadData(seen)), gone)
        np.testing.assert_allclose(both, wanted["text"][gone], rtol=1e-6, atol=1e-5)


def test_the_linear_head_starts_as_zero_shot(place: Path) -> None:
    """Whatever the statistics of the training rows are."""
    from mmfeat.baselines.zero_shot import ZeroShot
    from mmfeat.cache.store import Cache
    from mmfeat.heads.jobs import View
    from mmfeat.samples.dataset import read_samples

    described, samples = towers(place), read_samples(place / "demo").labelled
    seen = Cache(place / "cache", "demo").load(samples, [tower.spec for tower in described])
    seen = with_class_vectors(seen, config(place, "none"), described, "cpu", Silent())
    seen = seen.take(np.all(list(seen.masks.values()), axis=0))
    for modality in ("both", "text", "image"):
        data = HeadData(seen, modality)
        module = load_fusion("linear")(1, data.shape, 3)
        module.reset_head(0, torch.Generator().manual_seed(1))
        module.standardise(0, data.statistics(np.arange(40), unit=True))
        module.start_from(0, {start: torch.from_numpy(vectors) for start, vectors in data.classes.items()})
        rows = np.arange(len(seen))
        found = module.double()(data.batch(torch.from_numpy(rows[None])))[0].detach().numpy()
        np.testing.assert_allclose(found, ZeroShot(data.classes, False).logits(View(data), rows), rtol=0, atol=1e-3)


def test_they_join_the_leaderboard_and_its_ensembles(run: Run) -> None:
    entries = {entry.name: entry for entry in run.leaderboard}
    for modality in ("both", "text", "image"):
        assert entries[f"zero-shot-{modality}"].seeds["macro_f1"].values  # no training, so one seed
        assert len(entries[f"zero-shot-{modality}"].seeds["macro_f1"].values) == 1
        assert entries[f"linear-{modality}"].settings == HeadSettings(epochs=2, init="zero-shot")
    assert "zero-shot-image" in entries["greedy-ensemble"].members
    assert (run.config.class_names, run.config.templates) == (TEXTS, "openai")


def test_no_encoder_is_loaded_twice(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class vectors come from the cache in later sweeps, and from the run when it predicts."""
    monkeypatch.setattr(registry, "open_towers", None)
    assert clip_sweep(place, modalities=["image"]).run.leaderboard
    for modality in ("both", "image"):
        predicted = predict_data(place / "demo", run.folder, head="zero-shot", modalities=modality)
        assert len(predicted.predictions) == 120


def test_it_predicts_as_it_was_scored(place: Path, run: Run) -> None:
    """The ONNX graph of a run that is read from disk gives the same probabilities."""
    assert read_run(run.folder).entry("zero-shot", "image").final[0].config["model"] == {"multilabel": False}
    exported = export_run(run.folder, head="zero-shot", modalities="both", out=place / "export")
    assert exported.difference <= TOLERANCE


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_graph_gives_the_logits_of_the_model(multilabel: bool) -> None:
    """Of several encoders, some of whose vectors are missing; odds of a class against all others add up to 1."""
    from mmfeat.baselines.zero_shot import ZeroShot
    from mmfeat.export.graph import HeadPorts, ZeroShotPart

    random = np.random.default_rng(1)
    classes = {start: random.standard_normal((3, width)).astype(np.float32) for start, width in ((0, 8), (13, 5))}
    model = ZeroShot(
        {start: rows / np.linalg.norm(rows, axis=1)[:, None] for start, rows in classes.items()}, multilabel
    )
    vectors = random.standard_normal((40, 20)).astype(np.float32)
    vectors[:9, :8] = vectors[5:15, 13:18] = 0
    found = ZeroShotPart(HeadPorts({}, {}), model, 20).scored(torch.from_numpy(vectors)).numpy()
    wanted = model._scored(vectors)
    np.testing.assert_allclose(found, wanted, rtol=1e-3 if multilabel else 1e-6, atol=1e-5)  # odds of 1e12 are rough
    if multilabel:
        np.testing.assert_allclose((1 / (1 + np.exp(-wanted))).sum(1), 1, atol=1e-9)
    assert np.ptp(wanted[5:9], axis=1).max() < 1e-9


def test_it_is_reproduced_bit_for_bit(run: Run, tmp_path: Path) -> None:
    again = reproduce_run(run.folder, tmp_path / "again")
    assert (again.identical, again.reused) == (True, False)


def test_a_run_without_class_names_is_named_as_before(place: Path) -> None:
    plain = sweep(place, ["hashing"], fusion=["none"], baselines=["prior"], modalities=["text"]).run.config.to_json()
    assert not {"class_names", "templates"} & set(plain)
    assert "init" not in plain["plan"]["settings"]


def test_start_is_a_setting_to_search(place: Path) -> None:
    plan = Plan(HeadSettings(epochs=1), {"init": ("random", "zero-shot")})
    made = clip_sweep(place, fusion=["linear"], baselines=["none"], modalities=["image"], plan=plan).run
    assert made.leaderboard[0].trials == 2
    assert reproduce_run(made.folder, place / "again").identical


def test_several_labels_a_sample(place: Path, tmp_path: Path) -> None:
    changed = tmp_path / "demo"
    shutil.copytree(place / "demo", changed)
    list_file = changed / "train.txt"
    lines = list_file.read_text().splitlines()
    list_file.write_text("\n".join([lines[0], *(line + "|neutral" * (n % 3 == 0) for n, line in enumerate(lines[1:]))]))
    made = clip_sweep(
        place,
        data=changed,
        task="multilabel",
        out=tmp_path / "heads",
        fusion=["linear"],
        modalities=["image"],
        plan=Plan(HeadSettings(epochs=1, init="zero-shot")),
    ).run
    assert {entry.head for entry in made.leaderboard} >= {"linear", "zero-shot"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": {"positiv": "x"}}, "--class-names positiv=...: no such label; did you mean positive?"),
        ({"class_names": {"positive": " "}}, "--class-names positive=: an empty text"),
        ({"templates": "mine"}, "--templates mine: use one of openai, simple, none"),
        ({"baselines": ["prior"]}, "--class-names: no head reads them; add --baselines zero-shot"),
        ({"plan": Plan(HeadSettings(init="zero-shot"))}, "only the linear head starts from class names"),
    ],
)
def test_wrong_names_are_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, HeadError)) as caught:
        clip_sweep(place, **changes)
    assert message in str(caught.value)


def test_a_model_with_two_towers_is_needed(place: Path) -> None:
    with pytest.raises(HeadError, match="no encoder here has an image and a text tower"):
        sweep(place, ["hashing"], fusion=["none"], baselines=["zero-shot"], modalities=["text"])


def test_towers_of_one_model_belong_together(place: Path) -> None:
    described = towers(place)
    found = two_towers(described)
    assert set(found) == {tower.spec.folder_name for tower in described if tower.spec.family == "clip"}
    assert {(tower.spec.modality, tower.spec.cleaning) for tower in found.values()} == {("text", "none")}
    assert not two_towers([tower for tower in described if tower.spec.modality == "image"])


def test_all_leaves_them_out(place: Path) -> None:
    quick = {"plan": QUICK, "options": FLOAT32, "class_names": None, "modalities": ["text"], "ensembles": False}
    heads = {entry.head for entry in clip_sweep(place, **quick, baselines=["all"]).run.leaderboard}
    assert heads == set(BASELINES) - {"zero-shot"}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_of_transformers_have_two_towers_too(kind: str, place: Path, tmp_path: Path) -> None:
    """A class vector is the normalised mean of the library's own vectors of its sentences."""
    from open_clip.zero_shot_metadata import SIMPLE_IMAGENET_TEMPLATES

    request = f"hf:{write_hf(tmp_path / kind, kind)}"
    extract_features(place / "demo", [request], cache=place / "cache", options=FLOAT32)
    run = sweep(place, [request], **ZERO_SHOT, templates="simple", ensembles=False).run
    final = run.entry("zero-shot", "image").final[0]
    (image, text), found = run.config.encoders, load_final(run, run.entry("zero-shot", "image"), final)["0"]
    assert (image.spec.modality, text.spec.modality) == ("image", "text")
    encode = load_reference(Tower(text.request, replace(text.spec, cleaning="none")))
    for name, vector in zip(CLASSES, found, strict=True):
        made = [np.float64(encode(template(name))) for template in SIMPLE_IMAGENET_TEMPLATES]
        mean = np.mean([one / np.linalg.norm(one) for one in made], axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("positive=a happy photo,negative=sad", {"positive": "a happy photo", "negative": "sad"}),
        ("positive=happy, sunny, warm,negative=sad", {"positive": "happy, sunny, warm", "negative": "sad"}),
        ('positive="a, x=1", negative = b ', {"positive": "a, x=1", "negative": "b"}),
        ('"a,b=c"=one,d=e=f', {"a,b=c": "one", "d": "e=f"}),
        ('a=a "happy" photo,b=the "sad"', {"a": 'a "happy" photo', "b": 'the "sad"'}),
        ("", {}),
    ],
)
def test_names_are_read_as_they_are_typed(text: str, names: dict[str, str]) -> None:
    assert parse_class_names(text) == names


@pytest.mark.parametrize("text", ["positive", "=x", "a=b,a=c"])
def test_what_are_no_names_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--class-names"):
        parse_class_names(text)


def test_a_label_stands_for_itself_with_blanks() -> None:
    assert class_texts(["very_happy", "so-so"], {}, "openai") == {"very_happy": "very happy", "so-so": "so so"}
    with pytest.raises(ConfigError, match="label 1: a number tells no model"):
        class_texts(["0", "1"], {"0": "zero"}, "openai")
