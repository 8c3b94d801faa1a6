"""Extraction against the loop that peers write, and against bare forward passes, side by side in one run.

    python benchmarks/extract.py --data ../mvsa [--pairs 256] [SECTION ...]
    python benchmarks/extract.py sentences --data ../mvsa --model ../weights/all-MiniLM-L6-v2

Sections: clip (against the loop), bare (against forward passes over tensors in memory), three (CLIP, BERT and
ResNet-50 together), sentences (against sentence-transformers, if it is installed), large (a list of a million texts),
cuda. Weights are random in the real architectures; without --data the demo's pairs are used. Each way runs in a fresh
process, in turns, with its model loaded before the clock starts; the fastest of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from random_weights import main as write_weights
from random_weights import write_clip

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders, load_encoders, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.extraction.encode import CPU_SIZES
from mmfeat.extraction.extract import BLOCK, Extractor, ExtractSettings
from mmfeat.extraction.missing import BlockPlan, Planner
from mmfeat.extraction.reader import Reader
from mmfeat.extraction.requests import resolve_options
from mmfeat.samples.dataset import Sample, SampleSource, read_samples
from mmfeat.samples.demo import write_demo
from mmfeat.system.hardware import cpu_count, resolve_device, resolve_dtype

SECTIONS = ("clip", "bare", "three", "sentences", "large", "cuda")
REFERENCE_BATCH, REFERENCE_WORKERS = 64, 2
ROUNDS = 3


def main() -> None:
    """Run the sections that are named, or all that can run here; a way of one when started by this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    parser.add_argument("--data", help="folder or table of real pairs")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large list")
    parser.add_argument("--model", help="folder of a sentence encoder")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    given = parser.parse_args()
    import_torchvision()
    if given.way:
        print(json.dumps(WAYS[given.way](given)))
        return
    sections = given.sections or [name for name in SECTIONS if name != "sentences" or given.model]
    with tempfile.TemporaryDirectory() as place:
        given.place = place
        given.data = given.data or str(write_demo(f"{place}/demo", max(60, given.pairs)))
        write_weights(Path(place))
        print(f"{cpu_count()} cores, auto is {resolve_dtype()} here, {given.pairs} pairs of {Path(given.data).name}\n")
        for name in sections:
            globals()[f"show_{name}"](given)


def show_clip(given: argparse.Namespace) -> None:
    """CLIP ViT-B/32, image and text, in the machine's own arithmetic and in float32."""
    dtypes = list(dict.fromkeys([resolve_dtype(), "float32"]))
    seconds = in_turns(given, ["reference", *(f"clip-{dtype}" for dtype in dtypes)])
    wanted = np.load(f"{given.place}/reference.npz")
    print("| CLIP ViT-B/32, photo and text | pairs/s | against the loop | goal | farthest row |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| DataLoader, open_clip, float32, padded to 77 | {given.pairs / seconds['reference']:.1f} | 1 x | | |")
    for dtype in dtypes:
        found, name = np.load(f"{given.place}/clip-{dtype}.npz"), f"clip-{dtype}"
        ratio = seconds["reference"] / seconds[name]
        goal = ">= 1.3 x, within 1e-5" if dtype == "float32" else ">= 4 x, cosine >= 0.999"
        apart = max(float(np.abs(found[part] - wanted[part]).max()) for part in wanted)
        least = min(float(cosines(found[part], wanted[part]).min()) for part in wanted)
        far = f"{apart:.1e} apart, cosine {least:.6f}"
        print(f"| mmfeat {dtype} | {given.pairs / seconds[name]:.1f} | {ratio:.2f} x | {goal} | {far} |")
    print()


def show_bare(given: argparse.Namespace) -> None:
    """From files to committed shards, against forward passes over inputs in memory."""
    names = [f"bare-{dtype}" for dtype in dict.fromkeys([resolve_dtype(), "float32"])]
    print("| CLIP ViT-B/32 end to end | against bare forward passes | goal |\n| --- | --- | --- |")
    for name in names:
        found = [run(given, name) for _ in range(given.rounds)]
        ratio = min(each["whole"] for each in found) / min(each["forward"] for each in found)
        print(f"| {name.removeprefix('bare-')} | {ratio:.2f} x | <= 1.15 x |")
    print()


def show_three(given: argparse.Namespace) -> None:
    """CLIP, BERT-base and ResNet-50 at once, against the sum of their forward passes and one decode."""
    found = [run(given, "three") for _ in range(given.rounds)]
    whole = min(each["whole"] for each in found)
    parts = min(each["forward"] for each in found) + min(each["decode"] for each in found)
    print("| CLIP + BERT + ResNet-50 at once | against forward passes + one decode | goal |\n| --- | --- | --- |")
    print(f"| {resolve_dtype()} | {whole / parts:.2f} x | <= 1.05 x |\n")


