"""Damaged files: each is read, or refused in one line; none gives a raw error, a wrong value, a crash or a wait.

    python benchmarks/fuzz.py [--count 1500] [--seed 0] [KIND ...]

Tables of nine kinds, photos of six, packs of three, a graph of ONNX, and files of mmfeat's own (caches, runs, heads)
are cut, overwritten, filled and flipped at random. What is read of an own file must equal what the sound file gives, of
a graph within the tolerance of `--runtime`; a pack has no checksums. Exit code 1 where one did neither.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import feather, parquet

import mmfeat
from mmfeat.cache.store import INDEX_FILE, SPEC_FILE, Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.encoders.onnx_file import write_onnx
from mmfeat.encoders.runtime import OPENED, TOLERANCE, difference
from mmfeat.errors import CacheError, DataError, MmfeatError
from mmfeat.finetune import training
from mmfeat.runs.record import checksum
from mmfeat.runs.verdict import verdict
from mmfeat.samples.photos import decode_image
from mmfeat.sweep.search import Search
from mmfeat.sweep.trials import load_outcome
from mmfeat.system.wording import Silent

SECONDS = 10  # that one file may take
ODD = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b'"""\n', b",,,\n", b"\xef\xbb\xbf")


def tables() -> dict[str, bytes]:
    """Suffix -> a sound file with the same 30 rows."""
    rows = [{"id": str(n), "text": f'Tag {n}, "gut" ä', "label": "ab"[n % 2]} for n in range(30)]
    text, table = io.StringIO(), pyarrow.Table.from_pylist(rows)
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    lines, files = text.getvalue().encode(), {name: io.BytesIO() for name in ("parquet", "feather", "zip", "tar")}
    parquet.write_table(table, files["parquet"])
    feather.write_feather(table, files["feather"])
    with zipfile.ZipFile(files["zip"], "w") as archive:
        archive.writestr("t.csv", lines)
    with tarfile.open(fileobj=files["tar"], mode="w") as tar:
        member = tarfile.TarInfo("t.csv")
        member.size = len(lines)
        tar.addfile(member, io.BytesIO(lines))
    plain = {"csv": lines, "tsv": lines.replace(b",", b"\t"), "csv.gz": gzip.compress(lines, mtime=0)}
    plain |= {"json": json.dumps(rows).encode(), "jsonl": "\n".join(map(json.dumps, rows)).encode()}
    return plain | {name: file.getvalue() for name, file in files.items()}


def photos() -> dict[str, bytes]:
    """Format -> a sound photo."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    files = {name: io.BytesIO() for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
    for name, file in files.items():
        Image.fromarray(pixels).save(file, name)
    return {name: file.getvalue() for name, file in files.items()}


@dataclass(frozen=True)
class Target:
    """A sound file, and a call that reads it: of a file of mmfeat's own it returns what the file holds."""

    path: Path
    read: Callable[[], Any]


def nothing(read: Callable[..., object], *arguments: object) -> None:
    """Read a file of which any content may be right."""
    read(*arguments)


def graph(path: Path) -> Target:
    """An exported tower as `--runtime onnxruntime` takes it: one that cannot be run, or differs, is made again."""
    rows = torch.linspace(-1, 1, 18).reshape(2, 9)
    network = torch.nn.Sequential(torch.nn.Linear(9, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)).eval()

    class Tower(torch.nn.Module):
        def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
            return network(inputs[0])

    write_onnx(Tower(), [rows], ["rows"], ["vectors"], [{0: "batch"}], path)
    expected = network(rows).detach()

    def read() -> None:
        try:
            off = difference(OPENED["onnxruntime"](path, ["rows"])(rows), expected)
        except Exception as error:  # as the runtime is tried
            raise DataError("refused") from error
        if not off <= TOLERANCE:
            raise DataError("it differs")

    return Target(path, read)


def small_run(folder: Path, cache: Path) -> mmfeat.Run:
    """A run of one head on 60 photos."""
    shared: dict[str, Any] = {"cache": cache, "progress": Silent()}
    data = mmfeat.write_demo(folder / "demo", pairs=60)
    time.sleep(3)  # the index of photos takes none that may still change
    mmfeat.extract_features(data, ["hog"], **shared)
    shared |= {"fusion": ["none"], "baselines": ["ridge"], "modalities": ["image"], "ensembles": False}
    shared |= {"out": folder / "heads", "protocol": mmfeat.Protocol(folds=2, seeds=1)}
    return mmfeat.train_heads(data, ["hog"], **shared).run


