"""`--engine ray`: the processes of Ray Train as one team, each on a GPU or a share of the CPUs.

All of them need the data, the cache and the run folders at the same paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmfeat.cluster import join_cluster, leave_cluster
from mmfeat.errors import MmfeatError
from mmfeat.files import read_json, write_json
from mmfeat.remote import absolute

WORKERS = 2  # where nobody names a number
CPU_SHARE = 0.9  # of a core for each process: Ray's own tasks need the rest
SCRATCH = ".ray-train"  # beside the runs: what Ray Train keeps meanwhile
ANSWER = "answer.json"  # in there, by the first process
PATHS = ("run", "data", "cache", "heads", "out")


def train_on_ray(
    train: Callable[..., Any], arguments: Mapping[str, Any], workers: int, device: str, address: str | None
) -> tuple[Path, bool]:
    """`train(**arguments)` in `workers` processes; the folder of its run, and whether that was there already.

    Raises what a process raises; a path in `arguments` may be relative.
    """
    ray, started = join_cluster(address)
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    given = {name: absolute(v) if name in PATHS and v is not None else v for name, v in arguments.items()}
    scratch = Path(given["out"]) / SCRATCH
    on_gpu = _on_gpu(ray, device)
    share = {"GPU": 1.0} if on_gpu else {"CPU": CPU_SHARE}
    scaling = ScalingConfig(num_workers=workers or WORKERS, use_gpu=on_gpu, resources_per_worker=share)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"train": train, "arguments": given, "on_gpu": on_gpu, "answer": str(scratch / ANSWER)},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(storage_path=str(scratch), name="finetune"),
    )
    try:
        trainer.fit()
        answer = read_json(scratch / ANSWER)
        return Path(answer["folder"]), bool(answer["reused"])
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        raise next((each for each in failures if isinstance(each, MmfeatError)), error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if started:
            leave_cluster(ray)


def _on_gpu(ray: Any, device: str) -> bool:
    """What the cluster has counts, not this machine."""
    return device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def _worker(config: dict[str, Any]) -> None:
    """One process: Ray Train has joined it with the others."""
    from ray.train.torch import get_device

    device = str(get_device()) if config["on_gpu"] else "cpu"
    result = config["train"](**{**config["arguments"], "device": device})
    if result.leads:
        write_json(Path(config["answer"]), {"folder": str(result.run.folder), "reused": result.reused})
