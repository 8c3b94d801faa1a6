"""Reading tables of a million rows: each format in a fresh process, time as a ratio to JSONL, and most memory.

What an extraction reads of a table: once to count and check it, once in blocks of samples; with --extract, a whole
extraction by `hashing:1` into an empty cache.
`python benchmarks/tables.py FOLDER [--rows N] [--rounds N]` writes the tables to FOLDER and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from table import Row, measured

from mmfeat.extraction.extract import extract_features
from mmfeat.samples.dataset import SampleSource
from mmfeat.system.hardware import peak_memory

BLOCK = 65_536  # rows that an extraction has in memory at once
FORMATS = (
    "jsonl", "csv", "tsv", "txt", "psv", "quoted.csv", "cp1252.csv", "ndjson", "json", "parquet", "feather", "arrow",
    "jsonl.gz", "jsonl.bz2", "jsonl.xz", "csv.gz", "csv.bz2", "csv.xz", "csv.zst", "parquet.gz", "xlsx",
)  # fmt: skip
MARKS = {"csv": ",", "tsv": "\t", "txt": "\t", "psv": "|"}
COMPRESSIONS = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
PIECE = 50_000  # rows that are made at a time


def main() -> None:
    """Print the figures of all formats, or those of one table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=FORMATS)
    parser.add_argument("--extract", action="store_true", help="time whole extractions")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps((extract if given.extract else read)(given.folder)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    paths = {name: write(given.folder, name, given.rows) for name in given.only}
    figures: dict[str, dict[str, float]] = {}
    for _ in range(given.rounds):
        for name, path in paths.items():
            call = [sys.executable, __file__, str(path), "--read", *["--extract"] * given.extract]
            answer = subprocess.run(call, stdout=subprocess.PIPE, check=True)
            figure = json.loads(answer.stdout)
            assert figure["rows"] == given.rows, (name, figure)
            figures[name] = min(figures.get(name, figure), figure, key=lambda each: each["seconds"])
    print("| format | MB | time against JSONL | most memory |\n| --- | --- | --- | --- |")
    for name, figure in figures.items():
        ratio = figure["seconds"] / figures[given.only[0]]["seconds"]
        print(f"| {name} | {paths[name].stat().st_size / 1e6:.0f} | {ratio:.2f} | {figure['memory']:.2f} GB |")
    print(f"{given.only[0]}: {figures[given.only[0]]['seconds']:.1f} s")


def measure(small: bool) -> Iterator[Row]:
    """The figures of reading all formats, in one round."""
    count, first = 10_000 if small else 1_000_000, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in FORMATS:
            call = [sys.executable, __file__, str(write(Path(folder), name, count)), "--read"]
            figure = json.loads(subprocess.run(call, stdout=subprocess.PIPE, check=True).stdout)
            assert figure["rows"] == count, (name, figure)
            first, note = first or figure["seconds"], f"{figure['memory']:.2f} GB"
            what = f"{name} of {count:,} rows, CPU time against JSONL"
            yield measured(what, figure["seconds"] / first, "x", most=1.5, note=note)


def read(path: Path) -> dict[str, float]:
    """Seconds and most memory in GB of the two passes of an extraction over a table."""
    start, source = time.process_time(), SampleSource(path)
    source.check()
    count = source.overview().count
    assert sum(map(len, source.blocks(BLOCK))) == count
    seconds = time.process_time() - start  # of the processor: other work on the machine does not count
    return {"rows": count, "seconds": seconds, "memory": peak_memory() / 1e9}


def extract(path: Path) -> dict[str, float]:
    """Seconds and most memory in GB of an extraction of a table."""
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        start = time.process_time()
        result = extract_features(path, ["hashing:1"], cache=cache)
        return {"rows": len(result.samples), "seconds": time.process_time() - start, "memory": peak_memory() / 1e9}


def rows(count: int, quoted: bool) -> Iterator[list[tuple[str, str, str]]]:
    """Yield (id, text, label) of made-up texts of about a hundred letters, some thousand at a time."""
    words = np.array([f"wörd{n}" if n % 50 == 0 else f"word{n}" for n in range(30_000)])
    for first in range(0, count, PIECE):
        numbers = np.random.default_rng(first).integers(0, len(words), (min(PIECE, count - first), 12))
        texts = [
            " ".join(row[:6]) + (', "and"\n' if quoted else " ") + " ".join(row[6:]) for row in words[numbers].tolist()
        ]
        yield [(f"s{first + n}", text, "ab"[n % 2]) for n, text in enumerate(texts)]


def write(folder: Path, name: str, count: int) -> Path:
    """Write a table of so many rows, unless it is there."""
    path = folder / f"table{count}.{name}"
    if path.exists():
        return path
    stem, _, last = name.rpartition(".")
    made = path.with_name(f"making.{name}")
    if last in COMPRESSIONS or last == "zst":
        compress(write(folder, stem, count), made, last)
    elif last in ("parquet", "feather", "arrow"):
        write_arrow(made, last, count)
    elif last == "xlsx":
        write_excel(made, count)
    else:
        write_text(made, name, last, count)
    made.rename(path)
    return path


def write_text(path: Path, name: str, kind: str, count: int) -> None:
    quoted = name.startswith("quoted")
    encoding = "cp1252" if name.startswith("cp1252") else "utf-8"
    with path.open("w", encoding=encoding, newline="") as file:
        if kind in MARKS:
            file.write(MARKS[kind].join(("id", "text", "label")) + "\n")
        elif kind == "json":
            file.write("[")
        for number, piece in enumerate(rows(count, quoted)):
            if kind in MARKS:
                cell = (lambda text: '"' + text.replace('"', '""') + '"') if quoted else str
                file.writelines(MARKS[kind].join((id, cell(text), label)) + "\n" for id, text, label in piece)
            else:
                lines = [json.dumps({"id": id, "text": text, "label": label}) for id, text, label in piece]
                file.write((", " if number and kind == "json" else "") + (", " if kind == "json" else "\n").join(lines))
                file.write("" if kind == "json" else "\n")
        file.write("]" if kind == "json" else "")


def write_arrow(path: Path, kind: str, count: int) -> None:
    import pyarrow
    import pyarrow.parquet
    from pyarrow import feather, ipc

    names = ["id", "text", "label"]
    tables = [pyarrow.table(dict(zip(names, zip(*piece, strict=True), strict=True))) for piece in rows(count, False)]
    if kind == "feather":
        feather.write_feather(pyarrow.concat_tables(tables), path)
        return
    make: Any = pyarrow.parquet.ParquetWriter if kind == "parquet" else ipc.new_file
    with make(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_excel(path: Path, count: int) -> None:
    import openpyxl

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["id", "text", "label"])
    for piece in rows(count, False):
        for row in piece:
            sheet.append(row)
    book.save(path)


def compress(source: Path, target: Path, kind: str) -> None:
    if kind == "zst":
        import pyarrow

        with pyarrow.CompressedOutputStream(str(target), "zstd") as file:
            file.write(source.read_bytes())
        return
    options = {"preset": 1} if kind == "xz" else {"compresslevel": 1}
    with COMPRESSIONS[kind](target, "wb", **options) as file:
        file.write(source.read_bytes())


if __name__ == "__main__":
    main()
