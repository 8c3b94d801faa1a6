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
from typing import Any

from mmfeat import errors
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, is_torch
from mmfeat.errors import CacheError, ConfigError, MmfeatError
from mmfeat.extraction.extract import Extractor, ExtractSettings, Work
from mmfeat.extraction.missing import Counts, Planner
from mmfeat.samples.dataset import Sample, SampleSource
from mmfeat.samples.photo_cells import packed, unpacked
from mmfeat.system.ray_cluster import Interrupts, join_cluster, leave_cluster, without_stderr
from mmfeat.system.remote import RemoteFile, absolute, is_remote
from mmfeat.system.trust import is_trusted, trust
from mmfeat.system.wording import Progress

LOOKED_AT = 65_536  # samples that are looked up at a time before Ray is started
RAY_BLOCK = 16_384  # samples of a block at most; within a block rows are committed every 30 seconds
BLOCKS_EACH = 4  # blocks an actor at least, so that all actors end at about the same time
LEAST = 32  # samples of a block at least
CORES = 4  # CPUs of an actor that has no GPU
READER_CPUS = 0.25  # CPUs of the task that reads the list: actors that take all CPUs would starve it
SPARE_CPUS = 0.5  # CPUs of each node that actors leave free


def extract_on_ray(
    work: Work, settings: ExtractSettings, address: str | None, progress: Progress, total: int
) -> Counts:
    """Encode what the cache lacks of `total` samples; workers must see the data and the cache by the same paths.

    Ray is started only if anything is missing. A list of at most `LOOKED_AT` samples is looked up again afterwards, so
    that a content that several workers met counts once.
    """
    missing, before = _look(work, settings.retry_failed, progress)
    if not missing:
        return before
    with progress.step("starting ray", None):
        ray, started = join_cluster(address)
    try:
        counts = _run(ray, work, settings, progress, total)
    finally:
        if started:
            leave_cluster(ray)
    _check_shared(work, counts)
    if total <= LOOKED_AT:
        counts = _counted_once(counts, before, _look(work, False, progress)[1])
    return counts


def _look(work: Work, retry_failed: bool, progress: Progress) -> tuple[bool, Counts]:
    """Whether anything is missing, and the counts up to the first block that lacks something.

    The content keys of photos are computed here and kept in the stat index, where the workers find them. That reads the
    photos, so beyond the first block photos behind URLs are left to the workers.
    """
    counts = Counts()
    with Planner([tower.spec for tower in work.towers], work.store, retry_failed) as planner:
        for number, block in enumerate(work.source.blocks(LOOKED_AT)):
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


