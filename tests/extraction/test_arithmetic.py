"""The dtype `auto`: half precision where the first samples of a data set bear it, once for all commands."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders, load_encoders, whole_request
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.extraction.arithmetic import TRIED, Evidence, FirstSamples, Resolved, resolve_encoders, settle
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import Request, extraction_of, latest_request, resolve_options
from mmfeat.runs.run import is_same
from mmfeat.samples.dataset import SampleSource
from mmfeat.system.hardware import fast_half, resolve_dtype
from tests.cli.typed import invoke

HALF = "bfloat16"  # any CPU computes in it, if only a few slowly
AUTO = EncoderOptions(cleaning="none")
TEXTS = [f"{word} day number {number}" for number, word in enumerate(["happy", "sad", "good", "bad"] * 20)]
fast = pytest.mark.skipif(fast_half("cpu") != HALF, reason="this processor has no fast bfloat16")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"id": str(i), "text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a.jsonl"


@pytest.fixture(scope="module")
def coarse(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose embeddings have a large common part, which the norm behind them takes away again."""
    folder = shutil.copytree(tiny_bert, tmp_path_factory.mktemp("coarse") / "model")
    state = load_file(folder / "model.safetensors")
    state["embeddings.word_embeddings.weight"] += 1.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settled(data: Path, model: Path, asked: EncoderOptions = AUTO, trial: bool = True) -> Resolved:
    """The arithmetic of `bert:model` on a machine whose fast half precision is bfloat16."""
    source, cache = SampleSource(data), data.parent / "cache"
    options = resolve_options(asked, "cpu", before=None)
    described = Resolved(options, describe_encoders([f"bert:{model}"], options))
    first = FirstSamples(source, "cpu") if trial else None
    return settle(described, asked, Cache(cache, source.name), HALF, first)


def dtype(resolved: Resolved) -> str:
    (arithmetic,) = {tower.spec.arithmetic for tower in resolved.towers}
    return arithmetic


def test_the_first_samples_decide_and_stay_decided(data: Path, tiny_bert: Path, coarse: Path) -> None:
    assert dtype(settled(data, tiny_bert)) == HALF
    refused = settled(data, coarse)
    assert dtype(refused) == "float32"
    (evidence,) = refused.evidence.values()
    assert evidence.cosine < 0.999
    assert evidence.samples == TRIED
    assert str(evidence) == f"in float32: {HALF} changes vectors (cosine {evidence.cosine - 5e-6:.5f} on 64 samples)"
    data.write_text(data.read_text().replace("day", "night"))
    assert settled(data, coarse, trial=False) == refused  # whoever asks later, and whatever the texts are by then
    assert {path.suffix for path in (data.parent / "cache" / ".runtimes").iterdir()} == {".json"}


def test_every_value_of_every_output_is_judged(data: Path, tiny_bert: Path) -> None:
    resolved = settled(data, tiny_bert, replace(AUTO, outputs=("pooled", "tokens", "prefix:1")))
    rows = []
    for arithmetic in ("float32", HALF):
        towers = [replace(tower, spec=tower.spec.computed_in(arithmetic)) for tower in resolved.towers]
        (encoder,) = load_encoders(towers, "cpu")
        values = [encoder.embed([encoder.prepare(text)]) for text in TEXTS[:TRIED]]
        rows.append(np.concatenate([np.atleast_2d(one[0]) for outputs in values for one in outputs]).astype(float))
    cosines = (rows[0] * rows[1]).sum(1) / np.linalg.norm(rows[0], axis=1) / np.linalg.norm(rows[1], axis=1)
    (evidence,) = resolved.evidence.values()
    assert len(cosines) > 5 * TRIED
    assert abs(evidence.cosine - cosines.min()) < 2e-4  # batches of another size round elsewhere


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_stored_vectors_keep_their_dtype(data: Path, tiny_bert: Path, stored: str) -> None:
    cache, request = data.parent / "cache", f"bert:{tiny_bert}"
    extract_features(data, [request], cache=cache, options=replace(AUTO, dtype=stored))
    assert dtype(settled(data, tiny_bert)) == stored
    assert not (cache / ".runtimes").exists()  # no trial was made
    again = extract_features(data, [request], cache=cache, options=AUTO)
    assert again.nothing_to_do
    assert latest_request(cache).options.dtype == "auto"
    for found in (again.towers, resolve_encoders([request], AUTO, SampleSource(data), cache, "cpu").towers):
        assert [tower.spec.arithmetic for tower in found] == [stored]
    (tower,) = settled(data, tiny_bert, replace(AUTO, dtype="bert=float32")).towers
    assert tower.spec.arithmetic == "float32"  # what is asked for wins


def test_of_two_stored_dtypes_the_one_with_evidence_is_taken(data: Path, coarse: Path) -> None:
    cache = data.parent / "cache"
    assert dtype(settled(data, coarse)) == "float32"
    for stored in (HALF, "float32"):
        extract_features(data, [f"bert:{coarse}"], cache=cache, options=replace(AUTO, dtype=stored))
    assert dtype(settled(data, coarse)) == "float32"


def test_processes_that_ask_at_once_agree(data: Path, coarse: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: settled(data, coarse), range(2))
    assert first == second


def test_only_what_differs_from_the_usual_dtype_is_named(data: Path, tiny_bert: Path, coarse: Path) -> None:
    """So that runs on vectors of earlier versions keep their names, and printed commands stay short."""
    usual = resolve_options(AUTO, "cpu")
    for model in (tiny_bert, coarse):
        resolved, request = settled(data, model), whole_request(f"bert:{model}")
        differs = dtype(resolved) != resolve_dtype("auto", "cpu")
        assert (resolved.options == usual) != differs
        assert [tower.spec for tower in resolved.towers] == [
            tower.spec for tower in describe_encoders([f"bert:{model}"], resolved.options)
        ]
        command = extraction_of(Request(str(data), {}, [f"bert:{model}"], resolved.options), "cache", "cpu")
        assert (f"--dtype {request}={dtype(resolved)}" in command) == differs
        assert ("--dtype" in command) == differs


def test_a_moved_checkpoint_is_still_the_same(data: Path, coarse: Path, tmp_path: Path) -> None:
    """Its dtype is named by its old place."""
    (trained,) = settled(data, coarse).towers
    moved = shutil.copytree(coarse, tmp_path / "moved")
    (here,) = describe_encoders([f"bert:{moved}"], replace(AUTO, dtype=HALF))
    assert is_same(here, trained)


@fast
def test_extract_says_it_and_heads_and_predict_follow(
    data: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request, model = f"bert:{tmp_path}/model", shutil.copytree(coarse, tmp_path / "model")
    extract = ("extract", "--data", "a.jsonl", "--encoders", request, "--device", "cpu")
    dry = invoke(*extract, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "cache").exists()
    for new in (f"{len(TEXTS)} new", "0 new"):
        done = invoke(*extract)
        assert done.exit_code == 0, done.output
        assert "computed in float32: bfloat16 changes vectors (cosine 0.9" in done.output
        assert new in done.output
    heads = invoke("heads", "--fusion", "none", "--baselines", "logistic", "--folds", "2", "--seeds", "1")
    assert heads.exit_code == 0, heads.output
    model.rename(tmp_path / "moved")
    predict = invoke("predict", "--text", "a good day", "--encoders", f"bert:{tmp_path}/moved")
    assert predict.exit_code == 0, predict.output


def test_evidence_never_shows_more_than_it_is() -> None:
    assert "0.99899" in str(Evidence(HALF, 0.998999, 64))
    assert Evidence(HALF, float("nan"), 64).dtype == "float32"
