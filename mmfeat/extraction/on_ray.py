"""Extraction on a Ray cluster: blocks of samples flow through Ray Data to actors, which encode them and write shards.

A block counts as done when its rows are committed. Ray gives the blocks of an actor that died to another one, which
finds in the cache what was committed and encodes the rest.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmfeat import errors
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, is_torch
from mmfeat.errors import CacheError, ConfigError, MmfeatError
from mmfeat.extraction.counts import Counts
from mmfeat.extraction.extract import Extractor, ExtractSettings
from mmfeat.extraction.missing import Planner
from mmfeat.samples.dataset import Sample, SampleSource
from mmfeat.system.hardware import Interrupts, join_cluster, leave_cluster, without_stderr
from mmfeat.system.remote import RemoteFile, absolute, is_remote
from mmfeat.system.wording import Progress

LOOKED_AT = 65_536  # samples at a time that are looked up before anything is started
BLOCK = 16_384  # samples; what an actor did of one is committed every 30 seconds
BLOCKS_EACH = 4  # at least, of an actor where there are few samples
LEAST = 32  # samples of a block
CORES = 4  # of an actor that computes on CPUs
READER_CPUS = 0.25  # for the task that reads the list: actors that take all CPUs would starve it
SPARE_CPUS = 0.5


def extract_on_ray(
    source: SampleSource,
    towers: Sequence[Tower],
    store: Cache,
    settings: ExtractSettings,
    address: str | None,
    progress: Progress,
    total: int,
) -> Counts:
    """Encode what the cache lacks of `source`, `total` samples; workers must see the data and the cache by this path.

    Ray is started only if anything is missing. A content that several workers meet counts once where the list fits in
    one block of `LOOKED_AT`, which is looked up once more for that.
    """
    missing, before = _look(source, towers, store, settings.retry_failed, progress)
    if not missing:
        return before
    with progress.step("starting ray", None):
        ray, started = join_cluster(address)
    try:
        counts = _run(ray, source, towers, store, settings, progress, total)
    finally:
        if started:
            leave_cluster(ray)
    _check_shared(store, towers, counts)
    if total <= LOOKED_AT:
        counts = _counted_once(counts, before, _look(source, towers, store, False, progress)[1])
    return counts


def _look(
    source: SampleSource, towers: Sequence[Tower], store: Cache, retry_failed: bool, progress: Progress
) -> tuple[bool, Counts]:
    """Whether anything is missing, and what was found up to the first block that lacks something.

    Hashes that are made here are in the stat index when the workers look. Photos behind URLs would be read for them,
    so beyond the first block these are left to the workers.
    """
    counts = Counts()
    with Planner([tower.spec for tower in towers], store, retry_failed) as planner:
        for number, block in enumerate(source.blocks(LOOKED_AT)):
            if number and any(isinstance(sample.image, RemoteFile) for sample in block):
                return True, counts
            plan = planner.plan(block, progress)
            counts.add(plan.counts)
            if plan.needed:
                return True, counts
    return False, counts


def _counted_once(counts: Counts, before: Counts, after: Counts) -> Counts:
    """Count as new what is stored now and was not before, also where its worker died before it answered."""
    new = {folder: max(0, count - before.stored[folder]) for folder, count in after.stored.items()}
    stored = {folder: count - new[folder] for folder, count in after.stored.items()}
    return replace(
        counts,
        new=Counter({**counts.new, **new}),
        stored=Counter({**counts.stored, **stored}),
        unreadable=Counter({**counts.unreadable, **{folder: after.unreadable[folder] for folder in after.stored}}),
    )


def _run(
    ray: Any,
    source: SampleSource,
    towers: Sequence[Tower],
    store: Cache,
    settings: ExtractSettings,
    progress: Progress,
    total: int,
) -> Counts:
    counts = Counts()
    with Interrupts() as interrupts:
        _quiet(ray)
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count, resources = _share([cpus for cpus in nodes if cpus], gpus, settings)
        root = absolute(store.folder.parent)
        block = max(LEAST, min(BLOCK, -(-total // (BLOCKS_EACH * count))))
        done = _list(ray, source, block).map_batches(
            BlockActor,
            fn_constructor_args=(list(towers), root, source.name, _for_actor(settings, resources)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count),
            **resources,
        )
        with closing(_results(done, interrupts)) as results:
            with progress.step("starting workers", None):
                next(results, None)  # of the empty block: the clock starts when the first of them is there
            with progress.step(f"ray: {count} workers" if count > 1 else "ray: 1 worker", total) as advance:
                for block_counts, samples in results:
                    counts.add(block_counts)
                    advance(samples)
    return counts


class BlockActor:
    """One worker: its own models and its own shards."""

    def __init__(self, towers: list[Tower], root: str, dataset: str, settings: ExtractSettings) -> None:
        self._extractor = Extractor(towers, Cache(root, dataset), settings)
        if settings.device == "cpu" and any(is_torch(tower.request) for tower in towers):
            import torch

            torch.set_num_threads(settings.workers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        samples = _unpacked(str(batch["samples"][0]))
        if not samples:  # the block that shows that a worker is there
            return {"result": [json.dumps(Counts().to_json())], "error": [""], "samples": [0]}
        try:
            result, error = json.dumps(self._extractor.extract(samples).to_json()), ""
        except MmfeatError as problem:  # Ray would carry its text only, in a traceback
            result, error = str(problem), type(problem).__name__
        return {"result": [result], "error": [error], "samples": [len(samples)]}


def _list(ray: Any, source: SampleSource, block: int) -> Any:
    """The sample list as a Ray data set of one row a block of samples, read by one task as it is used."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class SampleList(Datasource):
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _packed_blocks(data, columns, block), metadata)]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    data, columns = absolute(source.data), source.columns
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = 1  # bytes: Ray would gather rows, here each one is work enough
    try:
        return ray.data.read_datasource(SampleList(), override_num_blocks=1, num_cpus=READER_CPUS)
    finally:
        context.target_max_block_size = before


