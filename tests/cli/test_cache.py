"""`mmfeat cache ...` as a user types it: what is printed, one line for an error, exit codes 0, 1 and 2."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
from click.testing import Result

from mmfeat.extraction.extract import extract_features
from tests.cli.typed import invoke


@pytest.fixture(scope="module")
def extracted(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(demo_folder, folder / "demo")
    extract_features(folder / "demo", ["hashing", "hog"], cache=folder / "cache")
    return folder


@pytest.fixture
def here(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `demo` and its `cache`; the note of the extraction names this demo."""
    shutil.copytree(extracted, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("cache/requests")
    assert extract_features("demo", ["hashing", "hog"], cache="cache").nothing_to_do
    return tmp_path


def mmfeat(*arguments: Any) -> Result:
    return invoke("cache", *arguments)


def lines(*arguments: Any) -> list[str]:
    """What a command that succeeds prints, without trailing spaces; no line is wider than a wide terminal."""
    answer = mmfeat(*arguments)
    assert answer.exit_code == 0, answer.output
    assert answer.stderr == ""
    found = [line.rstrip() for line in answer.stdout.splitlines()]
    assert max(len(line) for line in found if "made with" not in line) <= 160
    return found


def fails(answer: Result, *words: str) -> None:
    assert answer.exit_code == 1, answer.output
    (line,) = answer.stderr.splitlines()
    assert line.startswith("mmfeat: ")
    assert all(word in line for word in words), line


def shard(name: str) -> Path:
    return next(Path("cache/demo").glob(f"{name}-*/*.h5"))


def damage(path: Path) -> None:
    with h5py.File(path, "r") as file:
        offset = file["pooled"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_ls(here: Path) -> None:
    head, hashing, hog, total, following = lines("ls")
    assert following.startswith("next: mmfeat cache info")
    assert head.split() == ["data", "encoder", "rows", "width", "dtype", "size", "age", "fingerprint"]
    assert re.match(r"demo +hashing +115 +4096 +float32 +[\d.]+ MB +\d+ \w+ +[0-9a-f]{8}$", hashing)
    assert re.match(r"demo +hog +116 \+1 failed +996 +float32 +[\d.]+ kB +\d+ \w+ +[0-9a-f]{8}$", hog)
    assert re.match(r"2 encoders, [\d.]+ MB in cache$", total)
    assert max(map(len, (head, hashing, hog))) <= 100
    shard("hog").write_bytes(b"not a shard")
    assert lines("ls")[-1] == "some files are damaged; next: mmfeat cache verify --cache cache"
    Path("empty").mkdir()
    assert lines("ls", "--cache", "empty") == [
        "nothing is cached in empty; next: mmfeat extract --data DATA --encoders A,B"
    ]


def test_info(here: Path) -> None:
    text = "\n".join(lines("info"))
    assert "using demo with hashing, hog" in text
    assert "  image: 120 samples have one, 117 different\n  text: 119 samples have one, 115 different" in text
    assert "  covers 100.0%: 115 vectors, 0 unreadable, 0 missing" in text
    assert "  covers 99.1%: 116 vectors, 1 unreadable, 0 missing" in text
    assert re.search(r"  115 rows of 4096 x float32, computed in float32, [\d.]+ MB, 1 shard, \d+ \w+ old", text)
    assert re.search(r"  weights builtin:2, fingerprint [0-9a-f]{16}\n", text)
    assert text.count("made with mmfeat ") == 1
    shard("hog").write_bytes(b"not a shard")
    problem = mmfeat("info").stdout
    assert re.search(r"\n  cache/.*\.h5: not a readable HDF5 file .*mmfeat cache verify --quarantine", problem)


def test_explain(here: Path) -> None:
    using, text, photo = lines("explain", 1000)
    assert using == "using demo with hashing, hog"
    assert re.match(r"hashing: hit: row \d+ of cache/demo/hashing-\w+/\w+\.h5, first computed for 1000$", text)
    assert photo.startswith("hog: hit: row ")
    missing = lines("explain", 1000, "--cleaning", "none", "--encoders", "hashing")
    assert missing[1].startswith("hashing: miss: no shard of this encoder in cache/demo/hashing-")
    assert missing[3] == "    cleaning: there tweet, asked for none (--cleaning)"
    command = "mmfeat extract --data demo --encoders hashing --cleaning none"
    assert missing[4] == f"next: {command} computes what is missing"
    failed = lines("explain", 1003)[3]
    assert failed == "next: mmfeat extract --data demo --encoders hashing,hog --retry-failed tries again"
    fails(mmfeat("explain", 99), "no sample '99'; did you mean 1099")
    fails(mmfeat("explain", 1000, "--cache", "nowhere"), "nothing was extracted", "mmfeat extract")
    assert mmfeat("explain").exit_code == 2


def test_verify_quarantine_and_parity(here: Path) -> None:
    (sound,) = lines("verify")
    assert re.match(r"all sound: 2 encoders, 2 shards, 232 rows, [\d.]+ MB in cache; there is nothing to do$", sound)
    *_, first, second = lines("verify", "--parity", 3)
    assert first.startswith("parity holds: hashing: 3 rows, largest deviation 0.0e+00")
    assert second.startswith("parity holds: hog: 3 rows, ")
    path = shard("hog")
    damage(path)
    answer = mmfeat("verify", "--parity", 3)
    assert answer.exit_code == 1
    found, total, following, parity = answer.stdout.splitlines()
    assert found.startswith(f"damaged: {path}: MiB 0 does not match its checksum: rows 0 to 116 (samples 1000 to ")
    assert total.startswith("1 damaged among 2 encoders, 2 shards, 232 rows")
    assert following.startswith("next: mmfeat cache verify --cache cache --quarantine; then mmfeat extract ")
    assert parity == "parity was not checked: that needs a sound cache"
    moved = lines("verify", "--quarantine")
    assert moved[:2] == [found, f"  moved to cache/quarantine/demo/{path.parent.name}/{path.name}"]
    assert moved[-1] == "next: mmfeat extract computes what was moved again"
    assert lines("verify")[0].startswith("all sound: 2 encoders, 1 shard, 115 rows")
    assert lines("verify", "--parity", 3)[-1].startswith("parity not checked: hog: none of its rows is cached")
    fails(mmfeat("verify", "--cache", "nowhere"), "nowhere: no such cache; name its folder with --cache")
    assert mmfeat("verify", "--parity", -1).exit_code == 2


def test_the_command_that_helps_names_the_flags_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("id|title\n1|one, two\n2|three\n")
    given = "--data t.csv --encoders hashing --columns id=id,text=title --delimiter '|'"
    assert lines("explain", 1, *shlex.split(given))[-1] == f"next: mmfeat extract {given} computes what is missing"


def test_parity_is_checked_on_a_table_read_as_it_was_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_bytes("id;text\n1;déjà vu\n2;naïve café\n".encode("cp1252"))
    named = {"delimiter": ";", "encoding": "cp1252"}
    extract_features("t.csv", ["hashing"], columns=named)
    flags = [part for name, value in named.items() for part in (f"--{name}", value)]
    assert lines("verify", "--parity", 2, "--data", "t.csv", *flags)[-1].startswith("parity holds: hashing: 2 rows")
    fails(mmfeat("verify", "--parity", 2, "--data", "t.csv", "--delimiter", "|"), "t.csv")


def test_parity_that_does_not_hold_is_exit_code_1(here: Path) -> None:
    import numpy as np

    from tests.cache.shards import falsify

    with h5py.File(shard("hashing"), "r") as file:
        values = file["pooled"][:1] + np.float32(0.25)
    falsify(shard("hashing"), 0, values)
    assert lines("verify")[0].startswith("all sound")
    answer = mmfeat("verify", "--parity", 1000)
    assert answer.exit_code == 1
    assert re.search(
        r"parity DOES NOT HOLD: hashing: 119 rows, largest deviation 2\.5e-01.*, worst sample \d+", answer.stdout
    )
    assert "parity holds: hog: " in answer.stdout


def test_gc(here: Path) -> None:
    assert lines("gc") == ["nothing to delete (looked at no runs and all extractions)"]
    extract_features("demo", ["hashing"], cache="cache")
    old = time.time() - 7200
    for path in Path("cache/demo").glob("*/*"):
        os.utime(path, (old, old))
    found = lines("gc")
    assert found[0].split() == ["folder", "files", "size", "age", "why"]
    assert re.match(r"cache/demo/hog-\w+ +2 +[\d.]+ kB +2 h +neither a run nor a latest extraction needs it$", found[1])
    assert re.match(r"[\d.]+ kB could go \(looked at no runs and all extractions\)$", found[2])
    assert found[3] == "nothing was deleted; the same command with --yes deletes what is listed"
    assert list(Path("cache/demo").glob("hog-*/*.h5"))
    fails(mmfeat("gc", "--runs", "elsewhere", "--yes"), "--runs elsewhere: no such folder")
    assert re.match(r"deleted [\d.]+ kB$", lines("gc", "--yes", "--runs", "none")[-2])
    assert [path.name[:7] for path in Path("cache/demo").iterdir() if path.is_dir()] == ["hashing"]
    assert mmfeat("gc", "--no").exit_code == 2


def test_pack(here: Path) -> None:
    using, counts, place, following = lines("pack", "--out", "demo.h5")
    assert following.startswith("next: mmfeat.read_pack reads it")
    assert using == "using demo with hashing, hog"
    assert re.match(r"120 samples, 2 encoders, [\d.]+ MB$", counts)
    assert place == "pack demo.h5"
    with h5py.File("demo.h5", "r") as file:
        assert len(file["ids"]) == 120
        assert len(file) == 5
    assert "\npack pack.parquet\n" in mmfeat("pack", "--format", "parquet").stdout
    fails(mmfeat("pack", "--out", "tweets.xyz"), "no format has this suffix")
    fails(mmfeat("pack", "--out", "demo/train.txt", "--format", "h5"), "this exists and is no pack; name another file")
    fails(mmfeat("pack", "--cleaning", "none"), "not in the cache for hashing", "run mmfeat extract")
    damage(shard("hog"))
    fails(mmfeat("pack", "--out", "other.h5"), "values do not match their checksum", "mmfeat cache verify --quarantine")
    assert not Path("other.h5").exists()


def test_help_of_every_command_is_whole_lines_with_an_example() -> None:
    listed = mmfeat("--help").stdout
    assert "..." not in listed.partition("Commands:")[2]
    for command in ("ls", "info", "explain", "verify", "gc", "pack"):
        answer = mmfeat(command, "--help")
        assert answer.exit_code == 0
        assert f"  mmfeat cache {command}" in answer.stdout
        assert re.search(rf"^  {command} +\S", listed, flags=re.MULTILINE)
    assert mmfeat("dance").exit_code == 2


def test_long_names_are_neither_cut_nor_broken(here: Path) -> None:
    from mmfeat.cache.store import Cache
    from tests.cache.shards import POOLED_SPEC, rows

    spec = dataclasses.replace(POOLED_SPEC, family="bert", variant="paraphrase-multilingual-" * 2)
    with Cache("cache", "a-data-set-with-a-long-name").writer(spec, {}) as writer:
        writer.add(rows(spec))
    assert len(lines("ls")) == 6  # head, three encoders, the sum, what is next
    assert any(f"a-data-set-with-a-long-name  {spec.name}  8 " in line for line in lines("ls"))
