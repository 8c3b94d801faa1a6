"""Every family through its real loading code, against the reference library's own call."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmfeat.encoders import lexicon
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import Runtime, staged, to_device
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.extraction.requests import resolve_options
from mmfeat.samples.contents import clean_tweet

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")
TEXTS = ["What a wonderful day", "so tired", "@bob the bus http://t.co/x #day", ""]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (size, size + 20, 3), dtype=np.uint8)) for size in (40, 64, 65, 300)]


def vectors(request: str, options: EncoderOptions = FLOAT32) -> dict[str, np.ndarray]:
    """Modality -> (N, D) through mmfeat."""
    encoders = load_encoders(describe_encoders([request], options), "cpu")
    return {encoder.modality: embed(encoder)[0] for encoder in encoders}


def contents(modality: str) -> list[Any]:
    return {"text": TEXTS, "image": pictures()}[modality]


def embed(encoder: Encoder) -> list[Any]:
    """The values of each output for the samples of all lengths and sizes in one batch."""
    return encoder.embed([encoder.prepare(one) for one in contents(encoder.modality)])


def bert_reference(folder: Path, pooling: str) -> np.ndarray:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).float().eval()
    inputs = tokenizer([clean_tweet(text) for text in TEXTS], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    mask = inputs["attention_mask"][..., None]
    return {
        "mean": (output.last_hidden_state * mask).sum(1) / mask.sum(1),
        "cls": output.last_hidden_state[:, 0],
        "pooler": output.pooler_output,
    }[pooling].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_bert_equals_transformers(tiny_bert: Path, pooling: str) -> None:
    ours = vectors(f"bert:{tiny_bert}", EncoderOptions(dtype="float32", cleaning="tweet", pooling=pooling))["text"]
    np.testing.assert_allclose(ours, bert_reference(tiny_bert, pooling), atol=1e-5)


def test_auto_never_chooses_bfloat16_for_convolutions(tiny_timm: Path, resnet_file: Path, tiny_bert: Path) -> None:
    auto = resolve_options(EncoderOptions(dtype="auto", cleaning="tweet"), "auto")
    for tower in describe_encoders([f"timm:{tiny_timm}", f"resnet18:{resnet_file}"], auto):
        assert tower.spec.arithmetic in ("float16", "float32")
    import open_clip

    clip = tiny_timm.parent / "clip-resnet.pt"  # described by its architecture; never loaded here
    clip.touch()
    assert {tower.spec.arithmetic for tower in describe_encoders([f"clip:RN50/{clip}"], auto)} <= {"float16", "float32"}
    assert open_clip.get_model_config("RN50")["vision_cfg"]["layers"] == [3, 4, 6, 3]
    chosen = resolve_options(EncoderOptions(dtype="bfloat16", cleaning="tweet"), "auto")
    towers = describe_encoders([f"timm:{tiny_timm}", f"bert:{tiny_bert}"], chosen)
    assert [tower.spec.arithmetic for tower in towers] == ["bfloat16", "bfloat16"]


def test_built_in_encoders_are_deterministic_and_never_change() -> None:
    text, image = vectors("hashing:1")["text"], vectors("hog")["image"]
    assert text.shape == (4, 512)
    assert image.shape == (4, 996)
    np.testing.assert_allclose(np.linalg.norm(text[:3], axis=1), 1.0, atol=1e-6)
    assert not text[3].any()  # an empty text has no n-grams
    # Stored vectors of an earlier version must stay comparable: a change here needs another number after builtin.
    np.testing.assert_array_equal(np.flatnonzero(text[1])[:5], [19, 36, 43, 52, 54])
    np.testing.assert_allclose(text[1][[19, 36, 43]], [-0.171499, -0.171499, 0.171499], atol=1e-5)
    np.testing.assert_allclose(
        image[0][[0, 1, 2, -3, -2, -1]], [0.217659, 0.210813, 0.179424, 0.015625, 0.007270, 0.000977], atol=1e-5
    )


def test_the_lexicon_is_vaders_and_counts_what_cleaning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    text = "RT @bob GREAT day, not bad!! #happy #x http://t.co/love"
    row = vectors("lexicon")["text"][2], lexicon.describe_text(text)
    scores = SentimentIntensityAnalyzer().polarity_scores(text)
    np.testing.assert_allclose(row[1][:4], [scores[name] for name in ("compound", "pos", "neu", "neg")], atol=1e-6)
    np.testing.assert_allclose(np.expm1(np.abs(row[1][[4, 5]])), [3.1 + 2.7, 2.5], atol=1e-5)
    assert np.expm1(row[1][8:15]).round().tolist() == [2, 0, 2, 1, 1, 2, 8]
    assert np.expm1(row[0][8:15]).round().tolist() == [0, 0, 1, 1, 1, 0, 4]  # the cleaning is about other encoders
    with pytest.raises(ConfigError, match=r"cleaning lexicon=\.\.\.: no encoder of that name"):
        describe_encoders(["lexicon"], EncoderOptions(dtype="float32", cleaning="none,lexicon=tweet"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"lexicon needs vaderSentiment; .*pip install .*\[lexicon\]"):
        describe_encoders(["lexicon"], FLOAT32)


@pytest.fixture(scope="module")
def hashing() -> Encoder:
    return load_encoders(describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="none")), "cpu")[0]


def test_the_latest_hashing_never_changes(hashing: Encoder) -> None:
    (values,) = hashing.embed([*TEXTS, "天气很好，我很高兴"])
    assert values.shape == (5, 4096)
    assert values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(values[[0, 1, 2, 4]], axis=1), 1.0, atol=1e-6)
    assert not values[3].any()
    for row, columns, expected in (
        (1, [3, 11, 18, 169, 272], [0.072932, 0.072932, 0.072932, 0.072932, 0.291730]),
        (4, [15, 22, 218, 289, 334], [0.027899, 0.111595, 0.111595, -0.111595, 0.176875]),
    ):
        np.testing.assert_array_equal(np.flatnonzero(values[row])[:5], columns)
        np.testing.assert_allclose(values[row][columns], expected, atol=1e-5)


def test_a_hashed_vector_depends_on_its_text_alone(hashing: Encoder) -> None:
    texts = [
        *TEXTS,
        "天气很好",
        "😀😀",
        "\ud800x",
        " ",
        "Tab\tand\nline",
        "ab " * 360_000,
    ]  # the last is a piece of its own
    (together,) = hashing.embed(texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(hashing.embed([text])[0][0], row)
    np.testing.assert_array_equal(hashing.embed(["tab and  LINE"])[0][0], together[texts.index("Tab\tand\nline")])


def test_hashing_sees_what_texts_have_in_common(hashing: Encoder) -> None:
    def similarity(one: str, other: str) -> float:
        first, second = hashing.embed([one, other])[0]
        return float(first @ second)

    assert similarity("so tired today", "today I am tired") > 0.5
    assert similarity("天气很好我很高兴", "今天天气很好") > 0.5  # no space says where a word ends
    assert similarity("วันนี้อากาศดี", "อากาศดีมาก") > 0.4
    assert similarity("昨日はHTMLを書いた", "HTML") > 0.12  # a word of another script in the middle
    assert abs(similarity("天气很好", "我的書")) < 0.1
    assert abs(similarity("so tired", "the bus")) < 0.1


def test_a_version_of_hashing_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    monkeypatch.chdir(tmp_path)
    ((first, latest), named) = (
        describe_encoders(["hashing:1", "hashing"], FLOAT32),
        describe_encoders(["hashing:2"], FLOAT32),
    )
    assert [first.request, first.spec.weights, latest.spec.weights] == ["hashing:1", "builtin:1", "builtin:2"]
    assert named[0].spec == latest.spec
    with pytest.raises(EncoderError, match="builtin:9 is of a later version of mmfeat; update mmfeat"):
        load_encoders([dataclasses.replace(first, spec=dataclasses.replace(first.spec, weights="builtin:9"))], "cpu")


SPEC = EncoderSpec("bert", "text", "x", "sha256:0", "float32", "float32", "", "tweet", "mean", 128)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderSpec)])
def test_every_field_is_in_the_fingerprint(field: str) -> None:
    value = getattr(SPEC, field)
    changed = dataclasses.replace(SPEC, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert changed.fingerprint != SPEC.fingerprint
    assert SPEC.differences(changed) == [field]
    assert EncoderSpec.from_json(changed.stated) == changed


def test_a_field_that_came_later_changes_no_fingerprint_from_before() -> None:
    assert SPEC.fingerprint == "eea85fe462715a324defaf3f5a88d089117d50111d70ddb419c4cd2ebb82c204"
    assert {"layers", "remote_code"}.isdisjoint(SPEC.stated)


def test_fingerprint_follows_the_weights_and_not_their_place(tiny_timm: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / tiny_timm.name
    shutil.copytree(tiny_timm, moved)
    here, there = (describe_encoders([f"timm:{path}"], FLOAT32)[0].spec for path in (tiny_timm, moved))
    assert here == there
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert here.differences(describe_encoders([f"timm:{moved}"], FLOAT32)[0].spec) == ["weights"]


def test_a_tower_asked_for_twice_is_given_once(tiny_clip: Path) -> None:
    towers = describe_encoders(["hashing", f"clip:{tiny_clip}", "hashing"], FLOAT32)
    assert [tower.spec.modality for tower in towers] == ["text", "image", "text"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nope", r"no encoder family 'nope'; use st, bert"),
        ("restnet50", r"no encoder family 'restnet50'; did you mean resnet50\?"),
        ("CLIP", r"no encoder family 'CLIP'; did you mean clip\?"),
        ("bert:./nowhere", r"./nowhere: no such weights file or folder"),
        ("timm", "timm: name a model"),
        ("hashing:words", "hashing:words: no such version; name it hashing, or hashing:1"),
        ("hog:big", "hog:big: this encoder has no variants"),
        ("lexicon:big", "lexicon:big: this encoder has no variants"),
        ("resnet18:NOPE", "torchvision has IMAGENET1K_V1, or name a local weights file"),
        ("clip:ViT-B-32/nope", "no weights 'nope' for ViT-B-32"),
        ("clip:NoSuchModel/openai", "open_clip has no model 'NoSuchModel'"),
    ],
)
def test_wrong_requests_get_one_line(asked: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        describe_encoders([asked], FLOAT32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "clip", "timm"])
def test_a_folder_without_a_model_gets_one_line(tmp_path: Path, family: str) -> None:
    with pytest.raises(EncoderError) as caught:
        load_encoders(describe_encoders([f"{family}:{tmp_path}"], FLOAT32), "cpu")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2, 513])
def test_a_length_the_model_cannot_do_is_refused_at_once(tiny_bert: Path, length: int) -> None:
    with pytest.raises(EncoderError, match=f"--max-length {length} is not from 3 to 512"):
        vectors(f"bert:{tiny_bert}", EncoderOptions(dtype="float32", cleaning="tweet", max_length=length))


def test_random_weights_are_never_taken_for_trained_ones(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(tiny_bert, folder)
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert vectors(f"bert:{folder}")["text"].shape == (4, 32)
    with pytest.raises(EncoderError, match=r"the weights lack pooler.dense.bias.*--pooling mean"):
        vectors(f"bert:{folder}", EncoderOptions(dtype="float32", cleaning="tweet", pooling="pooler"))


@pytest.mark.parametrize("options", [{"cleaning": "x"}, {"pooling": "x"}, {"pooling": "mean,cls"}, {"max_length": -1}])
def test_wrong_options_get_one_line(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"use one of|use a number|write one value"):
        EncoderOptions(**options)


def test_a_hub_that_does_not_answer_gets_one_line(tmp_path: Path) -> None:
    """A real client against a port where nobody listens."""
    asked = ["clip", "bert", "timm:resnet50.a1_in1k"]
    code = (
        "from mmfeat.encoders.registry import *\n"
        f"for asked in {asked}:\n"
        "    try: describe_encoders([asked], EncoderOptions(dtype='float32'))\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert answer.stdout.count("\n") == len(asked), answer
    for line in answer.stdout.splitlines():
        assert line.startswith("HubError"), answer
        assert "local folder" in line
        assert "hashing,hog" in line
    assert answer.stderr == ""


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_the_same_vectors(tiny_bert: Path) -> None:
    from torch._dynamo import config as dynamo_config

    towers = describe_encoders([f"bert:{tiny_bert}"], EncoderOptions(dtype="float32", cleaning="tweet"))
    (plain,), (compiled,) = load_encoders(towers, "cpu"), load_encoders(towers, "cpu", Runtime("compile"))
    with dynamo_config.patch(assume_static_by_default=False):  # or all is compiled twice
        for texts in (TEXTS, TEXTS[:2]):  # shapes change from batch to batch
            prepared = [plain.prepare(text) for text in texts]
            np.testing.assert_allclose(compiled.embed(prepared)[0], plain.embed(prepared)[0], atol=1e-5)


def test_inputs_are_rounded_before_a_gpu_copies_them() -> None:
    """As the GPU itself would round them; whole numbers stay."""
    given = {"pixels": torch.randn(3, 4), "ids": torch.arange(6)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = staged(given, dtype, pinned=False)
        assert {name: value.dtype for name, value in found.items()} == {"pixels": dtype, "ids": torch.int64}
        for name, value in to_device(given, "cpu", dtype).items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
