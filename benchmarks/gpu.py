"""What a GPU machine shows, in one run of at most 8 minutes: extraction, stacked heads, whole sweeps and stage 2.

    python benchmarks/gpu.py [--out gpu.json] [--device cpu] [--small] [SECTION ...]

Sections: extraction heads sweep large finetune profile, each in a process with a limit of time. Rows are printed as
they come; --out gets all of them as JSON, and the profile beside it as text. Weights are random in the real
architectures, photos and texts are generated. `--device cpu --small` tries everything on small models, for which no
goal counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract import cosines
from finetune import cached_epoch
from random_weights import write_bert, write_clip, write_resnet
from synthetic import WIDTHS, make_samples
from table import Row, in_process, machine, measured, print_json, show, ungraded

from heads import compare, make_contest
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import Copies
from mmfeat.evaluation.splits import make_folds
from mmfeat.extraction.extract import Extractor, ExtractSettings
from mmfeat.extraction.missing import Planner
from mmfeat.extraction.reader import Reader
from mmfeat.extraction.requests import resolve_options
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings, Plan
from mmfeat.heads.stack import one_torch_thread
from mmfeat.samples.dataset import Sample
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train import CHEAP_BASELINES
from mmfeat.sweep.train_all import Trainers, _train_all, rank
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Silent

LIMITS = {"extraction": 200, "heads": 90, "sweep": 40, "large": 60, "finetune": 60, "profile": 30}  # seconds
PHOTOS, TEXTS, WARM = 2048, 8192, 512
SHARE, COSINE, LOOP, SWEEP, STAGE_2 = 0.9, 0.999, 50.0, 8.0, 1.2  # the goals
FUSIONS = ("late", "concat", "gated", "film", "film-concat")
WORDS = [
    "the",
    "sun",
    "and",
    "rain",
    "came",
    "over",
    "our",
    "town",
    "on",
    "this",
    "long",
    "day",
    "we",
    "all",
    "had",
    "to",
    "wait",
    "for",
    "bus",
    "home",
    "so",
    "tired",
    "happy",
]


def main() -> None:
    """Run the sections, or one of them in this process, where this script started it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.device = resolve_device(given.device)
    if given.folder:
        print_json(SECTIONS[given.sections[0]](given))
        return
    print(f"{machine(given.device)}\n")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = show(row for name in given.sections or SECTIONS for row in _section(name, given, folder))
    print(f"\n{time.perf_counter() - start:.0f} s; {sum(row.verdict == 'MISSED' for row in rows)} goals missed")
    given.out.write_text(json.dumps({"machine": machine(given.device), "rows": list(map(asdict, rows))}, indent=1))


def _section(name: str, given: argparse.Namespace, folder: str) -> Iterator[Row]:
    arguments = [name, "--device", given.device, "--folder", folder, "--out", str(given.out)]
    start = time.perf_counter()
    for row in in_process(__file__, arguments + ["--small"] * given.small, None if given.small else LIMITS[name]):
        yield ungraded(row) if given.small else row
    yield Row(f"{name}: the section itself", f"{time.perf_counter() - start:.0f} s")


def extraction(given: argparse.Namespace) -> Iterator[Row]:
    """Files to committed shards against bare forward passes, the parts alone, and the cosine of each row to float32."""
    for name, request, modality in models(given.folder, given.small):
        samples = made_pairs(given.folder, modality, given.small)
        wanted = None
        for dtype in ("float32", "float16", "bfloat16"):
            found = extract(given, request, modality, dtype, samples)
            vectors = found.pop("vectors")
            wanted = vectors if wanted is None else wanted
            rate = found["samples"] / found["whole"]
            parts = {part: found[part] for part in ("decode", "copy", "device")}
            rest = "write" if found["blocked"] > 0.1 * found["whole"] else max(parts, key=lambda part: parts[part])
            note = ", ".join(f"{part} alone {seconds:.2f} s" for part, seconds in parts.items())
            what = f"{name} {dtype}"
            yield Row(f"{what}: rate", f"{rate:,.0f} samples/s in batches of {found['batch']}, {note}", rate)
            share = found["device"] / found["whole"]
            least = None if given.small or dtype == "float32" else SHARE
            yield measured(f"{what}: share of bare forward passes", share, least=least, note=f"limited by {rest}")
            if dtype != "float32":
                yield measured(f"{what}: least cosine to float32", float(cosines(vectors, wanted).min()), least=COSINE)
    yield _memory("extraction", given.device)


