"""Checkpoints of open_clip: repositories of the hub, weights files of tags, tokenizers, code that is not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.clip_checkpoints import read_checkpoint
from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.errors import EncoderError
from tests.encoders.tiny_hf import change_json
from tests.encoders.tiny_models import contents, embed, write_clip, write_hub

PLAIN = EncoderOptions(dtype="float32", cleaning="none")
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def change(folder: Path, **values: Any) -> None:
    """Change parts of the configuration of a folder; `text` and `vision` are those of the towers."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    for tower in ("text", "vision"):
        config["model_cfg"][f"{tower}_cfg"].update(values.pop(tower, {}))
    config["model_cfg"].update(values.pop("model", {}))
    file.write_text(json.dumps({**config, **values}))


def copy_tokenizer(source: Path, folder: Path) -> None:
    for file in (*source.glob("token*"), source / "config.json"):  # which transformers wants in a cache of the hub
        shutil.copy(file, folder)


def check_parity(request: str, library_name: str, **arguments: Any) -> None:
    """Compare both towers with `open_clip.create_model_from_pretrained` and `get_tokenizer`, and the reference call."""
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(library_name, **arguments)
    tokenizer = open_clip.get_tokenizer(library_name)
    with torch.no_grad():
        published = {
            "image": model.eval().encode_image(torch.stack([transform(one) for one in contents("image")])).numpy(),
            "text": model.encode_text(tokenizer(contents("text"))).numpy(),
        }
    towers = describe_encoders([request], PLAIN)
    for tower, encoder in zip(towers, load_encoders(towers, "cpu"), strict=True):
        expected = published[encoder.modality]
        np.testing.assert_allclose(embed(encoder)["pooled"], expected, atol=1e-5)
        reference = load_reference(tower)(contents(encoder.modality)[0])
        np.testing.assert_allclose(reference, expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "siglip", "wide", "longest", "quickgelu"])
