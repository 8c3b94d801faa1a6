"""Checkpoints of sentence-transformers: each gives the vector of `SentenceTransformer.encode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.cli.extract import notes_on
from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import resolve_options
from tests.encoders.tiny_hf import change_json, write_hf
from tests.encoders.tiny_models import TEXTS

PLAIN = {"dtype": "float32", "cleaning": "none"}
PROMPTS = {"query": "what a bus: ", "passage": "so: "}


def write_checkpoint(
    folder: Path, backbone: Path, pooling: Any = "mean", dense: int = 0, normalize: bool = False, **settings: Any
) -> Path:
    """A checkpoint with modules, prompts and length, written by sentence-transformers."""
    quiet_transformers()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(7)
    body = modules.Transformer(str(backbone), max_seq_length=24)
    include = settings.pop("include_prompt", True)
    parts = [body, modules.Pooling(body.get_embedding_dimension(), pooling, include_prompt=include)]
    width = parts[-1].get_embedding_dimension()
    parts += [modules.Dense(width, dense)] if dense else []
    parts += [modules.Normalize()] if normalize else []
    SentenceTransformer(modules=parts, device="cpu", **settings).save_pretrained(str(folder))
    return folder


def published(folder: Path, **arguments: Any) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.stack([model.encode(text, **arguments) for text in TEXTS])


def vectors(request: str, **options: Any) -> np.ndarray:
    (encoder,) = load_encoders(describe_encoders([request], EncoderOptions(**{**PLAIN, **options})), "cpu")
    return encoder.embed([encoder.prepare(text) for text in TEXTS])[0]


def test_texts_are_sorted_by_tokens(tiny_bert: Path) -> None:
    """Letters say little: a word of many letters may be one token, and an emoji several."""
    (encoder,) = load_encoders(describe_encoders([f"st:{tiny_bert}"], EncoderOptions(**PLAIN)), "cpu")
    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(tiny_bert)
    lengths = [encoder.length(encoder.prepare(text)) for text in TEXTS]
    assert lengths == [len(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", ("cls", "mean")])
def test_any_pooling_equals_sentence_transformers(pooling: Any, tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert, pooling)
    np.testing.assert_allclose(vectors(f"st:{folder}"), published(folder), atol=1e-5)


def test_dense_normalize_and_truncation_equal_sentence_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert, "mean", dense=20, normalize=True)
    np.testing.assert_allclose(vectors(f"st:{folder}"), published(folder), atol=1e-5)
    short = vectors(f"st:{folder}", truncate_dim="st=8")
    np.testing.assert_allclose(short, published(folder, truncate_dim=8), atol=1e-5)
    assert short.shape == (len(TEXTS), 8)


@pytest.mark.parametrize("include", [True, False])
def test_prompts_equal_sentence_transformers(include: bool, tiny_bert: Path, tmp_path: Path) -> None:
    settings = {"prompts": PROMPTS, "default_prompt_name": "passage", "include_prompt": include}
    folder = write_checkpoint(tmp_path / "model", tiny_bert, **settings)
    own, query, none = (vectors(f"st:{folder}", prompt=name) for name in ("", "query", "none"))
    np.testing.assert_allclose(own, published(folder), atol=1e-5)
    np.testing.assert_allclose(query, published(folder, prompt_name="query"), atol=1e-5)
    np.testing.assert_allclose(none, published(folder, prompt=""), atol=1e-5)
    assert np.abs(own - query).max() > 1e-3
    with pytest.raises(
        ConfigError, match=r"--prompt question: .* no prompt of that name; use one of document, passage, query, none"
    ):
        vectors(f"st:{folder}", prompt="question")


def test_everything_that_changes_a_vector_changes_the_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert, dense=8, prompts=PROMPTS)

    def fingerprint(**options: Any) -> str:
        (tower,) = describe_encoders([f"st:{folder}"], EncoderOptions(**{**PLAIN, **options}))
        return tower.spec.fingerprint

    options: list[dict[str, Any]] = [{}, {"prompt": "query"}, {"truncate_dim": 4}, {"max_length": 9}]
    found = [fingerprint(**each) for each in options]
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"mean"', '"cls"'))
    assert len({*found, fingerprint()}) == 5


def test_tokens_and_length_follow_the_checkpoint(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    options = EncoderOptions(**PLAIN, outputs=("tokens", "prefix:1"))
    towers = describe_encoders([f"st:{folder}"], options)
    (encoder,) = load_encoders(towers, "cpu")
    tokens, prefix = encoder.embed([encoder.prepare(text) for text in TEXTS])
    reference = load_reference(towers[0])
    for values, text in zip(tokens, TEXTS, strict=True):
        np.testing.assert_allclose(values, reference(text), atol=1e-5)
    assert max(map(len, tokens)) == max(map(len, prefix)) == 24
    (tower,) = describe_encoders([f"st:{folder}"], EncoderOptions(**PLAIN, max_length=9))
    (shorter,) = load_encoders([tower], "cpu")
    assert shorter.embed([shorter.prepare(TEXTS[-1])])[0].shape == (1, 32)


def test_a_module_that_is_not_the_librarys_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own_code.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EncoderError, match=r"needs code of its own, own_code.Pooling in modules.json"):
        describe_encoders([f"st:{folder}"], EncoderOptions(**PLAIN))
    (folder / "modules.json").write_text("{}broken")
    with pytest.raises(EncoderError, match=r"not JSON"):
        describe_encoders([f"st:{folder}"], EncoderOptions(**PLAIN))
    for damaged in ([1], [{"path": ""}], [{"type": "sentence_transformers.models.Pooling", "path": "../secret"}]):
        (folder / "modules.json").write_text(json.dumps(damaged))
        for family in ("st", "bert"):
            with pytest.raises(EncoderError, match=r"modules.json is no list of modules"):
                describe_encoders([f"{family}:{folder}"], EncoderOptions(**PLAIN, pooling="auto"))
    with pytest.raises(EncoderError, match=r"st: name a checkpoint, as in st:"):
        describe_encoders(["st"], EncoderOptions(**PLAIN))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_bert_follows_the_pooling_of_a_checkpoint_if_asked(pooling: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert, pooling)
    ours = vectors(f"bert:{folder}", pooling="bert=auto", max_length=24)
    np.testing.assert_allclose(ours, published(folder), atol=1e-5)
    tower = describe_encoders([f"bert:{folder}"], EncoderOptions(**PLAIN, pooling="auto", max_length=24))[0]
    assert f"st:{folder} gives the vector as published" in notes_on([tower])[0]
    reference = load_reference(tower)
    np.testing.assert_allclose(ours, np.stack([reference(text) for text in TEXTS]), atol=1e-5)


@pytest.mark.parametrize("settings", [{"pooling_mode": ["cls", "mean"]}, {"pooling_mode": "weightedmean"}, {}, []])
def test_bert_refuses_a_pooling_that_it_has_not(settings: Any, tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for written in (settings, both):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(written))
        with pytest.raises(EncoderError, match=r"its pooling is .*; name st:"):
            describe_encoders([f"bert:{folder}"], EncoderOptions(**PLAIN, pooling="auto"))


def write_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny model of another architecture beside the tokenizer of the tiny BERT."""
    transformers = quiet_transformers()
    torch.manual_seed(8)
    words, small = len(transformers.AutoTokenizer.from_pretrained(tokenizer)), {"d_model": 16, "num_layers": 1}
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "T5Model": ("T5Config", {**small, "d_kv": 8, "d_ff": 16, "num_heads": 2}),
        "T5EncoderModel": ("T5Config", {**small, "d_kv": 8, "d_ff": 16, "num_heads": 2}),
        "BartModel": ("BartConfig", {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
        }),
        "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}),
        "RobertaModel": ("RobertaConfig", {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
            "max_position_embeddings": 34,
        }),
    }  # fmt: skip
    config, shape = shapes[kind]
    getattr(transformers, kind)(getattr(transformers, config)(vocab_size=words, **shape)).save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["T5Model", "T5EncoderModel", "BartModel", "GPT2LMHeadModel"])
