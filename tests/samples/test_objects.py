"""Data in memory and data sets of the library `datasets`: read as tables, cached by content, named in a run."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import mmfeat
from mmfeat.errors import DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import latest_request
from mmfeat.prediction.predict import predict_data
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.run import read_run
from mmfeat.samples.dataset import name_of, read_samples
from mmfeat.sweep.train import train_heads
from tests.sweep.small_sweeps import BUILT_IN, NO_HEADS, SMALL

WORDS = ["river", "stone", "lamp", "green", "quiet", "market", "train", "cloud", "paper", "winter"]


def photo(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), (number * 5, 90, 250 - number * 5)).save(file, "PNG")
    return file.getvalue()


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{n}",
            "text": f"{WORDS[n % 10]} {WORDS[n * 7 % 9]} {n} {['good', 'bad'][n % 2]}",
            "image": photo(n),
            "label": ["cat", "dog"][n % 2],
        }
        for n in range(count)
    ]


def polars_frame(values: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("polars").DataFrame(values)


def hub_dataset(values: list[dict[str, Any]]) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    made = [{**row, "image": {"bytes": row["image"], "path": None}} for row in values]
    return datasets.Dataset.from_list(made, features)


class Stream:
    """A frame of a library that has no more than Arrow's interface of streams."""

    def __init__(self, values: list[dict[str, Any]]) -> None:
        self._table = pa.Table.from_pylist(values)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


KINDS = {
    "list": list,
    "stream": Stream,
    "pandas": pd.DataFrame,
    "arrow": pa.Table.from_pylist,
    "polars": polars_frame,
    "datasets": hub_dataset,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_object_gives_the_same_samples(kind: str) -> None:
    samples = read_samples(KINDS[kind](rows()))
    assert [(s.id, s.text, s.label) for s in samples] == [(r["id"], r["text"], r["label"]) for r in rows()]
    assert [s.image.read_bytes() for s in samples if s.image] == [row["image"] for row in rows()]
    assert samples.name == "frame"


def test_the_name_of_an_object_is_its_content() -> None:
    frame = pd.DataFrame(rows())
    assert name_of(frame) == name_of(frame.copy().set_index(frame.index + 7))
    assert name_of(rows()) == name_of(rows())
    assert name_of(frame) != name_of(frame.assign(label="cat"))


def test_rows_of_a_selection_are_those_of_the_selection() -> None:
    chosen = hub_dataset(rows()).select([5, 2])
    assert [(s.id, s.label) for s in read_samples(chosen)] == [("s5", "dog"), ("s2", "cat")]


def test_paths_are_relative_to_the_working_folder_and_pictures_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(photo(3))
    picture = Image.open("a.png")
    samples = read_samples([{"text": "a", "image": Path("a.png")}]), read_samples([{"text": "a", "image": picture}])
    opened = [Image.open(io.BytesIO(one.samples[0].image.read_bytes())).getpixel((0, 0)) for one in samples]  # type: ignore[union-attr]
    assert opened == [picture.getpixel((0, 0))] * 2


@pytest.mark.parametrize(
    ("data", "message"),
    [(3, "data is int; give a path, a pandas"), ([1, 2], "data is list"), ([{"text": "a"}, {"text": 1}], "no table")],
)
def test_other_objects_are_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        read_samples(data)
    assert "\n" not in str(refusal.value)


def test_a_row_of_an_object_is_named_without_its_temporary_file() -> None:
    with pytest.raises(DataError, match=r"^data:2: the id 'x' is already at data:1; remove or rename one of them$"):
        read_samples(pd.DataFrame({"id": ["x", "x"], "text": ["a", "b"]}))


def test_the_named_levels_of_an_index_are_columns() -> None:
    frame = pd.DataFrame({"id": ["x", "y"], "text": ["a", "b"], "label": ["c", "d"]})
    for index in ("id", ["label", "id"]):
        samples = read_samples(frame.set_index(index))
        assert [(sample.id, sample.label) for sample in samples] == [("x", "c"), ("y", "d")]


def test_columns_are_a_mapping() -> None:
    with pytest.raises(DataError, match=r"columns is str; give a dict, as in {'text': 'title'}"):
        read_samples(pd.DataFrame({"title": ["a"]}), "text=title")  # type: ignore[arg-type]


def test_names_may_be_one_text_as_on_the_command_line(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"text": [f"{word} {n}" for n in range(6) for word in ("up", "down")], "label": ["a", "b"] * 6}
    )
    extract_features(frame, "hashing", cache=tmp_path / "cache")
    sweep = train_heads(
        frame, "hashing", cache=tmp_path / "cache", out=tmp_path, fusion="none", baselines="prior,ridge",
        protocol=SMALL, ensembles=False,
    )  # fmt: skip
    assert {entry.head for entry in sweep.run.leaderboard} == {"prior", "ridge"}