def packs(folder: Path, store: Cache, samples: Any, spec: Any) -> dict[str, Target]:
    """Kind -> a pack of the vectors of `spec`, and the table beside that of NumPy."""
    paths = {suffix: folder / f"pack.{suffix}" for suffix in ("h5", "npy", "parquet")}
    reads = {suffix: partial(nothing, mmfeat.read_pack, path, spec.folder_name) for suffix, path in paths.items()}
    for path in paths.values():
        mmfeat.write_pack(path, store, samples, [spec], Silent())
    targets = {f"pack, {suffix}": Target(path, reads[suffix]) for suffix, path in paths.items()}
    return targets | {"pack, table of npy": Target(paths["npy"].with_suffix(".csv"), reads["npy"])}


def own_files(folder: Path) -> dict[str, Target]:
    """Kind -> a file of a small cache, run or search made in `folder`, or of a saved classifier."""
    run = small_run(folder, cache := folder / "cache")
    head, spec, samples = run.head_folder(run.leaderboard[0]), run.towers[0].spec, mmfeat.read_samples(run.config.data)
    store, photos = Cache(cache, samples.name), [sample.image for sample in samples.samples[:3]]
    shard = next(store.spec_folder(spec).glob("*.h5"))
    classifier, rows = mmfeat.FusionClassifier(fusion="linear", epochs=2), np.random.default_rng(0).normal(size=(40, 9))
    classifier.fit(rows, np.arange(40) % 2).save(saved := folder / "classifier.safetensors")
    plan = mmfeat.Plan(mmfeat.HeadSettings(), {"learning_rate": (1e-4, 1e-3)})
    searched: dict[str, Any] = {"storage": folder / "search.db", "study": "head", "plan": plan, "seed": 0}
    search = Search(**searched)
    for asked in search.ask(2):
        search.tell(asked.number, 0.5 + asked.number / 4)

    def vectors() -> bytes:
        return store.load(samples.samples, [spec]).blocks[0].vectors.tobytes()

    def verified() -> bytes:
        if damages := verify_cache(cache).damages:
            raise CacheError(damages[0].reason)
        return shard.read_bytes()

    def whole_run() -> str:
        mmfeat.list_runs(run.folder.parent)
        again = mmfeat.read_run(run.folder)
        return checksum(again.to_json()) + str([again.facts(), verdict(again)])

    def trials() -> str:
        again = Search(**searched)
        return repr([[(trial.number, trial.params, trial.value) for trial in again.finished], again.failed])

    def out_of_fold() -> str:
        return repr(vars(mmfeat.read_run(run.folder).out_of_fold()).values())

    training.save(part := folder / "part.safetensors", {"a": torch.ones(2, 3), "b": torch.arange(4)}, {"epoch": 1})
    trial, note = head / "trials" / "0000", next(cache.glob("requests/*.json"))
    return {
        "shard": Target(shard, vectors),
        "shard, verify": Target(shard, verified),
        **packs(folder, store, samples, spec),
        "graph, onnxruntime": graph(folder / "model.onnx"),
        "spec.json": Target(shard.with_name(SPEC_FILE), vectors),
        "images.index": Target(store.folder / INDEX_FILE, vectors),
        "request": Target(note, lambda: repr(mmfeat.latest_request(cache))),
        "request, gc": Target(note, lambda: repr([piece.folder for piece in mmfeat.find_garbage(cache, ())])),
        "run.json": Target(run.folder / "run.json", whole_run),
        "out_of_fold.csv": Target(head / "out_of_fold.csv", out_of_fold),
        "folds.csv": Target(run.folder / "folds.csv", out_of_fold),
        "final head": Target(
            head / "final-0.safetensors", lambda: mmfeat.load(run.folder).predict_proba(images=photos).tobytes()
        ),
        "trial, json": Target(trial.with_suffix(".json"), lambda: repr(load_outcome(trial))),
        "trial, logits": Target(trial.with_suffix(".safetensors"), lambda: repr(load_outcome(trial))),
        "search.db": Target(folder / "search.db", trials),
        "checkpoint": Target(part, lambda: repr(training.load(part))),
        "classifier": Target(saved, lambda: mmfeat.FusionClassifier.load(saved).predict_proba(rows).tobytes()),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with one to ten damages."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        at, kind = rng.randrange(max(1, len(result))), rng.randrange(5)
        if kind == 0 and rng.random() < 0.5:
            del result[at:]
        elif kind == 1 and result:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            result[at : at + 32] = bytes(32)
        elif kind == 3:
            result[at:at] = rng.randbytes(rng.choice([1, 5, 300]))
        else:
            result[at : at + 4] = rng.choice(ODD)
    return bytes(result)


def foreign_files(folder: Path) -> Iterator[dict[str, Target]]:
    """The tables and the photos, written to `folder`."""

    def decode(path: Path) -> None:
        image, reason = decode_image(path.read_bytes())
        if image is None:
            raise DataError(reason)

    for read, files in ((mmfeat.read_samples, tables()), (decode, photos())):
        paths = {kind: folder / f"file.{kind}" for kind in files}
        for kind, data in files.items():
            paths[kind].write_bytes(data)
        yield {kind: Target(path, partial(nothing, read, path)) for kind, path in paths.items()}


def outcome(target: Target, wanted: Any) -> str:
    """`read`, `refused`, `wrong` for another value than `wanted`, or the error and its text."""
    try:
        return "read" if target.read() == wanted else "wrong"
    except MmfeatError as error:
        return "refused" if "\n" not in str(error) else f"lines: {error}"
    except Exception as error:  # the very thing that is looked for
        return f"{type(error).__name__}: {error}"


def put(path: Path, data: bytes) -> None:
    """Write a file as if nothing had ever lain beside it."""
    for journal in path.parent.glob(f"{path.name}-*"):
        journal.unlink()
    path.write_bytes(data)


def attack(targets: dict[str, Target], given: argparse.Namespace, rng: random.Random) -> Counter[tuple[str, str]]:
    """Damage and read files of kinds drawn by `rng`; (kind, outcome) -> their number."""
    tally, end = Counter[tuple[str, str]](), time.monotonic() + given.seconds
    sound = {kind: (target.path.read_bytes(), target.read()) for kind, target in targets.items()}
    for number in range(given.count):
        if time.monotonic() > end:
            break
        kind = rng.choice(sorted(targets))
        data, wanted = sound[kind]
        put(targets[kind].path, damaged(data, rng))
        signal.alarm(SECONDS)
        result = outcome(targets[kind], wanted)
        signal.alarm(0)
        put(targets[kind].path, data)
        tally[kind, result if result in ("read", "refused", "wrong") else "raw"] += 1
        if result not in ("read", "refused"):
            print(f"  {kind}, number {number}: {result}", file=sys.stderr)
    return tally


def main() -> None:
    """Print a table: kind of file, how many were tried, read, refused, ended in a raw error, and gave a wrong value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="by default all")
    parser.add_argument("--count", type=int, default=1500, help="files of each third: tables, photos, own files")
    parser.add_argument("--seconds", type=float, default=3600.0, help="most that a third may take")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, tally = random.Random(given.seed), Counter[tuple[str, str]]()
    warnings.simplefilter("ignore")
    np.set_printoptions(threshold=sys.maxsize, floatmode="unique")
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # ends the process where a file is waited for
    with tempfile.TemporaryDirectory() as folder:
        for files in (*foreign_files(Path(folder)), own_files(Path(folder))):
            chosen = {kind: target for kind, target in files.items() if kind in (given.kinds or files)}
            tally += attack(chosen, given, rng) if chosen else Counter()
    outcomes = ("read", "refused", "raw", "wrong")
    print("| kind | tried | read | refused | raw | wrong |\n| --- | --- | --- | --- | --- | --- |")
    for kind in dict.fromkeys(kind for kind, _ in sorted(tally)):
        counts = [tally[kind, result] for result in outcomes]
        print(f"| {kind} | {' | '.join(map(str, (sum(counts), *counts)))} |")
    raise SystemExit(int(any(result in ("raw", "wrong") for _, result in tally)))


if __name__ == "__main__":
    main()
