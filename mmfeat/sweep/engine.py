"""Engines run the jobs of a sweep: on the cores or the GPU of one machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from mmfeat.cache.features import Features
from mmfeat.errors import MmfeatError
from mmfeat.heads.jobs import Fitted, Job, Workbench, run_job
from mmfeat.samples.labels import Targets
from mmfeat.system.hardware import check_engine, cpu_count, join_cluster, leave_cluster
from mmfeat.system.wording import Advance


class Engine(Protocol):
    """Runs jobs side by side; `bench` is this process's view of the features."""

    bench: Workbench

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]: ...
    def close(self) -> None: ...


class LocalEngine:
    """One job a CPU core, or all on one GPU.

    A job uses one thread (see `one_torch_thread`, which holds around all of them), so sums do not depend on the number
    of workers.
    """

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, workers: int = 0) -> None:
        import torch

        self.bench = Workbench(features, targets, device, attend)
        self.stopped = False
        workers = (workers or cpu_count()) if device == "cpu" else 1
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs."""
        return [future.result() for future in self._submit(jobs, advance)]

    def close(self) -> None:
        """Drop jobs that wait; a job that runs ends with its epoch."""
        self.stopped = True
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, jobs: Sequence[Job], advance: Advance) -> list[Future[list[Fitted]]]:
        return [self._pool.submit(run_job, job, self.bench, partial(self._advance, advance)) for job in jobs]

    def _advance(self, advance: Advance, steps: int, note: str = "") -> None:
        if self.stopped:
            raise KeyboardInterrupt
        advance(steps, note)


class RayEngine:
    """A task a job on a Ray cluster.

    Features travel once; features on disk must lie in a folder that all nodes share.
    """

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, address: str | None) -> None:
        ray, self._started = join_cluster(address)
        self.ray = ray
        self.bench = Workbench(features, targets, device, attend)
        self._parts = ray.put((features, targets, device, attend))
        self._name = self._parts.hex()
        self._waiting: set[Any] = set()  # unfinished tasks of all threads
        self._task = ray.remote(num_cpus=1, num_gpus=1 if device.startswith("cuda") else 0)(_run_remote)

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs; Ray runs the jobs of a lost worker again."""
        waiting = {self._task.remote(job, self._name, self._parts): number for number, job in enumerate(jobs)}
        self._waiting.update(waiting)
        results: list[list[Fitted]] = [[] for _ in jobs]
        while waiting:
            (done, *_), _ = self.ray.wait(list(waiting))
            self._waiting.discard(done)
            number = waiting.pop(done)
            try:
                results[number] = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:  # the error's text is the remote traceback
                raise error.cause if isinstance(error.cause, MmfeatError) else error from None
            advance(len(results[number]))
        return results

    def close(self) -> None:
        """Leave the cluster as it was: tasks that still wait or run are cancelled."""
        for task in list(self._waiting):
            self.ray.cancel(task, force=True)  # an interrupt may be lost in the middle of a step
        if self._started:
            leave_cluster(self.ray)


_benches: dict[str, Workbench] = {}  # in a worker process: its jobs arrange the features once


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
    """Make the engine that `--engine` names."""
    check_engine(name, address)
    if name == "ray":
        return RayEngine(features, targets, device, attend, address)
    return LocalEngine(features, targets, device, attend, workers)
