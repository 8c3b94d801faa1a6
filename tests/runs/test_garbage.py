"""Nothing that a run or an extraction needs is ever deleted, nothing else unasked, and nothing outside the cache."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import export_name
from mmfeat.errors import CacheError, CacheMissError, ConfigError, RunError, WriteError
from mmfeat.extraction.requests import Request, latest_request, remember_request
from mmfeat.runs.garbage import delete_garbage, find_garbage
from mmfeat.system.files import _owner
from tests.cache.shards import POOLED_SPEC, TOKEN_SPEC, rows

OLD = time.time() - 2 * 3600
OTHER_SPEC = dataclasses.replace(POOLED_SPEC, cleaning="none")


def make_old(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (OLD, OLD), follow_symlinks=False)


def add(root: Path, spec: EncoderSpec, dataset: str = "set") -> Path:
    """An encoder's folder as an extraction leaves it, two hours old."""
    store = Cache(root, dataset)
    with store.writer(spec, {}) as writer:
        writer.add(rows(spec))
    make_old(store.spec_folder(spec))
    return store.spec_folder(spec)


def remember(root: Path, data: str, *specs: EncoderSpec) -> None:
    fingerprints = tuple(spec.fingerprint for spec in specs)
    remember_request(root, Request(data, {}, ["x"], EncoderOptions(), fingerprints))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three encoders, of which the latest extraction names one."""
    root = tmp_path / "cache"
    for spec in (POOLED_SPEC, OTHER_SPEC, TOKEN_SPEC):
        add(root, spec)
    remember(root, "/data/set", TOKEN_SPEC)
    return root


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listed(root: Path, runs: list[Path] | None = None) -> set[Path]:
    return {piece.folder for piece in find_garbage(root, runs or [])}


def folder_of(root: Path, spec: EncoderSpec, dataset: str = "set") -> Path:
    return Cache(root, dataset).spec_folder(spec)


def test_exported_towers_go_with_their_encoder_and_its_libraries(root: Path) -> None:
    used = export_name(TOKEN_SPEC.fingerprint)
    names = [used, export_name(POOLED_SPEC.fingerprint), f"{used[:-8]}01234567"]
    for name in names:
        (root / ".runtimes" / name).mkdir(parents=True)
        (root / ".runtimes" / name / "model.onnx").write_bytes(b"graph")
    make_old(root / ".runtimes")
    found = {piece.folder.name for piece in find_garbage(root, []) if piece.folder.parent.name == ".runtimes"}
    assert found == set(names[1:])
    assert Cache(root, ".runtimes").folder.name != ".runtimes"


def test_it_lists_and_deletes_only_when_told(root: Path) -> None:
    before = tree(root)
    found = find_garbage(root, [])
    assert {piece.folder for piece in found} == {folder_of(root, POOLED_SPEC), folder_of(root, OTHER_SPEC)}
    assert all(piece.reason == "neither a run nor a latest extraction needs it" for piece in found)
    assert tree(root) == before
    assert delete_garbage(found) == sum(piece.bytes for piece in found)
    assert tree(root) == {name: data for name, data in before.items() if "tokens" in name or "requests" in name}
    assert not folder_of(root, POOLED_SPEC).exists()
    assert find_garbage(root, []) == []


def test_the_latest_extraction_of_every_data_set_stays(root: Path) -> None:
    add(root, POOLED_SPEC, "second")
    remember(root, "/data/second", POOLED_SPEC)
    assert listed(root) == {folder_of(root, OTHER_SPEC)}  # an encoder that any data set uses stays in all
    remember(root, "/data/second", OTHER_SPEC)  # it was extracted again, with another one
    assert listed(root) == {folder_of(root, POOLED_SPEC), folder_of(root, POOLED_SPEC, "second")}


@pytest.fixture(scope="module")
def trained(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on the demo with its cache, both two hours old."""
    from mmfeat.evaluation.protocol import Protocol
    from mmfeat.extraction.extract import extract_features
    from mmfeat.sweep.train import train_heads

    folder = tmp_path_factory.mktemp("trained")
    options = EncoderOptions(dtype="float32", cleaning="tweet")
    extract_features(demo_folder, ["hashing"], cache=folder / "cache", options=options)
    places = {"cache": folder / "cache", "out": folder / "heads"}
    wanted = {"fusion": ["none"], "baselines": ["prior"], "modalities": ["text"]}
    train_heads(demo_folder, ["hashing"], options=options, protocol=Protocol(folds=2), **places, **wanted)
    extract_features(
        demo_folder, ["hashing"], cache=folder / "cache", options=dataclasses.replace(options, cleaning="none")
    )
    make_old(folder)
    return folder


