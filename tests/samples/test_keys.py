"""The stat index saves reading unchanged files and is never believed about changed ones."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mmfeat.samples.keys as indexing
from mmfeat.cache.store import Cache
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.keys import DIGEST_BYTES, ENTRY, StatIndex, content_keys

COUNT = 12
FOLDERS = 18
NAMES = ["0.png", "1 1.png", "二.png", "Ünï.png", "4\n.png", os.fsdecode(b"\xff5.png")]


def paths(folder: Path) -> list[Path]:
    return [folder / (NAMES[n] if n < len(NAMES) else f"{n}.png") for n in range(COUNT)]


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of files that lie long enough for their times to mean something; one wait for all tests."""
    made = [tmp_path_factory.mktemp("settled") for _ in range(FOLDERS)]
    for folder in made:
        for number, path in enumerate([*paths(folder), folder / "other.txt"]):
            path.write_bytes(f"content {number:03}".encode())
            os.utime(path, ns=(10**18, 10**18))
    time.sleep(indexing.RACY_SECONDS + 0.1)
    return iter(made)


@pytest.fixture
def data(settled: Iterator[Path]) -> Path:
    return next(settled)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path / "cache", "set")
    cache.create()
    return cache


def index_file(cache: Cache) -> Path:
    return cache.folder / "images.index"


def known(cache: Cache) -> int:
    return len(StatIndex(index_file(cache)))


def samples(files: list[Path]) -> list[Sample]:
    return [Sample("none", image_error="no image file"), *(Sample(path.name, image=path) for path in files)]


def check(cache: Cache, files: list[Path]) -> None:
    """The keys are those of plain hashing."""
    found, plain = cache.content_keys(samples(files), "image"), content_keys(samples(files), "image")
    assert found.keys.tolist() == plain.keys.tolist()
    assert found.present.tolist() == plain.present.tolist() == [False, *(path.is_file() for path in files)]
    assert found.reasons == plain.reasons


READ = """
import os, sys
from pathlib import Path
from mmfeat.cache.store import Cache
from mmfeat.samples.dataset import Sample
opened = []
sys.addaudithook(lambda event, found: opened.append(os.fsdecode(found[0])) if event == "open" else None)
folder = os.fsencode(sys.argv[2])
names = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
samples = [Sample(str(n), image=Path(os.fsdecode(name))) for n, name in enumerate(names)]
keys = Cache(sys.argv[1], "set").content_keys(samples, "image").keys
print(sum(str(path).startswith(sys.argv[2] + "/") for path in opened), b"".join(keys.tolist()).decode())
"""


