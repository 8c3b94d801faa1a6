"""The forecast: what it says is missing is what an extraction then makes, and it writes nothing."""

from __future__ import annotations

import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mmfeat.cli.console import out
from mmfeat.cli.extract import show_forecast
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.forecast import Forecast, Forecasts, forecast_extraction
from mmfeat.samples.rows import Overview
from mmfeat.system.wording import Advance, Silent, duration, size_of

OPTIONS = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "clip=tokens"), views=1)


@pytest.fixture
def data(demo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path / "demo"))


def missing(found: Forecasts) -> dict[str, int]:
    return {spec.folder_name: count for each in found.encoders for spec, count, _ in each.outputs if count}


def test_it_foretells_what_is_made(data: Path, tmp_path: Path, tiny_clip: Path) -> None:
    asked, cache = ["hashing", f"clip:{tiny_clip}"], tmp_path / "cache"
    before = forecast_extraction(data, asked, cache=cache, options=OPTIONS)
    assert not list(tmp_path.rglob("*.h5"))
    assert not cache.exists()
    extract_features(data, ["hashing"], cache=cache)
    tree = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    half = forecast_extraction(data, asked, cache=cache, options=OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == tree
    assert {each.model.split(":")[0] for each in half.encoders} == {"clip.text", "clip.image"}
    made = extract_features(data, asked, cache=cache, options=OPTIONS)
    written = {name: count for name, count in (made.new + made.unreadable).items() if count}
    assert missing(half) == written
    assert {name for name in missing(before) if name not in written} == {"hashing-bab0e679"}
    assert missing(before).items() >= written.items()
    assert all(each.rate > 0 and each.seconds > 0 for each in before.encoders)
    after = forecast_extraction(data, asked, cache=cache, options=OPTIONS)
    assert after.encoders == ()


def test_its_bytes_are_those_on_disk(data: Path, tmp_path: Path, tiny_clip: Path) -> None:
    cache = tmp_path / "cache"
    found = forecast_extraction(data, [f"clip:{tiny_clip}"], cache=cache, options=OPTIONS)
    extract_features(data, [f"clip:{tiny_clip}"], cache=cache, options=OPTIONS)
    for each in found.encoders:
        for spec, _, foretold in each.outputs:
            size = sum(file.stat().st_size for file in (cache / "demo" / spec.folder_name).glob("*.h5"))
            assert abs(size - foretold) < 0.25 * size + 8192, spec.name


def test_an_encoder_that_few_samples_lack_is_tried_too(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,text\n" + "".join(f"s{n},text {n}\n" for n in range(3000)))
    extract_features(table, ["hashing"], cache=tmp_path / "cache")
    table.write_text("id,text\n" + "".join(f"s{n},text {n}\n" for n in range(3010)))
    found = forecast_extraction(table, ["hashing"], cache=tmp_path / "cache")
    (each,) = found.encoders
    assert each.missing == 10
    assert 0 < each.rate < float("inf")
    assert 10 * 16_384 < each.outputs[0][2] < 10 * 16_384 + 50_000


def test_what_it_says(data: Path, tmp_path: Path) -> None:
    with out.capture() as printed:
        show_forecast(forecast_extraction(data, ["hashing", "hog"], cache=tmp_path / "cache"))
    text = printed.get()
    assert "demo: 120 samples" in text
    assert "hashing" in text
    assert re.search(r"hashing +pooled +1\d\d +[\d,.]+/s +[\d.]+ s +\d+", text)
    assert "nothing was written; next: the same command without --dry-run" in text
    extract_features(data, ["hashing"], cache=tmp_path / "cache")
    with out.capture() as printed:
        show_forecast(forecast_extraction(data, ["hashing"], cache=tmp_path / "cache"))
    assert "nothing to do: every vector is in" in printed.get()


def test_names_are_not_cut() -> None:
    spec = describe_encoders(["hog"], EncoderOptions(dtype="float32", cleaning="tweet"))[0].spec
    model = "timm:" + "a-name-that-goes-on" * 5
    found = Forecasts(Overview("t", "t.csv", 3, {}), Path("cache"), (Forecast(model, 3, 1, 3, ((spec, 3, 9),)),), 0, 9)
    with out.capture() as printed:
        show_forecast(found)
    assert any(line.split()[:2] == [model, "pooled"] for line in printed.get().splitlines())


def test_what_hog_does_is_encoding(data: Path, tmp_path: Path) -> None:
    """Its rate is that of its own work, which takes longer than decoding these small pictures; it is tried on a few."""
    steps: list[tuple[str, int | None]] = []

    class Noted(Silent):
        def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
            steps.append((title, total))
            return super().step(title, total)

    found = forecast_extraction(data, ["hog"], cache=tmp_path / "cache", progress=Noted())
    (each,) = found.encoders
    assert each.seconds > found.reading > 0
    assert each.seconds == pytest.approx(each.missing / each.rate)
    assert dict(steps)["try images"] == each.missing // 4


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.21, "3.2 s"), (150, "2.5 min"), (7300, "2.0 h"), (400_000, "4.6 days")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("count", "words"), [(12, "12 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3e9, "3.0 GB")])
def test_sizes(count: int, words: str) -> None:
    assert size_of(int(count)) == words
