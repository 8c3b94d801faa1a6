"""Image models and two towers of transformers: each gives the vector of the library's own processor and call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import Encoder, EncoderOptions
from mmfeat.errors import EncoderError
from mmfeat.system.trust import trust_remote_code
from tests.encoders.tiny_hf import KINDS, change_json, write_hf
from tests.encoders.tiny_models import TEXTS, contents, write_hub

PLAIN = {"dtype": "float32", "cleaning": "none"}
TWO_TOWERS = ("clip", "siglip", "siglip2")
OTHER_VECTORS = {  # kind -> the class that saved it, and its vector where that is no `pooler_output` of AutoModel
    "vit-classifier": ("AutoModel", lambda output: output.last_hidden_state[:, 0]),
    "vit_msn": ("AutoModel", lambda output: output.last_hidden_state[:, 0]),
    "ijepa": ("AutoModel", lambda output: output.last_hidden_state.mean(1)),
    "clip-projection": ("CLIPVisionModelWithProjection", lambda output: output.image_embeds),
}
IMAGES = [kind for kind in KINDS if kind not in (*TWO_TOWERS, "vit_mae")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes the model of a kind once and returns its folder."""
    written: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in written:
            written[kind] = write_hf(tmp_path_factory.mktemp("hf") / kind, kind)
        return written[kind]

    return folder


def pictures() -> list[Image.Image]:
    """Pictures of all sizes, one of them high and narrow."""
    narrow = np.random.default_rng(9).integers(0, 256, (90, 33, 3), np.uint8)
    return [*contents("image"), Image.fromarray(narrow)]


def published(folder: Path, kind: str, modality: str) -> np.ndarray:
    """The vectors by transformers alone, one call a sample."""
    transformers = quiet_transformers()
    loader, vector = OTHER_VECTORS.get(kind, ("AutoModel", lambda output: output.pooler_output))
    model = getattr(transformers, loader).from_pretrained(folder).eval()
    is_double = kind in TWO_TOWERS
    processor = (transformers.AutoProcessor if is_double else transformers.AutoImageProcessor).from_pretrained(folder)
    padding = {"padding": True, "max_length": 77} if kind == "clip" else {"padding": "max_length", "max_length": 64}
    rows = []
    for content in pictures() if modality == "image" else TEXTS:
        with torch.no_grad():
            if modality == "text":
                inputs = processor(text=[content], return_tensors="pt", truncation=True, **padding)
                output = model.get_text_features(**inputs)
            else:
                inputs = processor(images=content, return_tensors="pt")
                output = model.get_image_features(**inputs) if is_double else model(**inputs)
        rows.append(vector(output)[0].flatten().numpy())
    return np.stack(rows)


def encoders(request: str, **options: Any) -> list[Encoder]:
    return load_encoders(describe_encoders([request], EncoderOptions(**{**PLAIN, **options})), "cpu")


def vectors(encoder: Encoder) -> list[Any]:
    """The values of all outputs for one batch of all contents."""
    given = pictures() if encoder.modality == "image" else TEXTS
    return encoder.embed([encoder.prepare(content) for content in given])


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_both_towers_equal_transformers(kind: str, folders: Any) -> None:
    image, text = encoders(f"hf:{folders(kind)}")
    assert (image.specs[0].tower, text.specs[0].tower) == ("hf.image", "hf.text")
    np.testing.assert_allclose(vectors(image)[0], published(folders(kind), kind, "image"), atol=1e-5)
    np.testing.assert_allclose(vectors(text)[0], published(folders(kind), kind, "text"), atol=1e-5)


@pytest.mark.parametrize("kind", IMAGES)
def test_image_models_equal_transformers(kind: str, folders: Any) -> None:
    (image,) = encoders(f"hf:{folders(kind)}")
    ours = vectors(image)[0]
    np.testing.assert_allclose(ours, published(folders(kind), kind, "image"), atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-4


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "dinov3_vit", "swin", "convnext"])
def test_tokens_and_prefixes_equal_a_plain_call(kind: str, folders: Any) -> None:
    towers = describe_encoders(
        [f"hf:{folders(kind)}"], EncoderOptions(**PLAIN, outputs=("pooled", "tokens", "prefix:1"))
    )
    references = {tower.spec: load_reference(tower) for tower in towers}
    for encoder in load_encoders(towers, "cpu"):
        given = pictures() if encoder.modality == "image" else TEXTS
        for spec, ours in zip(encoder.specs, vectors(encoder), strict=True):
            for mine, content in zip(ours, given, strict=True):
                np.testing.assert_allclose(mine, references[spec](content), atol=1e-5, err_msg=spec.name)


def test_tokens_are_the_last_hidden_state_and_prefixes_the_one_before_a_layer(folders: Any) -> None:
    transformers = quiet_transformers()
    folder = folders("dinov2")
    (image,) = encoders(f"hf:{folder}", outputs=("tokens", "prefix:1"))
    tokens, prefix = vectors(image)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(images=pictures()[0], return_tensors="pt"), output_hidden_states=True)
    np.testing.assert_allclose(tokens[0], output.last_hidden_state[0], atol=1e-5)
    np.testing.assert_allclose(prefix[0], output.hidden_states[-2][0], atol=1e-5)


