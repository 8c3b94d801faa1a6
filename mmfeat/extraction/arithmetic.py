"""The arithmetic that `--dtype auto` stands for: half precision where it keeps the angles of the user's own samples.

What decides, in this order: the vectors that the cache has of a data set, so that nothing is encoded twice; what an
earlier trial found on this data set; a trial. Without any of them it is the dtype of `resolve_dtype`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from mmfeat.cache.parity import LEAST_COSINE, angle_and_length
from mmfeat.cache.store import EXPORTED, Cache, shard_files
from mmfeat.encoders.registry import Tower, absolute_names, describe_encoders, is_torch, open_towers, whole_request
from mmfeat.encoders.spec import NAMED, TWO_TOWERS, Encoder, EncoderOptions, EncoderSpec, named_values, written
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.errors import EncoderError, WriteError
from mmfeat.extraction.encode import Batcher, start_block
from mmfeat.extraction.missing import Item
from mmfeat.extraction.reader import Prepared, Reader
from mmfeat.extraction.requests import Decision, decide_cleaning, request_before, resolve_options
from mmfeat.samples.dataset import SampleSource
from mmfeat.samples.keys import single_photos
from mmfeat.system.files import make_folder, read_json, write_json
from mmfeat.system.hardware import DTYPES, fast_half, resolve_device
from mmfeat.system.locks import locked_folder
from mmfeat.system.wording import Progress, Silent

TRIED = 64  # samples of each modality
BATCH = 16
Values = dict[tuple[EncoderSpec, bytes], np.ndarray]  # by output and content, as they would be stored


@dataclass(frozen=True)
class Evidence:
    """The least cosine between a value in the dtype `half` and the same in float32, over all outputs of a model.

    Values are those of the first `samples` samples of a data set: pooled vectors, or single tokens.
    """

    half: str
    cosine: float
    samples: int

    @property
    def dtype(self) -> str:
        return self.half if self.cosine >= LEAST_COSINE else "float32"

    def __str__(self) -> str:
        cosine = f"{np.floor(self.cosine * 1e5) / 1e5:.5f}"  # never shown as more than it is
        measured = f"(cosine {cosine} on {self.samples} samples)"
        if self.dtype == "float32":
            return f"in float32: {self.half} changes vectors {measured}"
        return f"in {self.half}: vectors hardly change {measured}"


@dataclass(frozen=True)
class Resolved:
    """Options without `auto`, the towers that they describe, and evidence by the request of the model it is about."""

    options: EncoderOptions
    towers: list[Tower]
    evidence: Mapping[str, Evidence] = field(default_factory=dict)


Trial = Callable[[Sequence[Tower], str, Path], Evidence | None]


def resolve_encoders(
    encoders: Sequence[str],
    options: EncoderOptions,
    source: SampleSource,
    cache: str | Path,
    device: str,
    decision: Decision | None = None,
) -> Resolved:
    """Resolve all that is `auto` for a data set and this machine, without a trial; `decision` is on the cleaning."""
    decision = decision or decide_cleaning(options, source, cache)
    resolved = resolve_options(options, device, decision, request_before(cache, source.data))
    towers = describe_encoders(list(encoders), resolved)
    return settle(Resolved(resolved, towers), options, Cache(cache, source.name), fast_half(device))


def settle(before: Resolved, asked: EncoderOptions, store: Cache, half: str, trial: Trial | None = None) -> Resolved:
    """`before` with a settled dtype in place of each `auto` in `asked`; `trial` finds evidence where there is none."""
    chosen: dict[str, str] = {}
    evidence: dict[str, Evidence] = {}
    for request in dict.fromkeys(tower.request for tower in before.towers):
        towers = [tower for tower in before.towers if tower.request == request]
        if not _asks_auto(towers[0], asked):
            continue
        dtype, found = _settled(towers, store, half, trial)
        if dtype != towers[0].spec.arithmetic:
            chosen[request] = dtype
        if found is not None and found.dtype == dtype:
            evidence[request] = found
    if not chosen:
        return replace(before, evidence=evidence)
    named = {whole_request(request): dtype for request, dtype in chosen.items()}
    options = before.options
    dtype, convolutional = (
        written({**named_values(given), **named}) for given in (options.dtype, options.convolutional_dtype)
    )
    towers = [Tower(t.request, t.spec.computed_in(chosen.get(t.request, t.spec.arithmetic))) for t in before.towers]
    return Resolved(replace(options, dtype=dtype, convolutional_dtype=convolutional), towers, evidence)


def _asks_auto(tower: Tower, asked: EncoderOptions) -> bool:
    """Whether options leave it open in what arithmetic a torch model computes; one that was fine-tuned has float32."""
    family, whole = tower.request.partition(":")[0], whole_request(tower.request)
    names = {family, whole} | ({tower.spec.modality} if family not in TWO_TOWERS else set())
    own = absolute_names(asked).named(dict.fromkeys(NAMED, names))
    return own.dtype == "auto" and is_torch(tower.request) and family != "finetuned"


def _settled(towers: Sequence[Tower], store: Cache, half: str, trial: Trial | None) -> tuple[str, Evidence | None]:
    """The dtype of one model, and the evidence on this machine's half precision."""
    usual = towers[0].spec.arithmetic
    stored = [
        dtype
        for dtype in dict.fromkeys((usual, *DTYPES[1:]))
        if any(shard_files(store.spec_folder(tower.spec.computed_in(dtype))) for tower in towers)
    ]
    path = _path(towers, store, half)
    found = _read(path) if half != "float32" else None
    if stored:
        return (found.dtype if found is not None and found.dtype in stored else stored[0]), found
    if found is None and trial is not None and half != "float32":
        found = trial(towers, half, path)
    return (found.dtype if found is not None else usual), found


