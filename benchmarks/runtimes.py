"""The runtimes of `mmfeat extract --runtime` in turns: processor time a sample, and the largest difference to torch.

    python benchmarks/runtimes.py DATA clip:weights/clip-vit-b-32 resnet50:weights/resnet50.pth timm:FOLDER

DATA is a folder of photos and texts of one name. `plain` is torch's own pass; differences are shares of a row's largest
value. What a note calls refused or slower is torch's pass again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.runtime import difference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import Runtime

NAMES = ("plain", "torch", "onnxruntime", "openvino")
ROUNDS, BATCH = 4, {"image": 16, "text": 32}
MANY = {"image": 10**9, "text": 10**9}


def contents(data: Path, modality: str) -> list[Any]:
    """The first photos or texts of a folder, as many as a batch on a CPU has."""
    files = sorted(data.glob("*.jpg" if modality == "image" else "*.txt"))[: BATCH[modality]]
    if modality == "text":
        return [file.read_text(errors="replace") for file in files]
    return [Image.open(file).convert("RGB") for file in files]


def compare(request: str, data: Path, folder: Path) -> None:
    """Print a line for each tower of a request and each runtime."""
    towers = describe_encoders([request], EncoderOptions(dtype="float32", cleaning="none"))
    loaded = {name: load_encoders(towers, "cpu", Runtime(name, folder, samples=MANY)) for name in NAMES[1:]}
    loaded["plain"] = load_encoders(towers, "cpu")
    for number, plain in enumerate(loaded["plain"]):
        batch = [plain.prepare(one) for one in contents(data, plain.modality)]
        expected, seconds = torch.from_numpy(plain.embed(batch)[0]), dict.fromkeys(NAMES, float("inf"))
        for name in NAMES:
            loaded[name][number].embed(batch)  # the first batch chooses
        for _ in range(ROUNDS):
            for name in NAMES:
                start = time.process_time()
                vectors = loaded[name][number].embed(batch)[0]
                seconds[name] = min(seconds[name], time.process_time() - start)
                if _ == 0 and name != "plain":
                    print(
                        f"  {name}: {difference(torch.from_numpy(vectors), expected):.1e} {loaded[name][number].note()}"
                    )
        shown = ", ".join(f"{name} {1e3 * seconds[name] / len(batch):.1f} ms" for name in NAMES)
        ratios = ", ".join(f"{seconds['plain'] / seconds[name]:.2f} x" for name in NAMES[1:])
        print(f"{plain.specs[0].name}: {shown} a sample; {ratios}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for request in sys.argv[2:]:
            compare(request, Path(sys.argv[1]), Path(folder))
