"""Extraction against the loop that peers write, bare forward passes and sentence-transformers, each way in turns in a
fresh process with its model loaded before the clock starts. Weights are random in the real architectures."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from random_weights import main as write_weights
from table import Row, measured

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
from mmfeat.system.hardware import resolve_device, resolve_dtype
from mmfeat.system.wording import Silent

REFERENCE_BATCH, REFERENCE_WORKERS = 64, 2
LARGE = 270_000  # rows of the long list


@dataclass(frozen=True)
class Given:
    """What a way works on: pairs of `data` (the demo's without), weights in `place`, a sentence encoder."""

    place: str
    data: str
    pairs: int
    model: str
    rounds: int
    rows: int


def rows(small: bool, data: str = "", model: str = "") -> Iterator[Row]:
    """All sections; that of sentences needs the folder of a `model`."""
    import_torchvision()
    with tempfile.TemporaryDirectory() as place:
        pairs = 24 if small else 256
        data = data or str(write_demo(f"{place}/demo", max(60, pairs)))
        write_weights(Path(place), small)
        given = Given(place, data, pairs, model, 1 if small else 2, 5000 if small else LARGE)
        for section in (clip, bare, three, *([sentences] if model else []), large_list):
            yield from section(given)


def clip(given: Given) -> Iterator[Row]:
    """CLIP ViT-B/32, image and text, in the machine's own arithmetic and in float32, against open_clip's loop."""
    dtypes = list(dict.fromkeys([resolve_dtype(), "float32"]))
    seconds = in_turns(given, ["reference", *(f"clip-{dtype}" for dtype in dtypes)])
    wanted = np.load(f"{given.place}/reference.npz")
    yield measured("CLIP, open_clip's loop, float32", given.pairs / seconds["reference"], "pairs/s")
    for dtype in dtypes:
        found, name = np.load(f"{given.place}/clip-{dtype}.npz"), f"clip-{dtype}"
        least = 1.3 if dtype == "float32" else 4.0
        yield measured(f"CLIP {dtype} against open_clip's loop", seconds["reference"] / seconds[name], "x", least=least)
        if dtype == "float32":
            apart = max(float(np.abs(found[part] - wanted[part]).max()) for part in wanted)
            yield measured("CLIP float32, farthest value from open_clip's", apart, most=1e-5)
        else:
            cosine = min(float(cosines(found[part], wanted[part]).min()) for part in wanted)
            yield measured(f"CLIP {dtype}, least cosine to open_clip's", cosine, least=0.999)


def bare(given: Given) -> Iterator[Row]:
    """From files to committed shards, against forward passes over inputs in memory."""
    for name in [f"bare-{dtype}" for dtype in dict.fromkeys([resolve_dtype(), "float32"])]:
        found = [run(given, name) for _ in range(given.rounds)]
        ratio = min(each["whole"] for each in found) / min(each["forward"] for each in found)
        yield measured(f"CLIP {name[5:]}, files to shards against bare forward passes", ratio, "x", most=1.15)


def three(given: Given) -> Iterator[Row]:
    """CLIP, BERT-base and ResNet-50 at once, against the sum of their forward passes and one decode."""
    found = [run(given, "three") for _ in range(given.rounds)]
    whole = min(each["whole"] for each in found)
    parts = min(each["forward"] for each in found) + min(each["decode"] for each in found)
    yield measured("CLIP + BERT + ResNet-50 against forward passes + one decode", whole / parts, "x", most=1.05)


def sentences(given: Given) -> Iterator[Row]:
    """A sentence encoder on the texts alone, against sentence-transformers' `encode`."""
    names = ["sentence-transformers", "sentences-auto", "sentences-float32"]
    seconds = in_turns(given, names)
    wanted = np.load(f"{given.place}/{names[0]}.npz")["text"]
    yield measured(f"{Path(given.model).name}, sentence-transformers", given.pairs / seconds[names[0]], "texts/s")
    for name in names[1:]:
        note = f"least cosine {cosines(np.load(f'{given.place}/{name}.npz')['text'], wanted).min():.6f}"
        ratio, least = seconds[names[0]] / seconds[name], 3.0 if name == "sentences-auto" else None
        yield measured(f"{name} against sentence-transformers", ratio, "x", least=least, note=note)


def large_list(given: Given) -> Iterator[Row]:
    """Rate and memory from block to block of a long list."""
    blocks = run(given, "large")["blocks"]
    rates, memories = [rate for _, rate, _ in blocks], [memory for _, _, memory in blocks]
    yield measured("hashing of a long list, last block against the first", rates[-1] / rates[0], "x", least=0.9)
    yield Row("resident memory from block to block", f"{min(memories):,.0f} to {max(memories):,.0f} MB")


def in_turns(given: Given, names: Sequence[str]) -> dict[str, float]:
    """Seconds of each way, the fastest of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            found[name].append(run(given, name)["whole"])
    return {name: min(seconds) for name, seconds in found.items()}


def run(given: Given, name: str) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, name, json.dumps(vars(given))]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) of two (N, D)."""
    products = (one.astype(np.float64) * other).sum(1)
    return np.asarray(products / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))


