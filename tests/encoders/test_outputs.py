"""Tokens and prefixes of every family: what they are, and that one forward pass gives all outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.layers import Point, capture
from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.tiny_models import contents, embed, write_timm

ALL = ("pooled", "tokens", "prefix:1", "prefix:2")
KINDS = (
    "bert", "bert-left", "clip", "clip-resnet", "clip-timm-bert", "clip-late-norm", "resnet18", "mobilenet_v3_small",
    "densenet121", "test_resnet", "test_vit", "test_efficientnet", "swin", "hf-clip", "hf-siglip", "hf-dinov2",
)  # fmt: skip


def options(*outputs: str, **others: Any) -> EncoderOptions:
    return EncoderOptions(**{"dtype": "float32", "cleaning": "tweet", "outputs": outputs or ALL, **others})


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_pass_serves_all_outputs_as_the_reference_library_does(
    models: Callable[[str], str], kind: str
) -> None:
    """Every module that has weights of its own runs once, and the vector is what it is alone."""
    towers = describe_encoders([models(kind)], options())
    references = {tower.spec: load_reference(tower) for tower in towers}
    alone = load_encoders(describe_encoders([models(kind)], options("pooled")), "cpu")
    for encoder, vectors in zip(load_encoders(towers, "cpu"), alone, strict=True):
        assert len(encoder.specs) == len(ALL)
        runs: Counter[int] = Counter()

        def count(module: Any, *_: Any, runs: Counter[int] = runs) -> None:
            if next(module.parameters(recurse=False), None) is not None:
                runs[id(module)] += 1

        with torch.nn.modules.module.register_module_forward_pre_hook(count):
            values = encoder.embed([encoder.prepare(one) for one in contents(encoder.modality)])
        assert set(runs.values()) == {1}
        np.testing.assert_array_equal(values[0], embed(vectors)["pooled"])
        for spec, ours in zip(encoder.specs, values, strict=True):
            for mine, content in zip(ours, contents(encoder.modality), strict=True):
                exact = references[spec](content)
                assert mine.dtype == exact.dtype == np.float32
                assert mine.ndim == (1 if spec.output == "pooled" else 2)
                np.testing.assert_allclose(mine, exact, atol=1e-5, err_msg=spec.name)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, "bfloat16") for kind in ("bert", "clip", "test_resnet", "resnet18", "hf-clip")),
        *((kind, "float16") for kind in ("bert", "test_resnet")),
    ],
)
def test_values_in_half_precision_are_float32_and_close(models: Callable[[str], str], kind: str, dtype: str) -> None:
    towers = [describe_encoders([models(kind)], options(dtype=asked)) for asked in ("float32", dtype)]
    for exact, half in zip(*(load_encoders(asked, "cpu") for asked in towers), strict=True):
        for output, values in embed(exact).items():
            for one, other in zip(values, embed(half)[output], strict=True):
                assert other.dtype == np.float32
                cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
                assert np.nanmin(cosine) > (0.999 if output == "pooled" else 0.99)


def test_a_prefix_is_a_copy_where_the_layer_works_in_place() -> None:
    relu = torch.nn.ReLU(inplace=True)
    with capture([Point(relu, "input")]) as seen:
        relu(torch.full((1, 2, 3), -1.0))
    assert seen[0].tolist() == [[[-1.0] * 3] * 2]
    assert not relu._forward_pre_hooks


@pytest.mark.parametrize(
    ("kind", "count"), [("bert", 2), ("clip", 2), ("clip-resnet", 4), ("resnet18", 4), ("test_resnet", 4), ("swin", 2)]
)
def test_a_prefix_deeper_than_the_model_is_refused_at_once(models: Callable[[str], str], kind: str, count: int) -> None:
    towers = describe_encoders([models(kind)], options(f"prefix:{count + 1}"))
    with pytest.raises(
        EncoderError, match=rf"prefix:{count + 1}: the model has {count} layers; use prefix:1 to prefix:"
    ) as e:
        load_encoders(towers[:1], "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("architecture", "shape", "output", "message"),
    [
        # Three lists, each used in its own way; lists that are only looked into; pixels of all patches in one batch;
        # the maps of all stages in a list.
        ("visformer_tiny", {"depth": (1, 1, 1)}, "prefix:1", "no list of layers is known"),
        ("twins_svt_small", {"depths": (1, 1, 1, 1)}, "prefix:1", "takes no part in the forward pass"),
        ("tnt_s_patch16_224", {"depth": 2}, "prefix:1", "samples are not apart"),
        ("efficientvim_m1", {"depths": (1, 1, 1)}, "tokens", "no one sequence"),
    ],
)
def test_layers_that_are_no_plain_sequence_are_refused_at_once(
    tmp_path: Path, architecture: str, shape: dict[str, Any], output: str, message: str
) -> None:
    folder = write_timm(tmp_path / architecture, architecture, 224, **shape)
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoders(describe_encoders([f"timm:{folder}"], options(output)), "cpu")
    assert "\n" not in str(caught.value)
    assert f"timm:{architecture}" in str(caught.value)
    (encoder,) = load_encoders(describe_encoders([f"timm:{folder}"], options("pooled")), "cpu")
    assert embed(encoder)["pooled"].ndim == 2


@pytest.mark.parametrize("kind", ["hashing", "hog"])
def test_built_in_encoders_have_a_vector_only(kind: str) -> None:
    with pytest.raises(
        EncoderError, match=f"--outputs tokens: {kind} has no tokens; name the encoder, as in clip=tokens"
    ):
        describe_encoders([kind], options("tokens"))
    (tower,) = describe_encoders([kind], options("pooled"))
    (encoder,) = load_encoders([tower], "cpu")
    reference = load_reference(tower)
    for mine, content in zip(embed(encoder)["pooled"], contents(encoder.modality), strict=True):
        np.testing.assert_array_equal(mine, reference(content))


def test_each_view_has_an_encoder_of_its_own(models: Callable[[str], str]) -> None:
    towers = describe_encoders([models("clip"), "hog"], options("pooled", views=2))
    encoders = load_encoders(towers, "cpu")
    assert [(encoder.modality, encoder.view) for encoder in encoders] == [
        ("image", "none"), ("image", "train:1"), ("image", "train:2"), ("text", "none"),
        ("image", "none"), ("image", "train:1"), ("image", "train:2"),
    ]  # fmt: skip
    assert {spec for encoder in encoders for spec in encoder.specs} == {tower.spec for tower in towers}
    plain, view = (embed(encoder)["pooled"] for encoder in encoders[:2])
    np.testing.assert_array_equal(plain, view)  # the picture is changed before, not here


def test_outputs_of_some_towers_only(models: Callable[[str], str]) -> None:
    towers = describe_encoders(
        [models("clip"), "hog"], options("pooled", "clip.image=tokens", "clip.text=prefix:1", views=1)
    )
    found = [
        (encoder.specs[0].tower, encoder.view, *(s.output for s in encoder.specs))
        for encoder in load_encoders(towers, "cpu")
    ]
    assert found == [
        ("clip.image", "none", "pooled", "tokens"),
        ("clip.image", "train:1", "pooled", "tokens"),
        ("clip.text", "none", "pooled", "prefix"),
        ("hog", "none", "pooled"),
        ("hog", "train:1", "pooled"),
    ]
