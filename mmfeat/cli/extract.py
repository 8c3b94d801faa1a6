from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import SHOWN_LABELS, WORTH_A_LINE, ConsoleProgress, out, show_notes, show_table
from mmfeat.cli.flags import ENCODER_PARAMETERS, READING_PARAMETERS, CacheFolder, Data, Device, interruptible, requests
from mmfeat.system.wording import counted, duration, rate_of, shown, size_of

if TYPE_CHECKING:
    from mmfeat.encoders.registry import Tower
    from mmfeat.encoders.spec import EncoderSpec
    from mmfeat.extraction.extract import Extraction
    from mmfeat.extraction.forecast import Forecasts
    from mmfeat.extraction.missing import Clocks
    from mmfeat.extraction.requests import Decision
    from mmfeat.samples.rows import Overview
    from mmfeat.system.wording import Progress


PARAMETERS: flags.Parameters = {
    "data": (Data, None),
    "test": (flags.option("Data to predict, encoded as well; mmfeat submit writes the file.", str | None), None),
    "encoders": (flags.Encoders, "clip,bert,resnet50"),
    "cache": (CacheFolder, "cache"),
    **READING_PARAMETERS,
    "device": (Device, "auto"),
    "runtime": (flags.RuntimeFlag, "auto"),
    **ENCODER_PARAMETERS,
    "retry_failed": (flags.option("Try again what could not be read or encoded.", bool), False),
    "workers": (flags.Workers, 0),
    "batch_size": (flags.option("Samples in a forward pass; 0: by the device.", int, least=0), 0),
    "engine": (flags.EngineFlag, "local"),
    "ray_address": (flags.RayAddress, None),
    "dry_run": (flags.option("Say what is missing, how long it takes and how large it is.", bool), False),
}


@flags.takes(PARAMETERS, "every vector that was computed is kept, the same command goes on from there")
def extract(context: typer.Context, **given: Any) -> None:
    """Encode texts and photos, once. A rerun continues, or says that there is nothing to do.

    \b
    mmfeat extract tweets --encoders clip,bert:./my-bert --outputs pooled,clip=tokens
    """
    values = named_data(context)
    if values["dry_run"]:
        from mmfeat.extraction.forecast import forecast_extraction

        show_forecast(forecast_extraction(**_asked(values), progress=ConsoleProgress()))
        if values["engine"] != "local":
            out.print(
                f"that is one process of this machine; N workers of {values['engine']} divide the time by about N"
            )
        return
    result = extract_data(values, ConsoleProgress(), show_samples)
    show_extraction(result)
    if result.test is not None:
        show_extraction(result.test)
    photos = [tower.spec for tower in result.towers if tower.spec.part == "image"]
    if any(spec.decoding.is_plain for spec in photos) and "auto" in (values["exif"], values["background"]):
        out.print("photos count as stored, as before; --exif upright --background white shows them as people see them")
    elsewhere = f" --cache {shlex.quote(values['cache'])}" if values["cache"] != "cache" else ""
    few = len(result.samples.labels) < 2  # heads cannot be trained on them
    out.print(f"next: mmfeat {'predict' if few else 'heads'} --data {shlex.quote(values['data'])}{elsewhere}")


def named_data(context: typer.Context) -> dict[str, Any]:
    if context.params["data"] is None:
        context.fail(f"no data: name a folder or table, as in mmfeat {context.info_name} listings.csv")
    return context.params


def extract_data(values: Mapping[str, Any], progress: Progress, tell: Callable[[Overview], None]) -> Extraction:
    """Extract what the values of `PARAMETERS` ask for; `tell` is called with the overviews before that."""
    from mmfeat.extraction.extract import extract_features

    for note in notes_on_names(requests(values["encoders"])):
        out.print(note)
    engine = {name: values[name] for name in ("engine", "ray_address")}
    return extract_features(**_asked(values), **engine, progress=progress, tell=tell)


