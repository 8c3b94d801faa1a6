"""Tokenizers: whether capitals reach the model, and whether tokenizer and model belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import Encoder, EncoderOptions
from mmfeat.encoders.tokenizer import check_fit, is_cased
from mmfeat.errors import EncoderError

BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}


@pytest.mark.parametrize(
    ("files", "cased"),
    [
        ({"tokenizer.json": {"normalizer": {**BERT, "lowercase": True}}}, False),
        ({"tokenizer.json": {"normalizer": {**BERT, "lowercase": False}}}, True),
        ({"tokenizer.json": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}}, True),
        ({"tokenizer.json": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}}, False),
        ({"tokenizer.json": {"normalizer": None}}, True),
        ({"tokenizer.json": {"normalizer": {"type": "Unheard of"}}}, True),
        ({"tokenizer.json": []}, True),
        # XLM-R models carry the setting, which their tokenizer ignores; BERT's tokenizer heeds it before the file.
        ({"tokenizer.json": {"normalizer": None}, "tokenizer_config.json": {"do_lower_case": True}}, True),
        (
            {
                "tokenizer.json": {"normalizer": {**BERT, "lowercase": True}},
                "tokenizer_config.json": {"do_lower_case": False},
            },
            True,
        ),
        ({"tokenizer.json": {"normalizer": None}, "sentence_bert_config.json": {"do_lower_case": True}}, False),
        ({"vocab.txt": "a"}, False),
        ({"vocab.txt": "a", "tokenizer_config.json": {"do_lower_case": False}}, True),
        ({"vocab.txt": "a", "bpe.codes": "a"}, True),
        ({"sentencepiece.bpe.model": "a"}, True),
        ({}, True),
        (
            {
                "modules.json": [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}],
                "0_Transformer/tokenizer.json": {"normalizer": {**BERT, "lowercase": True}},
            },
            False,
        ),
    ],
)
def test_a_checkpoint_tells_by_its_files_whether_it_is_cased(
    files: dict[str, Any], cased: bool, tmp_path: Path
) -> None:
    (tmp_path / "0_Transformer").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert is_cased(str(tmp_path)) is cased


@pytest.mark.parametrize("lower", [True, False])
def test_the_files_say_what_the_tokenizer_does(lower: bool, tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    transformers.BertTokenizer.from_pretrained(tiny_bert, do_lower_case=lower).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.tokenize("Day") == tokenizer.tokenize("day")) is lower
    assert is_cased(str(folder)) is not lower


def load(request: str) -> Encoder:
    (encoder,) = load_encoders(describe_encoders([request], EncoderOptions(dtype="float32", cleaning="none")), "cpu")
    return encoder


@pytest.mark.parametrize("family", ["bert", "st"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "mpnet", "t5"])
def test_a_model_without_tokenizer_files_is_refused(
    family: str, kept: tuple[str, ...], kind: str, tiny_bert: Path, tmp_path: Path
) -> None:
    transformers = quiet_transformers()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "t5":
        small = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    config = transformers.AutoConfig.for_model(kind, vocab_size=70, **small)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    for name in kept:
        shutil.copy(tiny_bert / name, tmp_path / "model")
    with pytest.raises(EncoderError, match=r"no tokenizer files here \(.*\); copy them from the model's source"):
        load(f"{family}:{tmp_path / 'model'}")


@pytest.mark.parametrize("family", ["bert", "st"])
@pytest.mark.parametrize("rows", [40, 300])
def test_a_tokenizer_of_another_model_is_refused(family: str, rows: int, tiny_bert: Path, tmp_path: Path) -> None:
    transformers = quiet_transformers()
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=rows, **small)).save_pretrained(folder)
    with pytest.raises(EncoderError, match=rf"the tokenizer has \d+ tokens, the model {rows} embeddings"):
        load(f"{family}:{folder}")


# Tokens of the vocabulary, tokens added behind it, embeddings, and the special tokens of the configuration.
PUBLISHED = {
    "bert": (30522, 0, 30522, {"pad_token_id": 0}),
    "nomic-embed": (30522, 0, 30528, {"pad_token_id": 0}),
    "t5": (32000, 100, 32128, {"pad_token_id": 0, "eos_token_id": 1}),
    "modernbert": (50254, 114, 50368, {"pad_token_id": 0}),
    "phi": (50257, 38, 51200, {}),
    "qwen2.5": (151643, 22, 152064, {}),
    "embeddinggemma": (262144, 1, 262144, {"pad_token_id": 0}),  # an added token without an embedding
    "indobert": (30521, 0, 50000, {"pad_token_id": 0}),  # many rows that no token has
}
FOREIGN = {
    "bert for multilingual bert": (30522, 0, 119547, {"pad_token_id": 0}),
    "bert for roberta": (30522, 0, 50265, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "multilingual bert for bert": (119547, 0, 30522, {"pad_token_id": 0}),
    "none for t5": (3, 100, 32128, {"pad_token_id": 0, "eos_token_id": 1}),
}


@pytest.mark.parametrize("name", [*PUBLISHED, *FOREIGN])
def test_padded_vocabularies_fit_and_those_of_other_models_do_not(name: str) -> None:
    transformers = quiet_transformers()
    from tokenizers import Tokenizer, models

    words, added, rows, numbers = {**PUBLISHED, **FOREIGN}[name]
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w2"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
    tokenizer.add_tokens([f"<added {number}>" for number in range(added)])
    model = torch.nn.Module()
    model.config, model.embedding = transformers.PretrainedConfig(**numbers), torch.nn.Embedding(rows, 1)
    if name in FOREIGN:
        with pytest.raises(EncoderError, match=f"{words + added} tokens, the model {rows} embeddings"):
            check_fit(name, tokenizer, model)
        return
    check = check_fit(name, tokenizer, model)
    check("w5")
    if words + added > rows:
        with pytest.raises(ValueError, match="the model has no embedding of <added 0>"):
            check("w5 <added 0>")
