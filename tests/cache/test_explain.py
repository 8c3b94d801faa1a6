"""Why a sample is a hit or a miss, in words that name the field, the folder and the way out."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from mmfeat.cache.explain import Explanation, explain_sample
from mmfeat.cache.shard import read_ids
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import DataError
from mmfeat.extraction.extract import Extraction, extract_features
from mmfeat.samples.dataset import SampleSet, read_samples
from tests.cache.shards import POOLED_SPEC, SAMPLES, rows

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


@pytest.fixture(scope="module")
def source(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo extracted once: a folder with `demo` and `cache`."""
    folder = tmp_path_factory.mktemp("explain")
    shutil.copytree(demo_folder, folder / "demo")
    extract_features(folder / "demo", ["hashing", "hog"], cache=folder / "cache", options=FLOAT32)
    return folder


@pytest.fixture
def data(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path / "demo"


@pytest.fixture
def specs(source: Path) -> list[EncoderSpec]:
    return [tower.spec for tower in describe_encoders(["hashing", "hog"], FLOAT32)]


def explain(data: Path, id: str, specs: list[EncoderSpec]) -> list[Explanation]:
    return explain_sample(data.parent / "cache", read_samples(data), id, specs)


def test_a_hit_names_file_row_and_the_first_sample(data: Path, specs: list[EncoderSpec]) -> None:
    for found, spec in zip(explain(data, "1000", specs), specs, strict=True):
        assert (found.encoder, found.outcome) == (spec.name, "hit")
        (line,) = found.reasons
        row, path = re.match(r"row (\d+) of (\S+), first computed for 1000$", line).groups()  # type: ignore[union-attr]
        assert Path(path).parent.name == spec.folder_name
        assert read_ids(Path(path))[int(row)] == b"1000"


def test_an_equal_text_is_a_hit_that_another_sample_paid_for(data: Path, specs: list[EncoderSpec]) -> None:
    (data / "data" / "1000.txt").write_bytes((data / "data" / "1001.txt").read_bytes())
    found = explain(data, "1000", specs[:1])[0]
    assert found.outcome == "hit"
    assert found.reasons[0].endswith("first computed for 1001")


def test_an_edited_caption_is_a_miss_that_says_so(data: Path, specs: list[EncoderSpec]) -> None:
    before = read_samples(data).samples
    was = next(sample for sample in before if sample.id == "1000").key("text")[0]
    (data / "data" / "1000.txt").write_text("a caption that nobody else has")
    text, photo = explain(data, "1000", specs)
    now = next(sample for sample in read_samples(data) if sample.id == "1000").key("text")[0]
    assert was is not None
    assert now is not None
    assert photo.outcome == "hit"
    assert text.outcome == "miss"
    change = f"stored was {was.decode()[:12]}..., now it is {now.decode()[:12]}... (SHA-256)"
    expected = f"its text changed (or another data set of this name has the id): {change}"
    assert text.reasons == (expected,)


def test_a_new_sample_is_a_miss_among_so_many(data: Path, specs: list[EncoderSpec]) -> None:
    with (data / "train.txt").open("a") as lists:
        lists.write("new,positive\n")
    (data / "data" / "new.txt").write_text("never seen")
    text, photo = explain(data, "new", specs)
    assert text == Explanation("hashing", "miss", ("this text is not among the 115 that are stored",))
    assert photo == Explanation("hog", "masked", ("no image file: nothing to encode",))


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("cleaning", "none", "cleaning: there tweet, asked for none (--cleaning)"),
        ("max_length", 9, "max_length: there 0, asked for 9"),
        ("variant", "large", "variant: there nothing, asked for large (--encoders)"),
    ],
)
def test_a_changed_field_is_named_with_both_values(
    data: Path, specs: list[EncoderSpec], field: str, value: object, line: str
) -> None:
    asked = dataclasses.replace(specs[0], **{field: value})
    (found,) = explain(data, "1000", [asked])
    assert found.outcome == "miss"
    assert found.reasons == (
        f"no shard of this encoder in {data.parent / 'cache' / 'demo' / asked.folder_name}",
        f"nearest is {specs[0].folder_name}, which has this text; it differs in",
        f"  {line}",
    )


