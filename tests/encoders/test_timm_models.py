"""timm models against timm's own model and evaluation transform, over shapes, colours and sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.tiny_models import contents, embed, write_hub, write_timm

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"].update(values)
    file.write_text(json.dumps(config))


def check_parity(request: str, library_name: str) -> None:
    import timm

    model = timm.create_model(library_name, pretrained=True, num_classes=0).eval()
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    mode = "L" if settings["input_size"][0] == 1 else "RGB"  # as timm's validate.py opens pictures
    with torch.no_grad():
        published = model(torch.stack([transform(one.convert(mode)) for one in contents("image")])).numpy()
    (tower,) = describe_encoders([request], FLOAT32)
    (encoder,) = load_encoders([tower], "cpu")
    np.testing.assert_allclose(embed(encoder)["pooled"], published, atol=1e-5)
    np.testing.assert_allclose(load_reference(tower)(contents("image")[0]), published[0], atol=1e-5)


def test_a_repository_for_timm_and_open_clip_is_read_as_named(
    tmp_path: Path, tiny_timm: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's repositories of CLIP hold the image tower as a model of timm beside open_clip's whole model."""
    both = tmp_path / "both"
    for folder in (tiny_timm, tiny_clip):
        shutil.copytree(folder, both, dirs_exist_ok=True)
    write_hub(tmp_path / "hub", "timm/both", both, monkeypatch)
    check_parity("timm:timm/both", "hf-hub:timm/both")
    assert [tower.spec.family for tower in describe_encoders(["timm/both"], FLOAT32)] == ["clip", "clip"]


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("wide", {"input_size": [3, 48, 80]}, {}),
        ("whole", {"crop_pct": 1.0}, {}),
        ("squash", {"crop_mode": "squash", "crop_pct": 1.0}, {}),
        ("border", {"crop_mode": "border", "crop_pct": 1.0}, {}),
        ("grey", {"input_size": [1, 64, 64], "mean": [0.5], "std": [0.2]}, {"in_chans": 1}),
        ("grey-of-old", {"mean": [0.5], "std": [0.2]}, {"in_chans": 1}),
    ],
)
def test_every_shape_and_colour_equals_timm(
    tmp_path: Path, name: str, settings: dict[str, Any], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`grey-of-old` was saved by a timm that kept three channels in `input_size`."""
    folder = write_timm(tmp_path / name, "test_resnet", **arguments)
    change(folder, **settings)
    check_parity(f"timm:{folder}", f"local-dir:{folder}")
    revision = write_hub(tmp_path / "hub", f"org/{name}", folder, monkeypatch)
    for written in (f"timm:hf-hub:org/{name}", f"timm:org/{name}"):
        check_parity(written, f"hf-hub:org/{name}")
        (tower,) = describe_encoders([written], FLOAT32)
        assert (tower.spec.variant, tower.spec.weights) == (f"hf-hub:org/{name}", f"revision:{revision}")


def test_a_registered_model_by_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm:NAME` and `timm:hf-hub:timm/NAME` are one model of timm's own repository."""
    folder = write_timm(tmp_path / "model", "test_resnet", 160)
    write_hub(tmp_path / "hub", "timm/test_resnet.r160_in1k", folder, monkeypatch)
    vectors = []
    for request in ("timm:test_resnet.r160_in1k", "timm:timm/test_resnet.r160_in1k"):
        (tower,) = describe_encoders([request], FLOAT32)
        vectors.append(load_encoders([tower], "cpu")[0])
    assert all(np.isfinite(embed(encoder)["pooled"]).all() for encoder in vectors)


@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": "random"},
        {"crop_pct": 1e9},
        {"mean": ["a"] * 3},
        {"std": [0, 0, 0]},
        {"input_size": [3, 0, 9]},
    ],
)
def test_a_configuration_that_prepares_no_picture_gets_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_timm(tmp_path / "model", "test_resnet")
    change(folder, **settings)
    with pytest.raises(EncoderError) as error:
        load_encoders(describe_encoders([f"timm:{folder}"], FLOAT32), "cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_pictures_of_other_channels_get_one_line(tmp_path: Path) -> None:
    folder = write_timm(tmp_path / "model", "test_resnet", in_chans=4)
    change(folder, input_size=[4, 64, 64], mean=[0.5] * 4, std=[0.5] * 4, first_conv="conv1.0")
    with pytest.raises(EncoderError, match="its pictures have 4 channels") as error:
        load_encoders(describe_encoders([f"timm:{folder}"], FLOAT32), "cpu")
    assert "\n" not in str(error.value)
