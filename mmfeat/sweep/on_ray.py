"""Jobs of a sweep on a Ray cluster."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mmfeat.cache.features import Features
from mmfeat.errors import MmfeatError
from mmfeat.heads.jobs import Fitted, Job, Workbench, run_job
from mmfeat.samples.labels import Targets
from mmfeat.system.ray_cluster import join_cluster, leave_cluster
from mmfeat.system.wording import Advance


class RayEngine:
    """A task a job on a Ray cluster.

    Features travel once; features on disk must lie in a folder that all nodes share.
    """

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, address: str | None) -> None:
        ray, self._started = join_cluster(address)
        self.ray = ray
        self.bench = Workbench(features, targets, device, attend)
        self._parts = ray.put((features, targets, device, attend))
        self._waiting: set[Any] = set()  # unfinished tasks of all threads
        self._task = ray.remote(num_cpus=1, num_gpus=1 if device.startswith("cuda") else 0)(_run_remote)

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs; Ray runs the jobs of a lost worker again."""
        waiting = {self._task.remote(job, [self._parts]): number for number, job in enumerate(jobs)}
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


def _run_remote(job: Job, parts: list[Any]) -> list[Fitted]:
    return run_job(job, _workbench(*parts))


@functools.lru_cache(1)  # the jobs of a worker process arrange the features once
def _workbench(parts: Any) -> Workbench:
    """The workbench of a reference to features, targets, device and what cross-attention looks at."""
    import ray

    return Workbench(*ray.get(parts))