def test_the_nearest_folder_differs_least_and_is_of_the_same_encoder(data: Path, specs: list[EncoderSpec]) -> None:
    extract_features(
        data, ["hashing"], cache=data.parent / "cache", options=dataclasses.replace(FLOAT32, cleaning="none")
    )
    asked = dataclasses.replace(specs[0], cleaning="none", max_length=5)
    nearest = dataclasses.replace(specs[0], cleaning="none")
    reasons = explain(data, "1000", [asked])[0].reasons
    assert reasons[1:] == (
        f"nearest is {nearest.folder_name}, which has this text; it differs in",
        "  max_length: there 0, asked for 5",
    )
    stranger = dataclasses.replace(specs[0], family="bert")
    assert len(explain(data, "1000", [stranger])[0].reasons) == 1


def test_of_long_values_the_part_that_differs_is_shown(tmp_path: Path) -> None:
    """What turns a photo into numbers is long, and differs somewhere in it."""
    long = ",".join(f"step {number}" for number in range(40))
    stored = dataclasses.replace(POOLED_SPEC, preprocessing=f'{{"steps":"{long},224,{long}","size":[224,224]}}')
    with Cache(tmp_path, "set").writer(stored, {}) as writer:
        writer.add(rows(stored))
    asked = dataclasses.replace(stored, preprocessing=stored.preprocessing.replace("224,", "336,"))
    (found,) = explain_sample(tmp_path, SampleSet("set", "set", tuple(SAMPLES)), "s1", [asked])
    line, size = found.reasons[2:]
    assert re.match(r"  steps: there \.\.\..*,224,.*\.\.\., asked for .*,336,", line)
    assert len(line) < 170
    assert size == "  size: there [224, 224], asked for [336, 224] (--image-size)"


def test_a_failed_row_tells_its_error(data: Path, specs: list[EncoderSpec]) -> None:
    text, photo = explain(data, "1003", specs)
    assert text.outcome == "hit"
    assert photo.outcome == "failed"
    (reason,) = photo.reasons
    assert reason.startswith("broken image: image file is truncated (row ")


def test_a_missing_part_is_masked(data: Path, specs: list[EncoderSpec]) -> None:
    lacking = next(sample.id for sample in read_samples(data) if sample.text is None)
    assert explain(data, lacking, specs)[0] == Explanation("hashing", "masked", ("no text file: nothing to encode",))


def test_an_unknown_id_is_one_line_with_those_like_it(data: Path, specs: list[EncoderSpec]) -> None:
    with pytest.raises(DataError, match=r"^\S+demo: no sample '10000'; did you mean 1000(, \d+){0,2}$"):
        explain(data, "10000", specs)
    with pytest.raises(DataError, match="no sample 'zzz'; check the id"):
        explain(data, "zzz", specs)


def test_without_a_cache_everything_is_a_miss(data: Path, specs: list[EncoderSpec]) -> None:
    found = explain_sample(data.parent / "nowhere", read_samples(data), "1000", specs)
    assert [one.outcome for one in found] == ["miss", "miss"]
    assert all(one.reasons[0].startswith("no shard of this encoder in ") for one in found)
    assert not (data.parent / "nowhere").exists()


def test_what_is_said_is_what_the_extraction_does(data: Path, specs: list[EncoderSpec]) -> None:
    (data / "data" / "1000.txt").write_text("one")
    (data / "data" / "1001.txt").write_text("two")
    samples = read_samples(data)
    said = [explain(data, sample.id, specs[:1])[0].outcome for sample in samples]
    assert said.count("miss") == 2
    done: Extraction = extract_features(data, ["hashing"], cache=data.parent / "cache", options=FLOAT32)
    assert list(done.new.values()) == [2]
    assert {explain(data, sample.id, specs[:1])[0].outcome for sample in samples} == {"hit", "masked"}
