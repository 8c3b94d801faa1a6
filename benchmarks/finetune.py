"""An epoch of stage 2 (CLIP ViT-B/32 with random weights, last text layer, float32 weights) from the cached prefix: as
mmfeat trains, against its moving layers alone over tensors in memory, and against full passes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_weights import write_clip
from table import Row, measured
from torch import Tensor

from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.encoders.layers import capture
from mmfeat.encoders.registry import describe_encoders, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.evaluation.splits import Fold
from mmfeat.finetune.inputs import PrefixReader
from mmfeat.finetune.model import TunableModel
from mmfeat.finetune.processes import Execution, Team
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.finetune.towers import MovingTower, Slot
from mmfeat.finetune.training import Training, TrainingSetup
from mmfeat.finetune.unfreeze import Resumed, moving_parameters
from mmfeat.heads.data import HeadData
from mmfeat.heads.fusions import Concat
from mmfeat.heads.registry import HeadSettings
from mmfeat.samples.labels import Targets, indicator
from mmfeat.system.wording import Silent, ignore

GOAL, ROUNDS = 15.0, 4
TEXT = "what a wonderful day of this long year it is for all of us who came here to see the sea and the sun again"


def rows(small: bool) -> Iterator[Row]:
    """On a CPU: the cached path against a loop without a cache, and against its moving layers alone."""
    with tempfile.TemporaryDirectory() as folder:
        found = cached_epoch(Path(folder), "cpu", 16 if small else 64, 16, small)
    stage_2 = found["stage 2"]
    yield measured("stage 2, ms a sample from the cached prefix", 1e3 * stage_2, "ms")
    yield measured("stage 2: both towers in full against it", found["both towers"] / stage_2, "x", least=GOAL)
    yield measured("stage 2: text in full, photos cached, against it", found["full passes"] / stage_2, "x")
    yield measured("stage 2 against its moving layers alone", stage_2 / found["moving layers"], "x", most=1.2)


def cached_epoch(folder: Path, device: str, samples: int, size: int, small: bool = False) -> dict[str, float]:
    """Seconds a sample of an epoch each way, the fastest of some in turns; full passes on a part of the samples."""
    if not (folder / "clip").exists():
        write_clip(folder / "clip", small=small)
    image, spec = describe_encoders([f"clip:{folder / 'clip'}"], EncoderOptions(dtype="float32", cleaning="none"))
    whole, part = (open_towers(spec, [replace(spec.spec, output="prefix", layer=1)])[0] for _ in range(2))
    (pictures,) = open_towers(image)
    for tower in (whole, part, pictures):
        tower.module.to(device)
    ids = to_device(whole.collate([whole.prepare(TEXT)] * size), device, torch.float32)
    with torch.no_grad(), capture([whole.network.point(whole.specs[0])]) as captured:
        whole.network.forward(ids)
    kept = whole.keep(ids)
    assert kept is not None
    prefix, mask = captured[0][:, : int(kept.sum(1).max())].clone(), kept[:, : int(kept.sum(1).max())]
    resumed = Resumed(part, 1, device)
    depths = moving_parameters(part, lambda: resumed(prefix[:1], mask[:1]), 1, False)
    pixels = to_device(pictures.collate([pictures.prepare(Image.new("RGB", (224, 224)))] * size), device, torch.float32)
    photos = torch.randn(size, 512, device=device)

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            seen = pictures.network.forward(pixels)
        return seen, whole.network.forward(ids)

    many, few = max(16, samples // size), max(1, min(samples, 256) // size)
    text, full = lambda: (photos, resumed(prefix, mask)), lambda: (photos, whole.network.forward(ids))
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "moving layers": (partial(loop, part, depths, text, size, many), many * size),
        "full passes": (partial(loop, whole, depths, full, size, few), few * size),
        "both towers": (partial(loop, whole, depths, both, size, few), few * size),
        "stage 2": stage_two(part, depths, resumed, prefix[0].cpu().numpy(), samples, size, device),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, (epoch, count) in ways.items():
            start = time.perf_counter()
            epoch()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best[name] = min(best[name], (time.perf_counter() - start) / count)
    return best


def loop(
    tower: TorchTower, names: Mapping[str, int], vectors: Callable[[], tuple[Tensor, Tensor]], size: int, steps: int
) -> None:
    """Forward, backward and AdamW, as in a loop without a cache."""
    moving = [tower.module.get_parameter(name).requires_grad_(True) for name in names]
    head, labels = torch.nn.Linear(1024, 3).to(moving[0].device), torch.arange(size, device=moving[0].device) % 3
    optimiser = torch.optim.AdamW([*moving, *head.parameters()], 1e-6, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(torch.cat(vectors(), 1)), labels).backward()
        optimiser.step()


def stage_two(
    tower: TorchTower, depths: dict[str, int], resumed: Any, prefix: np.ndarray, samples: int, size: int, device: str
) -> tuple[Callable[[], None], int]:
    """An epoch of `mmfeat finetune` on a concat head, and its samples; prefixes are read from memory, as from the page
    cache."""
    every, length = np.arange(samples), len(prefix)
    lengths, there = np.full(samples, length), np.ones(samples, bool)
    stored = prefix.astype(np.float16)
    block = MappedBlock(
        "prefix", "text", prefix.shape[1], lengths, there, every, lambda rows: np.repeat(stored[None], len(rows), 0)
    )
    random = np.random.default_rng(0)
    vectors = tuple(
        Block(name, name, random.standard_normal((samples, 512)).astype(np.float16), there, name)
        for name in ("image", "text")
    )
    data, team = HeadData(Features(tuple(map(str, every)), vectors), "both", device), Team(device=device)
    everything = dict(tower.module.named_parameters())
    moving = {name: value.requires_grad_(True) for name, value in everything.items() if name in depths}
    frozen = {name: value for name, value in everything.items() if name not in depths}
    moved = MovingTower(
        Slot("text", 0, "text"),
        PrefixReader([block]),
        lambda inputs: resumed(*inputs),
        team,
        512,
        moving,
        depths,
        frozen,
    )
    settings = FinetuneSettings(batch_size=size, epochs=10**6, patience=10**6, amp="none")
    head = settings.of_head(HeadSettings())
    rows = Fold("all", every, every[:0], every[:0])
    setup = TrainingSetup(head, settings, rows, (1,), None)
    targets = Targets(("a", "b", "c"), indicator(every % 3, 3))
    model = TunableModel(Concat(1, data.shape, 3), data, [moved])
    execution = Execution(team, 1, 1e9, Silent())
    training = Training(model, setup, targets, execution, Path("nothing"))
    return lambda: training._epoch(ignore), training.steps * size
