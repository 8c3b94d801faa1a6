"""`mmfeat cache`: list, check, explain, tidy and export the feature cache."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import ConsoleProgress, out, show_table
from mmfeat.cli.flags import (
    LATEST_READING,
    AnyData,
    CacheFolder,
    Helped,
    find_request,
    interruptible,
    names,
    option,
    takes,
)
from mmfeat.system.wording import counted, size_of

if TYPE_CHECKING:
    from mmfeat.cache.explain import Explanation
    from mmfeat.cache.parity import Parity
    from mmfeat.cache.survey import CachedEncoder
    from mmfeat.cache.verify import Verification
    from mmfeat.encoders.registry import Tower
    from mmfeat.extraction.requests import Request
    from mmfeat.runs.garbage import Garbage
    from mmfeat.samples.dataset import SampleSet
    from mmfeat.samples.keys import ContentKeys


SHOWN_PROBLEMS = 3


def show_entries(entries: Sequence[CachedEncoder], cache: str) -> None:
    if not entries:
        out.print(f"nothing is cached in {cache}; next: mmfeat extract --data DATA --encoders A,B")
        return
    names = ("data", "encoder", "rows", "width", "dtype", "size", "age", "fingerprint")
    table = []
    for entry in entries:
        good, failed = entry.count()
        rows = f"{good:,}" + (f" +{failed:,} failed" if failed else "")
        dtype = entry.spec.storage if entry.spec else "?"
        name = entry.name if entry.spec else f"{entry.name} (damaged, or of another version)"
        width = str(entry.width or "-")
        sizes = (size_of(entry.bytes), age(entry.changed), entry.folder.name[-8:])
        table.append((entry.dataset, name, rows, width, dtype, *sizes))
    show_table(names, table, ("dtype", "width", "age", "fingerprint"))
    total = sum(entry.bytes for entry in entries)
    out.print(f"{counted(len(entries), 'encoder')}, {size_of(total)} in {cache}")
    if any(entry.problems for entry in entries):
        out.print(f"some files are damaged; next: mmfeat cache verify --cache {shlex.quote(cache)}")
    else:
        out.print("next: mmfeat cache info; it shows how much of a data set each encoder covers")


def show_coverage(samples: SampleSet, entries: Sequence[CachedEncoder], keys: Mapping[str, ContentKeys]) -> None:
    """Print how much of a data set each encoder covers, and the versions that made its vectors."""
    out.print(f"{samples.source}: {counted(len(samples), 'sample')}")
    for modality, contents in keys.items():
        present = contents.keys[contents.present].tolist()
        out.print(f"  {modality}: {len(present):,} samples have one, {len(set(present)):,} different")
    for entry in entries:
        out.print(f"{entry.name} ({entry.folder})")
        if entry.spec is None:
            show_problems(entry)
            continue
        good, failed, missing = entry.covered(keys[entry.spec.part])
        share = good / max(1, good + failed + missing)
        out.print(f"  covers {share:.1%}: {good:,} vectors, {failed:,} unreadable, {missing:,} missing")
        stored = sum(entry.count())
        dtype = f"{entry.width} x {entry.spec.storage}, computed in {entry.spec.arithmetic}"
        files = f"{size_of(entry.bytes)}, {counted(len(entry.shards), 'shard')}, {age(entry.changed)} old"
        out.print(f"  {counted(stored, 'row')} of {dtype}, {files}")
        out.print(f"  weights {entry.spec.weights[:40]}, fingerprint {entry.spec.fingerprint[:16]}")
        show_problems(entry)
    _show_versions(entries)


def _show_versions(entries: Sequence[CachedEncoder]) -> None:
    encoders: dict[str, list[str]] = {}
    for entry in entries:
        versions = entry.provenance.get("versions")
        if isinstance(versions, Mapping):
            made = ", ".join(f"{name} {version}" for name, version in versions.items())
            encoders.setdefault(made, []).append(entry.name)
    for made, whose in encoders.items():
        which = f"{', '.join(whose)} " if len(encoders) > 1 else ""
        out.print(f"{which}made with {made}")


def show_problems(entry: CachedEncoder) -> None:
    for problem in list(entry.problems.values())[:SHOWN_PROBLEMS]:
        out.print(f"  {problem}")
    if len(entry.problems) > SHOWN_PROBLEMS:
        out.print(f"  and {len(entry.problems) - SHOWN_PROBLEMS:,} more problems; mmfeat cache verify lists them all")


def show_explanations(explanations: Sequence[Explanation], extraction: str) -> None:
    """Print the outcome for each encoder, a hit or a miss, its reasons, and the command `extraction` that helps."""
    for explanation in explanations:
        first, *rest = explanation.reasons
        out.print(f"{explanation.encoder}: {explanation.outcome}: {first}")
        for reason in rest:
            out.print(f"  {reason}")
    outcomes = {explanation.outcome for explanation in explanations}
    if "miss" in outcomes:
        out.print(f"next: {extraction} computes what is missing")
    if "failed" in outcomes:
        out.print(f"next: {extraction} --retry-failed tries again")


def show_verification(result: Verification, cache: str) -> None:
    """Print each damage, the number of files and rows that were checked, and the next command."""
    for damage in result.damages:
        out.print(f"damaged: {damage.path}: {damage.reason}")
        if damage.moved:
            out.print(f"  moved to {damage.moved}")
    if result.doubles:
        out.print(f"{result.doubles:,} rows are stored twice (harmless: the first is read)")
    checked = ", ".join(
        [counted(result.encoders, "encoder"), counted(result.shards, "shard"), counted(result.rows, "row")]
    )
    checked += f", {size_of(result.bytes)}"
    if not result.damages:
        out.print(f"all sound: {checked} in {cache}; there is nothing to do")
        return
    out.print(f"{len(result.damages)} damaged among {checked} in {cache}")
    moved = "mmfeat extract computes what was moved again"
    move = "" if result.sound else f"mmfeat cache verify --cache {shlex.quote(cache)} --quarantine; then "
    out.print(f"next: {move}{moved}")


def show_parity(results: Sequence[Parity]) -> None:
    """Print the largest deviation of each encoder from a plain float32 call of its library."""
    for parity in results:
        if not parity.rows:
            out.print(f"parity not checked: {parity.encoder}: none of its rows is cached; mmfeat extract computes them")
            continue
        verdict = "holds" if parity.holds else "DOES NOT HOLD"
        worst = f", worst sample {parity.sample}" if parity.sample else ""
        deviation = f"largest deviation {parity.deviation:.1e}, smallest cosine {parity.cosine:.6f}"
        rows = counted(parity.rows, "row")
        out.print(f"parity {verdict}: {parity.encoder}: {rows}, {deviation}{worst} (bound: {parity.bound})")


def show_garbage(garbage: Sequence[Garbage], runs: Sequence[str]) -> None:
    table = [
        (str(piece.folder), str(len(piece.files)), size_of(piece.bytes), age(piece.changed), piece.reason)
        for piece in garbage
    ]
    looked = f"runs in {', '.join(runs)}" if runs else "no runs"
    if garbage:
        show_table(("folder", "files", "size", "age", "why"), table, ("files", "age"))
        out.print(f"{size_of(sum(piece.bytes for piece in garbage))} could go (looked at {looked} and all extractions)")
    else:
        out.print(f"nothing to delete (looked at {looked} and all extractions)")


def age(changed: float) -> str:
    """Return the time since `changed`, in seconds since 1970, as people read it."""
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


NAME = "cache"
RUNS = "heads"  # the folder of runs that gc looks into by default
SampleFlag = Annotated[str, typer.Argument(help="The id of a sample.", metavar="SAMPLE")]
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See, check, explain, tidy and export the cache.")


@app.command("ls", cls=Helped)
@interruptible("nothing was changed")
def list_entries(cache: CacheFolder = "cache") -> None:
    """List what is cached: one line an encoder.

    \b
    mmfeat cache ls
    """
    from mmfeat.cache.survey import survey

    show_entries(survey(cache), cache)


@app.command(cls=Helped)
@takes({"data": (AnyData, None), "cache": (CacheFolder, "cache"), **LATEST_READING}, "nothing was changed")
def info(context: typer.Context, cache: str, **values: Any) -> None:
    """Show how much of a data set each encoder covers. Also where its vectors came from.

    \b
    mmfeat cache info --data tweets
    """
    from mmfeat.cache.store import Cache
    from mmfeat.cache.survey import survey
    from mmfeat.samples.dataset import read_samples

    request = find_request({"cache": cache, **values})
    samples = read_samples(request.data, request.columns)
    store = Cache(cache, samples.name)
    entries = survey(cache, store.folder.name)
    progress = ConsoleProgress()
    modalities = {entry.spec.part for entry in entries if entry.spec}
    keys = {modality: store.content_keys(samples.samples, modality, progress) for modality in sorted(modalities)}
    show_coverage(samples, entries, keys)


@app.command(cls=Helped)
@takes({"sample": (SampleFlag, ...), **flags.REQUEST_PARAMETERS}, "nothing was changed")
def explain(context: typer.Context, **values: Any) -> None:
    """Say why a sample would be a hit or a miss. Names the fields of the spec that differ.

    \b
    mmfeat cache explain 4597 --cleaning none
    """
    from mmfeat.cache.explain import explain_sample
    from mmfeat.extraction.requests import extraction_of

    request = find_request(values)
    samples, towers = _samples_and_towers(request, values)
    explained = explain_sample(values["cache"], samples, values["sample"], [tower.spec for tower in towers])
    show_explanations(explained, extraction_of(request, values["cache"], values["device"]))


VERIFY_PARAMETERS: flags.Parameters = {
    "cache": (CacheFolder, "cache"),
    "quarantine": (option("Move damaged files into CACHE/quarantine.", bool, "--quarantine"), False),
    "parity": (option("Encode N samples again by the plain library call, and compare.", int, least=0), 0),
    "data": (AnyData, None),
    **LATEST_READING,
    "seed": (flags.Seed, 0),
}


@app.command(cls=Helped)
@takes(VERIFY_PARAMETERS, "nothing was lost; what was moved lies in the quarantine folder of the cache")
def verify(context: typer.Context, cache: str, quarantine: bool, parity: int, **values: Any) -> None:
    """Check every checksum, count and hash. Exit code 1 if anything is damaged.

    \b
    mmfeat cache verify --parity 20
    """
    from mmfeat.cache.verify import verify_cache

    result = verify_cache(cache, quarantine=quarantine, progress=ConsoleProgress())
    show_verification(result, cache)
    sound = result.sound
    if parity and sound:
        sound = _verify_parity({"cache": cache, **values}, parity, values["seed"])
    elif parity:
        out.print("parity was not checked: that needs a sound cache")
    if not sound:
        raise typer.Exit(1)


@app.command(cls=Helped)
@interruptible("what was not deleted yet is still there")
def gc(
    cache: CacheFolder = "cache",
    runs: Annotated[str, typer.Option(help="Folders of runs whose vectors are kept, A,B, or none.")] = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what no run and no latest extraction needs. Delete it with --yes.

    Encoders that changed within the last hour stay, as does the latest extraction of each data set.

    \b
    mmfeat cache gc
    """
    from mmfeat.runs.garbage import delete_garbage, find_garbage

    without = runs == "none" or (runs == RUNS and not Path(RUNS).exists())  # no run was made yet
    folders = [] if without else names(runs)
    garbage = find_garbage(cache, folders)
    show_garbage(garbage, folders)
    if garbage and yes:
        out.print(f"deleted {size_of(delete_garbage(garbage))}")
        out.print("next: mmfeat cache ls")
    elif garbage:
        out.print("nothing was deleted; the same command with --yes deletes what is listed")


