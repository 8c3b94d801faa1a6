"""The cache against the plain way, side by side: speed as ratios, memory, and faults survived. A ratio above 1 means
that the cache is faster. The sections `memory` and `index` need 20 GB of disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from table import Row, best, measured, timed

from mmfeat.cache.shard import Rows, Shard
from mmfeat.cache.store import Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.system.hardware import peak_memory

ROOT = Path(__file__).resolve().parent.parent
POOLED = EncoderSpec("hashing", "text", "", "builtin:1", "float32", "float16", cleaning="tweet")
TOKENS = replace(POOLED, output="tokens", pooling="none")


def section(name: str) -> Callable[[bool], Iterator[Row]]:
    """The function from `small`, which asks for a hundredth of everything, to the rows of a section."""

    def rows(small: bool) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as folder:
            yield from SECTIONS[name](Path(folder), 100 if small else 1)

    return rows


def load(folder: Path, part: int) -> Iterator[Row]:
    """A whole matrix into memory, checksums compared, against a copy of a mapped .npy file."""
    rows, width = 1_000_000 // part, 512
    vectors = random_vectors(rows, width)
    np.save(folder / "plain.npy", vectors)
    cache, keys, samples = filled(folder, POOLED, vectors)
    shuffled = np.random.default_rng(3).permutation(rows)
    shuffled_keys, shuffled_samples = taken(keys, shuffled), [samples[row] for row in shuffled]
    row_index = cache.row_index(POOLED)
    found, out = row_index.find(keys.keys), np.empty((rows, width), np.float16)
    (block,) = cache.load(shuffled_samples, [POOLED], {"text": shuffled_keys}).blocks
    assert np.array_equal(block.vectors, vectors[shuffled])

    def fresh() -> None:
        row_index.vectors(found, np.empty_like(out))

    ways = {
        "copy of the mapped .npy": lambda: np.array(np.load(folder / "plain.npy", mmap_mode="r")),
        "vectors, in file order": fresh,
        "the same, shuffled .npy": lambda: np.load(folder / "plain.npy", mmap_mode="r")[shuffled],
        "vectors, shuffled": lambda: row_index.vectors(found[shuffled], np.empty_like(out)),
        "Cache.load, keys and all": lambda: cache.load(samples, [POOLED], {"text": keys}),
    }
    seconds = best(ways)
    plain, ordered, plain_shuffled, ours_shuffled, whole = seconds.values()
    what = f"load {rows:,} x {width} float16"
    yield measured(f"{what}, in file order, against the mapped copy", plain / ordered, "x", least=0.9)
    yield measured(f"{what}, shuffled, against the mapped .npy indexed alike", plain_shuffled / ours_shuffled, "x")
    yield measured(f"{what}, Cache.load with opening, sorting and finding the keys", plain / whole, "x")


def scan(folder: Path, part: int) -> Iterator[Row]:
    """One pass over a matrix on disk, not copied, against the same pass over memory."""
    rows, width = 1_000_000 // part, 512
    vectors = random_vectors(rows, width)
    cache, _, _ = filled(folder, POOLED, vectors)
    weights = np.random.default_rng(4).standard_normal((width, 3)).astype(np.float32)
    shards = cache.shards(POOLED)
    logits = lambda block: (block.astype(np.float32) @ weights).sum(axis=0)  # noqa: E731
    largest = lambda block: block.view(np.uint64).max()  # noqa: E731
    for name, work in (("logits", logits), ("bare maximum", largest)):
        seconds = best(
            {
                "in memory": lambda work=work: [work(vectors[at : at + 4096]) for at in range(0, rows, 4096)],
                "first scan, all checked": lambda work=work: scan_all(fresh_shards(shards), work),
                "later scans": lambda work=work: scan_all(shards, work),
            }
        )
        memory, first, later = seconds.values()
        yield measured(f"scan, {name}, first", memory / first, "x", least=0.9 if name == "logits" else None)
        yield measured(f"scan, {name}, later", memory / later, "x", least=0.9)


def tokens(folder: Path, part: int) -> Iterator[Row]:
    """Random batches of a token cache, against numpy.memmap's take."""
    samples, length, width, batch = max(4_000 // part, 512), 50, 768, 256
    values = random_vectors(samples * length, width).reshape(samples, length, width)
    np.save(folder / "plain.npy", values)
    cache, keys, listed = filled(folder, TOKENS, list(values))
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    batches = np.random.default_rng(5).permutation(samples)[: samples // batch * batch].reshape(-1, batch)
    block = cache.map(listed, TOKENS, keys)
    assert np.array_equal(block.batch(batches[0])[0], values[batches[0]])
    seconds = best(
        {
            "memmap": lambda: [np.take(plain, rows, axis=0) for rows in batches],
            "first epoch, all checked": lambda: epoch(cache.map(listed, TOKENS, keys), batches),
            "later epochs": lambda: epoch(block, batches),
        }
    )
    memmap, first, later = seconds.values()
    yield measured("random batches of tokens, time against memmap's", later / memmap, "x", most=2.0)
    yield measured("the first epoch, with opening and all checksums, once", first / memmap, "x")


def write(folder: Path, part: int) -> Iterator[Row]:
    """Rows into fsynced shards with checksums, against the same bytes plainly written and fsynced."""
    for name, rows, shape in (("1 KB", 524_288, (512,)), ("8 KB", 65_536, (4096,)), ("77 KB", 6_991, (50, 768))):
        values = random_vectors(rows // part * (shape[0] if len(shape) > 1 else 1), shape[-1])
        spec = POOLED if len(shape) == 1 else TOKENS
        batches = [values.reshape(-1, *shape)[at : at + 256] for at in range(0, rows // part, 256)]
        keys = made_keys(rows // part)
        ready = [
            Rows(keys[256 * n : 256 * n + len(batch)], ["id"] * len(batch), [""] * len(batch), as_values(batch))
            for n, batch in enumerate(batches)
        ]
        seconds = best(
            {
                "plain file": lambda values=values: write_plainly(folder / "plain", values),
                "shards": lambda spec=spec, ready=ready: write_shards(folder, spec, ready),
            },
            between=lambda: clear(folder),
        )
        plain, sharded = seconds.values()
        yield measured(f"write rows of {name}, shards against the plain file", plain / sharded, "x", least=0.8)


def write_plainly(path: Path, values: np.ndarray) -> None:
    with open(path, "wb", buffering=0) as file:
        data = memoryview(values).cast("B")
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


def write_shards(folder: Path, spec: EncoderSpec, batches: list[Rows]) -> None:
    with Cache(folder, "set").writer(spec, {}) as writer:
        for batch in batches:
            writer.add(batch)


def as_values(batch: np.ndarray) -> np.ndarray | list[np.ndarray]:
    return batch if batch.ndim == 2 else list(batch)


def clear(folder: Path) -> None:
    (folder / "plain").unlink(missing_ok=True)
    shutil.rmtree(folder / "set", ignore_errors=True)


def memory(folder: Path, part: int) -> Iterator[Row]:
    """Most resident memory of processes that work on more than fits, mapped pages counted."""
    rows, width = 2_441_406 // part, 2048
    piece = random_vectors(min(rows, 50_000), width)
    with Cache(folder, "set").writer(POOLED, {}) as writer:
        for at in range(0, rows, len(piece)):
            count = min(len(piece), rows - at)
            keys = made_keys(count, at)
            writer.add(Rows(keys, ["id"] * count, [""] * count, piece[:count]))
    samples, length = 130_208 // part, 50
    with Cache(folder, "set").writer(TOKENS, {}) as writer:
        for at in range(0, samples, 500):
            count = min(500, samples - at)
            values = list(piece[: count * length, :768].reshape(count, length, 768))
            writer.add(Rows(made_keys(count, at), ["id"] * count, [""] * count, values))
    for name, code in MEMORY.items():
        process = subprocess.run(
            [sys.executable, __file__, name, str(folder), str(samples)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak, amount, seconds = map(float, process.stdout.split())
        yield measured(
            f"{name} {amount / 1e9:.1f} GB: most resident memory", peak / 1e9, "GB", most=1.0, note=f"{seconds:.1f} s"
        )
        assert callable(code)


def warm(folder: Path, part: int) -> Iterator[Row]:
    """`mmfeat extract` that finds nothing missing, as a process."""
    pairs = max(4_000 // part, 60)
    run("demo", "--out", "demo", "--pairs", str(pairs), cwd=folder)
    arguments = ("extract", "--data", "demo", "--encoders", "hashing,hog")
    run(*arguments, cwd=folder)
    time.sleep(2.1)  # entries of files this young are not trusted, so the first run notes none
    run(*arguments, cwd=folder)
    seconds = best({"warm": lambda: run(*arguments, cwd=folder)})["warm"]
    yield measured(f"extract of {pairs:,} cached samples", seconds, "s", most=2.0)


def index(folder: Path, part: int) -> Iterator[Row]:
    """The same for a table of a million pairs, each photo a file of its own."""
    rows = 1_000_000 // part
    (folder / "photos").mkdir()
    with open(folder / "table.csv", "w", encoding="utf-8") as table:
        table.write("id,text,image,label\n")
        for row in range(rows):
            path = f"photos/{row // 1000}/{row}.jpg"
            if row % 1000 == 0:
                (folder / "photos" / str(row // 1000)).mkdir()
            with open(folder / path, "wb") as photo:
                photo.write(b"photo %d" % row)
            table.write(f"s{row},text {row},{path},{'yes' if row % 2 else 'no'}\n")
    fill_as_if_extracted(folder)
    arguments = ("extract", "--data", "table.csv", "--encoders", "hashing,hog")
    run(*arguments, cwd=folder)
    second = timed(lambda: run(*arguments, cwd=folder))
    yield measured(f"extract of {rows:,} cached pairs, each photo a file", second, "s", most=20.0)


def faults(folder: Path, part: int) -> Iterator[Row]:
    """Kills, power losses, full disks, short writes, races and flipped bits: survived / tried, which must be equal."""
    sys.path.insert(0, str(ROOT))
    from tests.cache import faults as tests
    from tests.cache import power, syscalls

    if reason := syscalls.unavailable():
        yield Row("faults", f"none can be put between a process and the kernel: {reason}")
        return
    seeds = range(1 if part > 1 else 10)
    kinds: dict[str, Callable[[Path], tests.Tally]] = {
        "SIGKILL before each system call of any kind": tests.kills,
        "SIGKILL inside each call that changes a file": tests.kills_within,
        "SIGKILL around each call of a rerun after a kill": tests.kills_of_a_rerun,
        "no locks, no hard links": tests.poor_file_systems,
        "short writes": tests.short_writes,
        "power loss after a kill and a rerun": lambda place: tests.power_losses_after_a_rerun(place, "nothing"),
        "four writers race, two are killed": lambda place: tests.races(place, range(len(seeds) * 5)),
        "one bit flipped anywhere, found by verify": lambda place: flips(place, tests.Tally, len(seeds) * 50),
    }
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        kinds[f"{errno.errorcode[number]}, once"] = lambda place, n=number: tests.refusals(place, n, lasting=False)
        kinds[f"{errno.errorcode[number]}, from then on"] = lambda place, n=number: tests.refusals(
            place, n, lasting=True
        )
    for mode in power.MODES:
        chances = seeds if mode == "random" else (0,)
        kinds[f"power loss, {mode}"] = lambda place, m=mode, c=chances: tests.power_losses(place, m, c)
    for number, (name, kind) in enumerate(kinds.items()):
        place = folder / str(number)
        place.mkdir()
        tally = kind(place)
        yield measured(f"faults survived, {name}", tally.survived, f"of {tally.tried:,}", least=tally.tried)


def flips(folder: Path, tally: Callable[[int, list[str]], object], count: int) -> object:
    """Flip one bit at random places of a shard of some MiB, and see whether verification says so."""
    filled(folder, POOLED, random_vectors(3_000, 512))
    (path,) = folder.glob("set/*/*.h5")
    missed, chance = [], np.random.default_rng(8)
    for place in chance.integers(path.stat().st_size, size=count).tolist():
        flip(path, place)
        if verify_cache(folder).sound:
            missed.append(f"byte {place}")
        flip(path, place)
    return tally(count, missed)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def random_vectors(rows: int, width: int) -> np.ndarray:
    """A block of noise again and again: what the values are does not matter, that they are not zero does."""
    block = np.random.default_rng(1).standard_normal((min(rows, 20_000), width)).astype(np.float16)
    return np.concatenate([block] * -(-rows // len(block)))[:rows]


def made_keys(count: int, first: int = 0) -> list[bytes]:
    """Distinct keys that look like hashes."""
    numbers = (np.arange(first, first + count, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    return [b"%016x%016x" % (number, number) for number in numbers.tolist()]


def filled(folder: Path, spec: EncoderSpec, values: np.ndarray | list) -> tuple[Cache, ContentKeys, list[Sample]]:
    """A cache of these values, their keys and samples in order."""
    cache, keys = Cache(folder, "set"), made_keys(len(values))
    with cache.writer(spec, {}) as writer:
        for at in range(0, len(keys), 4096):
            count = len(keys[at : at + 4096])
            writer.add(Rows(keys[at : at + count], ["id"] * count, [""] * count, values[at : at + count]))
    present = np.ones(len(keys), bool)
    return cache, ContentKeys(np.array(keys), present, ("",) * len(keys)), [Sample(key.decode()) for key in keys]


def taken(keys: ContentKeys, rows: np.ndarray) -> ContentKeys:
    return ContentKeys(keys.keys[rows], keys.present[rows], keys.reasons)


def fresh_shards(shards: list[Shard]) -> list[Shard]:
    """The same shards, nothing of them checked yet."""
    return [replace(shard, checked=np.zeros_like(shard.checked)) for shard in shards]


def scan_all(shards: list[Shard], work: Callable[[np.ndarray], object]) -> None:
    from mmfeat.cache.reading import scan as scan_shard

    for shard in shards:
        for _, values in scan_shard(shard):
            work(values)


def epoch(block: object, batches: np.ndarray) -> None:
    for rows in batches:
        block.batch(rows)


def run(*arguments: str, cwd: Path, flags: tuple[str, ...] = ()) -> str:
    """Standard error of the command, which must succeed."""
    command = [sys.executable, *flags, "-m", "mmfeat", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stderr


def fill_as_if_extracted(folder: Path) -> None:
    """Vectors of the table's contents, without the hours that encoding them would take."""
    from mmfeat.encoders.registry import describe_encoders
    from mmfeat.encoders.spec import EncoderOptions
    from mmfeat.samples.dataset import read_samples

    samples = read_samples(folder / "table.csv")
    cache = Cache(folder / "cache", samples.name)
    for tower in describe_encoders(["hashing", "hog"], EncoderOptions(dtype="float32", cleaning="tweet")):
        with cache.writer(tower.spec, {}) as writer:
            for at in range(0, len(samples), 4096):
                part = samples.samples[at : at + 4096]
                keys = [sample.key(tower.spec.modality)[0] or b"" for sample in part]
                ids = [sample.id for sample in part]
                writer.add(Rows(keys, ids, [""] * len(part), random_vectors(len(part), 32).astype(np.float32)))


def measure(name: str, folder: str, samples: str) -> None:
    """In a process of its own: do the work, then print peak bytes, bytes that were read and seconds."""
    start = time.perf_counter()
    read = MEMORY[name](Cache(folder, "set"), int(samples))
    print(peak_memory(), read, time.perf_counter() - start)


def scan_everything(cache: Cache, _: int) -> int:
    return sum(int(np.isfinite(values).all()) * values.nbytes for _, values in cache.scan(POOLED))


def batches_of_everything(cache: Cache, samples: int) -> int:
    keys = np.array(made_keys(samples))
    found = ContentKeys(keys, np.ones(samples, bool), ("",) * samples)
    block = cache.map([Sample(str(number)) for number in range(samples)], TOKENS, found)
    order = np.random.default_rng(6).permutation(samples)
    return sum(block.batch(order[at : at + 256])[0].nbytes for at in range(0, samples, 256))


SECTIONS = {
    "load": load,
    "scan": scan,
    "tokens": tokens,
    "write": write,
    "memory": memory,
    "warm": warm,
    "index": index,
    "faults": faults,
}
MEMORY = {"scanning": scan_everything, "random batches of tokens,": batches_of_everything}

if __name__ == "__main__":
    measure(*sys.argv[1:])
