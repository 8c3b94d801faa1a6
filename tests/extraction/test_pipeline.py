"""The pipeline: rows are committed however it ends, and the clocks name what the others wait for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.extraction.encode import BackgroundWriter
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.missing import Clocks
from mmfeat.samples.dataset import content_key
from mmfeat.system.locks import locked_folder

(TOWER,) = describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="tweet"))
FULL = """
import resource, signal, sys
import mmfeat.cache.store as writer
from mmfeat.cli.main import main
writer.SHARD_BYTES = {shard_bytes}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.argv = ["mmfeat", "extract", "--data", {data!r}, "--cache", {cache!r}, "--encoders", "hashing,hog"]
main()
"""


def rows(start: int, count: int = 10) -> Rows:
    keys = [content_key(str(number).encode()) for number in range(start, start + count)]
    return Rows(keys, [str(n) for n in range(count)], [""] * count, np.ones((count, 4), np.float32))


def writer_of(cache: Cache) -> BackgroundWriter:
    return BackgroundWriter(lambda fingerprint: cache.writer(TOWER.spec, {}))


def stored(cache: Cache) -> int:
    return len(cache.row_index(TOWER.spec).keys)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_what_was_handed_over_is_committed(tmp_path: Path, error: type[BaseException] | None) -> None:
    cache, clocks = Cache(tmp_path, "data"), Clocks()
    try:
        with writer_of(cache) as writer:
            writer.open(TOWER.spec.fingerprint)
            for start in range(0, 300, 10):
                writer.add(TOWER.spec.fingerprint, rows(start), clocks)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert stored(cache) == 300
    assert writer.counts == {TOWER.spec.fingerprint: (300, 0, 0)}
    assert clocks.write > 0  # the commit at the end counts, too


def test_an_interrupt_while_the_writer_is_waited_for_loses_nothing(tmp_path: Path) -> None:
    """Somebody else holds the folder for a second; meanwhile Ctrl-C comes."""
    cache = Cache(tmp_path, "data")
    folder = cache.spec_folder(TOWER.spec)
    folder.mkdir(parents=True)
    held = threading.Event()

    def hold() -> None:
        with locked_folder(folder):
            held.set()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=hold)

    def write() -> None:
        with writer_of(cache) as writer:
            writer.open(TOWER.spec.fingerprint)
            thread.start()
            held.wait()
            writer.add(TOWER.spec.fingerprint, rows(0), Clocks())

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train leaves one of its own
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert stored(cache) == 10


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_disk_that_refuses_is_one_line_and_keeps_what_was_committed(
    demo_folder: Path, tmp_path: Path, limit: int
) -> None:
    """No file may grow beyond a limit: the first shard fails, or the first of photos."""
    data = Path(shutil.copytree(demo_folder, tmp_path / "demo"))
    code = FULL.format(shard_bytes=1 << 30, limit=limit, data=str(data), cache=str(tmp_path / "cache"))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.strip().splitlines()[-1].startswith("mmfeat: ")
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    extract_features(data, ["hashing", "hog"], cache=tmp_path / "cache")
    assert extract_features(data, ["hashing", "hog"], cache=tmp_path / "cache").nothing_to_do


@pytest.mark.parametrize(
    ("clocks", "step"),
    [
        (Clocks(workers=2, read=1, decode=2, encode=9, starved=1, wall=10), "encode"),
        (Clocks(workers=2, read=1, decode=18, encode=4, starved=5, wall=10), "decode"),
        (Clocks(workers=2, read=15, decode=4, encode=4, starved=5, wall=10), "read"),
        (Clocks(workers=2, read=1, decode=4, encode=4, write=9, blocked=5, wall=10), "write"),
        (Clocks(), "encode"),
    ],
)
def test_the_step_that_others_wait_for_is_named(clocks: Clocks, step: str) -> None:
    assert clocks.bottleneck == step


def test_times_of_many_blocks_add_up() -> None:
    total = Clocks(0)
    for _ in range(100):
        total.add(Clocks(workers=2, read=0.1, decode=1, encode=4.9, starved=0.1, wall=5))
    assert total.bottleneck == "encode"
    assert str(total) == "read 1% decode 10% encode 98% write 0%"
