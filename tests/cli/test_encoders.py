"""`mmfeat encoders`: what can be named, and the recipe of one encoder before any weights are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import huggingface_hub.constants
import pytest

from mmfeat.encoders.catalogue import RECOMMENDED, cached_models, listed, torchvision_size
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from tests.cli.typed import invoke
from tests.encoders.tiny_models import embed

PLAIN = EncoderOptions(dtype="float32", cleaning="none")


def lines(*arguments: str) -> list[str]:
    answer = invoke("encoders", *arguments)
    assert answer.exit_code == 0, answer.output
    return answer.stdout.splitlines()


def fails(message: str, *arguments: str) -> None:
    answer = invoke("encoders", *arguments)
    assert answer.exit_code == 1
    (line,) = answer.stderr.splitlines()
    assert message in line


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def put(cache: Path, repository: str, folder: Path) -> None:
    """A folder as the snapshot of a repository in the hub's cache."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))


def test_the_overview_is_short_and_has_every_recommended_model(hub_cache: Path) -> None:
    printed = lines()
    names = [model.name for models in RECOMMENDED.values() for model in models]
    assert all(any(line.strip().startswith(f"{name}:") for line in printed) for name in names)
    assert len(printed) < 60
    assert "in the hub cache" not in printed


def test_what_is_in_the_hub_cache_is_listed_by_its_files(hub_cache: Path, tmp_path: Path, tiny_bert: Path) -> None:
    card = Path(shutil.copytree(tiny_bert, tmp_path / "card"))
    (card / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    put(hub_cache, "someone/tiny-bert", card)
    put(hub_cache, "someone/data", _empty(tmp_path))
    (found,) = cached_models()
    assert (found.name, found.licence, found.cached) == ("bert:someone/tiny-bert", "mit", True)
    assert "in the hub cache" in lines()
    assert any(line.startswith("  bert:someone/tiny-bert: text, mit") for line in lines("--family", "bert"))


def test_a_cached_model_of_two_towers_is_for_texts_too(hub_cache: Path, tmp_path: Path) -> None:
    for kind, modality in (("siglip", "image, text"), ("dinov2", "image")):
        (folder := tmp_path / kind).mkdir()
        (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        put(hub_cache, f"someone/{kind}", folder)
        assert f"  hf:someone/{kind}: {modality}, in the hub cache" in lines("--family", "hf")


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no model")
    return folder / "empty"


def test_a_family_is_narrowed_by_a_text() -> None:
    found = listed("timm", "dinov3.lvd1689m")
    assert all(model.width and model.parameters and model.licence == "dinov3-license" for model in found)
    printed = lines("--family", "timm", "--match", "DINOv3.LVD")
    assert any(line.startswith("  timm:vit_base_patch16_dinov3.lvd1689m: image, 768 wide") for line in printed)
    assert lines("--family", "timm")[-1].endswith("more; --match TEXT narrows the list")
    assert listed("clip", "ViT-B-16-SigLIP2/")[0].tokens == 64
    assert [model.name for model in listed("torchvision", "resnet50")] == ["resnet50", "wide_resnet50_2"]
    assert torchvision_size("resnet50")[0] == 2048
    assert lines("--family", "hashing") == ["  hashing: text"]
    assert lines("--family", "timm", "--match", "nothing")[0].startswith("no name of timm that holds 'nothing'")


def test_a_list_of_encoders_has_the_recipe_of_each() -> None:
    assert [line for line in lines("hashing,hog") if not line.startswith(" ")] == [
        "hashing",
        "hog",
        "next: mmfeat extract --data DATA --encoders hashing,hog",
    ]


def test_wrong_asks_are_one_line(hub_cache: Path) -> None:
    fails("--family elmo: use one of st, bert", "--family", "elmo")
    fails("name where, as in --family timm", "--match", "x")
    fails("leave them out to see the recipe of one", "hog", "--family", "timm")
    fails("no encoder family 'elmo'", "elmo")
    fails("the model hub gave no weights", "st:nobody/nothing")


@pytest.mark.parametrize("kind", ["hashing", "hog", "bert", "clip", "resnet18"])
def test_a_recipe_says_what_the_encoder_then_is(kind: str, models: Callable[[str], str]) -> None:
    request = kind if kind in ("hashing", "hog") else models(kind)
    printed = lines(request, "--device", "cpu")
    towers = describe_encoders([request], EncoderOptions(**{**vars(PLAIN), "dtype": _dtype(printed)}))
    for tower in towers:
        (start,) = [number for number, line in enumerate(printed) if line == tower.spec.model]
        own = takewhile(lambda line: line.startswith("  "), printed[start + 1 :])
        told = dict(line.strip().split(": ", 1) for line in own if ": " in line)
        assert told["family"] == f"{tower.spec.family}, {tower.spec.modality}"
        assert tower.spec.arithmetic in told["arithmetic"]
        assert ("cleaning" in told) == (tower.spec.modality == "text")
        if tower is towers[-1]:
            assert told["fingerprint"] == tower.spec.fingerprint[:8]
    widths = [line.split(": ")[1].replace(",", "") for line in printed if line.startswith("  width: ")]
    vectors = [embed(encoder) for encoder in load_encoders(describe_encoders([request], PLAIN), "cpu")]
    assert widths == [str(next(iter(values.values()))[0].shape[-1]) for values in vectors]


def _dtype(printed: list[str]) -> str:
    return next(line for line in printed if line.startswith("  arithmetic: ")).split()[1].rstrip(",")


def test_a_recipe_has_the_prompts_and_the_length_of_a_checkpoint(tmp_path: Path, tiny_bert: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "st"))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    types = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules]
    (folder / "modules.json").write_text(json.dumps(types))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    prompts = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    printed = lines(f"st:{folder}")
    assert "  pooling: Transformer, Pooling, Normalize (modules.json)" in printed
    assert "  prompts: query (default): 'find: '; document: ''" in printed
    assert "  max length: 24 tokens, the checkpoint's" in printed


def test_the_recipe_of_clip_fetches_no_weights(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    import open_clip

    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_: pytest.fail("weights were fetched"))
    assert lines("clip:ViT-B-32-256/datacomp_s34b_b86k").count(
        "  weights: not here; the first extraction downloads them"
    )