def test_a_repository_of_the_hub_equals_open_clip(
    kind: str, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    vision = {"wide": {"image_size": [32, 64]}, "siglip": trunk}.get(kind, {"image_size": 48})
    text = {"context_length": 16, "no_causal_mask": True, "pool_type": "last"} if kind == "siglip" else None
    folder = write_clip(tmp_path / "model", vision, text)
    if kind == "siglip":
        copy_tokenizer(tiny_bert, folder)
        own = {"hf_tokenizer_name": "org/siglip", "tokenizer_kwargs": {"clean": "canonicalize"}}
        change(folder, preprocess_cfg=SIGLIP, text=own, model={"custom_text": True, "init_logit_bias": -10})
    if kind == "longest":
        change(folder, preprocess_cfg={"resize_mode": "longest", "fill_color": 127})
    if kind == "quickgelu":
        change(folder, model={"quick_gelu": True})
    revision = write_hub(tmp_path / "hub", f"org/{kind}", folder, monkeypatch)
    (spec, _) = (tower.spec for tower in describe_encoders([f"clip:hf-hub:org/{kind}"], PLAIN))
    assert (spec.variant, spec.weights) == (f"hf-hub:org/{kind}", f"revision:{revision}")
    check_parity(f"clip:hf-hub:org/{kind}", f"hf-hub:org/{kind}")


def test_a_repository_stays_at_the_revision_of_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_clip(tmp_path / "model")
    revision = write_hub(tmp_path / "hub", "org/name", folder, monkeypatch)
    towers = describe_encoders(["clip:hf-hub:org/name"], PLAIN)
    repository, newer = tmp_path / "hub" / "models--org--name", "1" * 40
    shutil.copytree(repository / "snapshots" / revision, repository / "snapshots" / newer)
    (repository / "refs" / "main").write_text(newer)
    change(repository / "snapshots" / newer, preprocess_cfg=SIGLIP)
    assert {tower.spec.weights for tower in towers} == {f"revision:{revision}"}
    assert len(load_encoders(towers, "cpu")) == 2  # the newer one has another preprocessing, which would be refused
    assert describe_encoders(["clip:hf-hub:org/name"], PLAIN)[0].spec.weights == f"revision:{newer}"


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file of an architecture with two tags that disagree; no published one is small enough."""
    import_torchvision()
    import open_clip

    folder = write_clip(tmp_path / "folder", {"image_size": 48})
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    quick = {"url": "http://127.0.0.1:9/tiny-quick.safetensors", "quick_gelu": True, "std": (0.4, 0.5, 0.6)}
    tags = {"quick": quick, "squash": {"hf_hub": "org/tiny/tiny-squash.safetensors", **SIGLIP}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    (folder / "open_clip_config.json").rename(folder / "aside.json")
    return folder / "open_clip_model.safetensors"


QUICK = {"force_quick_gelu": True, "image_std": (0.4, 0.5, 0.6)}
SQUASH = {f"image_{name}": value for name, value in SIGLIP.items()}


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ("quick=open_clip_model.safetensors", QUICK),
        ("squash=open_clip_model.safetensors", SQUASH),
        ("tiny-quick.safetensors", QUICK),
        ("tiny-squash.safetensors", SQUASH),
    ],
)
def test_a_weights_file_is_read_as_its_tag_says(tagged: Path, asked: str, arguments: dict[str, Any]) -> None:
    """A tag is named before the file, or known by the name of its published file."""
    tag, _, name = asked.rpartition("=")
    file = tagged.with_name(name)
    if file != tagged:
        shutil.copy(tagged, file)
    request = f"clip:tiny-clip/{tag}{'=' if tag else ''}{file}"
    (tower, _) = describe_encoders([request], PLAIN)
    quick = "-quickgelu" if arguments is QUICK else ""
    assert (tower.request, tower.spec.variant) == (request, f"tiny-clip{quick}/{name}")
    check_parity(request, "tiny-clip", pretrained=str(file), **arguments)


def test_a_weights_file_whose_tag_is_not_known_is_refused(tagged: Path) -> None:
    with pytest.raises(
        EncoderError, match=r"name the tag .* clip:tiny-clip/TAG=FILE; there are quick, squash"
    ) as error:
        describe_encoders([f"clip:tiny-clip/{tagged}"], PLAIN)
    assert "\n" not in str(error.value)
    with pytest.raises(EncoderError, match=r"no weights 'nope' for tiny-clip; open_clip has quick, squash"):
        describe_encoders([f"clip:tiny-clip/nope={tagged}"], PLAIN)
    with pytest.raises(EncoderError, match=r"no such weights file 'nowhere\.pt'; check the path after quick="):
        describe_encoders(["clip:tiny-clip/quick=nowhere.pt"], PLAIN)


def test_a_weights_file_is_read_as_the_configuration_beside_it_says(tagged: Path) -> None:
    tagged.with_name("aside.json").rename(tagged.with_name("open_clip_config.json"))
    change(tagged.parent, preprocess_cfg=SIGLIP, model={"quick_gelu": True})
    check_parity(f"clip:tiny-clip/{tagged}", "tiny-clip", pretrained=str(tagged), force_quick_gelu=True, **SQUASH)
    (tower, _) = describe_encoders([f"clip:tiny-clip/squash={tagged}"], PLAIN)
    assert tower.spec.variant == f"tiny-clip/{tagged.name}"  # the tag that is named counts more


def test_a_folder_in_the_place_of_a_file_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=rf"is a folder, so name clip:{tmp_path}"):
        describe_encoders([f"clip:ViT-B-32/{tmp_path}"], PLAIN)


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_models_whose_tags_disagree_ask_for_one(tmp_path: Path, model: str) -> None:
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(EncoderError, match=rf"clip:{model}/TAG=FILE; there are .*laion2b"):
        read_checkpoint(f"{model}/{tmp_path}/open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    ("model", "mean", "resize", "quick"),
    [
        ("ViT-B-16-SigLIP", 0.5, "squash", False),
        ("ViT-B-32/openai=", 0.48145466, "shortest", True),
        ("ViT-B-32/laion2b_s34b_b79k=", 0.48145466, "shortest", False),
        ("MobileCLIP-B", 0.0, "shortest", False),
        ("ViT-B-16-quickgelu", 0.48145466, "shortest", False),
    ],
)
def test_published_weights_in_a_file_have_their_recipe(
    tmp_path: Path, model: str, mean: float, resize: str, quick: bool
) -> None:
    file = tmp_path / "open_clip_model.safetensors"
    file.touch()
    checkpoint = read_checkpoint(f"{model}{'' if '=' in model else '/'}{file}")
    recipe = json.loads(checkpoint.preprocessing)
    assert (recipe["mean"][0], recipe["resize_mode"]) == (mean, resize)
    assert checkpoint.arguments["force_quick_gelu"] is quick


def test_openai_s_own_names_of_models(tmp_path: Path) -> None:
    (tmp_path / "ViT-B-32.pt").touch()  # the name of OpenAI's own file
    assert read_checkpoint(f"ViT-B/32/{tmp_path}/ViT-B-32.pt").name == "ViT-B-32-quickgelu/ViT-B-32.pt"


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Own\n"


@pytest.fixture
def hostile(tmp_path: Path, tiny_bert: Path) -> Path:
    """A folder whose tokenizer is a class in a Python file of its own, which leaves a marker when it is run."""
    folder = write_clip(tmp_path / "hostile", text={"context_length": 16})
    copy_tokenizer(tiny_bert, folder)
    own = {"AutoTokenizer": ["own.Own", "own.Own"]}
    change_json(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    change(folder, text={"hf_tokenizer_name": "org/hostile"})
    return folder


@pytest.mark.parametrize("asked", [{}, {"trust_remote_code": True}, {"trust_remote_code": "yes"}, {"vocab_file": "/x"}])
def test_a_folder_s_code_is_never_run(
    hostile: Path, tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever would be asked says yes
    change(hostile, text={"tokenizer_kwargs": asked})
    (hostile / "config.json").unlink()  # it would name a class of the library to take instead
    write_hub(tmp_path / "hub", "org/hostile", hostile, monkeypatch)
    for request in (f"clip:{hostile}", "clip:hf-hub:org/hostile"):
        with pytest.raises(EncoderError) as error:
            load_encoders(describe_encoders([request], PLAIN), "cpu")
        assert "\n" not in str(error.value)
        reason = "tokenizer_kwargs" if asked else "cannot be loaded"
        assert reason in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("settings", [{"mean": ["a"] * 3}, {"mean": [0.5] * 2}, {"std": [0, 0, 0]}, ["squash"], 3])
def test_a_configuration_that_prepares_no_picture_gets_one_line(tmp_path: Path, settings: Any) -> None:
    folder = write_clip(tmp_path / "folder")
    change(folder, preprocess_cfg=settings)
    with pytest.raises(EncoderError) as error:
        load_encoders(describe_encoders([f"clip:{folder}"], PLAIN), "cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("trunk", ["hf-hub:org/other", "local-dir:/other"])
def test_a_folder_names_no_configuration_elsewhere(tmp_path: Path, trunk: str) -> None:
    folder = write_clip(tmp_path / "folder")
    change(folder, vision={"timm_model_name": trunk})
    with pytest.raises(EncoderError, match=rf"timm_model_name {trunk}, which leaves it") as error:
        describe_encoders([f"clip:{folder}"], PLAIN)
    assert "\n" not in str(error.value)


def test_a_folder_without_its_tokenizer_gets_one_line(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "folder")
    change(folder, text={"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"})
    with pytest.raises(EncoderError, match=r"copy them from timm/ViT-B-16-SigLIP.* into this folder") as error:
        describe_encoders([f"clip:{folder}"], PLAIN)
    assert "\n" not in str(error.value)


def test_a_repository_whose_tokenizer_cannot_be_had_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_clip(tmp_path / "folder")
    change(folder, text={"hf_tokenizer_name": "org/elsewhere"})
    write_hub(tmp_path / "hub", "org/name", folder, monkeypatch)
    with pytest.raises(EncoderError, match=r"its tokenizer org/elsewhere cannot be loaded") as error:
        load_encoders(describe_encoders(["clip:hf-hub:org/name"], PLAIN), "cpu")
    assert "\n" not in str(error.value)
