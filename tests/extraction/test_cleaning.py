"""The cleaning `auto`: what the texts say, once for a data set, and the case of a text for a model that sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfeat.encoders.lexicon import describe_text
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError
from mmfeat.extraction.extract import Extraction, extract_features, extract_samples
from mmfeat.extraction.forecast import forecast_extraction
from mmfeat.extraction.requests import latest_request
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.train import train_heads
from tests.encoders.tiny_hf import change_json

TWEETS = ["so happy http://t.co/x", "@friend look", "#sunny", "plain one", "plain two"]
PRODUCTS = ["Cotton shirt, blue", "C# in a nutshell", "write to me@shop.com", "the #1 lamp", "chair"]


def table(path: Path, texts: list[str], column: str = "text") -> Path:
    rows = [{"id": str(number), column: text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def extract(data: Path, encoder: str = "hashing", columns: dict[str, str] | None = None, **options: str) -> Extraction:
    asked = EncoderOptions(dtype="float32", **options)
    return extract_features(data, [encoder], cache=data.parent / "cache", options=asked, columns=columns)


def cleaning(result: Extraction) -> str:
    (tower,) = result.towers
    return tower.spec.cleaning


@pytest.mark.parametrize(("texts", "chosen", "share"), [(TWEETS, "tweet", "60 %"), (PRODUCTS, "none", "0 %")])
def test_the_texts_decide_and_the_reason_is_given(texts: list[str], chosen: str, share: str, tmp_path: Path) -> None:
    data = table(tmp_path / "a.jsonl", texts)
    options = EncoderOptions(dtype="float32")
    forecast = forecast_extraction(data, ["hashing"], cache=tmp_path / "cache", options=options)
    result = extract(data)
    assert cleaning(result) == chosen
    assert result.decision is not None
    assert result.decision == forecast.decision
    assert (result.decision.cleaning, result.decision.reason) == (
        chosen,
        f"{share} of texts have a link, mention or hashtag",
    )


def test_a_decision_stays_when_the_texts_change(tmp_path: Path) -> None:
    data = table(tmp_path / "a.jsonl", TWEETS)
    extract(data)
    extract(data, cleaning="none")  # another cleaning, asked for, is no decision
    again = extract(table(data, TWEETS + 9 * PRODUCTS))
    assert again.decision is not None
    assert (cleaning(again), again.decision.kept) == ("tweet", True)
    assert not extract(data).new.total()


def test_other_texts_are_judged_anew(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    rows = [{"id": str(n), "text": TWEETS[n], "title": PRODUCTS[n], "image": ""} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cleaning(extract(data)) == "tweet"
    assert cleaning(extract(data, columns={"text": "title"})) == "none"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    photos = table(tmp_path / "b.jsonl", ["a.jpg"], "image")
    assert extract(photos, "hog").decision is None
    assert cleaning(extract(table(photos, TWEETS))) == "tweet"


def test_heads_find_the_vectors_without_the_request(tmp_path: Path, demo_folder: Path) -> None:
    data, cache = Path(shutil.copytree(demo_folder, tmp_path / "demo")), tmp_path / "cache"
    extract(data)
    few = {"fusion": ["none"], "baselines": ["prior"], "modalities": ["text"], "cache": cache, "out": tmp_path}
    auto, named = (
        train_heads(data, ["hashing"], options=EncoderOptions(dtype="float32", **options), **few)
        for options in ({}, {"cleaning": "tweet"})
    )
    shutil.rmtree(cache / "requests")
    assert train_heads(data, ["hashing"], options=EncoderOptions(dtype="float32"), **few).reused
    assert (named.run.name, named.reused) == (auto.run.name, True)  # as it was called when `tweet` was the default
    assert auto.run.config.encoders[0].spec.cleaning == "tweet"


def test_an_extraction_of_an_earlier_version_keeps_its_cleaning(tmp_path: Path) -> None:
    data = table(tmp_path / "a.jsonl", PRODUCTS)
    extract(data, cleaning="tweet")
    (file,) = (tmp_path / "cache" / "requests").iterdir()
    earlier = json.loads(file.read_text())
    assert (earlier.pop("decision"), len(earlier.pop("sha256"))) == (None, 64)
    file.write_text(json.dumps(earlier))
    again = extract(data)
    assert (cleaning(again), again.new.total()) == ("tweet", 0)
    assert latest_request(tmp_path / "cache").options.cleaning == "tweet"


def test_a_cased_model_keeps_the_case_unless_asked(tmp_path: Path, tiny_bert: Path) -> None:
    cased = Path(shutil.copytree(tiny_bert, tmp_path / "cased"))
    change_json(cased / "tokenizer.json", normalizer=None)
    change_json(cased / "tokenizer_config.json", do_lower_case=False)
    tweets, products = table(tmp_path / "a.jsonl", TWEETS), table(tmp_path / "b.jsonl", PRODUCTS)
    assert cleaning(extract(tweets, f"bert:{cased}")) == "tweet-cased"
    assert cleaning(extract(tweets, f"bert:{cased}", cleaning="tweet")) == "tweet"
    assert cleaning(extract(tweets, f"bert:{cased}", cleaning="none")) == "none"
    assert cleaning(extract(products, f"bert:{cased}")) == "none"
    both = extract_features(
        tweets, ["hashing", f"bert:{cased}"], cache=tmp_path / "cache", options=EncoderOptions(dtype="float32")
    )
    assert [tower.spec.cleaning for tower in both.towers] == ["tweet", "tweet-cased"]


def test_the_lexicon_reads_raw_texts_and_says_where_they_are_hardly_english(tmp_path: Path) -> None:
    data = table(tmp_path / "a.jsonl", TWEETS)
    result = extract_features(data, ["lexicon", "hashing"], cache=tmp_path / "cache")
    assert result.decision is not None
    assert result.decision.cleaning == "tweet"  # that of hashing
    said = "lexicon knows English sentiment only; 0% of texts have one of ten common English words"
    assert said in result.samples.notes
    _, features = result.load()
    (stored,) = [block.vectors for block in features.blocks if block.width == 16]
    np.testing.assert_array_equal(stored, np.stack([describe_text(text) for text in TWEETS]))
    english = table(tmp_path / "b.jsonl", [f"this is what {text}" for text in TWEETS])
    assert "lexicon" not in str(extract(english, "lexicon").samples.notes)


def test_auto_for_all_but_one_encoder(tmp_path: Path, tiny_bert: Path) -> None:
    data = table(tmp_path / "a.jsonl", TWEETS)
    for asked in ("bert=none", "auto,bert=none", "bert=none,text=auto"):
        options = EncoderOptions(dtype="float32", cleaning=asked)
        result = extract_features(data, ["hashing", f"bert:{tiny_bert}"], cache=tmp_path / "cache", options=options)
        assert [tower.spec.cleaning for tower in result.towers] == ["tweet", "none"]


def test_auto_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cleaning auto depends on the texts: name tweet or none"):
        describe_encoders(["hashing"], EncoderOptions(dtype="float32"))
    assert describe_encoders(["hog"], EncoderOptions(dtype="float32"))  # photos have no cleaning
    with pytest.raises(ConfigError, match="use one of auto, tweet, tweet-cased, none"):
        EncoderOptions(cleaning="tweets")
    samples = read_samples(table(tmp_path / "a.jsonl", TWEETS))
    towers = describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="none"))
    assert extract_samples(samples, towers, cache=tmp_path / "cache").decision is None