def show_sentences(given: argparse.Namespace) -> None:
    """A sentence encoder on the texts alone, against sentence-transformers' `encode`."""
    names = ["sentence-transformers", "sentences-auto", "sentences-float32"]
    seconds = in_turns(given, names)
    wanted = np.load(f"{given.place}/{names[0]}.npz")["text"]
    print(f"| {Path(given.model).name} | texts/s | against sentence-transformers | goal | least cosine |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        least = cosines(np.load(f"{given.place}/{name}.npz")["text"], wanted).min()
        ratio = seconds[names[0]] / seconds[name]
        goal = ">= 3 x" if name == "sentences-auto" else ""
        print(f"| {name} | {given.pairs / seconds[name]:.0f} | {ratio:.2f} x | {goal} | {least:.6f} |")
    print()


def show_large(given: argparse.Namespace) -> None:
    """Rate and memory from block to block of a long list."""
    found = run(given, "large")
    print("| rows done | rows/s of this block | resident memory, MB |\n| --- | --- | --- |")
    for rows, rate, memory in found["blocks"]:
        print(f"| {rows:,} | {rate:,.0f} | {memory:,.0f} |")
    memories = [memory for _, _, memory in found["blocks"]]
    print(f"\n{min(memories):,.0f} to {max(memories):,.0f} MB; what has to grow are 26 MB a million rows\n")


def show_cuda(given: argparse.Namespace) -> None:
    """Rates on a GPU, as a share of bare forward passes."""
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here\n")
        return
    write_clip(Path(given.place) / "clip-vit-l-14", "ViT-L-14")
    print(f"| {torch.cuda.get_device_name()} | dtype | samples/s | of bare forward | limited by | goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in ("clip.image", "clip-l.image", "resnet50", "bert"):
        for dtype in ("float16", "bfloat16"):
            found = run(given, f"cuda/{model}/{dtype}")
            share = found["forward"] / found["whole"]
            rate = found.samples / found["whole"]
            print(f"| {model} | {dtype} | {rate:,.0f} | {share:.2f} | {found['bottleneck']} | >= 0.9 |")
    print()


def in_turns(given: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Seconds of each way, the fastest of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            found[name].append(run(given, name)["whole"])
    return {name: min(seconds) for name, seconds in found.items()}


def run(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--way", name, "--data", given.data, "--pairs", str(given.pairs)]
    command += ["--place", given.place, "--rows", str(given.rows), *(["--model", given.model] if given.model else [])]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) of two (N, D)."""
    products = (one.astype(np.float64) * other).sum(1)
    return np.asarray(products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))


def pairs_of(given: argparse.Namespace) -> list[Sample]:
    """Different samples with a text and a photo, the first ones of the list."""
    texts: set[str] = set()
    photos: set[bytes] = set()
    found = []
    for sample in read_samples(given.data):
        photo = sample.image.read_bytes() if sample.image else b""
        if sample.text and photo and sample.text not in texts and photo not in photos and _opens(photo):
            texts.add(sample.text)
            photos.add(photo)
            found.append(sample)
    return found[: given.pairs]


def _opens(photo: bytes) -> bool:
    from mmfeat.samples.photos import decode_image

    return decode_image(photo)[0] is not None


def reference(given: argparse.Namespace) -> dict[str, Any]:
    """The loop that peers use: open_clip's transform and tokenizer in a DataLoader, float32, texts padded to 77."""
    import open_clip
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    name = f"local-dir:{given.place}/clip-vit-b-32"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    samples = pairs_of(given)

    class Pairs(Dataset):
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, row: int) -> tuple[Any, Any]:
            return transform(Image.open(samples[row].image)), tokenizer([samples[row].text])[0]

    loader = DataLoader(Pairs(), batch_size=REFERENCE_BATCH, num_workers=REFERENCE_WORKERS)
    images, texts = [], []
    start = time.perf_counter()
    with torch.no_grad():
        for pictures, ids in loader:
            images.append(model.encode_image(pictures))
            texts.append(model.encode_text(ids))
    seconds = time.perf_counter() - start
    np.savez(f"{given.place}/reference.npz", image=torch.cat(images).numpy(), text=torch.cat(texts).numpy())
    return {"whole": seconds}


def sentence_transformers(given: argparse.Namespace) -> dict[str, Any]:
    """Its own `encode` as a user calls it, in float32, as it advises where a checkpoint is in float16."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(given.model, device="cpu", model_kwargs={"dtype": "float32"})
    texts = [sample.text for sample in pairs_of(given)]
    start = time.perf_counter()
    vectors = model.encode(texts)
    seconds = time.perf_counter() - start
    np.savez(f"{given.place}/sentence-transformers.npz", text=vectors)
    return {"whole": seconds}


def extraction(
    given: argparse.Namespace, name: str, requests: list[str], dtype: str, modality: str = ""
) -> dict[str, Any]:
    """From files to committed shards, with the forward passes and the decoding alone before it; saves the vectors."""
    options = resolve_options(EncoderOptions(dtype=dtype, cleaning="none"), "auto")
    towers = [t for t in describe_encoders(requests, options) if modality in ("", t.spec.modality)]
    samples = pairs_of(given)
    with tempfile.TemporaryDirectory(dir=given.place) as folder:
        store = Cache(folder, "pairs")
        with Extractor(towers, store, ExtractSettings()) as extractor:
            extractor.load({tower.spec.fingerprint for tower in towers})
            start = time.perf_counter()
            counts = extractor.extract(samples)
            whole = time.perf_counter() - start
        alone = _alone(towers, samples, Path(folder), resolve_device())
        features = store.load(samples, [tower.spec for tower in towers])
    blocks = {block.modality: block.vectors.astype(np.float32) for block in features.blocks}
    np.savez(f"{given.place}/{name.replace('/', '-')}.npz", **blocks)
    slowest = max(counts.clocks.values(), key=lambda clocks: clocks.wall)
    return {"whole": whole, "samples": len(samples), "bottleneck": slowest.bottleneck, **alone}


def _alone(towers: Sequence[Tower], samples: Sequence[Sample], folder: Path, device: str) -> dict[str, float]:
    """Seconds of reading and decoding alone, and of bare forward passes over the same batches in memory."""
    found = {"forward": 0.0, "decode": 0.0}
    with Planner([tower.spec for tower in towers], Cache(folder / "none", "x")) as planner:
        plan = planner.plan(samples)
    for modality, items in plan.items.items():
        encoders = [encoder for encoder in load_encoders(list(towers), device) if encoder.modality == modality]
        start = time.perf_counter()
        prepared = list(Reader(encoders).read(items, len(items))) if encoders else []
        found["decode"] += time.perf_counter() - start
        for number, encoder in enumerate(encoders):
            request = next(tower.request for tower in towers if tower.spec == encoder.specs[0])
            opened = open_towers(Tower(request, encoder.specs[0]), list(encoder.specs))[0]
            found["forward"] += _forward([entry.inputs[number] for entry in prepared], opened, device)
    return found


def _forward(inputs: list[Any], tower: TorchTower, device: str) -> float:
    """Seconds of the second of two turns; the longest come first."""
    import torch

    tower.encoder(device)  # where and in what it computes
    if tower.length is not None:
        inputs.sort(key=lambda one: -tower.length(one))
    size = CPU_SIZES[tower.specs[0].modality] if device == "cpu" else 256
    dtype = getattr(torch, tower.specs[0].arithmetic)
    parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    batches = [to_device(tower.collate(part), device, dtype) for part in parts]
    for _ in range(2):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                last = tower.network.forward(batch)
            last.cpu()
        seconds = time.perf_counter() - start
    return seconds


def large(given: argparse.Namespace) -> dict[str, Any]:
    """A list of made-up texts through the built-in text encoder, a block at a time."""
    table = Path(given.place) / "large.csv"
    with table.open("w") as file:
        file.write("id,text\n")
        file.writelines(f"s{row},{_words(row)}\n" for row in range(given.rows))
    source = SampleSource(table)
    source.overview()
    towers = describe_encoders(["hashing"], resolve_options(EncoderOptions(cleaning="none"), "cpu"))
    blocks: list[tuple[int, float, int]] = []

    def plans(planner: Planner) -> Iterator[BlockPlan]:
        """The plan of each block; its time ends when the next plan is asked for."""
        rows = 0
        for block in source.blocks(BLOCK):
            start = time.perf_counter()
            yield planner.plan(block)
            rows += len(block)
            blocks.append((rows, len(block) / (time.perf_counter() - start), _resident()))

    with tempfile.TemporaryDirectory(dir=given.place) as folder:
        with Extractor(towers, Cache(folder, "large"), ExtractSettings("cpu")) as extractor:
            counts = extractor.encode(plans(extractor.planner))
        assert counts.new.total() == blocks[-1][0]
    return {"blocks": blocks}


def _words(row: int) -> str:
    numbers = np.random.default_rng(row).integers(0, 30_000, 12)
    return " ".join(f"word{number}" for number in numbers.tolist())


def _resident() -> float:
    """MB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _ways() -> Iterator[tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]]:
    """All ways by name."""
    clip, bert, resnet = "clip:{}/clip-vit-b-32", "bert:{}/bert-base", "resnet50:{}/resnet50.pth"

    def way(name: str, requests: list[str], dtype: str, modality: str = "") -> Callable[..., dict[str, Any]]:
        def measure(given: argparse.Namespace) -> dict[str, Any]:
            asked = [request.format(given.place) for request in requests if request] or [f"bert:{given.model}"]
            return extraction(given, name, asked, dtype, modality)

        return measure

    yield "reference", reference
    yield "sentence-transformers", sentence_transformers
    yield "large", large
    yield "three", way("three", [clip, bert, resnet], "auto")
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        yield f"clip-{dtype}", way(f"clip-{dtype}", [clip], dtype)
        yield f"bare-{dtype}", way(f"bare-{dtype}", [clip], dtype)
        yield f"sentences-{dtype}", way(f"sentences-{dtype}", [""], dtype, "text")
        models = {"clip.image": clip, "clip-l.image": "clip:{}/clip-vit-l-14", "resnet50": resnet, "bert": bert}
        for model, request in models.items():
            name, modality = f"cuda/{model}/{dtype}", "text" if model == "bert" else "image"
            yield name, way(name, [request], dtype, modality)


WAYS = dict(_ways())

if __name__ == "__main__":
    main()