PACK_PARAMETERS: flags.Parameters = {
    "out": (option("The file to write; its suffix is a format.  [default: pack.FORMAT]", str | None), None),
    "format": (option("h5, npy, parquet, lance or faiss.  [default: the suffix of --out, or h5]", str | None), None),
    "labels": (flags.Labels, None),
    **flags.REQUEST_PARAMETERS,
}


@app.command(cls=Helped)
@takes(PACK_PARAMETERS, "no file was written")
def pack(context: typer.Context, **values: Any) -> None:
    """Write ids, labels, split and vectors for other programs. Their rows are aligned.

    \b
    mmfeat cache pack --out tweets.h5
    mmfeat cache pack --out tweets.parquet
    """
    from mmfeat.cache.pack import HDF5, write_pack
    from mmfeat.cache.store import Cache

    path, format = Path(values["out"] or f"pack.{values['format'] or HDF5}"), values["format"]
    samples, towers = _samples_and_towers(find_request(values), values)
    specs = [tower.spec for tower in towers]
    written = write_pack(path, Cache(values["cache"], samples.name), samples, specs, ConsoleProgress(), format)
    out.print(f"{counted(len(samples), 'sample')}, {counted(len(specs), 'encoder')}, {size_of(written)}")
    out.print(f"pack {path}")
    out.print("next: mmfeat.read_pack reads it; docs/cache.md names other programs")


def _verify_parity(values: Mapping[str, Any], count: int, seed: int) -> bool:
    """Print how far `count` samples, encoded again, differ from their cached vectors; return whether parity holds."""
    from mmfeat.cache.parity import check_parity
    from mmfeat.cache.store import Cache

    samples, towers = _samples_and_towers(find_request(values), values)
    results = list(check_parity(samples, towers, Cache(values["cache"], samples.name), count, seed, ConsoleProgress()))
    show_parity(results)
    return all(result.holds for result in results)


def _samples_and_towers(request: Request, values: Mapping[str, Any]) -> tuple[SampleSet, list[Tower]]:
    from mmfeat.extraction.arithmetic import resolve_encoders
    from mmfeat.samples.corrections import read_corrected, without_labels
    from mmfeat.samples.dataset import SampleSource

    source, device = SampleSource(request.data, without_labels(request.columns)), values.get("device", "auto")
    resolved = resolve_encoders(request.encoders, request.options, source, values["cache"], device)
    return read_corrected(request.data, request.columns)[0], resolved.towers