def test_preprocessing_is_read_from_the_files_and_part_of_the_spec(folders: Any, tmp_path: Path) -> None:
    """A file as hub checkpoints have it is enough; one that leaves settings out is completed by the library."""
    folder = shutil.copytree(folders("dinov2"), tmp_path / "model")
    file = folder / "preprocessor_config.json"
    whole = json.loads(file.read_text())

    def described(settings: dict[str, Any]) -> dict[str, Any]:
        file.write_text(json.dumps(settings))
        (tower,) = describe_encoders([f"hf:{folder}"], EncoderOptions(**PLAIN))
        load_encoders([tower], "cpu")
        return json.loads(tower.spec.preprocessing)

    settings = described(whole)
    assert settings["processor"] == "BitImageProcessor"
    assert settings["size"] == {"shortest_edge": 37}
    assert settings["crop_size"] == {"height": 32, "width": 32}
    assert (settings["resample"], settings["do_center_crop"]) == (3, True)
    assert described({name: whole[name] for name in ("size", "crop_size", "image_processor_type")}) == settings
    assert described({**whole, "resample": 2})["resample"] == 2
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32, "resample": 3}
    assert described(old)["size"] == {"shortest_edge": 40}
    assert described(old)["processor"] == "CLIPImageProcessor"


def test_describing_a_common_checkpoint_imports_no_library(folders: Any) -> None:
    requests = [f"hf:{folders(kind)}" for kind in ("dinov2", "clip")]
    code = (
        "import sys; from mmfeat.encoders import EncoderOptions, describe_encoders; "
        f"describe_encoders({requests}, EncoderOptions(dtype='float32', cleaning='none')); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def states(kind: str, folder: Path, layers: int, asked: dict[str, Any] | None = None) -> list[np.ndarray]:
    """(T, D) of each picture by transformers: the mean of its last hidden states, behind the norm if there is one."""
    transformers = quiet_transformers()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tower = model.vision_model if kind in TWO_TOWERS else model
    norm = {"clip": lambda hidden: hidden, "siglip": getattr(tower, "post_layernorm", None)}.get(kind)
    norm = norm or getattr(tower, "layernorm", None) or tower.norm
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    result = []
    for picture in pictures():
        inputs = processor(images=picture, return_tensors="pt", **(asked or {}))
        any_size = {"interpolate_pos_encoding": True} if asked and kind in ("vit-classifier", "clip") else {}
        with torch.no_grad():
            output = tower(**inputs, **any_size, output_hidden_states=True)
            hidden = torch.stack([norm(state) for state in output.hidden_states[-layers:]]).mean(0)
        if layers == 1:
            torch.testing.assert_close(hidden, output.last_hidden_state)
        result.append(hidden[0].numpy())
    return result


@pytest.mark.parametrize(
    ("kind", "prefix"), [("dinov2_with_registers", 5), ("dinov3_vit", 5), ("vit", 1), ("clip", 1), ("siglip", 0)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_other_poolings_and_layers_are_those_of_the_hidden_states(
    kind: str, prefix: int, layers: int, folders: Any
) -> None:
    exact = states(kind, folders(kind), layers)
    wanted = {"mean": np.stack([rows[prefix:].mean(0) for rows in exact])}
    if prefix:
        wanted["cls"] = np.stack([rows[0] for rows in exact])
        wanted["cls+mean"] = np.concatenate([wanted["cls"], wanted["mean"]], 1)
    for pooling, vector in wanted.items():
        image = encoders(f"hf:{folders(kind)}", image_pooling=pooling, layers=layers)[0]
        np.testing.assert_allclose(vectors(image)[0], vector, atol=1e-5, err_msg=pooling)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("vit-classifier", {"size": {"height": 16, "width": 48}}),
        ("dinov2", {"size": {"shortest_edge": 56}, "crop_size": {"height": 16, "width": 48}}),
        ("clip", {"size": {"shortest_edge": 56}, "crop_size": {"height": 16, "width": 48}}),
    ],
)
def test_another_image_size_is_that_of_the_processor(kind: str, sizes: dict[str, Any], folders: Any) -> None:
    image = encoders(f"hf:{folders(kind)}", image_size="16x48", image_pooling="cls")[0]
    assert image.specs[0].image_size == (16, 48)
    exact = states(kind, folders(kind), 1, sizes)
    np.testing.assert_allclose(vectors(image)[0], np.stack([rows[0] for rows in exact]), atol=1e-5)


def test_an_own_size_that_is_asked_for_is_no_other_encoder(folders: Any) -> None:
    plain, asked = (
        describe_encoders([f"hf:{folders('dinov2')}"], EncoderOptions(**PLAIN, **size))[0].spec.fingerprint
        for size in ({}, {"image_size": "32"})
    )
    assert plain == asked


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("siglip", {"image_pooling": "cls"}, r"--image-pooling cls: hf.image:siglip has no class token; use mean or"),
        (
            "siglip",
            {"layers": 2},
            r"--layers 2: hf.image:siglip has layers of its own behind the pooling; add --image-",
        ),
        ("dinov2", {"layers": 3}, r"--layers 3: hf.image:dinov2 has 2 layers; use no more, or leave it out"),
        ("convnext", {"layers": 2, "image_pooling": "mean"}, r"--layers 2: the layers of .* give no hidden states of"),
        (
            "vit",
            {"image_size": "20"},
            r"--image-size: .* cannot take this size \(its patches are 8 pixels wide; use mul",
        ),
        ("convnext", {"image_size": "32x48"}, r"--image-size 32x48: the processor of .* gives squares; use one number"),
        ("siglip2", {"image_size": "32"}, r"--image-size: .* takes photos in any shape; leave it out"),
    ],
)
def test_an_option_that_a_model_cannot_follow_gets_one_line(
    kind: str, options: dict[str, Any], message: str, folders: Any
) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        encoders(f"hf:{folders(kind)}", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip2"])
def test_a_hub_name_is_read_at_its_revision(
    kind: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = write_hub(tmp_path / "hub", f"org/{kind}", folders(kind), monkeypatch)
    towers = describe_encoders([f"hf:org/{kind}"], EncoderOptions(**PLAIN))
    spec = towers[0].spec
    assert (spec.name, spec.weights) == (f"hf.image:org/{kind}", f"revision:{revision}")
    repository = tmp_path / "hub" / f"models--org--{kind}"  # a newer revision prepares pictures in another way
    newer = shutil.copytree(repository / "snapshots" / revision, repository / "snapshots" / ("1" * 40))
    for file in newer.glob("p*config.json"):
        file.write_text(file.read_text().replace('"image_mean"', '"resample": 0, "image_mean"'))
    (repository / "refs" / "main").write_text("1" * 40)
    for encoder in load_encoders(towers, "cpu"):
        exact = published(folders(kind), kind, encoder.modality)
        np.testing.assert_allclose(vectors(encoder)[0], exact, atol=1e-5)


def test_code_of_a_checkpoint_runs_with_consent_alone(folders: Any, tmp_path: Path) -> None:
    plain, folder = folders("convnext"), tmp_path / "own"
    shutil.copytree(plain, folder)
    own = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=own)
    (folder / "own.py").write_text(
        "from transformers import ConvNextConfig, ConvNextModel\n"
        "class OwnConfig(ConvNextConfig):\n    model_type = 'own'\n"
        "class OwnModel(ConvNextModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(EncoderError, match=r"needs code of its own, own.py; read it, then add --trust-remote-code"):
        encoders(f"hf:{folder}")
    with trust_remote_code():
        (image,) = encoders(f"hf:{folder}")
    assert image.specs[0].remote_code == 1
    np.testing.assert_allclose(vectors(image)[0], published(plain, "convnext", "image"), atol=1e-5)


def damaged(kind: str, change: str, folders: Any, folder: Path) -> str:
    """The request for a copy of a checkpoint that lacks a file or holds another one."""
    shutil.copytree(folders(kind), folder)
    if change == "processor":
        (folder / "preprocessor_config.json").unlink()
    elif change == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif change == "sizes":
        (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 50}, "do_center_crop": false}')
    elif change == "unlisted":
        (folder / "config.json").unlink()
    elif change:
        name, value = change.split("=")
        change_json(folder / "config.json", **{name: json.loads(value)})
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dinov2", "processor", r"preprocessor_config.json is missing, which says how pictures are prepared; copy it"),
        ("clip", "tokenizer", r"no tokenizer files here \(.*\); copy them"),
        ("dinov2", "sizes", r"cannot take what its processor makes of pictures .*; name the size of the model, as in"),
        (
            "vit",
            "image_size=16",
            r"the weights are of another shape than config.json says: embeddings.position_emb.*; use a",
        ),
        ("dinov2", "num_hidden_layers=3", r"the weights lack encoder.layer.2.*; use a complete checkpoint"),
        ("dinov2", 'model_type="dinov9"', r"transformers has no model type 'dinov9'"),
        ("dinov2", 'model_type="wav2vec2"', r"wav2vec2 is no encoder of pictures; use another checkpoint"),
        ("dinov2", 'model_type="bert"', r"bert is a text model; name st:.* or bert:"),
        ("dinov2", "unlisted", r"no config.json of transformers, with a model_type, is here; name a folder"),
        ("vit_mae", "", r"ViTMAEModel gives another vector of a picture at each call, as it hides random parts"),
    ],
)
def test_a_checkpoint_that_cannot_be_followed_gets_one_line(
    kind: str, change: str, message: str, folders: Any, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        encoders(damaged(kind, change, folders, tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_folders_of_other_libraries_are_told_their_family(tiny_timm: Path, tiny_clip: Path, tiny_bert: Path) -> None:
    for folder, family in ((tiny_timm, "timm"), (tiny_clip, "clip"), (tiny_bert, "bert")):
        with pytest.raises(EncoderError, match=rf"name .*{family}:"):
            encoders(f"hf:{folder}")
    with pytest.raises(EncoderError, match=r"hf: name a checkpoint, as in hf:facebook/dinov2-base"):
        encoders("hf")
