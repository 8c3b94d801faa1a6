"""Export of a run: graphs checked on real rows, what they take as JSON, and a model card, in one step into one folder.

OUT/head.onnx        vectors and masks -> calibrated probabilities and choices
OUT/head.json        its inputs, classes, encoders, and how it was checked
OUT/model.onnx       pixels and token ids -> the same, where torch can export the encoders
OUT/model.json       what turns texts and photos into its inputs
OUT/MODEL_CARD.md    for people
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower
from mmfeat.errors import RunError
from mmfeat.export.build import Port, build_graph, inputs_of, why_not_exportable
from mmfeat.export.card import model_card
from mmfeat.export.graph import HeadGraph
from mmfeat.export.onnx_file import TOLERANCE, check_installed, largest_difference, run_onnx, write_onnx
from mmfeat.export.towers import TowerInput, build_model, why_no_model
from mmfeat.extraction.extract import extract_samples
from mmfeat.extraction.worker import ExtractSettings
from mmfeat.prediction.final_heads import EntryPredictor
from mmfeat.prediction.inference import read_for
from mmfeat.runs.entry import Entry
from mmfeat.runs.folders import choose_run
from mmfeat.runs.run import Run, checked_towers
from mmfeat.samples.dataset import MODALITIES, Sample, SampleSet
from mmfeat.samples.images import decode_image
from mmfeat.system.files import new_folder, read_json, write_atomic, write_json
from mmfeat.system.progress import Progress, Silent
from mmfeat.version import __version__

HEAD, MODEL, CARD = "head.onnx", "model.onnx", "MODEL_CARD.md"
HEAD_FACTS, MODEL_FACTS = "head.json", "model.json"
OWN = {HEAD, HEAD_FACTS, MODEL, MODEL_FACTS, CARD, f"{HEAD}.data", f"{MODEL}.data"}  # all that it may hold
MADE_BY = "mmfeat export"
CHECKED_ROWS = 256  # of the head
CHECKED_LACKING = 4  # without a text, and as many without a photo
CHECKED_SAMPLES = 4  # of encoders and head together, which are slow
TRACED_ROWS = 3  # the exporter looks at
VECTOR_TOLERANCE = 1e-3  # of vectors, relative to their largest number where that is above 1


@dataclass(frozen=True)
class Export:
    """What was written: file -> bytes. `difference` is the largest one of probabilities between onnxruntime and mmfeat
    on `rows` samples, `model_difference` that of encoders and head together; `no_model` says why there is no model.
    `passed_over` names better entries that cannot be exported, with the reason."""

    folder: Path
    run: Run
    head: str
    modalities: str
    files: Mapping[str, int]
    rows: int
    difference: float
    model_difference: float | None = None
    no_model: str = ""
    passed_over: tuple[tuple[str, str], ...] = ()


def export_run(
    run: str | Path | None = None,
    *,
    out: str | Path | None = None,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    data: str | Path | None = None,
    cache: str | Path | None = None,
    model: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> Export:
    """Write ONNX graphs and a model card of an entry of a run: the best that can be exported, or the best of this head.

    `out` is export/RUN by default; an earlier export there is replaced. The graphs are compared with what mmfeat
    predicts for samples of the run's data; `model` False leaves the encoders out. Raises `RunError` where the entry
    cannot be exported, where a graph gives other probabilities, or where `out` holds something else.
    """
    check_installed()
    chosen = choose_run(run, heads, data, head, modalities)
    entry, passed_over = _entry(chosen, head, modalities)
    folder = Path(out) if out is not None else Path("export") / chosen.name
    _check_free(folder)
    samples, features, towers = _features(chosen, entry, data, cache, device, progress or Silent())
    graph, ports = build_graph(chosen, entry, towers, features)
    _, wanted = EntryPredictor(chosen, entry).predict(features, samples)
    with new_folder(folder) as place:
        with (progress or Silent()).task("export", 2) as advance:
            difference = _write_head(graph, ports, features, wanted, place / HEAD)
            advance(1)
            reason, deviation = _write_model(graph, ports, samples, model, place)
            advance(1)
        facts = _facts(chosen, entry, ports, len(features), difference)
        write_json(place / HEAD_FACTS, facts)
        write_atomic(place / CARD, model_card(chosen, entry, ports, facts, reason, deviation).encode())
        sizes = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
    named = entry.head, entry.modalities
    return Export(folder, chosen, *named, sizes, len(features), difference, deviation, reason, passed_over)


def _entry(run: Run, head: str | None, modalities: str | None) -> tuple[Entry, tuple[tuple[str, str], ...]]:
    """The best entry that can be exported, and the better ones that cannot."""
    run.entry(head, modalities)  # says what there is
    passed_over: list[tuple[str, str]] = []
    for entry in run.matching(head, modalities):
        reason = why_not_exportable(run, entry)
        if not reason:
            return entry, tuple(passed_over)
        passed_over.append((entry.label, reason))
    name, reason = passed_over[0]
    raise RunError(f"{run.folder}: {name} cannot be exported: {reason}; name another --head or --modalities")


def _check_free(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not _is_export(folder)):
        raise RunError(f"--out {folder}: not empty and no earlier export; name another folder")


def _is_export(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names <= OWN:  # the whole folder is replaced
        return False
    if not names:
        return True
    try:
        return str(read_json(folder / HEAD_FACTS)["made_by"]).startswith(MADE_BY)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _features(
    run: Run, entry: Entry, data: str | Path | None, cache: str | Path | None, device: str,
    progress: Progress,
) -> tuple[list[Sample], Features, list[Tower]]:  # fmt: skip
    """Evenly spaced samples of the run's data, and some that lack a text or a photo, with their vectors; what the cache
    lacks is extracted."""
    everything: SampleSet = read_for(data or run.config.data, None, run.config.columns)
    places = np.unique(np.linspace(0, len(everything) - 1, CHECKED_ROWS).round().astype(int)).tolist()
    places = sorted({*places, *(row for name in MODALITIES for row in _lacking(everything, name))})
    some = replace(everything, samples=tuple(everything.samples[place] for place in places))
    predictor = EntryPredictor(run, entry)
    towers = checked_towers(run, predictor.towers)
    cache = cache or run.config.cache
    extract_samples(some, towers, cache=cache, settings=ExtractSettings(device), progress=progress)
    features = Cache(cache, some.name).load(some.samples, [tower.spec for tower in towers])
    return list(some.samples), features.widened(predictor.widths), towers


def _lacking(samples: SampleSet, modality: str) -> list[int]:
    """Rows of the first samples without this modality."""
    rows = (row for row, sample in enumerate(samples) if getattr(sample, modality) is None)
    return list(islice(rows, CHECKED_LACKING))


def _write_head(graph: HeadGraph, ports: list[Port], features: Features, wanted: np.ndarray, path: Path) -> float:
    """The largest difference of probabilities; raises `RunError` above the tolerance."""
    names = [name for port in ports for name in (port.name, port.mask)]
    inputs = inputs_of(ports, features)
    axes = [_axes(port) for port in ports for _ in range(2)]
    write_onnx(graph, [each[:TRACED_ROWS] for each in inputs], names, ("probabilities", "chosen"), axes, path)
    found, _ = run_onnx(path, names, inputs)
    return _checked(largest_difference(found, wanted), TOLERANCE, path.name)


def _axes(port: Port) -> dict[int, str]:
    return {0: "batch", 1: f"{port.name}_length"} if port.is_tokens else {0: "batch"}


def _checked(difference: float, tolerance: float, name: str) -> float:
    if difference > tolerance:
        raise RunError(f"{name}: onnxruntime differs from mmfeat by {difference:.1e}; nothing was written")
    return difference


def _write_model(
    graph: HeadGraph, ports: list[Port], samples: list[Sample], wanted: bool, place: Path
) -> tuple[str, float | None]:
    """Why there is no model, or the largest difference of its probabilities from those of the torch towers and head."""
    reason = why_no_model(ports) if wanted else "it was left out"
    contents = [] if reason else _contents(samples)
    if not reason and not contents:
        reason = "no sample has both a text and a photo to check it with"
    if reason:
        return reason, None
    import torch

    module, given = build_model(ports, graph)
    try:
        inputs = _model_inputs(given, contents)
        names = [name for each in given for name in (*each.names, each.port.mask)]
        outputs = ["probabilities", "chosen", *(f"{each.port.name}_vectors" for each in given)]
        axes = [axis for each in given for axis in (*each.axes, {0: "batch"})]
        write_onnx(module, _model_inputs(given, contents[:2]), names, outputs, axes, place / MODEL)
    except Exception as error:  # whatever the exporter meets inside somebody's model
        (place / MODEL).unlink(missing_ok=True)
        return f"torch's exporter cannot follow these encoders ({' '.join(str(error).split())[:160]})", None
    with torch.no_grad():
        right = [each.numpy() for each in module(inputs)]
    found = run_onnx(place / MODEL, names, inputs)
    for mine, theirs in zip(found[2:], right[2:], strict=True):
        largest = max(1.0, float(np.abs(theirs).max(initial=0.0)))
        _checked(largest_difference(mine, theirs) / largest, VECTOR_TOLERANCE, MODEL)
    difference = _checked(largest_difference(found[0], right[0]), TOLERANCE, MODEL)
    about = {each.port.name: {"inputs": each.names, "mask": each.port.mask, **each.preprocessing} for each in given}
    write_json(place / MODEL_FACTS, {"made_by": MADE_BY, "encoders": about, "outputs": outputs})
    return "", difference


def _contents(samples: list[Sample]) -> list[dict[str, Any]]:
    """Text and picture of a few samples that have both."""
    found: list[dict[str, Any]] = []
    for sample in samples:
        if sample.text is None or sample.image is None or len(found) == CHECKED_SAMPLES:
            continue
        try:
            picture, _ = decode_image(sample.image.read_bytes())
        except OSError:
            continue
        if picture is not None:
            found.append({"text": sample.text, "image": picture})
    return found


def _model_inputs(given: list[TowerInput], contents: list[dict[str, Any]]) -> list[Any]:
    import torch

    found = []
    for each in given:
        found += each.inputs([content[each.port.tower.spec.modality] for content in contents])
        found.append(torch.ones(len(contents), dtype=torch.bool))
    return found


def _facts(
    run: Run, entry: Entry, ports: list[Port], rows: int, difference: float
) -> dict[str, Any]:  # fmt: skip
    return {
        "made_by": f"{MADE_BY} {__version__}",
        "run": run.name,
        "head": entry.head,
        "modalities": entry.modalities,
        "task": run.config.task,
        "classes": list(run.classes),
        "inputs": [
            {
                "name": port.name,
                "mask": port.mask,
                "width": port.width,
                "modality": port.tower.spec.modality,
                "encoder": port.tower.spec.name,
                "fingerprint": port.tower.spec.fingerprint,
                "spec": asdict(port.tower.spec),
            }
            for port in ports
        ],
        "outputs": ["probabilities", "chosen"],
        "checked": {"rows": rows, "largest_difference": difference, "tolerance": TOLERANCE},
    }
