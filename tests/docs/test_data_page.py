"""Each row of the table of layouts in docs/data.md is typed, on a layout that is written for it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmfeat.cli.main import app
from mmfeat.samples.dataset import SampleSet, read_samples
from tests.docs.markdown import ROOT

ROW = re.compile(r"^\| (?P<have>[^|]+) \| [^|]* \| `--data (?P<typed>[^|]+)` \|$", re.MULTILINE)
SECTION = (ROOT / "docs/data.md").read_text().partition("## Layout by layout")[2].partition("\n## ")[0]
ROWS = {match["have"]: match["typed"] for match in ROW.finditer(SECTION)}
TEXTS = ["green cloud", "so, happy", "déjà vu", "paper stone", "quiet lamp", "orange train"]
LABELS = ["up", "down"] * 3
FRAME = pd.DataFrame(
    {"id": [f"s{n}" for n in range(6)], "text": TEXTS, "image": [f"{n}.png" for n in range(6)], "label": LABELS}
)


def photos(folder: Path = Path()) -> None:
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 90, 200 - 30 * number)).save(folder / f"{number}.png")


def with_lists() -> None:
    data = Path("tweets/data")
    data.mkdir(parents=True)
    photos(data)
    for number, text in enumerate(TEXTS):
        (data / f"{number}.txt").write_text(text)
    Path("tweets/train.txt").write_text("guid,tag\n" + "".join(f"{n},{label}\n" for n, label in enumerate(LABELS)))


def table(name: str, frame: pd.DataFrame = FRAME, **options: object) -> Callable[[], None]:
    def write() -> None:
        photos()
        frame.to_csv(name, index=False, **options)

    return write


def text(name: str, lines: list[str], **options: str) -> Callable[[], None]:
    def write() -> None:
        photos()
        Path(name).write_text("\n".join(lines) + "\n", **options)

    return write


def shards() -> None:
    Path("shards").mkdir()
    photos(Path("shards"))
    for number in range(2):
        part = FRAME.iloc[3 * number : 3 * number + 3]
        pq.write_table(pa.Table.from_pandas(part, preserve_index=False), f"shards/part-{number}.parquet")


def mvsa() -> None:
    with_lists()
    Path("tweets").rename("MVSA_Single")
    lines = "".join(f"{n}\t{'positive' if label == 'up' else 'negative'},neutral\n" for n, label in enumerate(LABELS))
    Path("MVSA_Single/train.txt").unlink()
    Path("MVSA_Single/labelResultAll.txt").write_text("ID\ttext,image\n" + lines)


def genres() -> None:
    photos()
    FRAME.assign(label=[["Drama"], ["Drama", "Comedy"]] * 3).to_json("genres.jsonl", orient="records", lines=True)


def split_files() -> None:
    Path("parts").mkdir()
    photos(Path("parts"))
    FRAME.iloc[:4].to_parquet("parts/train-0.parquet")
    FRAME.iloc[4:].to_parquet("parts/validation-0.parquet")


def two_files() -> None:
    table("first.csv", FRAME.iloc[:3])()
    table("second.csv", FRAME.iloc[3:])()


def parquet() -> None:
    photos()
    FRAME.to_parquet("tweets.parquet")


def excel() -> None:
    photos()
    FRAME.to_excel("tweets.xlsx", index=False)


def train_and_test() -> None:
    table("train.csv")()
    table("test.csv", FRAME.drop(columns="label"))()


def by_root() -> None:
    Path("photos/pics").mkdir(parents=True)
    photos(Path("photos/pics"))
    Path("lists").mkdir()
    FRAME.assign(image="pics/" + FRAME["image"]).to_csv("lists/train.csv", index=False)


def by_id() -> None:
    Path("pics").mkdir()
    photos()
    for number in range(6):
        Path(f"{number}.png").rename(f"pics/s{number}.png")
    FRAME.drop(columns="image").to_csv("byid.csv", index=False)


def paths() -> None:
    Path("my pics").mkdir()
    photos(Path("my pics"))
    here = Path("my pics").absolute().as_uri()
    names = ["my pics\\0.png", f"{here}/1.png", "my%20pics/2.png", " my pics/3.png ", "my pics/4.PNG", "my pics/5"]
    FRAME.assign(image=names).to_csv("paths.csv", index=False)


def contents() -> list[bytes]:
    photos()
    return [Path(name).read_bytes() for name in FRAME["image"]]


def held() -> None:
    images = [{"bytes": data, "path": name} for data, name in zip(contents(), FRAME["image"], strict=True)]
    FRAME.assign(image=images).to_parquet("held.parquet")


def encoded() -> None:
    images = [base64.b64encode(data).decode() for data in contents()]
    images[3:] = [f"data:image/png;base64,{text}" for text in images[3:]]
    FRAME.assign(image=images).to_json("base64.jsonl", orient="records", lines=True)


def several() -> None:
    photos()
    images = [[f"{n}.png", f"{(n + 1) % 6}.png"] if n % 2 else f"{n}.png;{(n + 1) % 6}.png" for n in range(6)]
    FRAME.assign(image=images).to_json("several.jsonl", orient="records", lines=True)


def files(folder: str, names: dict[str, str | None]) -> Callable[[], None]:
    """Write a photo for each name whose content is None, and a text for the others."""

    def write() -> None:
        for number, (name, content) in enumerate(names.items()):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                Image.new("RGB", (64, 64), (10 * number, 90, 200 - 10 * number)).save(path)
            else:
                path.write_text(content)

    return write


def packed(kind: str, folder: str, name: str, write: Callable[[], None]) -> Callable[[], None]:
    """Write a layout, and pack it into an archive."""

    def pack() -> None:
        write()
        shutil.make_archive(name, kind, folder)

    return pack


def saved(*splits: str) -> Callable[[], None]:
    """Save a data set of the library datasets, or one of several splits."""

    def save() -> None:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        photos()
        made = datasets.Dataset.from_pandas(FRAME.assign(image=[Path(name).read_bytes() for name in FRAME.image]))
        (datasets.DatasetDict(dict.fromkeys(splits, made)) if splits else made).save_to_disk("pets")

    return save


PHOTOS: dict[str, str | None] = {f"{n}.png": None for n in range(6)}
PETS: dict[str, str | None] = {f"{LABELS[n]}/{n}.png": None for n in range(6)}
SPLIT = {f"{part}/{name}": None for part in ("train", "test") for name in PETS}
BESIDE = {
    f"{n}.{kind}": content for n in range(6) for kind, content in (("png", None), ("txt", TEXTS[n]), ("cls", LABELS[n]))
}
FILMS = {f"{n}.json": json.dumps({"plot": TEXTS[n], "genre": LABELS[n], "title": "x"}) for n in range(6)} | PHOTOS
HUB = {"metadata.csv": FRAME.rename(columns={"image": "file_name"}).to_csv(index=False)} | PHOTOS
PARTS = ["train", "Training", "dev", "train", "val", "test"]
SHOP = FRAME.set_axis(["sku", "title", "photo", "category"], axis=1)
HALVES = FRAME.assign(title=[text.split()[0] for text in TEXTS], body=[text.split()[1] for text in TEXTS])
HALVES = HALVES.drop(columns="text")
PLAIN = ["\t".join((f"s{n}", '"' * (n == 2) + word, f"{n}.png", LABELS[n])) for n, word in enumerate(TEXTS)]
BUILDERS = {
    "a table to train on, one to predict": train_and_test,
    "a folder with lists": with_lists,
    "MVSA as published": mvsa,
    "class folders of photos": files("pets", PETS),
    "class folders to train on and to predict": files("pets", SPLIT),
    "class folders with validation data": files(
        "pets", {f"{'train' if n < 4 else 'val'}/{LABELS[n]}/{n}.png": None for n in range(6)}
    ),
    "a table that is split": table("tweets.csv", FRAME.assign(split=PARTS)),
    "a split under another name": table("faces.csv", FRAME.assign(usage=PARTS)),
    "a folder of tables named by parts": files(
        "shop",
        {
            "train.csv": FRAME.iloc[:4].to_csv(index=False),
            "val.csv": FRAME.iloc[4:].to_csv(index=False),
            "test.csv": FRAME.drop(columns="label").to_csv(index=False),
            **PHOTOS,
        },
    ),
    "files named by parts": split_files,
    "a folder of the Hub": files("hub", HUB),
    "photos with texts beside them": files("pairs", BESIDE),
    "photos with JSON beside them": files("films", FILMS),
    "shards of WebDataset": packed("tar", "shard", "train-000", files("shard", BESIDE)),
    "shards that are compressed": packed("gztar", "shard", "packed-000", files("shard", BESIDE)),
    "one of these layouts in an archive": packed("zip", "pets", "pets", files("pets", BESIDE)),
    "a table in an archive": packed("zip", "s", "shop", files("s", {"train.csv": FRAME.to_csv(index=False)} | PHOTOS)),
    "a data set of the Hub, or one that was saved to disk": saved(),
    "a split of it": saved("train", "test"),
    "a table with these names": table("tweets.csv"),
    "a table with other names": table("shop.csv", SHOP),
    "a text in several columns": table("halves.csv", HALVES),
    "numbers and categories": table("priced.csv", FRAME.assign(price=[9.5, 12, None, 3, 4, 5], brand=["a", "b"] * 3)),
    "names in capitals or with blanks": table("caps.csv", FRAME.set_axis(["Id", " Text", " Image", " Label"], axis=1)),
    "columns without a name, of a spreadsheet": text(
        "sheet.csv",
        [",id,text,image,label,,", *(f'{n},s{n},"{word}",{n}.png,up,,' for n, word in enumerate(TEXTS))],
    ),
    "a table without ids": table("noid.csv", FRAME.drop(columns="id")),
    "a table without a header": table("titles.csv", FRAME[["image", "text", "label"]], header=False),
    "tabs, pipes or semicolons": table("table.txt", sep="|"),
    "a delimiter of your own": table("odd.csv", sep="~"),
    "a table that was written without quoting": text("plain.tsv", ["id\ttext\timage\tlabel", *PLAIN]),
    "quotes that enclose nothing, for sure": table("plain.csv", FRAME.replace("so, happy", "so happy")),
    "JSON lines": lambda: (photos(), FRAME.to_json("tweets.jsonl", orient="records", lines=True)),
    "a JSON array, or an object that holds it": lambda: (photos(), FRAME.to_json("tweets.json", orient="records")),
    "Parquet, Feather, Arrow": parquet,
    "Excel": excel,
    "a compressed table": table("tweets.csv.gz"),
    "a folder of shards": shards,
    "some of the files": shards,
    "files with different names": two_files,
    "texts that are not UTF-8": table("western.csv", encoding="cp1252"),
    "texts in an encoding that you know": table("dos.csv", encoding="cp850"),
    "photos in another folder": by_root,
    "photos named by id": by_id,
    "paths of Windows, of URLs, with blanks": paths,
    "photos inside the table": held,
    "photos as base64": encoded,
    "several classes a sample": genres,
    "several photos a sample": several,
    "several photos, of which the first counts": several,
    "a class called none": table("stance.csv", FRAME.replace("down", "none")),
}

WITH_A_SPLIT = [
    "class folders with validation data", "a table that is split", "a split under another name", "files named by parts",
    "a folder of tables named by parts",
]  # fmt: skip


def read_latest() -> SampleSet:
    """The samples as the request of the extraction records them."""
    (request,) = (json.loads(path.read_text()) for path in Path("cache/requests").glob("*.json"))
    return read_samples(request["data"], request["columns"])


@pytest.mark.parametrize("have", ROWS)
def test_each_row_of_the_table_runs(have: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    BUILDERS[have]()
    typed = ["extract", "--encoders", "hashing,hog", "--data", *ROWS[have].replace("'", "").split(" ")]
    answer = CliRunner().invoke(app, typed)
    assert answer.exit_code == 0, answer.output
    assert ": 6 samples, 6 labelled" in answer.stdout
    samples = read_latest()
    assert ("split of the data: train" in answer.stdout) == (have in WITH_A_SPLIT)
    if "class folders" in have:
        assert sorted(str(sample.label) for sample in samples) == sorted(LABELS)
        return
    plain = [(sample.text or "").strip('"').replace(",", "").replace("\n", " ") for sample in samples]
    assert plain == [words.replace(",", "") for words in TEXTS]
    assert all(sample.image is not None for sample in samples)


def test_every_layout_is_built() -> None:
    assert set(ROWS) == set(BUILDERS)