def models(folder: Path, small: bool) -> Iterator[tuple[str, str, str]]:
    """Write the weights of each model, and yield its name, its request and the modality."""
    torch.manual_seed(0)
    for name, model in [("CLIP ViT-B/32", "ViT-B-32"), *([] if small else [("CLIP ViT-L/14", "ViT-L-14")])]:
        write_clip(folder / model, model, small)
        yield name, f"clip:{folder / model}", "image"
    resnet = "resnet18" if small else "resnet50"
    write_resnet(folder / f"{resnet}.pth", resnet)
    yield resnet, f"{resnet}:{folder / resnet}.pth", "image"
    write_bert(folder / "bert", small)
    yield "BERT-base", f"bert:{folder / 'bert'}", "text"


def made_pairs(folder: Path, modality: str, small: bool) -> list[Sample]:
    """Texts of 8 to 40 words, or photos: few pictures, each copied with other bytes behind its end."""
    random = np.random.default_rng(5)
    count = 32 if small else WARM + (PHOTOS if modality == "image" else TEXTS)
    if modality == "text":
        texts = [" ".join(random.choice(WORDS, random.integers(8, 40))) for _ in range(count)]
        return [Sample(f"s{row}", text=f"{row} {text}") for row, text in enumerate(texts)]
    from PIL import Image

    (folder / "photos").mkdir(exist_ok=True)
    samples = [Sample(f"s{row}", image=folder / f"photos/{row}.jpg") for row in range(count)]
    if not samples[-1].image.exists():
        for number, sample in enumerate(samples):
            if number < 256:
                coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                coarse.resize((480, 360)).save(sample.image, quality=90)
            else:
                sample.image.write_bytes(samples[number % 256].image.read_bytes() + b"%d" % number)
    return samples


def extract(
    given: argparse.Namespace, request: str, modality: str, dtype: str, samples: list[Sample]
) -> dict[str, Any]:
    """Seconds of an extraction once the batch size is found, of its parts alone, and the (N, D) vectors."""
    options = resolve_options(EncoderOptions(dtype=dtype, cleaning="none"), given.device)
    towers = [tower for tower in describe_encoders([request], options) if tower.spec.modality == modality]
    warm = 4 if given.small else WARM
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        store = Cache(folder, "pairs")
        with Extractor(towers, store, ExtractSettings(given.device)) as extractor:
            extractor.extract(samples[:warm])
            start = time.perf_counter()
            counts = extractor.extract(samples[warm:])
            whole = time.perf_counter() - start
            batch = extractor.encoders(modality)[0].size
        (block,) = store.load(samples, [towers[0].spec]).blocks
    found = {"whole": whole, "samples": len(samples) - warm, "batch": batch, "vectors": block.vectors}
    return {
        **found,
        "blocked": counts.clocks[modality].blocked,
        **alone(towers[0], samples[warm:], batch, given.device),
    }


def alone(tower: Tower, samples: Sequence[Sample], batch: int, device: str) -> dict[str, float]:
    """Seconds of reading and decoding alone, of copies to the device, and of forward passes over what is there."""
    opened = open_towers(tower)[0]
    encoder = opened.encoder(device)
    with tempfile.TemporaryDirectory() as folder, Planner([tower.spec], Cache(folder, "none")) as planner:
        items = planner.plan(list(samples)).items[tower.spec.modality]
    start = time.perf_counter()
    inputs = [entry.inputs[0] for entry in Reader([encoder]).read(items, len(items))]
    found = {"decode": time.perf_counter() - start}
    if opened.length is not None:
        inputs.sort(key=lambda one: -opened.length(one))
    pieces = [inputs[start : start + batch] for start in range(0, len(inputs), batch)]
    copies, dtype = Copies(device), getattr(torch, tower.spec.arithmetic)
    there = []
    for part, work in (
        ("copy", lambda piece: copies.to_device(opened.collate(piece), dtype)),
        ("device", opened.network.forward),
    ):
        given = pieces if part == "copy" else there
        for _ in range(2):  # the second round counts
            _wait(device)
            start = time.perf_counter()
            with torch.inference_mode():
                made = [work(each) for each in given]
            _wait(device)
            found[part] = time.perf_counter() - start
            there = made if part == "copy" else there
    return found