def opens(cache: Cache, data: Path) -> int:
    """How many of the files are opened to take all keys, which are right."""
    answer = subprocess.run(
        [sys.executable, "-c", READ, str(cache.folder.parent), str(data)], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    count, keys = answer.stdout.split()
    ordered = [os.path.join(os.fsencode(data), name) for name in sorted(os.listdir(os.fsencode(data)))]
    assert keys == b"".join(content_key(Path(os.fsdecode(path)).read_bytes()) for path in ordered).decode()
    return int(count)


def test_unchanged_files_are_not_read_again(cache: Cache, data: Path) -> None:
    (data / "link.png").symlink_to(data / "8.png")
    assert opens(cache, data) == COUNT + 2
    assert opens(cache, data) == 0
    (data / "8.png").write_bytes(b"content 0x8")  # of the same size
    assert opens(cache, data) == 2
    index_file(cache).unlink()
    assert opens(cache, data) == COUNT + 2


def test_fresh_files_are_never_trusted(cache: Cache, tmp_path: Path) -> None:
    """A file that changed in the clock tick in which it was hashed looks the same ever after."""
    fresh = tmp_path / "fresh.png"
    for number in range(100):
        fresh.write_bytes(f"content {number:03}".encode())
        os.utime(fresh, ns=(10**18, 10**18))  # an old date alone settles nothing
        check(cache, [fresh])
        assert known(cache) == 0


def test_a_known_file_that_changes_is_read_again(cache: Cache, data: Path) -> None:
    files = paths(data)
    check(cache, files)
    assert known(cache) == COUNT
    for path in files[:6]:
        before = path.stat()
        path.write_bytes(path.read_bytes()[::-1])
        if path in files[:3]:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    files[6].write_bytes(b"longer than before")
    files[7].unlink()
    check(cache, files)


def test_a_file_put_in_the_place_of_another_with_its_old_date_is_read(cache: Cache, data: Path) -> None:
    """`cp -p`, `mv` and `rsync -a` keep the date; sizes are equal."""
    files, other = paths(data), data / "other.txt"
    check(cache, files)
    assert known(cache) == COUNT
    shutil.copy2(other, files[0])
    os.replace(shutil.copy2(other, data / "aside"), files[1])
    os.rename(files[2], data / "aside")  # two known files change places
    os.rename(files[3], files[2])
    os.rename(data / "aside", files[3])
    for path in files:
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (11, 10**18)
    check(cache, files)


def test_a_file_that_moved_or_was_copied_has_its_own_entry(cache: Cache, data: Path, tmp_path: Path) -> None:
    check(cache, paths(data))
    copied = Path(shutil.copytree(data, tmp_path / "copied"))
    moved = Path(shutil.move(data, tmp_path / "moved"))
    (copied / "9.png").write_bytes(b"content 0x9")
    renamed = (moved / "8.png").rename(moved / "renamed.png")
    for folder in (data, copied, moved):
        check(cache, [*paths(folder), renamed])


def test_two_paths_of_one_file(cache: Cache, data: Path) -> None:
    one, two = paths(data)[0], data / "link.png"
    os.link(one, two)
    for content in (b"content 000", b"content 0y0", b"content 0z0"):
        with two.open("r+b") as file:  # in place, so both change
            file.write(content)
        check(cache, [one, two, one])


def test_symlinks_are_what_they_point_to(cache: Cache, data: Path) -> None:
    one, two, link = data / "8.png", data / "9.png", data / "link.png"
    link.symlink_to(one)
    check(cache, [link, one])
    assert known(cache) == 2
    link.unlink()
    link.symlink_to(two)
    check(cache, [link])
    two.write_bytes(b"content 0y9")
    check(cache, [link])
    two.unlink()
    check(cache, [link, one])


def test_a_damaged_index_counts_as_absent(cache: Cache, data: Path) -> None:
    check(cache, paths(data))
    whole = index_file(cache).read_bytes()
    assert len(whole) == DIGEST_BYTES + COUNT * ENTRY.itemsize
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 37)]
    cut = [whole[:size] for size in (0, 5, DIGEST_BYTES, DIGEST_BYTES + ENTRY.itemsize, len(whole) - 1)]
    for damaged in (*flipped, *cut, whole + b"x", whole + whole, bytes(len(whole)), b"not an index"):
        index_file(cache).write_bytes(damaged)
        assert known(cache) == 0
        check(cache, paths(data))
        assert index_file(cache).read_bytes() == whole


def test_a_changed_file_replaces_its_entry(cache: Cache, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "RACY_SECONDS", 0.03)
    check(cache, paths(data))
    size = index_file(cache).stat().st_size
    for number in range(5):
        (data / "8.png").write_bytes(b"content %3d" % number)
        time.sleep(0.06)
        before = index_file(cache).read_bytes()
        check(cache, paths(data))
        assert index_file(cache).stat().st_size == size
        assert index_file(cache).read_bytes() != before


def test_reading_makes_no_cache(data: Path, tmp_path: Path) -> None:
    check(Cache(tmp_path / "absent", "set"), paths(data))
    assert list(tmp_path.iterdir()) == []


def test_the_working_folder_may_be_gone(cache: Cache, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "gone").mkdir()
    monkeypatch.chdir(data / "gone")
    (data / "gone").rmdir()
    check(cache, paths(data))


def test_an_index_that_cannot_be_written_is_done_without(cache: Cache, data: Path) -> None:
    (index_file(cache) / "in the way").mkdir(parents=True)
    for _ in range(2):
        check(cache, paths(data))
    assert [path.name for path in cache.folder.iterdir()] == ["images.index"]


@pytest.mark.parametrize("mode", [0o500, 0o300, 0o100])
def test_a_read_only_cache_is_no_error(cache: Cache, data: Path, mode: int) -> None:
    check(cache, paths(data)[:6])
    cache.folder.chmod(mode)
    try:
        if os.access(cache.folder, os.R_OK | os.W_OK):
            pytest.skip("whoever runs this may write anywhere")
        check(cache, paths(data))
    finally:
        cache.folder.chmod(0o700)


