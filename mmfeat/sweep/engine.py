"""Engines: where the jobs of a sweep run. One machine's cores or GPU, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from mmfeat.cache.features import Features
from mmfeat.errors import MmfeatError
from mmfeat.heads.jobs import Fitted, Job, Workbench, run_job
from mmfeat.samples.labels import Targets
from mmfeat.system.hardware import check_engine, cpu_count, join_cluster, leave_cluster

Advance = Callable[[int], None]


class Engine(Protocol):
    """Runs jobs side by side; `bench` is this process's view of the features."""

    bench: Workbench

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]: ...
    def close(self) -> None: ...


class LocalEngine:
    """One job a CPU core, or all on one GPU. Sums come out alike on any number of workers: a job has one thread."""

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, workers: int = 0) -> None:
        import torch

        self.bench = Workbench(features, targets, device, attend)
        self.stopped = False
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # here and in each worker: what one of them sets counts for all in part
        workers = (workers or cpu_count()) if device == "cpu" else 1
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs."""
        return [future.result() for future in self._submit(jobs, advance)]

    def close(self) -> None:
        """Drop what waits; what runs ends with its epoch."""
        import torch

        self.stopped = True
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def _submit(self, jobs: Sequence[Job], advance: Advance) -> list[Future[list[Fitted]]]:
        return [self._pool.submit(run_job, job, self.bench, partial(self._advance, advance)) for job in jobs]

    def _advance(self, advance: Advance, heads: int) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        advance(heads)


class RayEngine:
    """A task a job on a Ray cluster; features travel once, those on disk must lie in a folder that all nodes share."""

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, address: str | None) -> None:
        ray, self._started = join_cluster(address)
        self.ray = ray
        self.bench = Workbench(features, targets, device, attend)
        self._parts = ray.put((features, targets, device, attend))
        self._name = self._parts.hex()
        self._waiting: set[Any] = set()  # tasks of all threads that have not ended
        self._task = ray.remote(num_cpus=1, num_gpus=1 if device.startswith("cuda") else 0)(_run_remote)

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs; Ray runs those of a lost worker again."""
        waiting = {self._task.remote(job, self._name, self._parts): number for number, job in enumerate(jobs)}
        self._waiting.update(waiting)
        results: list[list[Fitted]] = [[] for _ in jobs]
        while waiting:
            (done, *_), _ = self.ray.wait(list(waiting))
            self._waiting.discard(done)
            number = waiting.pop(done)
            try:
                results[number] = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:  # its text is the remote traceback
                raise error.cause if isinstance(error.cause, MmfeatError) else error from None
            advance(len(results[number]))
        return results

    def close(self) -> None:
        """Leave the cluster as it was found: what still waits or runs there is cancelled."""
        for task in list(self._waiting):
            self.ray.cancel(task, force=True)  # an interrupt may be lost in the middle of a step
        if self._started:
            leave_cluster(self.ray)


_benches: dict[str, Workbench] = {}  # of a worker process, so that its jobs arrange the features once


def _run_remote(job: Job, name: str, parts: tuple[Features, Targets, str, str]) -> list[Fitted]:
    if name not in _benches:
        _benches.clear()
        _benches[name] = Workbench(*parts)
    return run_job(job, _benches[name])


def make_engine(
    name: str,
    features: Features,
    targets: Targets,
    device: str,
    attend: str,
    workers: int = 0,
    address: str | None = None,
) -> Engine:
    """The engine that `--engine` names."""
    check_engine(name, address)
    if name == "ray":
        return RayEngine(features, targets, device, attend, address)
    return LocalEngine(features, targets, device, attend, workers)
