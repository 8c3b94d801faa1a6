"""Export of a run: ONNX graphs checked on samples of its data, JSON about their inputs, and a model card.

OUT/head.onnx        vectors and masks -> calibrated probabilities and choices
OUT/head.json        inputs, classes, encoders and result of the check
OUT/model.onnx       pixels and token ids -> the same, where torch can export the encoders
OUT/model.json       how texts and photos become its inputs
OUT/README.md        the model card, which a hub shows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.onnx_file import check_installed, largest_difference, run_onnx, write_onnx
from mmfeat.encoders.registry import Tower
from mmfeat.errors import RunError
from mmfeat.export.build import Port, build_graph, inputs_of, why_not_exportable
from mmfeat.export.card import BEGINNING, model_card
from mmfeat.export.graph import HeadGraph
from mmfeat.export.towers import ModelGraph, TowerInput, build_model, why_no_model
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.prediction.final_heads import EntryPredictor, read_for
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run, checked_towers, choose_run
from mmfeat.samples.dataset import MODALITIES, Data, Sample, SampleSet, name_of
from mmfeat.samples.photos import Decoding, decode_image
from mmfeat.system.files import new_folder, read_json, write_atomic, write_json
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress
from mmfeat.version import __version__

HEAD, MODEL, CARD = "head.onnx", "model.onnx", "README.md"
HEAD_FACTS, MODEL_FACTS = "head.json", "model.json"
OLD_CARD = "MODEL_CARD.md"
# All files of an export.
EXPORTED = {HEAD, HEAD_FACTS, MODEL, MODEL_FACTS, CARD, OLD_CARD, f"{HEAD}.data", f"{MODEL}.data"}
MADE_BY = "mmfeat export"
OUTPUTS = ("probabilities", "chosen")  # of every graph
CHECKED_ROWS = 256  # samples that check the head
CHECKED_LACKING = 4  # samples without a text, and as many without a photo, that check the head
CHECKED_SAMPLES = 4  # samples that check encoders and head together
TRACED_ROWS = 3  # rows of the example that the exporter traces
TOLERANCE = 1e-4  # largest difference of probabilities
VECTOR_TOLERANCE = 1e-3  # largest difference of vectors, divided by max(1, largest absolute number)


@dataclass(frozen=True)
class Export:
    """The result of an export: `files` maps names to sizes in bytes.

    `difference` is the largest difference of probabilities between onnxruntime and mmfeat on `rows` samples,
    `model_difference` the same for encoders and head together. `no_model` says why there is no model, and `passed_over`
    has (name, reason) of better entries that cannot be exported.
    """

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
    data: Data = None,
    cache: str | Path | None = None,
    model: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> Export:
    """Write ONNX graphs and a model card of the best entry of a run that can be exported, or of the entry named.

    `out` is export/RUN by default; an earlier export there is replaced. The graphs are compared with
    predictions of mmfeat for samples; `model=False` leaves the encoders out. Raises `RunError` where the entry
    cannot be exported, where a graph gives other probabilities, or where `out` holds something else.
    """
    check_installed()
    data = name_of(data)
    chosen = choose_run(run, heads, data, head, modalities)
    entry, passed_over = _entry(chosen, head, modalities)
    folder = Path(out) if out is not None else Path("export") / chosen.name
    _check_free(folder)
    samples, features, towers = _features(chosen, entry, data, cache, device, progress or usual_progress())
    graph, ports = build_graph(chosen, entry, towers, features)
    _, wanted = EntryPredictor(chosen, entry).predict(features, samples)
    with new_folder(folder) as temporary:
        with (progress or usual_progress()).step("export", 2) as advance:
            difference = _write_head(graph, ports, features, wanted, temporary / HEAD)
            advance(1)
            reason, deviation = _write_model(graph, ports, samples, model, temporary)
            advance(1)
        facts = _facts(chosen, entry, ports, len(features), difference)
        write_json(temporary / HEAD_FACTS, facts)
        write_atomic(temporary / CARD, model_card(chosen, entry, ports, facts, reason, deviation).encode())
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    named = entry.head, entry.modalities
    return Export(folder, chosen, *named, sizes, len(features), difference, deviation, reason, passed_over)


def _entry(run: Run, head: str | None, modalities: str | None) -> tuple[Entry, tuple[tuple[str, str], ...]]:
    """The recommended entry, else the best that can be exported, and (name, reason) of those before it."""
    first = run.predicting(head, modalities)  # raises where there is no such entry
    if run.config.is_regression:
        raise RunError(f"{run.folder}: a regression, of which no graph can be made yet")
    passed_over: list[tuple[str, str]] = []
    for entry in sorted(run.matching(head, modalities), key=lambda entry: entry.name != first.name):
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
    if not names <= EXPORTED:  # an export replaces the whole folder
        return False
    if not names:
        return True
    if CARD in names and not (folder / CARD).read_bytes().startswith(BEGINNING.encode()):
        return False  # the user's own
    try:
        return str(read_json(folder / HEAD_FACTS)["made_by"]).startswith(MADE_BY)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _features(
    run: Run, entry: Entry, data: str | Path | None, cache: str | Path | None, device: str,
    progress: Progress,
) -> tuple[list[Sample], Features, list[Tower]]:  # fmt: skip
    """Evenly spaced samples of the run's data and some without text or photo, their features, and the encoders.

    Vectors that the cache lacks are extracted.
    """
    everything: SampleSet = read_for(data or run.config.data, None, run.config)
    rows = np.linspace(0, len(everything) - 1, CHECKED_ROWS).round().astype(int).tolist()
    rows = sorted({*rows, *(row for name in MODALITIES for row in _lacking(everything, name))})
    checked = replace(everything, samples=tuple(everything.samples[row] for row in rows))
    predictor = EntryPredictor(run, entry)
    towers = checked_towers(run, predictor.towers)
    cache = cache or run.config.cache
    extract_samples(checked, towers, cache=cache, settings=ExtractSettings(device), progress=progress)
    features = Cache(cache, checked.name).load(checked.samples, [tower.spec for tower in towers])
    return list(checked.samples), features.widened(predictor.widths), towers


def _lacking(samples: SampleSet, modality: str) -> list[int]:
    """Rows of the first samples without this modality."""
    rows = (row for row, sample in enumerate(samples) if getattr(sample, modality) is None)
    return list(islice(rows, CHECKED_LACKING))


def _write_head(graph: HeadGraph, ports: list[Port], features: Features, wanted: np.ndarray, path: Path) -> float:
    """Write the head and return the largest difference of probabilities. Raises `RunError` above the tolerance."""
    names = [name for port in ports for name in (port.name, port.mask)]
    inputs = inputs_of(ports, features)
    lengths = [{1: f"{port.name}_length"} if port.is_tokens else {} for port in ports]
    axes = [{0: "batch"} | length for length in lengths for _ in range(2)]
    write_onnx(graph, [tensor[:TRACED_ROWS] for tensor in inputs], names, OUTPUTS, axes, path)
    probabilities, _ = run_onnx(path, names, inputs)
    return _checked(largest_difference(probabilities, wanted), TOLERANCE, path.name)


def _checked(difference: float, tolerance: float, name: str) -> float:
    if difference > tolerance:
        raise RunError(f"{name}: onnxruntime differs from mmfeat by {difference:.1e}; nothing was written")
    return difference


def _write_model(
    graph: HeadGraph, ports: list[Port], samples: list[Sample], wanted: bool, folder: Path
) -> tuple[str, float | None]:
    """Write the model if possible: (reason why not, None), or ("", largest difference of probabilities to torch)."""
    reason, contents = _checkable(ports, samples, wanted)
    if reason:
        return reason, None
    module, towers = build_model(ports, graph)
    names = [name for tower in towers for name in (*tower.names, tower.port.mask)]
    outputs = [*OUTPUTS, *(f"{tower.port.name}_vectors" for tower in towers)]
    try:
        axes = [axis for tower in towers for axis in (*tower.axes, {0: "batch"})]
        write_onnx(module, _model_inputs(towers, contents[:2]), names, outputs, axes, folder / MODEL)
    except Exception as error:  # the exporter may raise any error inside a network of another library
        (folder / MODEL).unlink(missing_ok=True)
        return f"torch's exporter cannot follow these encoders ({' '.join(str(error).split())[:160]})", None
    difference = _compare_model(module, _model_inputs(towers, contents), names, folder / MODEL)
    encoders = {t.port.name: {"inputs": t.names, "mask": t.port.mask, **t.preprocessing} for t in towers}
    write_json(folder / MODEL_FACTS, {"made_by": MADE_BY, "encoders": encoders, "outputs": outputs})
    return "", difference


def _checkable(ports: list[Port], samples: list[Sample], wanted: bool) -> tuple[str, list[dict[str, Any]]]:
    """(reason why no model can be written and checked, or "", contents to check the model with)."""
    reason = why_no_model(ports) if wanted else "it was left out"
    decoding = next((port.tower.spec.decoding for port in ports if port.tower.spec.modality == "image"), None)
    contents = [] if reason else _contents(samples, decoding)
    if not reason and not contents:
        reason = "no sample has both a text and a photo to check it with"
    return reason, contents


def _compare_model(module: ModelGraph, inputs: list[Any], names: list[str], path: Path) -> float:
    """Largest difference of probabilities; raises `RunError` where probabilities or vectors differ too much."""
    import torch

    with torch.no_grad():
        expected = [output.numpy() for output in module(inputs)]
    outputs = run_onnx(path, names, inputs)
    for vectors, wanted in zip(outputs[2:], expected[2:], strict=True):
        scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
        _checked(largest_difference(vectors, wanted) / scale, VECTOR_TOLERANCE, path.name)
    return _checked(largest_difference(outputs[0], expected[0]), TOLERANCE, path.name)


def _contents(samples: list[Sample], decoding: Decoding | None) -> list[dict[str, Any]]:
    """Text and picture of a few samples that have both."""
    contents: list[dict[str, Any]] = []
    for sample in samples:
        if sample.text is None or sample.image is None or len(contents) == CHECKED_SAMPLES:
            continue
        try:
            picture, _ = decode_image(sample.image.read_bytes(), decoding)
        except OSError:
            continue
        if picture is not None:
            contents.append({"text": sample.text, "image": picture})
    return contents


def _model_inputs(towers: list[TowerInput], contents: list[dict[str, Any]]) -> list[Any]:
    import torch

    inputs = []
    for tower in towers:
        inputs += tower.inputs([content[tower.port.tower.spec.modality] for content in contents])
        inputs.append(torch.ones(len(contents), dtype=torch.bool))
    return inputs


def _facts(run: Run, entry: Entry, ports: list[Port], rows: int, difference: float) -> dict[str, Any]:
    """The content of `head.json`."""
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
                "spec": port.tower.spec.stated,
            }
            for port in ports
        ],
        "outputs": list(OUTPUTS),
        "checked": {"rows": rows, "largest_difference": difference, "tolerance": TOLERANCE},
    }