SAVE = """
import sys
from pathlib import Path
from mmfeat.cache.store import Cache
from mmfeat.samples.dataset import Sample
cache, half, *paths = sys.argv[1:]
files = paths[int(half)::2]
for n in range(60):
    part = files[: n % len(files) + 1]
    Cache(cache, "set").content_keys([Sample(str(k), image=Path(path)) for k, path in enumerate(part)], "image")
    if n % 7 == 0:
        (Path(cache) / "set" / "images.index").unlink(missing_ok=True)
"""


def test_two_that_save_at_once_lose_nothing_but_time(cache: Cache, data: Path) -> None:
    command = [sys.executable, "-c", SAVE, str(cache.folder.parent)]
    running = [subprocess.Popen([*command, half, *map(str, paths(data))]) for half in "01"]
    while any(process.poll() is None for process in running):
        check(cache, paths(data))
    assert [process.returncode for process in running] == [0, 0]
    check(cache, paths(data))
    assert known(cache) == COUNT
    assert [path.name for path in cache.folder.iterdir()] == ["images.index"]


INTERRUPT = """
import os, signal, sys, time
from pathlib import Path
from mmfeat.cache.store import Cache
from mmfeat.samples.dataset import Sample

def interrupt(event, found):
    if event == "open" and str(found[0]).endswith("8.png"):
        time.sleep(0.3)  # until the main thread waits for this very file
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
Cache(sys.argv[1], "set").content_keys([Sample(path, image=Path(path)) for path in sys.argv[2:]], "image")
"""


def test_an_interrupt_keeps_what_was_hashed(cache: Cache, data: Path) -> None:
    files = paths(data)
    command = [sys.executable, "-c", INTERRUPT, str(cache.folder.parent), *map(str, files)]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a job in the background ignores it
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=heed)
    assert process.returncode in (-signal.SIGINT, 130), process.stderr
    assert known(cache) == 8
    check(cache, files)
    assert known(cache) == COUNT


def edits(folder: Path, rng: random.Random) -> dict[str, Callable[[Path], object]]:
    """Ways to change, or seem to change, one file; most keep its size."""
    number = rng.randrange(10**6)

    def restored(path: Path) -> None:
        before = path.stat()
        path.write_bytes(b"%011d" % number)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def replaced(path: Path) -> None:
        shutil.copy2(path, folder / "new")
        restored(folder / "new")
        os.replace(folder / "new", path)

    def swapped(path: Path) -> None:
        other = rng.choice(sorted(folder.iterdir()))
        other.rename(folder / "aside")
        if path.exists():
            path.rename(other)
        (folder / "aside").rename(path)

    return {
        "same size": lambda path: path.write_bytes(b"%011d" % number),
        "other size": lambda path: path.write_bytes(b"x" * (number % 50)),
        "touch": Path.touch,
        "old date": lambda path: os.utime(path, ns=(10**18, 10**18)),
        "same size, same date": restored,
        "replaced, same date": replaced,
        "swapped": swapped,
        "deleted": Path.unlink,
        "copied": lambda path: shutil.copy2(path, folder / "99.png"),
    }


@pytest.mark.parametrize("seed", range(3))
def test_any_edits_give_what_plain_hashing_gives(
    cache: Cache, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a racy window of a few clock ticks, so that most files are known when they change."""
    monkeypatch.setattr(indexing, "RACY_SECONDS", 0.03)
    rng, folder = random.Random(seed), tmp_path / "files"
    folder.mkdir()
    files = [folder / f"{number}.png" for number in range(20)]
    for number, path in enumerate(files):
        path.write_bytes(b"%011d" % number)
    most = 0
    for _ in range(35):
        for _ in range(rng.choice((1, 1, 3))):
            path, choices = rng.choice(files), edits(folder, rng)
            kind = rng.choice(list(choices)) if path.exists() else "same size"
            choices[kind](path)
        if rng.random() < 0.4:
            time.sleep(0.05)
        check(cache, [*files, folder / "99.png"])
        most = max(most, known(cache))
    assert 15 <= most <= 21  # it was put to the test