def test_encoders_of_other_architectures_equal_their_library(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_model(kind, tmp_path / "model", tiny_bert)
    if kind == "GPT2LMHeadModel":  # such a model has no padding token
        change_json(folder / "tokenizer_config.json", pad_token=None, eos_token="[SEP]")
    (tower,) = describe_encoders([f"bert:{folder}"], EncoderOptions(**PLAIN, pooling="auto", max_length=32))
    assert tower.spec.pooling == ("last" if kind == "GPT2LMHeadModel" else "mean")
    (encoder,), reference = load_encoders([tower], "cpu"), load_reference(tower)
    batch = encoder.embed([encoder.prepare(text) for text in TEXTS])[0]
    np.testing.assert_allclose(batch, np.stack([reference(text) for text in TEXTS]), atol=1e-5)


def test_positions_that_a_model_keeps_for_itself_are_no_room_for_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_model("RobertaModel", tmp_path / "model", tiny_bert)
    assert vectors(f"bert:{folder}", max_length=32).shape == (len(TEXTS), 16)
    with pytest.raises(EncoderError, match=r"--max-length 34 is more than its positions hold"):
        vectors(f"bert:{folder}", max_length=34)


def test_an_option_for_one_encoder_leaves_the_others_alone(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    requests = [f"st:{folder}", f"bert:{tiny_bert}", "hog"]
    asked = {"max_length": "text=16,bert=20", "cleaning": "tweet,st=none", "dtype": "float32,bert=bfloat16"}
    st, bert, hog = (t.spec for t in describe_encoders(requests, resolve_options(EncoderOptions(**asked), "cpu")))
    assert (st.max_length, st.cleaning, st.arithmetic) == (16, "none", "float32")
    assert (bert.max_length, bert.cleaning, bert.arithmetic, hog.max_length) == (20, "tweet", "bfloat16", 0)
    for name in ("clip", "st"):
        with pytest.raises(
            ConfigError,
            match=rf"--pooling {name}=...: no encoder of that name takes this option; there are bert, text$",
        ):
            describe_encoders(requests, EncoderOptions(**PLAIN, pooling=f"{name}=cls"))


def test_an_option_that_no_encoder_heeds_is_refused(tiny_bert: Path, tiny_clip: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,text\na,so tired\n")
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    for request, asked, about in (
        (f"st:{folder}", {"pooling": "cls"}, "--pooling cls: it is about bert, and there is only st:model"),
        (f"clip:{tiny_clip}", {"max_length": 8}, "--max-length 8: it is about bert and st, and there is only clip"),
    ):
        with pytest.raises(ConfigError, match=about):
            extract_features(table, [request], cache=tmp_path / "cache", options=EncoderOptions(**asked))


def test_what_a_checkpoint_cannot_give_is_said(tiny_bert: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_bert)
    with pytest.raises(EncoderError, match=r"--truncate-dim 33 is more than the 32 dimensions of its vectors"):
        vectors(f"st:{folder}", truncate_dim=33)
    assert vectors(f"st:{folder}", truncate_dim=32).shape[1] == 32
    with pytest.raises(ConfigError, match=r"--prompt query: st:.* has no prompts; leave it out"):
        vectors(f"st:{tiny_bert}", prompt="query")
    pictures = write_hf(tmp_path / "pictures", "dinov2")
    with pytest.raises(EncoderError, match=r"a model of pictures and no text encoder; name hf:.*pictures$"):
        vectors(f"st:{pictures}")
