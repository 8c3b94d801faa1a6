"""Blocks: a list that is read piece by piece leaves the cache, the counts and the errors of one read at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import DataError
from mmfeat.extraction import extract, missing
from mmfeat.extraction.extract import Extraction, Extractor, ExtractSettings, extract_features, extract_samples
from mmfeat.extraction.missing import Planner
from mmfeat.samples.dataset import Sample, SampleSet, SampleSource, read_samples
from mmfeat.samples.rows import Overview
from mmfeat.system.wording import Silent

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


class Titles:
    """Notes what a person would see."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.notes: list[str] = []

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        self.seen.append((title, total))
        yield lambda steps, note="": self.notes.append(note)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Thirty samples; texts come again three, photos five samples later, beyond the end of a block."""
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    rows = [f"s{n},text {n % 20},{n % 5}.png,{'ab'[n % 2] if n % 3 else ''}" for n in range(30)]
    path = tmp_path / "table.csv"
    path.write_text("id,text,image,label\n" + "\n".join(rows) + "\n")
    return path


def stored(result: Extraction) -> dict[str, np.ndarray]:
    cache = Cache(result.folder.parent, result.folder.name)
    samples = read_samples(result.samples.source).samples
    return {b.name: b.vectors for b in cache.load(samples, [tower.spec for tower in result.towers]).blocks}


@pytest.mark.parametrize("size", [1, 7, 29])
def test_blocks_leave_what_one_leaves(table: Path, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = extract_features(table, ["hashing", "hog"], cache=tmp_path / "whole")
    monkeypatch.setattr(extract, "BLOCK", size)
    titles = Titles()
    found = extract_features(table, ["hashing", "hog"], cache=tmp_path / "blocks", progress=titles)
    assert (found.new, found.stored, found.unreadable) == (whole.new, whole.stored, whole.unreadable)
    assert sorted(found.new.values()) == [5, 20]  # each content once
    for name, vectors in stored(whole).items():
        np.testing.assert_array_equal(stored(found)[name], vectors)
    assert ("text: hashing (block 1 of " + f"{-(-30 // size)})", min(size, 20)) in titles.seen
    assert extract_features(table, ["hashing", "hog"], cache=tmp_path / "blocks").nothing_to_do


def test_a_note_says_where_the_time_goes(table: Path, tmp_path: Path) -> None:
    titles = Titles()
    found = extract_features(table, ["hog"], cache=tmp_path / "cache", progress=titles)
    assert any(note.startswith("read ") and " encode " in note and " write " in note for note in titles.notes)
    clocks = found.clocks["image"]
    assert clocks.decode > 0
    assert clocks.write > 0
    assert clocks.wall >= clocks.starved


def test_outputs_that_a_later_block_needs_come_from_the_same_pass(tmp_path: Path, tiny_clip: Path) -> None:
    """The first block lacks one output, the second both: the model is loaded once, with both."""
    towers = describe_encoders(
        [f"clip:{tiny_clip}"], EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "tokens"))
    )
    texts = {tower.spec.output: tower.spec.fingerprint for tower in towers if tower.spec.modality == "text"}
    with Extractor(towers, Cache(tmp_path / "cache", "table"), ExtractSettings("cpu")) as extractor:
        extractor.load({texts["pooled"]}, {"text": 1}, Silent(), whole=True)
        extractor.load(set(texts.values()), {"text": 1}, Silent(), whole=True)
        (batcher,) = extractor.encoders("text")
        assert batcher.encoder.fingerprints == set(texts.values())


def test_planning_ends_soon_after_it_is_stopped(table: Path, tmp_path: Path) -> None:
    rest = missing.Unseen()
    rest.stopped = True
    towers = describe_encoders(["hashing"], FLOAT32)
    with Planner([tower.spec for tower in towers], Cache(tmp_path, "table")) as planner, pytest.raises(CancelledError):
        planner.plan(read_samples(table).samples, rest)


def test_no_samples_are_no_error(tmp_path: Path) -> None:
    found = extract_samples(SampleSet("empty", "", ()), describe_encoders(["hashing"], FLOAT32), cache=tmp_path)
    assert found.nothing_to_do


def test_an_overview_counts_what_the_samples_are(table: Path, demo_folder: Path) -> None:
    for data in (table, demo_folder):
        assert SampleSource(data).overview() == Overview.of(read_samples(data))
        blocks = list(SampleSource(data).blocks(7))
        assert [len(block) for block in blocks[:-1]] == [7] * (len(blocks) - 1)
        assert tuple(sample for block in blocks for sample in block) == read_samples(data).samples


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_ids_that_come_twice_are_found_however_far_apart(tmp_path: Path, suffix: str) -> None:
    ids = [f"s{n}" for n in range(5000)] + ["s17"]
    lines = [f"{id},text" for id in ids] if suffix == "csv" else [f'{{"id": "{id}", "text": "t"}}' for id in ids]
    path = tmp_path / f"t.{suffix}"
    path.write_text("\n".join((["id,text"] if suffix == "csv" else []) + lines))
    first = 19 if suffix == "csv" else 18
    wanted = f"{path}:{first + 4983}: the id 's17' is already at {path}:{first}; remove or rename one of them"
    for read in (lambda: SampleSource(path).overview(), lambda: read_samples(path)):
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value) == wanted


def test_a_bad_row_far_down_is_told_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,text\n" + "".join(f"s{n},text\n" for n in range(3000)) + " ,text\n")
    with pytest.raises(DataError, match=r"t\.csv:3002: an id must be printable text"):
        extract_features(path, ["hashing"], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.h5"))
    assert not (tmp_path / "cache").exists()  # and `mmfeat heads` does not take it for the latest


def test_what_fails_in_one_block_after_another_is_remembered_once(tmp_path: Path) -> None:
    """As a worker of a cluster goes through its blocks, trying again what failed."""
    samples = [Sample(str(n), image=tmp_path / f"{n}.jpg") for n in range(2)]
    for n in range(2):
        (tmp_path / f"{n}.jpg").write_bytes(b"no photo %d" % n)
    towers, store = describe_encoders(["hog"], FLOAT32), Cache(tmp_path / "cache", "data")
    for retry, blocks in ((False, [samples]), (True, [samples[:1], samples[1:]])):
        with Extractor(towers, store, ExtractSettings("cpu", retry_failed=retry)) as extractor:
            for block in blocks:
                extractor.extract(block)
        assert len(store.row_index(towers[0].spec).keys) == 2


def test_a_long_text_file_is_decoded_line_by_line_across_its_pieces(tmp_path: Path) -> None:
    """Pieces of a megabyte; lines in two encodings; quoted cells with line ends inside."""
    rows = [f's{n},"first line\nsecond of {n} {"天" * 40}",a\r\n' for n in range(9000)]
    data = b"".join(row.encode("utf-8" if n % 2 else "gb18030") for n, row in enumerate(rows))
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text,label\n" + data)
    samples = read_samples(path)
    assert len(samples) == 9000
    assert all(s.text == f"first line\nsecond of {n} {'天' * 40}" for n, s in enumerate(samples))
    assert samples.encodings["gb18030"] == 4500