@dataclass(frozen=True)
class FirstSamples:
    """A trial of half precision on the first samples of a data set; without `writes` nothing of it is kept."""

    source: SampleSource
    device: str
    workers: int = 0
    writes: bool = True
    progress: Progress = field(default_factory=Silent)

    def __call__(self, towers: Sequence[Tower], half: str, path: Path) -> Evidence | None:
        """Compare two passes over the samples; None where there is nothing to compare. Other processes wait for it."""
        with ExitStack() as stack:
            if self.writes:
                with suppress(OSError):  # the extraction tells of a cache that cannot be written
                    make_folder(path.parent)
                    stack.enter_context(locked_folder(path.parent))
            if (found := _read(path)) is None:
                found = self._compared([tower for tower in towers if tower.spec.view == "none"], half)
                if found is not None and self.writes:
                    with suppress(WriteError):
                        write_json(path, asdict(found))
        return found

    def _compared(self, towers: Sequence[Tower], half: str) -> Evidence | None:
        exact = [tower.spec.computed_in("float32") for tower in towers]
        items, device = self._items(exact, half), resolve_device(self.device)
        if not (count := max(map(len, items.values()))):
            return None
        with self.progress.step(f"loading {exact[0].model} to try it in {half}", None):
            try:
                opened = open_towers(Tower(towers[0].request, exact[0]), exact)
                encoders = [tower.encoder(device) for tower in opened]
                read = [list(Reader([one], self.workers).read(items[one.modality], TRIED)) for one in encoders]
                wanted = [_values(*pair, device) for pair in zip(encoders, read, strict=True)]
            except EncoderError:
                return None  # the extraction raises it, with its context
            halves = (_in_half(tower, half, entries, device) for tower, entries in zip(opened, read, strict=True))
            cosines = [
                _cosine(found.get((spec.computed_in(half), key)), value)
                for found, values in zip(halves, wanted, strict=True)
                for (spec, key), value in values.items()
            ]
        return Evidence(half, min(cosines), count) if cosines else None

    def _items(self, specs: Sequence[EncoderSpec], half: str) -> dict[str, list[Item]]:
        """The first samples that have a part of each modality; a number stands for the key of a text."""
        fingerprints = frozenset(one.fingerprint for spec in specs for one in (spec, spec.computed_in(half)))
        items: dict[str, list[Item]] = {spec.modality: [] for spec in specs}
        for block in self.source.blocks(TRIED):
            for modality, chosen in items.items():
                for sample in single_photos(block)[0] if modality == "image" else block:
                    if getattr(sample, modality) is not None and len(chosen) < TRIED:
                        chosen.append(Item(sample, modality, str(len(chosen)).encode(), fingerprints))
            if all(len(chosen) == TRIED for chosen in items.values()):
                break
        return items


def _in_half(tower: TorchTower, half: str, prepared: Iterable[Prepared], device: str) -> Values:
    """The values in half precision; none where they leave its range, or torch lacks an operation in it."""
    with suppress(EncoderError, RuntimeError):
        encoder = replace(tower, specs=tuple(spec.computed_in(half) for spec in tower.specs)).encoder(device)
        return _values(encoder, prepared, device)
    return {}


def _values(encoder: Encoder, prepared: Iterable[Prepared], device: str) -> Values:
    blocks = start_block(list(prepared), 0, Batcher(encoder, device, BATCH))()
    rows = ((spec, *row) for spec, rows in blocks for row in zip(rows.keys, rows.values, rows.errors, strict=True))
    return {(spec, key): value for spec, key, value, error in rows if not error}


def _cosine(found: np.ndarray | None, wanted: np.ndarray) -> float:
    """The least cosine between two (D), or between the tokens of two (T, D); 0 for what is not there."""
    if found is None or found.shape != wanted.shape:
        return 0.0
    pairs = zip(np.atleast_2d(found).astype(float), np.atleast_2d(wanted).astype(float), strict=True)
    return min((angle_and_length(one, other)[0] for one, other in pairs), default=1.0)


def _path(towers: Sequence[Tower], store: Cache, half: str) -> Path:
    """Where the evidence lies: by the data set, and by the outputs in float32."""
    exact = sorted({tower.spec.computed_in("float32").source for tower in towers})
    name = hashlib.sha256("".join(exact).encode()).hexdigest()
    return store.folder.parent / EXPORTED / f"{store.folder.name}-{name[:8]}-{half}.json"


def _read(path: Path) -> Evidence | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = read_json(path)
        return Evidence(str(values["half"]), float(values["cosine"]), int(values["samples"]))
    return None
