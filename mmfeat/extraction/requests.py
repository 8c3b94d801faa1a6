"""Requests: the data, encoders and options of extractions, kept in the cache for the commands that follow; and data to
predict beside the data to train on, as in train.csv and test.csv, read by the same names of columns."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.registry import Tower, absolute_names, is_torch, kept_for
from mmfeat.encoders.spec import (
    AUTO,
    BEFORE,
    DECIDED,
    HEEDING,
    EncoderOptions,
    EncoderSpec,
    named_values,
    written,
)
from mmfeat.encoders.torch_tower import LIBRARIES, RUNTIMES
from mmfeat.errors import CacheMissError, ConfigError, DataError, WriteError
from mmfeat.samples.contents import JUDGED, TWEETS, tweet_share
from mmfeat.samples.corrections import without_labels
from mmfeat.samples.dataset import Data, SampleSource, name_of
from mmfeat.samples.folders import hash_of
from mmfeat.samples.labels import SPLIT
from mmfeat.samples.objects import OBJECT
from mmfeat.samples.table_columns import COLUMNS, ROW_NUMBER, columns_in, find_column, find_columns
from mmfeat.system.files import canonical_json, no_such_data, read_json, write_json
from mmfeat.system.hardware import resolve_device, resolve_dtype
from mmfeat.system.remote import HUB, absolute, exists, is_remote
from mmfeat.system.wording import shown, without_passwords
from mmfeat.version import install_command

FOLDER = "requests"
CHECKSUM = "sha256"
NO_TEXTS = "no texts"
# The decision in a request of a version that knew no `auto`, where all texts were taken for tweets.
EARLIER = {"cleaning": "tweet", "reason": "the default of an earlier version"}


def stated_options(values: Any) -> Any:
    """The plain values of options, with what an earlier version did in place of those that it lacked."""
    return {**BEFORE, **values} if isinstance(values, dict) else values


@dataclass(frozen=True)
class Decision:
    """The cleaning that `auto` stands for in a data set, the reason in words, and whether it is an earlier one."""

    cleaning: str
    reason: str
    kept: bool = False


@dataclass(frozen=True)
class Request:
    """Data, encoders and options of the last complete extraction of a data set, or of the first while it runs.

    A dtype `auto` stays so in the options: the vectors that the cache has say what it is, on any machine.

    `data` and `test` are absolute paths or URLs; a submission predicts `test`, empty where no test data was named.
    `fingerprints` are those of the encoder specs, which say without loading a model which vectors are in use.
    `decision` is that of the first extraction with the cleaning `auto`, None before.
    """

    data: str
    columns: dict[str, str]
    encoders: list[str]
    options: EncoderOptions
    fingerprints: tuple[str, ...] = ()
    decision: Decision | None = None
    test: str = ""

    def changed(
        self, encoders: list[str] | None, columns: dict[str, str] | None, options: Mapping[str, Any]
    ) -> Request:
        """The request with those arguments and options that are not None in place of its own.

        With other encoders, its own options of encoders that are not among them are dropped.
        """
        named = {name: value for name, value in options.items() if value is not None}
        if "dtype" in named:
            named["convolutional_dtype"] = ""  # only `auto` sets another dtype for convolutional models
        return Request(
            self.data,
            columns if columns is not None else self.columns,
            encoders if encoders is not None else self.encoders,
            replace(kept_for(encoders, self.options) if encoders is not None else self.options, **named),
        )


def new_request(data: str, encoders: list[str], columns: dict[str, str], options: Mapping[str, Any]) -> Request:
    """A request with defaults in place of the options that are None."""
    return Request(absolute(data), columns, encoders, EncoderOptions()).changed(None, None, options)


def remember_request(cache: str | Path, request: Request) -> None:
    """Write a request in the cache, one file a data set; a read-only cache is left as it is."""
    name = hashlib.sha256(request.data.encode()).hexdigest()[:16]
    request = replace(request, columns={part: without_passwords(value) for part, value in request.columns.items()})
    with contextlib.suppress(WriteError):
        values = asdict(request)
        write_json(Path(cache) / FOLDER / f"{name}.json", {**values, CHECKSUM: _checksum(values)})


def begin_request(cache: str | Path, request: Request) -> None:
    """Record that work on a request begins: the last complete request stays the latest, vectors of both are in use."""
    before = request_before(cache, request.data) or request
    fingerprints = tuple(dict.fromkeys((*before.fingerprints, *request.fingerprints)))
    remember_request(cache, replace(before, fingerprints=fingerprints))


def latest_request(cache: str | Path, data: Data = None) -> Request:
    """The newest request in `cache`, or the newest of `data`. Raises `CacheMissError` where there is none."""
    data = name_of(data)
    wanted = absolute(data) if data is not None else None
    for request in all_requests(cache):
        if wanted in (None, request.data):
            return replace(request, data=data) if is_remote(data) else request  # with the secrets of its URL
    raise CacheMissError(
        f"{cache}: nothing was extracted{f' of {data}' if data is not None else ''}; "
        f"run mmfeat extract --data {data or 'DATA'} --encoders A,B first"
    )


def request_before(cache: str | Path, data: Data) -> Request | None:
    """The latest request of `data`, None where nothing of it was extracted."""
    with contextlib.suppress(CacheMissError):
        return latest_request(cache, data)
    return None


def test_of(cache: str | Path, data: str | Path) -> str:
    """The test data that the latest extraction of `data` remembers, "" where it has none."""
    before = request_before(cache, data)
    return before.test if before else ""


def extraction_of(request: Request, cache: str | Path, device: str = "auto") -> str:
    """The command that extracts a request; options that hold their default are left out."""
    before = next((other.options for other in all_requests(cache) if other.data == request.data), None)
    usual = [asdict(EncoderOptions()), asdict(EncoderOptions().decided(before))]
    usual.append({"dtype": "", "convolutional_dtype": request.options.convolutional_dtype})
    flags = {n: shown(value) for n, value in without_labels(request.columns).items() if n not in COLUMNS}
    columns = ",".join(f"{name}={value}" for name, value in request.columns.items() if name in COLUMNS)
    given = {"columns": columns, **flags, "cache": str(cache), "device": device}
    usual.append({"columns": "", "cache": "cache", "device": "auto"})
    parts = ["mmfeat", "extract", "--data", shown(request.data), "--encoders", ",".join(map(shown, request.encoders))]
    for name, value in {**given, **asdict(request.options), "dtype": _asked_dtype(request.options, device)}.items():
        if value not in [some[name] for some in usual if name in some] and not str(value).startswith(DECIDED):
            parts += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(parts)


def _asked_dtype(options: EncoderOptions, device: str) -> str:
    """The dtypes that a user must name to have these options: not those that `auto` gives without a trial."""
    dtypes, convolutional = (named_values(dtype) for dtype in (options.dtype, options.convolutional_dtype))
    usual = [resolve_dtype("auto", device, kind) for kind in (False, True)]
    if [dtypes.get(""), convolutional.get("")] == usual:
        del dtypes[""]
    return written(dtypes)


def decide_cleaning(options: EncoderOptions, source: SampleSource, cache: str | Path) -> Decision | None:
    """What the cleaning `auto` stands for in a data set; None where it is not asked for and was not before.

    A decision stays with the data set, so that a text that is added or edited does not have all others encoded again;
    only texts from another column are judged anew.
    """
    before = request_before(cache, source.data)
    if (
        before
        and before.decision
        and before.decision.reason != NO_TEXTS
        and before.columns.get("text") == source.columns.get("text")
    ):
        return before.decision
    if options.cleaned("none") == options:
        return None
    share, count = tweet_share(source.texts())
    of = f"the first {count:,} texts" if count == JUDGED else "texts"
    reason = f"{share:.0%} of {of} have a link, mention or hashtag".replace("%", " %") if count else NO_TEXTS
    return Decision(f"{DECIDED}tweet" if share >= TWEETS else "none", reason)


def resolve_options(
    options: EncoderOptions, device: str, decision: Decision | None = None, before: Request | None = None
) -> EncoderOptions:
    """The options with the dtype of `resolve_dtype`, the cleaning of `decision`, and the decoding of photos in the
    request `before`, in place of `auto`.

    Local paths that name encoders become absolute.
    """
    options = absolute_names(options)
    return replace(
        (options.cleaned(decision.cleaning) if decision else options).decided(before.options if before else None),
        dtype=_resolved(options.dtype, device),
        convolutional_dtype=options.convolutional_dtype or _resolved(options.dtype, device, convolutional=True),
    )


def _resolved(option: str, device: str, convolutional: bool = False) -> str:
    dtypes = {"": "auto", **named_values(option)}
    return written({name: resolve_dtype(dtype, device, convolutional) for name, dtype in dtypes.items()})


def all_requests(cache: str | Path) -> list[Request]:
    """The requests in `cache`, the newest first."""
    paths = sorted(Path(cache).glob(f"{FOLDER}/*.json"), key=lambda path: -path.stat().st_mtime)
    return [request for request in map(_read, paths) if request is not None]


def _read(path: Path) -> Request | None:
    """The request in a file, None for a file that holds none: the user then names the flags again."""
    try:
        values = read_note(path)
        options = EncoderOptions(**stated_options(values["options"]))
        earlier = EARLIER if named_values(options.cleaning).get("", "tweet") == "tweet" else None
        decision = values.get("decision", earlier)
        kept = decision and Decision(**{**decision, "kept": True})
        changed = {"options": options, "fingerprints": tuple(values["fingerprints"]), "decision": kept}
        return Request(**{**values, **changed})
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def read_note(path: Path) -> dict[str, Any]:
    """The plain values of a request in a file. Raises `OSError`, or `ValueError` or `TypeError` for a damaged file."""
    values = dict(read_json(path))
    if values.pop(CHECKSUM, None) not in (None, _checksum(values)):  # earlier versions wrote none
        raise ValueError("its content is not what was written")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def check_applies(towers: Sequence[Tower], options: EncoderOptions, runtime: str, device: str) -> None:
    """Raise `ConfigError` for an option, or a runtime on a device, that no encoder heeds."""

    def pooled(specs: list[EncoderSpec]) -> list[EncoderSpec]:
        return [spec for spec in specs if spec.output == "pooled"]

    names = ", ".join(dict.fromkeys(tower.spec.model for tower in towers))
    check_runtime(runtime, device, towers)
    for name in ("views", "draft", "exif", "background"):
        flag, value = f"--{name}", getattr(options, name)
        if value not in (0, AUTO) and not any(tower.spec.part == "image" for tower in towers):
            raise ConfigError(f"{flag} {value}: it is about photos, and {names} takes none; leave it out")
    specs = [tower.spec for tower in towers if is_torch(tower.request)]
    photos = [spec for spec in specs if spec.part == "image"]
    layered = [spec for spec in specs if spec.part == "image" or spec.family in ("bert", "st")]
    heeding = {
        "image_size": (photos, "torch models of photos"),
        "image_pooling": (pooled(photos), "pooled vectors of torch models of photos"),
        "layers": (pooled(layered), "pooled vectors of bert, st and torch models of photos"),
    }
    for name, families in HEEDING.items():
        heeding[name] = [tower.spec for tower in towers if tower.spec.family in families], " and ".join(families)
    for name, (found, about) in heeding.items():
        if (asked := getattr(options, name)) != getattr(EncoderOptions(), name) and not found:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {asked}: it is about {about}, and there is only {names}; leave it out")


def check_runtime(runtime: str, device: str, towers: Sequence[Tower]) -> None:
    """Raise `ConfigError` for a runtime that none of the towers could use on this device."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime {runtime}: use one of {', '.join(RUNTIMES)}")
    if runtime in ("auto", "torch"):
        return
    specs = [tower.spec for tower in towers if is_torch(tower.request)]
    if not specs:
        names = ", ".join(dict.fromkeys(tower.spec.model for tower in towers))
        raise ConfigError(f"--runtime {runtime}: there is no torch model in {names}; leave it out")
    if not any(spec.output == "pooled" for spec in specs):
        raise ConfigError(
            f"--runtime {runtime}: it applies to pooled vectors, and --outputs asks for none; leave it out"
        )
    if runtime not in LIBRARIES:
        return
    if lacking := [name for name in (runtime, "onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        extra = {"onnxruntime": "onnx"}.get(runtime, runtime)
        raise ConfigError(f"--runtime {runtime} needs {', '.join(lacking)}; {install_command(extra)}")
    if resolve_device(device) != "cpu":
        raise ConfigError(f"--runtime {runtime}: it computes on the CPU; add --device cpu, or leave it out")
    if not any(spec.arithmetic == "float32" for spec in specs):
        raise ConfigError(f"--runtime {runtime}: it computes in float32; add --dtype float32, or leave it out")


def open_test(test: str | Path, source: SampleSource) -> SampleSource:
    """The test data of `source`, with its names of columns; a label may be missing.

    Raises `DataError` for a table that lacks another of the columns, and for test data that are the data themselves.
    """
    if absolute(test) == absolute(source.data):
        raise DataError(f"--test {test}: the same as --data; leave it out, unlabelled rows are predicted without it")
    if not str(test).startswith((HUB, OBJECT)) and not exists(test):
        raise DataError(f"--test {no_such_data(test)}")
    flags = {name: value for name, value in source.columns.items() if name not in COLUMNS}
    opened = SampleSource(test, flags)
    if opened.rows is None or source.rows is None or source.rows.is_numbered:
        return opened if source.rows is None or opened.rows is None else SampleSource(test, source.columns)
    wanted = {**source.rows.columns, "id": source.rows.id_column}
    names = opened.rows.table.names
    needed = [
        (part, c) for c, name in wanted.items() if c not in ("label", SPLIT) for part in columns_in(c, name, names)
    ]
    lacking = [f"{part} ({column})" for part, column in needed if find_column(part, names) is None]
    if lacking:
        missing = ", ".join(lacking)
        raise DataError(
            f"{test}: no column {missing} as in {source.data}, among {', '.join(names)}; give both the same names"
        )
    columns = {column: name for column, name in wanted.items() if find_columns(column, name, names) is not None}
    if columns["id"] == ROW_NUMBER:
        del columns["id"]  # the table may have a column of ids
    opened = SampleSource(test, flags | columns)
    opened.check()
    return opened


def shared_ids(first: SampleSource, second: SampleSource) -> str:
    """A note on ids that occur in both data sets, "" without any or where they are numbers of rows."""
    if any(source.rows is not None and source.rows.id_column == ROW_NUMBER for source in (first, second)):
        return ""
    hashes = [np.fromiter((hash_of(sample.id) for sample in s.read(look=False)), np.uint64) for s in (first, second)]
    both = frozenset(np.intersect1d(hashes[0], hashes[1]).tolist())
    if not both:
        return ""
    example = next(sample.id for sample in second.read(look=False) if hash_of(sample.id) in both)
    return f"{len(both):,} ids occur in {first.data} too (first: {example}); are these the same samples?"