def heads(given: argparse.Namespace) -> Iterator[Row]:
    """A stack of 256 heads against the loop that peers write, at two batch sizes."""
    for batch_size in (16, 64):
        contest = replace(make_contest(given.device, batch_size, given.small), rounds=1 if given.small else 2)
        yield from compare(contest, None if given.small else LOOP)
    yield _memory("heads", given.device)


def sweep(given: argparse.Namespace) -> Iterator[Row]:
    """The default sweep on 4,000 samples."""
    yield from _sweep(given, 200 if given.small else 4000, None if given.small else SWEEP)


def large(given: argparse.Namespace) -> Iterator[Row]:
    """The default sweep on 100,000 samples, fusions alone: the baselines compute on the CPU."""
    yield from _sweep(given, 400 if given.small else 100_000, None, ())


def _sweep(
    given: argparse.Namespace, samples: int, most: float | None, baselines: Sequence[str] = CHEAP_BASELINES
) -> Iterator[Row]:
    made = make_samples(samples, {"image": 64, "text": 32} if given.small else WIDTHS)
    ids, folds = made.features.ids, 2 if given.small else 5
    splits = make_folds(made.targets, ids, np.arange(samples), folds, repeats=1 if given.small else 3)
    problem = Problem(ids, made.targets, splits, 1 if given.small else 3, 42)
    plan = Plan(HeadSettings(epochs=1 if given.small else HeadSettings().epochs))
    pairs = [(head, m) for m in ("both", "text", "image") for head in (*FUSIONS, *baselines)]
    pairs = [pair for pair in pairs if pair[0] != "film-concat" or pair[1] == "both"]
    engine, start = LocalEngine(made.features, made.targets, given.device, "tokens"), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        trainers = Trainers(problem, engine, plan, Path(folder), Silent(), float("inf"))
        ranked = rank(problem, _train_all(trainers, pairs, True))
    engine.close()
    seconds = time.perf_counter() - start
    what = f"sweep of {samples:,} samples with {'defaults' if baselines else 'all fusions'}"
    yield measured(what, seconds, "s", most=most, note=f"best {ranked[0].head} {ranked[0].macro_f1.value:.3f}")
    by_head: dict[str, float] = {}
    for entry in ranked:
        by_head[entry.head] = by_head.get(entry.head, 0.0) + entry.seconds
    slowest = sorted(by_head.items(), key=lambda pair: -pair[1])[:6]
    yield Row(f"{what}: CPU seconds by head", ", ".join(f"{name} {spent:.1f}" for name, spent in slowest))
    yield _memory(what, given.device)


def finetune(given: argparse.Namespace) -> Iterator[Row]:
    """An epoch of stage 2 from the cached prefix, against the moving layers alone and against full passes."""
    for batch in (16, 64):
        found = cached_epoch(given.folder, given.device, 64 if given.small else 2048, batch, given.small)
        stage_2, bare, full = found["stage 2"], found["moving layers"], found["full passes"]
        most = None if given.small else STAGE_2
        what = f"stage 2, CLIP ViT-B/32, last text layer, batch {batch}"
        yield measured(f"{what}: epoch against its moving layers alone", stage_2 / bare, "x", most=most)
        yield measured(f"{what}: full passes of the text against it", full / stage_2, "x")
    yield _memory("stage 2", given.device)


def profile(given: argparse.Namespace) -> Iterator[Row]:
    """Where an epoch of stacked heads spends its time; the table lies beside --out."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    from heads import train_stacked

    contest = make_contest(given.device, 16, given.small)
    train_stacked(contest)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if given.device.startswith("cuda") else [])]
    with watch(activities=kinds) as seen:
        train_stacked(replace(contest, settings=replace(contest.settings, epochs=1, patience=1)))
    path = given.out.with_suffix(".profile.txt")
    key = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
    path.write_text(seen.key_averages().table(sort_by=key, row_limit=40))
    yield Row("profile of stacked heads", path.name)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _memory(what: str, device: str) -> Row:
    if not device.startswith("cuda"):
        return Row(f"{what}: most memory of the device", "no CUDA here")
    return measured(f"{what}: most memory of the device", torch.cuda.max_memory_reserved() / 1e9, "GB")


SECTIONS = {f.__name__: f for f in (extraction, heads, sweep, large, finetune, profile)}

if __name__ == "__main__":
    main()
