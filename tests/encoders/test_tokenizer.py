"""Tokenizers: whether capitals reach the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmfeat.encoders.tokenizer import is_cased

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