def _asked(values: Mapping[str, Any]) -> dict[str, Any]:
    from mmfeat.encoders.spec import EncoderOptions
    from mmfeat.extraction.extract import ExtractSettings
    from mmfeat.system.hardware import check_engine

    check_engine(values["engine"], values["ray_address"])
    settings = (values[name] for name in ("device", "workers", "batch_size", "runtime", "retry_failed"))
    return {
        **{name: values[name] for name in ("data", "cache", "test")},
        "encoders": requests(values["encoders"]),
        "options": EncoderOptions(**flags.encoder_options(values)),
        "columns": flags.reading(values),
        "settings": ExtractSettings(*settings),
    }


@interruptible("the same command writes the rest")
def demo(
    out_folder: Annotated[str, typer.Option("--out", help="Folder to write.")] = "demo",
    pairs: Annotated[int, typer.Option(help="Number of pairs.", min=60)] = 600,
    seed: flags.Seed = 7,
) -> None:
    """Write a small generated data set to try. It has drawn pictures, texts, and the ugliness of real data.

    \b
    mmfeat demo --out demo
    """
    from mmfeat.samples.demo import write_demo

    folder = write_demo(out_folder, pairs, seed)
    out.print(f"{pairs:,} generated pairs in {folder}")
    out.print(f"next: mmfeat extract --data {folder} --encoders hashing,hog")


WORTH_ADVICE = 60.0  # seconds of wall time from which advice is given
SHOWN_FAILURES = 5


def show_samples(samples: Overview) -> None:
    """Print the samples of a data set before any of them is encoded: their labels, and what was decided in reading."""
    counts = samples.labels
    out.print(f"{samples.source}: {counted(len(samples), 'sample')}, {sum(counts.values()):,} labelled")
    if counts:
        out.print(f"  labels: {', '.join(f'{name} {counts[name]:,}' for name in sorted(counts)[:SHOWN_LABELS])}")
    if samples.unused_columns:
        names = "" if counts else " (--columns label=... names yours)"
        out.print(f"  columns not used: {', '.join(samples.unused_columns)}{names}")
    _show_table(samples)
    show_notes(map(shown, samples.notes), "  ")


def notes_on(towers: Sequence[Tower]) -> list[str]:
    """A line for each tower that takes the tokens of a checkpoint whose authors publish another vector, and for each
    model with two towers of which only that of photos heeds `--layers`."""
    from mmfeat.encoders.weights import MODULES

    texts = {tower.request for tower in towers if (tower.spec.modality, tower.spec.layers) == ("text", 1)}
    layered = {tower.request: tower.spec.layers for tower in towers if tower.spec.layers > 1}
    notes = [
        f"{request}: --layers {layers} is about photos; texts have the model's own vectors"
        for request, layers in layered.items()
        if request in texts
    ]
    for request in dict.fromkeys(tower.request for tower in towers if tower.spec.family == "bert"):
        folder = Path(request.partition(":")[2])
        if (folder / MODULES).is_file():
            own = f"{request} has pooling and length of its own ({MODULES})"
            notes.append(f"{own}; st:{folder} gives the vector as published")
    return notes


def notes_on_names(requests: Sequence[str]) -> list[str]:
    """A line for each request without a family, which says the family that its files have."""
    from mmfeat.encoders.registry import absolute_request, is_family

    families = {request: absolute_request(request).partition(":")[0] for request in requests}
    return [
        f"{request}: no family is named; by its files this is {family}"
        for request, family in families.items()
        if not is_family(request.partition(":")[0]) and is_family(family)
    ]


