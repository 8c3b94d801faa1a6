"""Damaged tables and photos: each is read, or refused in one line; none is a raw error, a crash or a wait.

    python benchmarks/fuzz.py [--count 1500] [--seed 0]

Files of nine kinds and photos of six are cut, overwritten, filled and flipped at random. Exit code 1 where one was
neither read nor refused.
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
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import feather, parquet

import mmfeat
from mmfeat.errors import MmfeatError
from mmfeat.samples.photos import decode_image

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


def outcome(kind: str, data: bytes, folder: Path) -> str:
    """`read`, `refused`, or what else happened."""
    try:
        if kind.isupper():
            image, reason = decode_image(data)
            return "read" if image is not None else "refused" if "\n" not in reason else f"lines: {reason}"
        path = folder / f"file.{kind}"
        path.write_bytes(data)
        mmfeat.read_samples(path)
        return "read"
    except MmfeatError as error:
        return "refused" if "\n" not in str(error) else f"lines: {error}"
    except Exception as error:  # the very thing that is looked for
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Print a table: kind of file, how many were read, refused, and neither."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1500, help="files of each half: tables and photos")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, tally = random.Random(given.seed), Counter[tuple[str, str]]()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # ends the process where a file is waited for
    with tempfile.TemporaryDirectory() as folder:
        for files in (tables(), photos()):
            for number in range(given.count):
                kind = rng.choice(sorted(files))
                signal.alarm(SECONDS)
                result = outcome(kind, damaged(files[kind], rng), Path(folder))
                signal.alarm(0)
                tally[kind, result if result in ("read", "refused") else "neither"] += 1
                if result not in ("read", "refused"):
                    print(f"  {kind}, number {number}: {result}", file=sys.stderr)
    print("| kind | read | refused | neither |\n| --- | --- | --- | --- |")
    for kind in dict.fromkeys(kind for kind, _ in sorted(tally)):
        print(f"| {kind} | {tally[kind, 'read']} | {tally[kind, 'refused']} | {tally[kind, 'neither']} |")
    raise SystemExit(int(any(result == "neither" for _, result in tally)))


if __name__ == "__main__":
    main()
