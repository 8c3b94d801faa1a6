"""Vectors of the user's own, by sample id, in every kind of file; what is wrong with a file is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import mmfeat
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.vectors import read_vectors
from mmfeat.errors import DataError, EncoderError

IDS = ["007", "a b", "ünï", "d"]
VECTORS = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
OPTIONS = EncoderOptions(dtype="float32", cleaning="none")


def write_npy(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    np.save(path, vectors)
    pd.DataFrame({"id": ids}).to_csv(path.with_suffix(".csv"), index=False)


def write_lines(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    np.save(path, vectors)
    path.with_suffix(".txt").write_text("\n".join(ids), encoding="utf-8")


def write_structured(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    rows = np.zeros(len(ids), [("id", "U9"), ("vector", "f4", vectors.shape[1])])
    rows["id"], rows["vector"] = ids, vectors
    np.save(path, rows)


def write_parquet(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    pd.DataFrame({"id": ids, "label": range(len(ids)), "v": list(vectors)}).to_parquet(path)


def write_csv(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    columns = {f"x{number}": column for number, column in enumerate(vectors.T)}
    pd.DataFrame({"label": range(len(ids)), "id": ids, **columns}).to_csv(path, index=False)


def write_h5(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["ids"], file["model/pooled"] = ids, vectors


WRITERS: dict[str, tuple[str, Callable[[Path, list[str], np.ndarray], None]]] = {
    "npy": (".npy", write_npy),
    "lines": (".npy", write_lines),
    "structured": (".npy", write_structured),
    "parquet": (".parquet", write_parquet),
    "csv": (".csv", write_csv),
    "h5": (".h5", write_h5),
}


def spec_of(path: Path) -> EncoderSpec:
    return describe_encoders([f"vectors:{path}"], OPTIONS)[0].spec


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_its_rows_by_id(kind: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[kind]
    path = tmp_path / f"v{suffix}"
    write(path, IDS, VECTORS)
    (encoder,) = load_encoders(describe_encoders([f"vectors:{path}"], OPTIONS), "cpu")
    (rows,) = encoder.embed([encoder.prepare(id) for id in ("d", "007")])
    np.testing.assert_allclose(rows, VECTORS[[3, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="no vector of this id in v"):
        encoder.prepare("7")
    before = spec_of(path)
    write(path, IDS, VECTORS + 1)
    assert spec_of(path).weights != before.weights


def test_the_ids_beside_a_matrix_are_part_of_the_spec(tmp_path: Path) -> None:
    write_npy(tmp_path / "v.npy", IDS, VECTORS)
    before = spec_of(tmp_path / "v.npy")
    write_npy(tmp_path / "v.npy", IDS[::-1], VECTORS)
    assert spec_of(tmp_path / "v.npy") != before


def test_a_pack_of_the_cache_is_such_a_file(demo_folder: Path, tmp_path: Path) -> None:
    """Samples without a text have a row of NaN there: no vector, and no error."""
    samples = mmfeat.read_samples(demo_folder)
    mmfeat.extract_features(demo_folder, ["hashing:1"], cache=tmp_path)
    specs = [tower.spec for tower in describe_encoders(["hashing:1"], EncoderOptions("float32", "tweet"))]
    store = mmfeat.Cache(tmp_path, samples.name)
    expected = store.load(samples.samples, specs).blocks[0]
    for suffix in ("h5", "npy", "parquet"):
        path = tmp_path / f"pack.{suffix}"
        mmfeat.write_pack(path, store, samples, specs)
        rows, vectors = read_vectors(path)
        present = [id for id, mask in zip((s.id for s in samples), expected.mask, strict=True) if mask]
        assert list(rows) == present
        np.testing.assert_array_equal(vectors[list(rows.values())], expected.vectors[expected.mask])


def bad_twice(path: Path) -> None:
    write_npy(path, ["a", "b", "a", "c"], VECTORS)


def bad_nan(path: Path) -> None:
    write_npy(path, IDS, np.where(np.arange(5) == 2, np.nan, VECTORS))


def bad_count(path: Path) -> None:
    write_npy(path, IDS[:3], VECTORS)


def bad_pickle(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def bad_lone(path: Path) -> None:
    np.save(path, VECTORS)


def bad_torn(path: Path) -> None:
    write_npy(path, IDS, VECTORS)
    path.write_bytes(path.read_bytes()[:150])


def bad_texts(path: Path) -> None:
    write_npy(path, IDS, np.array([["x"] * 5] * 4))


def bad_flat(path: Path) -> None:
    write_npy(path, IDS, VECTORS[:, 0])


BROKEN: dict[Callable[[Path], None], str] = {
    bad_twice: "the id a occurs twice",
    bad_nan: "4 vectors hold NaN or infinity, the first is that of 007",
    bad_count: r"3 ids for an array \(4, 5\)",
    bad_pickle: "no vectors can be read .*Python objects",
    bad_lone: "no ids; write them beside it, as v.csv",
    bad_torn: "no vectors can be read",
    bad_texts: r"4 ids for an array \(4, 5\) of <U1",
    bad_flat: r"4 ids for an array \(4,\)",
}


@pytest.mark.parametrize("write", BROKEN, ids=lambda write: write.__name__)
def test_a_broken_file_is_one_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "v.npy")
    with pytest.raises(EncoderError, match=BROKEN[write]) as caught:
        read_vectors(tmp_path / "v.npy")
    assert "\n" not in str(caught.value)


def test_broken_tables_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pd.DataFrame({"id": ["a", "b"], "v": [[1.0, 2.0], [1.0]]}).to_parquet(path)
    with pytest.raises(EncoderError, match="the vector of b has 1 numbers, others 2"):
        read_vectors(path)
    for columns, message in (
        ({"id": ["a"], "v": [[1.0]], "w": [[1.0]]}, r"several columns of vectors \(v, w\)"),
        ({"id": ["a"], "text": ["b"]}, "no column of vectors or numbers"),
        ({"who": ["a"], "x": [1.0]}, "no column id among who, x"),
    ):
        pd.DataFrame(columns).to_parquet(path)
        with pytest.raises(EncoderError, match=message):
            read_vectors(path)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["ids"], file["a"], file["b"] = ["x"], [[1.0]], [[2.0]]
    with pytest.raises(EncoderError, match="the matrices /a, /b"):
        read_vectors(tmp_path / "v.h5")
    for name, message in (("nowhere.npy", "no such weights file"), ("v.txt", "no file of .npy, .parquet")):
        (tmp_path / "v.txt").touch()
        with pytest.raises(EncoderError, match=message):
            spec_of(tmp_path / name)


def test_heads_and_predictions_see_them_whatever_text_and_photo_are(tmp_path: Path) -> None:
    """Samples with equal texts have vectors of their own, and one that has none stays, masked, with the reason."""
    labels = ["up", "down"] * 30
    frame = pd.DataFrame({"id": [f"s{n}" for n in range(60)], "text": ["the same"] * 60, "label": labels})
    vectors = np.random.default_rng(0).standard_normal((59, 6)) + 4 * (np.arange(59)[:, None] % 2)
    write_npy(tmp_path / "v.npy", frame["id"].tolist()[:59], vectors)
    encoders, cache = [f"vectors:{tmp_path / 'v.npy'}", "hashing:1"], tmp_path / "cache"
    extraction = mmfeat.extract_features(frame, encoders, cache=cache)
    assert extraction.failures[0][0] == "s59"
    assert "no vector of this id in v.npy, which has s0, s1, s2" in extraction.failures[0][1]
    model = mmfeat.fit(
        frame,
        encoders,
        cache=cache,
        out=tmp_path / "heads",
        fusion=["none"],
        baselines=["ridge"],
        protocol=mmfeat.Protocol(folds=3, seeds=1),
        device="cpu",
    )
    assert model.run.leaderboard[0].macro_f1.value > 0.9
    predicted = mmfeat.predict_data(frame, model.run.folder, cache=cache, device="cpu")
    assert predicted.predictions.labels[:59] == labels[:59]
    with pytest.raises(DataError, match=r"none of 1 vectors can be read; the first is sample z.*name a file that has"):
        mmfeat.extract_features([{"id": "z", "text": "a"}], encoders[:1], cache=cache)
    with pytest.raises(mmfeat.MmfeatError, match="it takes no texts"):
        mmfeat.embed(["a"], encoder=encoders[0], cache=None)