def _packed_blocks(data: str, columns: dict[str, str], size: int) -> Iterator[Any]:
    import pyarrow

    yield pyarrow.table({"samples": ["[]"]})  # whoever answers it has started
    for block in SampleSource(data, columns).blocks(size):
        rows = [[s.id, s.text, None if s.image is None else str(s.image), s.text_error, s.image_error] for s in block]
        yield pyarrow.table({"samples": [json.dumps(rows)]})


def _unpacked(packed: str) -> list[Sample]:
    samples = []
    for id, text, image, text_error, image_error in json.loads(packed):
        place = None if image is None else RemoteFile(image) if is_remote(image) else Path(image)
        samples.append(Sample(id, text, place, None, text_error, image_error))
    return samples


def _share(nodes: Sequence[float], gpus: int, settings: ExtractSettings) -> tuple[int, dict[str, float]]:
    """How many actors, and what each gets: a GPU, or a share of its node's CPUs; `nodes` are the CPUs of each.

    Every node keeps some CPU, so the task that reads the list finds a place whatever else runs.
    """
    if settings.device.startswith("cuda:") or (settings.device == "cuda" and not gpus):
        raise ConfigError(f"--device {settings.device}: the cluster has {gpus} GPUs; use --device auto or cpu")
    if gpus and settings.device != "cpu":
        return settings.workers or gpus, {"num_gpus": 1}
    if not nodes:
        raise ConfigError("the cluster has no CPUs for workers; add a node that has some")
    each = [-(-settings.workers // len(nodes)) or max(1, int(cpus // CORES)) for cpus in nodes]
    share = min((cpus - SPARE_CPUS) / count for cpus, count in zip(nodes, each, strict=True))
    if share < READER_CPUS:
        raise ConfigError(f"--workers {settings.workers}: the cluster has {sum(nodes):g} CPUs; ask for fewer workers")
    return settings.workers or sum(each), {"num_cpus": int(share * 100) / 100}


def _for_actor(settings: ExtractSettings, resources: dict[str, float]) -> ExtractSettings:
    """The settings within an actor, whose `workers` are its readers."""
    if "num_gpus" in resources:
        return replace(settings, device="cuda", workers=0)
    return replace(settings, device="cpu", workers=math.ceil(resources["num_cpus"]))


def _results(data: Any, interrupts: Interrupts) -> Generator[tuple[Counts, int], None, None]:
    """What the actors did, block by block, with the number of samples; an error of theirs is raised here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.data", category=UserWarning)  # it wants several list readers
        rows = iter(data.iter_rows())
        try:
            for row in rows:
                interrupts.obey()
                if row["error"]:
                    raise getattr(errors, row["error"])(row["result"])
                yield Counts.from_json(json.loads(row["result"])), int(row["samples"])
            interrupts.obey()
        finally:  # its threads would go on asking a cluster that was left, and crash
            interrupts.leave()
            with without_stderr():  # which complain of the workers that are sent away
                rows.close()


def _check_shared(store: Cache, towers: Sequence[Tower], counts: Counts) -> None:
    """Raise `CacheError` where this machine does not see what the workers wrote."""
    for tower in towers:
        if counts.new[tower.spec.folder_name] and not len(store.row_index(tower.spec).keys):
            raise CacheError(
                f"{store.folder}: the workers wrote to a folder of this name that this machine does not see; give a "
                "--cache that all machines share"
            )


def _quiet(ray: Any) -> None:
    """Ray's own bars and logs would interleave with ours."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