def show_extraction(result: Extraction) -> None:
    """Print the vectors by encoder, what is missing or failed, and where the time went."""
    show_notes(map(shown, result.lost), "  ")
    for modality, reasons in result.missing.items():
        for reason, count in reasons.most_common(SHOWN_FAILURES):
            example = shown(result.examples[modality][reason])
            out.print(f"  {modality}: {count:,} without ({reason}; first: {example}); kept, the model uses the rest")
        if len(reasons) > SHOWN_FAILURES:
            out.print(f"  {modality}: {len(reasons) - SHOWN_FAILURES:,} more reasons")
    evidence = dict(result.evidence)
    for tower in result.towers:
        spec, folder = tower.spec, tower.spec.folder_name
        new, unreadable = result.new.get(folder, 0), result.unreadable[folder]
        good = f"{counted(result.stored[folder] + new, 'vector')}, {new:,} new"
        noun = "photo" if spec.part == "image" else spec.part
        lost = result.parts[spec.part].lost if spec.part in result.parts else 0  # samples, which may share a content
        trouble = f", {counted(max(lost, unreadable), noun)} unreadable" if unreadable else ""
        out.print(f"  {spec.name}: {good}{trouble} -> {result.folder / folder}")
        if result.cut[folder]:
            out.print(f"    {_cut(result.cut[folder], new, 'new texts', result.limits[folder], spec)}")
        if tower.request in evidence:  # once, below the first output
            out.print(f"    computed {evidence.pop(tower.request)}")
        if folder in result.runtimes:
            out.print(f"    computed by {shown(result.runtimes[folder])}")
    show_decision(result.decision)
    show_notes(map(shown, notes_on(result.towers)), "  ")
    for id, reason in result.failures[:SHOWN_FAILURES]:
        out.print(f"  sample {id}: {reason}; kept, the model uses the rest")
    if result.failed > SHOWN_FAILURES:
        out.print(f"  and {result.failed - SHOWN_FAILURES:,} more that cannot be read")
    if result.nothing_to_do:
        again = "; --retry-failed tries what is unreadable again" if sum(result.unreadable.values()) else ""
        out.print(f"nothing to do: every vector is in {result.folder} ({result.seconds:.1f} s){again}")
    else:
        for modality, clocks in result.clocks.items():
            if clocks.wall >= WORTH_A_LINE:
                out.print(f"  {modality}s: {_spent(clocks, modality, remedies_left(result, modality))}")
        out.print(f"wrote {counted(sum(result.new.values()), 'vector')} to {result.folder} in {result.seconds:.1f} s")


def _show_table(samples: Overview) -> None:
    """Print what the columns of numbers and categories hold, for heads to read."""
    if columns := samples.table:
        width = sum(column.width for column in columns)
        out.print(f"  table: {', '.join(column.label for column in columns)}; {counted(width, 'value')} a sample")


def show_decision(decision: Decision | None) -> None:
    if decision is None:
        return
    remedy = "none keeps them" if "tweet" in decision.cleaning else "tweet drops them"
    kept = "; kept from the first extraction" if decision.kept else ""
    out.print(f"  cleaning: {decision.cleaning} ({decision.reason}{kept}); --cleaning {remedy}")


def show_forecast(forecasts: Forecasts) -> None:
    """Print a forecast: what is missing, its time and its size on disk; the test data follow."""
    parts = [forecasts, *([forecasts.test] if forecasts.test else [])]
    for part in parts:
        _show_part(part)
    if any(part.encoders for part in parts):
        out.print("nothing was written; next: the same command without --dry-run")


def _show_part(forecasts: Forecasts) -> None:
    out.print(f"{forecasts.samples.source}: {counted(len(forecasts.samples), 'sample')}")
    show_notes(map(shown, forecasts.samples.notes), "  ")
    _show_table(forecasts.samples)
    show_decision(forecasts.decision)
    if not forecasts.encoders:
        out.print(f"nothing to do: every vector is in {forecasts.folder}")
        return
    rows = []
    for forecast in forecasts.encoders:
        for number, (spec, missing, size) in enumerate(forecast.outputs):
            shown_once = (rate_of(forecast.rate), duration(forecast.seconds)) if number == 0 else ("", "")
            view = f" {spec.view}" if spec.view != "none" else ""
            output = f"{spec.output}:{spec.layer}" if spec.layer else spec.output
            rows.append((shown(forecast.model), output + view, f"{missing:,}", *shown_once, size_of(size)))
    show_table(("encoder", "output", "missing", "rate", "time", "on disk"), rows, ("rate", "missing", "on disk"))
    for forecast in (forecast for forecast in forecasts.encoders if forecast.cut):
        cut = _cut(forecast.cut, forecast.tried, "texts that were tried", forecast.limit, forecast.outputs[0][0])
        out.print(f"{shown(forecast.model)}: {cut}")
    out.print(f"reading and decoding add {duration(forecasts.reading)}")
    total = f"{duration(forecasts.seconds)} and {size_of(forecasts.bytes)} in all"
    out.print(f"{total}; {size_of(forecasts.free)} free at {forecasts.folder}")
    if forecasts.bytes > forecasts.free:
        out.print("note: the disk is too small for that; name another with --cache, or fewer --outputs and --views")


