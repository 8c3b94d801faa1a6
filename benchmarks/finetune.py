"""An epoch of stage 2 (CLIP ViT-B/32, last text layer) from the cached prefix against full passes, side by side.

    python benchmarks/finetune.py [--samples 64] [--batch-size 16]

Random weights, texts of 28 tokens as tweets have them, float32. "both towers in full" is what a loop without a cache
runs each epoch; "text in full" has the photos cached, as `mmfeat finetune --path full` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from random_weights import write_clip
from torch import Tensor

from mmfeat.encoders.layers import capture
from mmfeat.encoders.registry import describe_encoders, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.finetune.unfreeze import Resumed, moving_parameters
from mmfeat.system.hardware import cpu_count

GOAL, ROUNDS = 15.0, 3
TEXT = "what a wonderful day of this long year it is for all of us who came here to see the sea and the sun again"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    import_torchvision()
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip")
        ways = make_ways(f"clip:{folder}/clip", given.samples, given.batch_size)
        seconds = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, epoch in ways.items():
                start = time.perf_counter()
                epoch()
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(each[1:]) / given.samples * 1e3 for name, each in seconds.items()}
    cached = best["cached prefix"]
    print(f"{cpu_count()} cores, torch {torch.__version__}, batch {given.batch_size}\n")
    print("| way | ms a sample | against the cached prefix | goal |\n| --- | --- | --- | --- |")
    for name, each in best.items():
        goal = f">= {GOAL:g}" if name == "both towers in full" else ""
        print(f"| {name} | {each:.1f} | {each / cached:.1f} x | {goal} |")


def make_ways(request: str, samples: int, size: int) -> dict[str, Callable[[], None]]:
    """An epoch each way, over the same samples and batches, with an optimiser of its own."""
    options = EncoderOptions(dtype="float32", cleaning="none")
    image, text = describe_encoders([request], options)
    (pictures,) = open_towers(image)
    pixels = torch.randn(samples, 3, 224, 224)
    whole, part = (open_towers(text, [replace(text.spec, output="prefix", layer=1)])[0] for _ in range(2))
    ids = whole.collate([whole.prepare(TEXT)] * samples)
    with torch.no_grad(), capture([whole.network.point(whole.specs[0])]) as captured:
        photos = torch.cat([pictures.network.forward(each) for each in pixels.split(size)])
        whole.network.forward(ids)
    kept = whole.keep(ids)
    assert kept is not None
    longest = int(kept.sum(1).max())
    prefix, mask = captured[0][:, :longest].clone(), kept[:, :longest]
    resumed = Resumed(part, 1, "cpu")
    depths = moving_parameters(part, lambda: resumed(prefix[:1], mask[:1]), 1, False)

    def both(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            seen = pictures.network.forward(pixels[rows])
        return seen, whole.network.forward(ids[rows])

    return {
        "both towers in full": epoch_of(whole, depths, both, samples, size),
        "text in full": epoch_of(
            whole, depths, lambda rows: (photos[rows], whole.network.forward(ids[rows])), samples, size
        ),
        "cached prefix": epoch_of(
            part, depths, lambda rows: (photos[rows], resumed(prefix[rows], mask[rows])), samples, size
        ),
    }


def epoch_of(
    tower: TorchTower,
    names: dict[str, int],
    vectors: Callable[[slice], tuple[Tensor, Tensor]],
    samples: int,
    size: int,
) -> Callable[[], None]:
    """Forward, backward and AdamW over all batches."""
    head, labels = torch.nn.Linear(1024, 3), torch.randint(0, 3, (samples,))
    moving = [tower.module.get_parameter(name).requires_grad_(True) for name in names]
    optimiser = torch.optim.AdamW(
        [{"params": moving, "lr": 5e-6}, {"params": head.parameters(), "lr": 3e-4}], fused=True
    )

    def epoch() -> None:
        for start in range(0, samples, size):
            rows = slice(start, start + size)
            optimiser.zero_grad()
            logits = head(torch.cat(vectors(rows), 1))
            torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimiser.step()

    return epoch


if __name__ == "__main__":
    main()
