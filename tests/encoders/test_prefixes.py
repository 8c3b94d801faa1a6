"""A prefix is what its layer gets: the rest of the model, run from it, gives the tokens and the vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.layers import Point, capture
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torchvision_models import drop_classifier, network_of
from tests.encoders.tiny_models import embed

ALL = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "tokens", "prefix:1", "prefix:2"))


def outputs_of(request: str, modality: str) -> dict[str, Any]:
    towers = [tower for tower in describe_encoders([request], ALL) if tower.spec.modality == modality]
    (encoder,) = load_encoders(towers, "cpu")
    return embed(encoder)


def test_bert_continues_from_its_prefix(models: Callable[[str], str], tiny_bert: Path) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny_bert).eval()
    values = outputs_of(models("bert"), "text")
    for n in (1, 2):
        for pooled, tokens, prefix in zip(values["pooled"], values["tokens"], values[f"prefix:{n}"], strict=True):
            hidden = torch.from_numpy(prefix)[None]
            with torch.no_grad():
                for layer in model.encoder.layer[-n:]:
                    hidden = layer(hidden)
                    hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
            np.testing.assert_allclose(hidden[0].numpy(), tokens, atol=1e-5)
            np.testing.assert_allclose(hidden[0].mean(0).numpy(), pooled, atol=1e-5)
    assert [len(tokens) for tokens in values["tokens"]][3:] == [2, 128]  # the frame only, and cut off


def open_clip_model(request: str) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{request.partition(':')[2]}").eval()


def test_clip_text_continues_from_its_prefix(models: Callable[[str], str]) -> None:
    model = open_clip_model(models("clip"))
    values = outputs_of(models("clip"), "text")
    assert [len(tokens) for tokens in values["tokens"]][3:] == [2, 77]  # start and end, and the whole context
    for n in (1, 2):
        for pooled, tokens, prefix in zip(values["pooled"], values["tokens"], values[f"prefix:{n}"], strict=True):
            assert len(tokens) == len(prefix)
            hidden, length = torch.from_numpy(prefix)[None], len(prefix)
            with torch.no_grad():
                for block in model.transformer.resblocks[-n:]:
                    hidden = block(hidden, attn_mask=model.attn_mask[:length, :length])
                hidden = model.ln_final(hidden)[0]
                np.testing.assert_allclose(hidden.numpy(), tokens, atol=1e-5)
                np.testing.assert_allclose((hidden[-1] @ model.text_projection).numpy(), pooled, atol=1e-5)


def test_clip_image_continues_from_its_prefix(models: Callable[[str], str]) -> None:
    visual = open_clip_model(models("clip")).visual
    values = outputs_of(models("clip"), "image")
    assert values["tokens"][0].shape == (1 + 4, 64)  # the class token and 2 x 2 patches
    for n in (1, 2):
        hidden = torch.from_numpy(np.stack(values[f"prefix:{n}"]))
        with torch.no_grad():
            for block in visual.transformer.resblocks[-n:]:
                hidden = block(hidden)
            hidden = visual.ln_post(hidden)
            np.testing.assert_allclose(hidden.numpy(), np.stack(values["tokens"]), atol=1e-5)
            np.testing.assert_allclose((hidden[:, 0] @ visual.proj).numpy(), values["pooled"], atol=1e-5)


def feature_map(rows: list[np.ndarray]) -> Any:
    """(B, C, H, W) again."""
    maps = torch.from_numpy(np.stack(rows)).transpose(1, 2)
    side = round(maps.shape[-1] ** 0.5)
    return maps.unflatten(2, (side, side))


def test_clip_resnet_continues_from_its_prefix(models: Callable[[str], str]) -> None:
    visual = open_clip_model(models("clip-resnet")).visual
    values = outputs_of(models("clip-resnet"), "image")
    with torch.no_grad():
        np.testing.assert_allclose(visual.attnpool(feature_map(values["tokens"])), values["pooled"], atol=1e-5)
        last = visual.attnpool(visual.layer4(feature_map(values["prefix:1"])))
        np.testing.assert_allclose(last, values["pooled"], atol=1e-5)
        both = visual.attnpool(visual.layer4(visual.layer3(feature_map(values["prefix:2"]))))
        np.testing.assert_allclose(both, values["pooled"], atol=1e-5)


def test_a_text_tower_that_sees_its_padding_keeps_the_whole_context(models: Callable[[str], str]) -> None:
    model = open_clip_model(models("clip-resnet"))
    values = outputs_of(models("clip-resnet"), "text")
    assert {len(tokens) for tokens in values["tokens"]} == {77}
    first = np.stack([tokens[0] for tokens in values["tokens"]])
    np.testing.assert_allclose(first @ model.text_projection.detach().numpy(), values["pooled"], atol=1e-5)


def test_torchvision_continues_from_its_prefix(models: Callable[[str], str], resnet_file: Path) -> None:
    import torchvision

    model = torchvision.models.resnet18(num_classes=7).eval()
    model.load_state_dict(torch.load(resnet_file, weights_only=True))
    values = outputs_of(models("resnet18"), "image")
    assert values["tokens"][0].shape == (49, 512)
    with torch.no_grad():
        pooled = model.avgpool(model.layer4(model.layer3(feature_map(values["prefix:2"])))).flatten(1)
    np.testing.assert_allclose(pooled, values["pooled"], atol=1e-5)
    np.testing.assert_allclose(feature_map(values["tokens"]).mean((2, 3)), values["pooled"], atol=1e-5)


@pytest.mark.parametrize("kind", ["test_resnet", "test_vit", "test_efficientnet", "swin"])
def test_timm_tokens_and_prefixes_lead_to_the_vector(models: Callable[[str], str], kind: str) -> None:
    import timm

    model = timm.create_model(f"local-dir:{models(kind).partition(':')[2]}", pretrained=True, num_classes=0).eval()
    values = outputs_of(models(kind), "image")
    tokens, prefix = torch.from_numpy(np.stack(values["tokens"])), torch.from_numpy(np.stack(values["prefix:1"]))
    if kind == "swin":
        tokens, prefix = (rows.unflatten(1, (round(rows.shape[1] ** 0.5), -1)) for rows in (tokens, prefix))
        rest = model.norm(model.layers[-1](prefix))
    elif kind == "test_vit":
        rest = model.norm(model.blocks[-1](prefix))
    else:
        tokens, prefix = feature_map(values["tokens"]), feature_map(values["prefix:1"])
        rest = model.layer4(prefix) if kind == "test_resnet" else model.bn2(model.conv_head(model.blocks[-1](prefix)))
    np.testing.assert_allclose(rest.detach(), tokens, atol=1e-5)
    np.testing.assert_allclose(model.forward_head(tokens).detach(), values["pooled"], atol=1e-5)


def test_torchvision_transformers_have_layers_too() -> None:
    """Small ones, which the family itself cannot name."""
    import torchvision

    torch.manual_seed(6)
    vit = torchvision.models.VisionTransformer(32, 16, 3, 2, 16, 32).eval()
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4]).eval()
    for model, shapes in ((vit, [(5, 16), (5, 16)]), (swin, [(16, 16), (16, 16)])):
        drop_classifier(model)
        network = network_of(model)
        with torch.no_grad(), capture([network.tokens, Point(network.layers[-1], "input", network.layout)]) as seen:
            pooled = network.forward(torch.randn(2, 3, 32, 32))
        assert [tuple(values.shape) for values in seen] == [(2, *shape) for shape in shapes]
        tokens, prefix = seen
        with torch.no_grad():
            if model is vit:
                np.testing.assert_allclose(tokens[:, 0], pooled, atol=1e-6)
                rest = model.encoder.ln(network.layers[-1](prefix))
            else:
                np.testing.assert_allclose(tokens.mean(1), pooled, atol=1e-6)
                rest = model.norm(network.layers[-1](prefix.unflatten(1, (4, 4)))).flatten(1, 2)
        np.testing.assert_allclose(rest, tokens, atol=1e-5)
