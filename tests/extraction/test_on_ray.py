"""Ray: two workers on a real local cluster leave the cache that one process leaves, also if one of them is killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmfeat.cache.store import Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_features
from mmfeat.extraction.on_ray import READER_CPUS, _share
from mmfeat.samples.dataset import read_samples

OPTIONS = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "clip=tokens"), views=1)
TWO = ExtractSettings(workers=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One on two CPUs, as on a small machine."""
    ray = pytest.importorskip("ray", reason="the engine needs the extra ray")
    pytest.importorskip("ray.data", reason="the engine needs ray[data]")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    context = ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def data(demo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path / "demo"))


def workers() -> Iterator[int]:
    """Process ids of the actors: Ray writes into a process's title what it runs."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if file.read_bytes().startswith(b"ray::MapWorker(MapBatches(BlockActor))"):
                yield int(file.parent.name)


def features(result: Extraction) -> dict[str, np.ndarray]:
    """All values, by cache folder; tokens padded."""
    cache = Cache(result.folder.parent, result.folder.name)
    samples = read_samples(result.samples.source).samples
    loaded = cache.load(samples, [tower.spec for tower in result.towers])
    rows = np.arange(len(samples))
    return {
        **{block.name: block.vectors for block in loaded.blocks},
        **{block.name: block.batch(rows)[0] for block in loaded.mapped},
    }


def check_equal(one: Extraction, other: Extraction) -> None:
    theirs = features(other)
    for name, values in features(one).items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-5, err_msg=name)
    counts = ("new", "stored", "unreadable", "missing")  # what two workers meet counts once
    assert [getattr(one, name) for name in counts] == [getattr(other, name) for name in counts]


def test_two_workers_leave_the_cache_of_one_process(data: Path, tmp_path: Path, tiny_clip: Path, cluster: str) -> None:
    asked = ["hashing", f"clip:{tiny_clip}"]
    alone = extract_features(data, asked, cache=tmp_path / "alone", options=OPTIONS)
    found = extract_features(data, asked, cache=tmp_path / "ray", options=OPTIONS, settings=TWO, engine="ray")
    assert verify_cache(tmp_path / "ray").sound
    check_equal(alone, found)
    assert sorted(id for id, _ in found.failures) == sorted(id for id, _ in alone.failures)
    assert all(len(list(found.folder.glob(f"{tower.spec.folder_name}/*.h5"))) > 1 for tower in found.towers)
    again = extract_features(data, asked, cache=tmp_path / "ray", options=OPTIONS, settings=TWO, engine="ray")
    assert again.nothing_to_do


def test_blocks_of_a_killed_worker_are_redone(data: Path, tmp_path: Path, cluster: str) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        """The first worker that has committed something."""
        while not list((tmp_path / "ray").glob("*/*/*.h5")):
            time.sleep(0.01)
        pid = next(workers())
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    asked, options = ["hashing", "hog"], EncoderOptions(dtype="float32", cleaning="tweet", views=2)
    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    found = extract_features(data, asked, cache=tmp_path / "ray", options=options, settings=TWO, engine="ray")
    thread.join(30)
    assert killed
    assert verify_cache(tmp_path / "ray").sound
    alone = extract_features(data, asked, cache=tmp_path / "alone", options=options)
    theirs = features(found)
    for name, values in features(alone).items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line(data: Path, tmp_path: Path, cluster: str, number: signal.Signals) -> None:
    flags = ["--data", data, "--encoders", "hashing,hog", "--engine", "ray", "--ray-address", cluster]
    code = "from mmfeat.cli import console, main; console.NAMED_AFTER = 0.01; main.main()"
    command = [sys.executable, "-c", code, "extract", *map(str, flags)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        began = list(itertools.takewhile(lambda line: line != "starting workers ...\n", lines))
        time.sleep(0.3)  # an interrupt in the middle of a line has it printed twice
        process.send_signal(number)
        rest = list(lines)
        assert process.wait(60) == 130
    assert set(began) <= {"reading demo ...\n", "starting ray ...\n"}
    assert len(rest) == 1
    assert rest[0].startswith("interrupted; every vector")


def test_an_error_in_a_worker_is_one_line_here(data: Path, tmp_path: Path, cluster: str) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(EncoderError, match=r"broken.pth: cannot be loaded"):
        extract_features(data, [f"resnet18:{broken}"], cache=tmp_path / "cache", settings=TWO, engine="ray")


def test_more_workers_than_the_cluster_can_have_are_refused(data: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(ConfigError, match="--workers 50: the cluster has 2 CPUs"):
        extract_features(data, ["hashing"], cache=tmp_path, settings=ExtractSettings(workers=50), engine="ray")


@pytest.mark.parametrize(
    ("nodes", "workers", "count", "share"),
    [
        ([2.0], 0, 1, 1.5),
        ([2.0], 2, 2, 0.75),
        ([8.0, 8.0, 8.0], 0, 6, 3.75),
        ([8.0, 8.0, 8.0], 4, 4, 3.75),
        ([16.0] * 4, 0, 16, 3.87),
        ([8.0, 16.0], 0, 6, 3.75),
    ],
)
def test_every_node_keeps_a_place_for_the_list(nodes: list[float], workers: int, count: int, share: float) -> None:
    assert _share(nodes, 0, ExtractSettings(workers=workers)) == (count, {"num_cpus": share})
    assert all(cpus - int(cpus / share) * share >= READER_CPUS for cpus in nodes)


def test_a_gpu_each() -> None:
    assert _share([16.0], 4, ExtractSettings()) == (4, {"num_gpus": 1})
    assert _share([16.0], 4, ExtractSettings("cpu", workers=3))[1] == {"num_cpus": 5.16}
    for device, gpus in (("cuda", 0), ("cuda:1", 4)):
        with pytest.raises(ConfigError, match=f"--device {device}: the cluster has {gpus} GPUs"):
            _share([16.0], gpus, ExtractSettings(device))


def test_an_unknown_engine_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--engine spark: use one of local, ray"):
        extract_features(data, ["hashing"], cache=tmp_path, engine="spark")
