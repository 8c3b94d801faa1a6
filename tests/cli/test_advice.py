"""Advice and flags: what could not apply is not advised, and what nothing would heed is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmfeat.cli.extract import REMEDIES, advice, remedies_left
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_features
from mmfeat.extraction.missing import Counts
from mmfeat.samples.photos import Decoding
from mmfeat.samples.rows import Overview
from mmfeat.system.hardware import cpu_count


def tower(family: str, modality: str, draft: int = 0, arithmetic: str = "float32") -> Tower:
    spec = EncoderSpec(family, modality, "", "builtin:1", arithmetic, "float32", preprocessing="{}")
    return Tower(family, spec.decoded(Decoding(draft)))


def room(*towers: Tower, modality: str = "image", engine: str = "local", source: str = "t.csv", **settings: int) -> set:
    found = ExtractSettings(**{"device": "cpu", **settings})
    samples = Overview("t", source, 3, {})
    plain = {"samples": samples, "towers": towers, "folder": Path("cache"), "settings": found, "engine": engine}
    return remedies_left(Extraction(**plain, seconds=0.0, **vars(Counts())), modality)


def test_without_a_torch_model_no_gpu_and_no_half_precision_is_advised() -> None:
    assert not room(tower("hog", "image"), tower("clip", "text")) & {"cuda", "mps", "half"}
    assert not room(tower("hashing", "text"), modality="text") & {"cuda", "mps", "half"}
    assert advice("encode", room(tower("hashing", "text"), modality="text")) == "--engine ray"


def test_what_is_used_up_is_not_advised() -> None:
    assert "draft" in room(tower("hog", "image"))
    assert "draft" not in room(tower("hog", "image", draft=300))
    assert "workers" not in room(tower("hog", "image")) | room(tower("hog", "image"), workers=cpu_count())
    assert ("workers" in room(tower("hog", "image"), workers=1)) == (cpu_count() > 1)
    assert not room(tower("clip", "image"), engine="ray") & {"ray", "workers", "cuda", "mps"}
    assert "half" not in room(tower("clip", "image", arithmetic="bfloat16"))
    assert "local" in room(tower("hog", "image"))
    assert "remote" in room(tower("hog", "image"), source="s3://bucket/t.csv")
    assert advice("decode", {"draft", "ray"}) == "--draft for large JPEGs or --engine ray"
    assert advice("tokenize", set()) == ""
    assert all(advice(step, {"local", "workers", "ray"}) for step in REMEDIES)


def test_advice_does_not_import_torch() -> None:
    code = (
        "import sys; from tests.cli.test_advice import room, tower; found = room(tower('clip', 'image')); "
        "assert 'torch' not in sys.modules; assert not found & {'cuda', 'mps'}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)


@pytest.mark.parametrize(
    ("encoders", "options", "settings", "message"),
    [
        ("hashing,hog", {}, {"runtime": "compile"}, "--runtime compile: there is no torch model in hashing, hog"),
        ("hashing,hog", {}, {"runtime": "onnx"}, "--runtime onnx: use one of auto, torch, compile, onnxruntime, openv"),
        ("hashing", {"views": 2}, {}, "--views 2: it is about photos, and hashing takes none"),
        ("hashing", {"draft": 300}, {}, "--draft 300: it is about photos, and hashing takes none"),
        ("hashing", {"prompt": "query"}, {}, "--prompt query: it is about st, and there is only hashing"),
        ("hashing", {"truncate_dim": 8}, {}, "--truncate-dim 8: it is about st, and there is only hashing"),
    ],
)
def test_flags_that_nothing_would_heed_are_refused(
    demo_folder: Path, tmp_path: Path, encoders: str, options: dict, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        extract_features(
            demo_folder,
            encoders.split(","),
            cache=tmp_path / "cache",
            options=EncoderOptions(**options),
            settings=ExtractSettings(**settings),
        )
    assert not (tmp_path / "cache").exists()


def test_compiling_only_tokens_is_refused(demo_folder: Path, tmp_path: Path, tiny_clip: Path) -> None:
    options, settings = (
        EncoderOptions(dtype="float32", cleaning="tweet", outputs=("tokens",)),
        ExtractSettings(runtime="compile"),
    )
    with pytest.raises(ConfigError, match="--runtime compile: it applies to pooled vectors, and --outputs asks"):
        extract_features(demo_folder, [f"clip:{tiny_clip}"], cache=tmp_path, options=options, settings=settings)


def test_an_output_that_an_encoder_has_not_is_refused(demo_folder: Path, tmp_path: Path) -> None:
    options = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "hog=tokens"))
    with pytest.raises(
        EncoderError, match="--outputs hog=tokens: hog has no tokens, only pooled vectors; leave this out"
    ):
        extract_features(demo_folder, ["hashing", "hog"], cache=tmp_path, options=options)