def pairs_of(given: Given) -> list[Sample]:
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


def reference(given: Given) -> dict[str, Any]:
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


def sentence_transformers(given: Given) -> dict[str, Any]:
    """Its own `encode` as a user calls it, in float32, as it advises where a checkpoint is in float16."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(given.model, device="cpu", model_kwargs={"dtype": "float32"})
    texts = [sample.text for sample in pairs_of(given)]
    start = time.perf_counter()
    vectors = model.encode(texts)
    seconds = time.perf_counter() - start
    np.savez(f"{given.place}/sentence-transformers.npz", text=vectors)
    return {"whole": seconds}


def extraction(given: Given, name: str, requests: list[str], dtype: str, modality: str = "") -> dict[str, Any]:
    """From files to committed shards, with the forward passes and the decoding alone before it; saves the vectors."""
    options = resolve_options(EncoderOptions(dtype=dtype, cleaning="none"), "auto")
    towers = [t for t in describe_encoders(requests, options) if modality in ("", t.spec.modality)]
    samples = pairs_of(given)
    with tempfile.TemporaryDirectory(dir=given.place) as folder:
        store = Cache(folder, "pairs")
        with Extractor(towers, store, ExtractSettings()) as extractor:
            extractor.load({tower.spec.fingerprint for tower in towers}, {}, Silent())
            start = time.perf_counter()
            extractor.extract(samples)
            whole = time.perf_counter() - start
        alone = _alone(towers, samples, Path(folder), resolve_device())
        features = store.load(samples, [tower.spec for tower in towers])
    blocks = {block.modality: block.vectors.astype(np.float32) for block in features.blocks}
    np.savez(f"{given.place}/{name.replace('/', '-')}.npz", **blocks)
    return {"whole": whole, **alone}


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


def large(given: Given) -> dict[str, Any]:
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


def _ways() -> Iterator[tuple[str, Callable[[Given], dict[str, Any]]]]:
    """All ways by name."""
    clip, bert, resnet = "clip:{}/clip-vit-b-32", "bert:{}/bert-base", "resnet50:{}/resnet50.pth"

    def way(name: str, requests: list[str], dtype: str, modality: str = "") -> Callable[..., dict[str, Any]]:
        def measure(given: Given) -> dict[str, Any]:
            asked = [request.format(given.place) for request in requests if request] or [f"bert:{given.model}"]
            return extraction(given, name, asked, dtype, modality)

        return measure

    yield "reference", reference
    yield "sentence-transformers", sentence_transformers
    yield "large", large
    yield "three", way("three", [clip, bert, resnet], "auto")
    for dtype in ("auto", "float32", "bfloat16"):
        yield f"clip-{dtype}", way(f"clip-{dtype}", [clip], dtype)
        yield f"bare-{dtype}", way(f"bare-{dtype}", [clip], dtype)
        yield f"sentences-{dtype}", way(f"sentences-{dtype}", [""], dtype, "text")


WAYS = dict(_ways())

if __name__ == "__main__":
    import_torchvision()
    print(json.dumps(WAYS[sys.argv[1]](Given(**json.loads(sys.argv[2])))))
