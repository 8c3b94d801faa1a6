"""Text checkpoints that cannot be encoded with: one line each, and never a vector of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.tiny_hf import change_json


def without_a_layer(folder: Path) -> None:
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "layer.1." not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Any, str]] = {
    "a layer": (without_a_layer, r"the weights lack encoder.layer.*; use a complete checkpoint"),
    "another width": (
        lambda folder: change_json(folder / "config.json", intermediate_size=48),
        r"the weights are of another shape than config.json says: encoder.layer.*intermediate",
    ),
    "no type": (
        lambda folder: (folder / "config.json").write_text('{"hidden_size": 32}'),
        r"no config.json of transformers, with a model_type, is here; name a folder as save_pretrained writes it",
    ),
    "a known type": (
        lambda folder: change_json(folder / "config.json", model_type="bert9"),
        r"cannot be loaded \(transformers has no model type bert9; a newer one may have it\)",
    ),
    "a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
        r"tokenizer.json cannot be read \(.*\); copy it from the model's source",
    ),
    "an adapter": (
        lambda folder: change_json(folder / "adapter_config.json", base_model_name_or_path="bert-base-uncased"),
        r"an adapter \(LORA\) and no model: merge it into bert-base-uncased by peft's",
    ),
    "fewer bits": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantised \(gptq\); name the checkpoint that they were made of",
    ),
}


@pytest.mark.parametrize("family", ["bert", "st"])
@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_whole_model_gets_one_line(family: str, fault: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    break_it, message = BROKEN[fault]
    break_it(folder)
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoders(
            describe_encoders([f"{family}:{folder}"], EncoderOptions(dtype="float32", cleaning="none")), "cpu"
        )
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 240


def test_a_model_of_pictures_is_named_by_another_family(tiny_bert: Path, tmp_path: Path) -> None:
    transformers = quiet_transformers()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    folder = tmp_path / "vit"
    transformers.ViTModel(transformers.ViTConfig(**size, image_size=32)).save_pretrained(folder)
    for file in tiny_bert.glob("token*"):
        shutil.copy(file, folder)
    with pytest.raises(EncoderError, match=rf"vit is a model of pictures and no text encoder; name hf:{folder}"):
        load_encoders(describe_encoders([f"bert:{folder}"], EncoderOptions(dtype="float32", cleaning="none")), "cpu")