@pytest.fixture
def with_run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "trained"))


def test_what_a_run_names_stays_wherever_the_run_is_named(with_run: Path) -> None:
    (run,) = (with_run / "heads").iterdir()
    assert len(listed(with_run / "cache")) == 1  # without the run its encoder is garbage
    for runs in (with_run / "heads", run):
        assert listed(with_run / "cache", [runs]) == set()


@pytest.mark.parametrize("content", ["", "{}", "not JSON", '{"encoders": [{"request": "x", "spec": {}}]}'])
def test_it_refuses_while_a_run_cannot_be_read(with_run: Path, content: str) -> None:
    (run,) = (with_run / "heads").iterdir()
    (run / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json: not a run .*cache gc deletes nothing while a run cannot be read"):
        find_garbage(with_run / "cache", [with_run / "heads"])


def test_it_refuses_while_a_note_of_an_extraction_cannot_be_read(root: Path) -> None:
    (note,) = (root / "requests").iterdir()
    fingerprint = latest_request(root).fingerprints[0]
    changed = note.read_text().replace(fingerprint, fingerprint[::-1])
    for content in ("", "{}", '{"fingerprints": 3}', "[]", "5", changed):
        note.write_text(content)
        with pytest.raises(CacheError, match=r"this note of an extraction cannot be read.*mmfeat extract again"):
            find_garbage(root, [])
    with pytest.raises(CacheMissError, match="nothing was extracted"):
        latest_request(root)


def test_a_folder_of_runs_that_is_not_there_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; name the folders that hold your runs, or --runs none"):
        find_garbage(root, [tmp_path / "nowhere"])
    with pytest.raises(CacheError, match="no such cache"):
        find_garbage(tmp_path / "nowhere", [])


def test_what_changed_within_the_hour_stays(root: Path) -> None:
    for name in ("spec.json", "new.h5", ".x.h5.host-1-0.tmp"):  # whatever a writer may just have made
        path = folder_of(root, POOLED_SPEC) / name
        path.touch()
        remember(root, "/data/set", TOKEN_SPEC)
        assert listed(root) == set()
        make_old(path.parent)
        assert listed(root) == {folder_of(root, POOLED_SPEC), folder_of(root, OTHER_SPEC)}


def test_a_data_set_stays_while_an_extraction_is_at_work_on_it(root: Path) -> None:
    """What was finished hours ago may be counted on by what is being written now."""
    running = dataclasses.replace(TOKEN_SPEC, layer=1, output="prefix")
    with Cache(root, "set").writer(running, {}) as writer:
        writer.add(rows(TOKEN_SPEC))
    add(root, POOLED_SPEC, "second")
    assert listed(root) == {folder_of(root, POOLED_SPEC, "second")}
    remember(root, "/data/set", running)
    assert folder_of(root, POOLED_SPEC) not in listed(root)
    make_old(root)
    assert folder_of(root, POOLED_SPEC) in listed(root)
    assert folder_of(root, running) not in listed(root)


def test_unknown_files_and_their_folders_stay(root: Path) -> None:
    folder = folder_of(root, POOLED_SPEC)
    (folder / "notes.txt").write_text("mine")
    (folder / f"{'0' * 32}.h5").mkdir()  # named like a shard, and none
    (root / "set" / "own").mkdir()
    (root / "set" / "own" / "thesis.tex").write_text("mine")
    (root / "README").write_text("mine")
    make_old(root)
    delete_garbage(find_garbage(root, []))
    assert sorted(path.name for path in folder.iterdir()) == [f"{'0' * 32}.h5", "notes.txt"]
    assert (root / "set" / "own" / "thesis.tex").exists()
    assert (root / "README").exists()


def test_no_link_is_followed_out_of_the_cache(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = add(outside, OTHER_SPEC)
    (outside / f".a.{_owner()}-{dead_process()}-0.tmp").write_text("theirs")
    (outside / "quarantine").mkdir()
    (outside / "quarantine" / "x.h5").write_text("theirs")
    make_old(outside)
    before = tree(outside)
    os.symlink(outside / "set", root / "linked")  # a data set
    os.symlink(folder, root / "set" / "elsewhere")  # an encoder
    os.symlink(outside / "quarantine", root / "quarantine")
    (kept,) = folder.glob("*.h5")
    os.symlink(kept, folder_of(root, POOLED_SPEC) / f"{'f' * 32}.h5")  # a shard
    make_old(root)
    delete_garbage(find_garbage(root, []))
    assert tree(outside) == before
    assert not folder_of(root, POOLED_SPEC).exists()  # the link itself went


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_and_verify_left_is_listed(root: Path) -> None:
    remember(root, "/data/set", POOLED_SPEC, OTHER_SPEC, TOKEN_SPEC)
    folder = folder_of(root, POOLED_SPEC)
    dead = folder / f".x.h5.{_owner()}-{dead_process()}-0.tmp"
    living = folder / f".x.h5.{_owner()}-{os.getpid()}-0.tmp"
    foreign = folder / ".x.h5.another-host-1-0.tmp"
    moved = root / "quarantine" / "set" / folder.name / f"{'0' * 32}.h5"
    moved.parent.mkdir(parents=True)
    for path in (dead, living, foreign, moved):
        path.write_bytes(b"123")
    found = {piece.reason: piece for piece in find_garbage(root, [])}
    assert found["left by a killed process"].files == (dead,)
    assert found["moved away by cache verify"].files == (moved,)
    assert len(found) == 2
    assert delete_garbage(list(found.values())) == 6
    assert living.exists()
    assert foreign.exists()
    assert not (root / "quarantine" / "set").exists()
    assert len(list(folder.glob("*.h5"))) == 1


def test_a_folder_of_another_version_is_garbage_only_when_old(root: Path) -> None:
    folder = folder_of(root, POOLED_SPEC)
    (folder / "spec.json").write_text(json.dumps({"spec": {"family": "x"}}))
    for path in folder.glob("*.h5"):
        path.write_bytes(b"of another version")
    remember(root, "/data/set", OTHER_SPEC, TOKEN_SPEC)
    assert find_garbage(root, []) == []
    make_old(folder)
    (piece,) = find_garbage(root, [])
    assert (piece.folder, piece.reason) == (folder, "of another version of mmfeat, or damaged")


def test_what_appears_between_listing_and_deleting_stays(root: Path) -> None:
    found = find_garbage(root, [])
    new = folder_of(root, POOLED_SPEC) / "new.h5"
    new.write_bytes(b"new")
    (gone,) = (path for path in folder_of(root, OTHER_SPEC).glob("*.h5"))
    gone.unlink()  # somebody else tidied too
    delete_garbage(found)
    assert list(folder_of(root, POOLED_SPEC).iterdir()) == [new]
    assert not folder_of(root, OTHER_SPEC).exists()


def test_a_file_that_cannot_be_deleted_is_one_line(root: Path) -> None:
    found = find_garbage(root, [])
    (path,) = folder_of(root, POOLED_SPEC).glob("*.h5")
    path.unlink()
    path.mkdir()
    with pytest.raises(WriteError, match=f"^cannot delete {path}: Is a directory; delete it by hand$"):
        delete_garbage(found)
    assert (path.parent / "spec.json").exists()  # it goes last


Damage = Callable[[Path], object]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")], ids=["gone", "other"])
@pytest.mark.parametrize("pattern", ["spec.json", "*.h5", "*"])
def test_an_encoder_in_use_stays_also_where_it_is_damaged(root: Path, damage: Damage, pattern: str) -> None:
    for path in folder_of(root, TOKEN_SPEC).glob(pattern):
        damage(path)
    make_old(root / "set")
    assert folder_of(root, TOKEN_SPEC) not in listed(root)