def test_the_whole_way_with_frames(tmp_path: Path) -> None:
    train, test = pd.DataFrame(rows(40)), pd.DataFrame(rows(50)[40:]).drop(columns="label")
    cache = tmp_path / "cache"
    first = mmfeat.extract_features(train[:30], BUILT_IN, cache=cache)
    assert list(first.new.values()) == [30, 30]
    result = extract_features(train, BUILT_IN, cache=cache, test=test)
    assert list(result.new.values()) == [10, 10]  # content keys: the rows before are there
    run = train_heads(train, BUILT_IN, cache=cache, out=tmp_path / "heads", protocol=SMALL, **NO_HEADS).run
    assert run.config.data == name_of(train)
    assert train_heads(train, BUILT_IN, cache=cache, out=tmp_path / "heads", protocol=SMALL, **NO_HEADS).reused
    written = write_submission(run.folder, out=tmp_path / "s.csv", cache=cache)
    assert list(pd.read_csv(written.path)) == ["id", "label"]
    assert len(predict_data(test, run.folder, cache=cache).predictions) == 10
    assert latest_request(cache, train).test == name_of(test)
    lost = "import mmfeat, sys; mmfeat.read_samples(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-c", lost, read_run(run.folder).config.data], capture_output=True, text=True, check=False
    )
    assert answer.stderr.splitlines()[-1].endswith("program, which is not here; give it again as data=...")


def saved(folder: Path, **splits: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = {name: hub_dataset(values) for name, values in splits.items()}
    (datasets.DatasetDict(made) if len(made) > 1 else next(iter(made.values()))).save_to_disk(folder)
    return folder


def test_a_data_set_that_was_saved_to_disk_is_named_by_hf(tmp_path: Path) -> None:
    folder = saved(tmp_path / "pets", train=rows())
    samples = read_samples(f"hf:{folder}")
    assert samples.name == "pets"
    assert samples.classes == ("cat", "dog")
    assert [s.image.read_bytes() for s in samples if s.image] == [row["image"] for row in rows()]


def test_splits_are_named_behind_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "pets", train=rows(), test=rows(3))
    monkeypatch.chdir(tmp_path)
    assert len(read_samples("hf:pets:test")) == 3
    for name, problem in (("hf:pets", "several splits"), ("hf:pets:dev", "no split dev")):
        with pytest.raises(DataError, match=f"{problem}; name one: hf:pets:train, hf:pets:test"):
            read_samples(name)
    result = extract_features("hf:pets:train", ["hog"], cache="cache", test="hf:pets:test")
    assert result.test is not None
    assert latest_request("cache").data == f"hf:{tmp_path}/pets:train"
    assert extract_features("hf:pets:train", ["hog"], cache="cache", test="hf:pets:test").nothing_to_do


def test_a_folder_of_parquet_files_is_read_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "pets").mkdir()
    hub_dataset(rows()).to_parquet(tmp_path / "pets" / "train-00000-of-00001.parquet")
    samples = read_samples(f"hf:{tmp_path}/pets")
    assert [(s.id, s.label) for s in samples] == [(row["id"], row["label"]) for row in rows()]


def test_a_data_set_that_is_nowhere_is_told_in_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hf:no-one/nothing: datasets cannot load it") as refusal:
        read_samples("hf:no-one/nothing")
    assert "\n" not in str(refusal.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install -e .*\[hf\]"):
        read_samples("hf:someone/something")