def _cut(count: int, total: int, what: str, limit: int, spec: EncoderSpec) -> str:
    """How many texts an encoder cut, and to what, with the flag that sets the length where one does."""
    flag = " (--max-length)" if spec.family in ("bert", "st") and spec.max_length else ""
    return f"{count:,} of {total:,} {what} are longer and were cut to {limit:,} tokens{flag}"


def _spent(clocks: Clocks, modality: str, possible: Collection[str]) -> str:
    """The seconds of each step, and what would make the slowest one faster."""
    slowest = "tokenize" if (modality, clocks.bottleneck) == ("text", "decode") else clocks.bottleneck
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in clocks.seconds.items())
    readers = f" ({clocks.workers} readers)" if clocks.workers > 1 else ""
    helpful = advice(slowest, possible) if clocks.wall >= WORTH_ADVICE else ""
    return f"{steps}{readers}; slowest step: {slowest}{f', {helpful} would help' if helpful else ''}"


# Step of an extraction -> advice -> the condition in `remedies_left` under which it helps, "" for always.
REMEDIES = {
    "read": {"a faster disk": "local", "more --workers": "remote"},
    "decode": {"more --workers": "workers", "--draft for large JPEGs": "draft", "--engine ray": "ray"},
    "tokenize": {"--engine ray (a tokenizer takes one thread)": "ray"},
    "encode": {
        "a GPU (--device cuda)": "cuda",
        "a GPU (--device mps)": "mps",
        "half precision (--dtype auto)": "half",
        "--engine ray": "ray",
    },
    "write": {"a faster disk for --cache": ""},
}


def advice(step: str, possible: Collection[str]) -> str:
    """Advice that makes a step faster, "" where none is known; `possible` are the conditions that hold."""
    words = [words for words, condition in REMEDIES[step].items() if not condition or condition in possible]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def remedies_left(result: Extraction, modality: str) -> set[str]:
    """The conditions of `REMEDIES` that hold: what the extraction of a modality could have used and did not."""
    from mmfeat.encoders.registry import is_torch
    from mmfeat.system.hardware import cpu_count, gpus_seen
    from mmfeat.system.remote import is_remote

    towers = [tower for tower in result.towers if tower.spec.part == modality]
    torch = [tower for tower in towers if is_torch(tower.request)]
    device, local = result.settings.device, result.engine != "ray"
    conditions = {
        "local": not is_remote(result.samples.source),
        "remote": is_remote(result.samples.source),
        "ray": local,
        "workers": local and 0 < result.settings.workers < cpu_count(),
        "draft": modality == "image" and not any(tower.spec.decoding.draft for tower in towers),
        "half": any(_could_be_half(tower, device) for tower in torch if tower.request not in result.evidence),
        **{gpu: bool(torch) and device == "cpu" and local for gpu in gpus_seen()},
    }
    return {name for name, holds in conditions.items() if holds}


def _could_be_half(tower: Tower, device: str) -> bool:
    from mmfeat.system.hardware import fast_half

    if tower.spec.arithmetic != "float32" or tower.request.startswith("finetuned:"):
        return False
    return fast_half(device) != "float32"