def _run(ray: Any, work: Work, settings: ExtractSettings, progress: Progress, total: int) -> Counts:
    """Send blocks of samples through actors, and add up the counts of all blocks."""
    counts = Counts()
    with Interrupts() as interrupts:
        _quiet(ray)
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count, resources = _share([cpus for cpus in nodes if cpus], gpus, settings)
        root = absolute(work.store.folder.parent)
        block = max(LEAST, min(RAY_BLOCK, -(-total // (BLOCKS_EACH * count))))
        done = _list(ray, work.source, block).map_batches(
            BlockActor,
            fn_constructor_args=(work.towers, root, work.source.name, _for_actor(settings, resources), is_trusted()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count),
            **resources,
        )
        with closing(_results(done, interrupts)) as results:
            with progress.step("starting workers", None):
                next(results, None)  # result of the empty block: the first worker is there, the clock starts
            with progress.step(f"ray: {count} workers" if count > 1 else "ray: 1 worker", total) as advance:
                for block_counts, samples in results:
                    counts.add(block_counts)
                    advance(samples)
    return counts


class BlockActor:
    """One worker, with models and shards that no other worker touches."""

    def __init__(
        self, towers: list[Tower], root: str, dataset: str, settings: ExtractSettings, trusted: bool = False
    ) -> None:
        trust(trusted)  # the user's consent to code of a checkpoint belongs to the process
        self._extractor = Extractor(towers, Cache(root, dataset), settings)
        if settings.device == "cpu" and any(is_torch(tower.request) for tower in towers):
            import torch

            torch.set_num_threads(settings.workers)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = json.loads(str(batch["samples"][0]))
        if not rows:  # the empty block, whose answer shows that a worker has started
            return {"result": [Counts().to_json()], "error": [""], "samples": [0]}
        samples = [Sample(id, text, unpacked(image), None, *errors) for id, text, image, *errors in rows]
        try:
            result, error = self._extractor.extract(samples).to_json(), ""
        except MmfeatError as problem:  # Ray would keep only the text of an exception
            result, error = str(problem), type(problem).__name__
        return {"result": [result], "error": [error], "samples": [len(samples)]}


def _list(ray: Any, source: SampleSource, block: int) -> Any:
    """The sample list as a Ray data set, one row a block of samples, read by one task on demand."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class SampleList(Datasource):
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _packed_blocks(data, columns, block), metadata)]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    data, columns = source.data if is_remote(source.data) else absolute(source.data), source.columns
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = 1  # bytes: Ray must not gather rows, each of which is a whole block of samples
    try:
        return ray.data.read_datasource(SampleList(), override_num_blocks=1, num_cpus=READER_CPUS)
    finally:
        context.target_max_block_size = before


def _packed_blocks(data: str, columns: dict[str, str], size: int) -> Iterator[Any]:
    """Tables of one row: an empty block, then each block of samples as JSON."""
    import pyarrow

    yield pyarrow.table({"samples": ["[]"]})
    for block in SampleSource(data, columns).blocks(size):
        rows = [[s.id, s.text, packed(s.image), s.text_error, s.image_error] for s in block]
        yield pyarrow.table({"samples": [json.dumps(rows)]})


def _share(nodes: Sequence[float], gpus: int, settings: ExtractSettings) -> tuple[int, dict[str, float]]:
    """(number of actors, resources of each): one GPU, or a share of the CPUs of a node; `nodes` lists their CPUs.

    Every node keeps some CPU free, so the task that reads the list can run beside the actors.
    """
    if settings.device.startswith("cuda:") or (settings.device == "cuda" and not gpus):
        raise ConfigError(f"--device {settings.device}: the cluster has {gpus} GPUs; use --device auto or cpu")
    if gpus and settings.device != "cpu":
        return settings.workers or gpus, {"num_gpus": 1}
    if not nodes:
        raise ConfigError("the cluster has no CPUs for workers; add a node that has some")
    actors = [-(-settings.workers // len(nodes)) or max(1, int(cpus // CORES)) for cpus in nodes]
    share = min((cpus - SPARE_CPUS) / count for cpus, count in zip(nodes, actors, strict=True))
    if share < READER_CPUS:
        raise ConfigError(f"--workers {settings.workers}: the cluster has {sum(nodes):g} CPUs; ask for fewer workers")
    return settings.workers or sum(actors), {"num_cpus": int(share * 100) / 100}


def _for_actor(settings: ExtractSettings, resources: dict[str, float]) -> ExtractSettings:
    """The settings of an actor, where `workers` is the number of its readers."""
    if "num_gpus" in resources:
        return replace(settings, device="cuda", workers=0)
    return replace(settings, device="cpu", workers=math.ceil(resources["num_cpus"]))


def _results(data: Any, interrupts: Interrupts) -> Generator[tuple[Counts, int], None, None]:
    """Yield the counts and the number of samples of each block; raises the error of an actor."""
    with warnings.catch_warnings():
        # Ray advises several readers of the list.
        warnings.filterwarnings("ignore", module=r"ray\.data", category=UserWarning)
        rows = iter(data.iter_rows())
        try:
            for row in rows:
                interrupts.obey()
                if row["error"]:
                    raise getattr(errors, row["error"])(row["result"])
                yield Counts.from_json(row["result"]), int(row["samples"])
            interrupts.obey()
        finally:  # Ray's threads would go on asking a cluster that was left, and crash
            interrupts.leave()
            with without_stderr():  # Ray complains of the workers that are sent away
                rows.close()


def _check_shared(work: Work, counts: Counts) -> None:
    """Raise `CacheError` where this machine does not see what the workers wrote."""
    for tower in work.towers:
        if counts.new[tower.spec.folder_name] and not len(work.store.row_index(tower.spec).keys):
            raise CacheError(
                f"{work.store.folder}: the workers wrote to a folder of this name that this machine does not see; "
                "give a --cache that all machines share"
            )


def _quiet(ray: Any) -> None:
    """Silence Ray's bars and logs, which would interleave with those of mmfeat."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
