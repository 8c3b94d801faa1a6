"""The reader: processes give what threads give, one decode serves all, a killed process costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import Encoder, EncoderOptions
from mmfeat.errors import DataError
from mmfeat.extraction import reader
from mmfeat.extraction.encode import Batcher, start_block
from mmfeat.extraction.missing import Item
from mmfeat.extraction.reader import Prepared, Reader, prefetch, prepare, recipe_of
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.photos import Decoding, decode_image
from tests.encoders.tiny_models import change_json, write_clip

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Forty small photos, one of them broken and one that is gone."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(40):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(rng.integers(0, 256, (70 + number, 90, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    paths[5].write_bytes(b"no photo")
    paths[11].unlink()
    return paths


def items_of(paths: list[Path], encoders: list[Encoder]) -> list[Item]:
    names = frozenset(name for encoder in encoders for name in encoder.fingerprints)
    return [Item(Sample(path.stem, image=path), "image", b"planned", names) for path in paths]


def load(requests: list[str], **options: object) -> list[Encoder]:
    return load_encoders(
        describe_encoders(requests, EncoderOptions(dtype="float32", cleaning="tweet", **options)), "cpu"
    )  # type: ignore[arg-type]


def plain(prepared: list[Prepared]) -> list[tuple[str, bytes, dict[int, list[float]], dict[int, str]]]:
    """All but the seconds."""
    return [
        (p.item.sample.id, p.key, {n: np.asarray(v).ravel().tolist() for n, v in p.inputs.items()}, dict(p.errors))
        for p in prepared
    ]


def test_processes_give_what_threads_give(
    photos: list[Path], tiny_clip: Path, tiny_timm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [e for e in load([f"clip:{tiny_clip}", f"timm:{tiny_timm}", "hog"], views=1) if e.modality == "image"]
    items = items_of(photos, encoders)
    threads = list(Reader(encoders, workers=2).read(items, ahead=16))
    monkeypatch.setattr(reader, "PROCESSES_FROM", 1)
    monkeypatch.setattr(reader, "ThreadPoolExecutor", None)  # so nothing else can have done it
    processes = list(Reader(encoders, workers=2).read(items, ahead=16))
    assert plain(processes) == plain(threads)
    assert [p.item.sample.id for p in threads] == [path.stem for path in photos]
    assert set(threads[5].errors.values()) == {"not an image"}
    assert set(threads[11].errors.values()) == {"unreadable: No such file or directory"}
    assert threads[11].key == b""
    assert start_block([threads[11]], 0, Batcher(encoders[0], "cpu"))() == []  # what has no content is not remembered
    assert threads[0].key == content_key(photos[0].read_bytes())  # and not the one that it was planned with


def test_a_process_killed_in_the_middle_of_a_result_is_noticed(tmp_path: Path) -> None:
    killed = tmp_path / "killed"

    def work(number: int) -> int:
        if number == 3 and not killed.exists():
            killed.touch()
            Connection._send = half  # type: ignore[attr-defined]
        return number

    def half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), message[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    assert list(reader._in_order(work, range(8), partial(reader._processes, 2), 4)) == list(range(8))
    assert killed.exists()


def test_what_a_killed_process_had_is_done_again(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is killed while whoever reads is busy with what it has."""
    monkeypatch.setattr(reader, "PROCESSES_FROM", 1)
    (encoder,) = load(["hog"])
    items = items_of(photos * 20, [encoder])
    killed: list[int] = []

    def kill() -> None:
        while not (found := children()):
            time.sleep(0.01)
        time.sleep(0.3)
        killed.append(found[0])
        os.kill(found[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    prepared = []
    for number, entry in enumerate(Reader([encoder], workers=2).read(items, ahead=64)):
        prepared.append(entry)
        time.sleep(0.1 if number % 40 == 0 else 0)
    thread.join()
    assert killed
    assert [p.item.sample.id for p in prepared] == [item.sample.id for item in items]


def children() -> list[int]:
    """Reading processes of this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"popen_loky" in command:
            found.append(int(stat.parent.name))
    return found


ORPHANS = """
import os, time
from mmfeat.extraction import reader
print(reader._processes(2).submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_readers_go_when_whoever_reads_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reading = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{reading}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_processes_that_are_killed_again_and_again_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PROCESSES_FROM", 1)
    work = reader._in_order(deadly, range(3), lambda: reader._processes(1), ahead=2)
    with pytest.raises(DataError, match="killed 4 times; is memory short"):
        list(work)


def deadly(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_prefetch_keeps_order_and_bounds_memory() -> None:
    started = []

    def work(number: int) -> int:
        started.append(number)
        return number * number

    results = prefetch(work, range(100), threads=4, ahead=8)
    assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
    assert len(started) <= 10 + 8
    assert list(results) == [number * number for number in range(10, 100)]


@pytest.mark.parametrize("views", [0, 2])
def test_one_decode_serves_every_encoder_and_view(
    photos: list[Path], tiny_clip: Path, tiny_timm: Path, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [
        e for e in load(["hog", f"timm:{tiny_timm}", f"clip:{tiny_clip}"], views=views) if e.modality == "image"
    ]
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    (item,) = items_of(photos[:1], encoders)
    prepared = prepare(item, [recipe_of(encoder) for encoder in encoders])
    assert len(prepared.inputs) == 3 * (1 + views)
    assert len(opened) == 1


@pytest.fixture
def large_jpeg(tmp_path: Path) -> bytes:
    """1,600 x 1,200, as smooth as photos are."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    return (tmp_path / "large.jpg").read_bytes()


def test_a_draft_keeps_enough_pixels(large_jpeg: bytes) -> None:
    def size(draft: int) -> tuple[int, int]:
        picture, error = decode_image(large_jpeg, Decoding(draft))
        assert picture is not None, error
        return picture.size

    assert size(0) == size(1200) == size(5000) == (1600, 1200)
    assert size(600) == (800, 600)
    assert size(500) == (800, 600)  # a quarter would have fewer
    assert size(300) == (400, 300)
    assert size(1) == (200, 150)  # an eighth is the least


def test_a_draft_is_part_of_the_spec_and_changes_vectors_little(
    large_jpeg: bytes, tiny_clip: Path, tmp_path: Path
) -> None:
    plain_tower, draft_tower = (
        describe_encoders([f"clip:{tiny_clip}"], EncoderOptions(dtype="float32", cleaning="tweet", draft=draft))
        for draft in (0, 64)
    )
    assert plain_tower[0].spec.fingerprint != draft_tower[0].spec.fingerprint
    assert plain_tower[1].spec == draft_tower[1].spec  # texts have none
    assert (draft_tower[0].spec.decoding.draft, draft_tower[0].spec.transform) == (64, plain_tower[0].spec.transform)
    vectors = []
    for tower in (plain_tower[0], draft_tower[0]):
        (encoder,) = load_encoders([tower], "cpu")
        item = Item(Sample("a", image=tmp_path / "large.jpg"), "image", b"", encoder.fingerprints)
        vectors.append(encoder.embed([prepare(item, [recipe_of(encoder)]).inputs[0]])[0][0])
    one, other = vectors
    assert not np.array_equal(one, other)
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.999


def test_known_transforms_are_taken_apart_and_others_called_as_they_are(
    tiny_clip: Path, tiny_timm: Path, write_odd_clip: Callable[[], Path]
) -> None:
    for request in (f"clip:{tiny_clip}", f"timm:{tiny_timm}"):
        (encoder,) = (e for e in load([request]) if e.modality == "image")
        assert encoder.light
        prepared = encoder.prepare(Image.new("RGB", (50, 40)))
        assert isinstance(prepared, np.ndarray)
        assert prepared.dtype == np.uint8
    (odd,) = (e for e in load([f"clip:{write_odd_clip()}"]) if e.modality == "image")
    assert not odd.light


@pytest.fixture
def write_odd_clip(tmp_path: Path) -> Callable[[], Path]:
    """A CLIP whose pictures are fitted into the square, not cropped."""

    def write() -> Path:
        folder = write_clip(tmp_path / "odd")
        change_json(folder / "open_clip_config.json", preprocess_cfg={"resize_mode": "longest"})
        return folder

    return write
