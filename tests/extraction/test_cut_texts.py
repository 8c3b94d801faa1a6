"""Texts longer than a model reads are counted, exactly: while they are encoded, and by the audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.audit.result import read_audit
from mmfeat.audit.texts import cut_texts
from mmfeat.cli.audit import show_audit
from mmfeat.cli.console import out
from mmfeat.cli.extract import show_extraction, show_forecast
from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.tokenizer import watch_cuts
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.forecast import forecast_extraction
from mmfeat.extraction.missing import Counts
from mmfeat.samples.dataset import read_samples
from tests.encoders.test_sentence import write_checkpoint
from tests.encoders.tiny_models import write_kind


def write_lengths(folder: Path, lengths: list[int], token: str) -> Path:
    """A table of texts of so many tokens, the special ones aside."""
    rows = [
        {"id": f"s{number}", "text": token * count, "label": "xy"[number % 2]} for number, count in enumerate(lengths)
    ]
    (folder / "lengths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "lengths.jsonl"


@pytest.mark.parametrize(
    ("kind", "limit", "special"),
    [
        ("bert", 12, 2),
        ("st", 24, 2),
        ("clip", 77, 2),
        ("clip-timm-bert", 24, 2),
        ("hf-clip", 77, 2),
        ("hf-siglip", 64, 0),
    ],
)
def test_a_text_is_cut_if_it_has_more_tokens_than_the_limit(
    kind: str, limit: int, special: int, tiny_bert: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    if kind == "st":
        request = f"st:{write_checkpoint(tmp_path / 'model', tiny_bert)}"
    elif kind in ("bert", "clip"):
        request = f"{kind}:{tiny_bert if kind == 'bert' else tiny_clip}"
    else:
        request = write_kind(kind, tmp_path / "model", tiny_bert)
    fits = limit - special
    data = write_lengths(
        tmp_path, [1, fits - 1, fits, fits + 1, fits + 2, 40 * fits], "a" if kind == "hf-siglip" else "a "
    )
    options = EncoderOptions(dtype="float32", cleaning="none", max_length=f"bert={limit}" if kind == "bert" else 0)
    foreseen = forecast_extraction(data, [request], cache=tmp_path / "cache", options=options)
    assert [(each.cut, each.tried, each.limit) for each in foreseen.encoders if each.tried] == [(3, 6, limit)]
    made = extract_features(data, [request], cache=tmp_path / "cache", options=options)
    assert sum(made.cut.values()) == 3
    assert set(made.limits.values()) == {limit}
    (spec,) = [tower.spec for tower in made.towers if tower.spec.modality == "text"]
    texts = [sample.text or "" for sample in read_samples(data)]
    assert cut_texts(tmp_path / "cache", data, texts) == ({spec.name: {"texts": 3, "limit": limit}}, [])
    again = extract_features(data, [request], cache=tmp_path / "cache", options=options)
    assert not again.cut
    with out.capture() as shown:
        show_forecast(foreseen)
        show_extraction(made)
    flag = " (--max-length)" if kind == "bert" else ""
    assert f"3 of 6 texts that were tried are longer and were cut to {limit} tokens{flag}\n" in shown.get()
    assert f"3 of 6 new texts are longer and were cut to {limit} tokens{flag}\n" in shown.get()


def test_the_audit_counts_them_and_says_what_it_cannot_count(tiny_bert: Path, tmp_path: Path) -> None:
    data, model, cache = write_lengths(tmp_path, [1, 10, 11, 50], "a "), tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_bert, model)
    extract_features(data, [f"bert:{model}"], cache=cache, options=EncoderOptions(dtype="float32", max_length=12))
    counted = audit_data(data, out=tmp_path / "audit", cache=cache, run="none")
    assert read_audit(counted.folder).profile["all"]["text"]["cut"] == {"bert:model": {"texts": 2, "limit": 12}}
    with out.capture() as shown:
        show_audit(counted)
    assert "  2 are longer than the 12 tokens that bert:model reads\n" in shown.get()
    shutil.rmtree(model)
    lost = audit_data(data, out=tmp_path / "audit", cache=cache, run="none")
    assert "cut" not in lost.profile["all"]["text"]
    assert any("texts not counted" in note and "no such weights file or folder" in note for note in lost.notes)


def test_a_tokenizer_in_python_counts_too() -> None:
    tokenizer = quiet_transformers().ByT5Tokenizer()
    cuts = watch_cuts(tokenizer)
    plain = quiet_transformers().ByT5Tokenizer()
    asked = {"truncation": True, "max_length": 5}
    assert dict(tokenizer("abcde", **asked)) == dict(plain("abcde", **asked))
    assert cuts.pop() == 5
    tokenizer(["abcd", "abcde", "a"], **asked)
    assert cuts == [0, 5, 0]


def test_workers_add_up_what_they_cut() -> None:
    one, other = Counts(), Counts()
    one.add_cut("st", 24)
    other.add_cut("st", 24)
    one.add(Counts.from_json(other.to_json()))
    assert (one.cut, one.limits) == ({"st": 2}, {"st": 24})
