"""`mmfeat cache`: what is cached, is it intact, why is a sample a miss, delete the unused, one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.console import ConsoleProgress, out
from mmfeat.console_cache import (
    counted,
    show_coverage,
    show_entries,
    show_explanations,
    show_garbage,
    show_parity,
    show_verification,
)
from mmfeat.flags import (
    AnyCleaning,
    AnyColumns,
    AnyData,
    AnyDraft,
    AnyDtype,
    AnyEncoders,
    AnyMaxLength,
    AnyOutputs,
    AnyPooling,
    AnyViews,
    CacheFolder,
    Device,
    Seed,
    find_request,
    names,
    reported,
)
from mmfeat.wording import size_of

if TYPE_CHECKING:
    from mmfeat.encoders import EncoderSpec
    from mmfeat.requests import Request
    from mmfeat.samples import SampleSet

NAME = "cache"
RUNS = "heads"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See, check, explain, tidy and export the cache.")


@app.command("ls")
@reported("nothing was changed")
def list_entries(cache: CacheFolder = "cache") -> None:
    """List what is cached: one line an encoder.

    \b
    mmfeat cache ls
    """
    from mmfeat.cache.survey import survey

    show_entries(survey(cache), cache)


@app.command()
@reported("nothing was changed")
def info(data: AnyData = None, cache: CacheFolder = "cache", columns: AnyColumns = None) -> None:
    """Show how much of a data set each encoder covers. Also where its vectors came from.

    \b
    mmfeat cache info --data tweets
    """
    from mmfeat.cache import Cache
    from mmfeat.cache.survey import survey
    from mmfeat.samples import read_samples

    request = find_request(data, None, cache, columns, {})
    samples = read_samples(request.data, request.columns)
    store = Cache(cache, samples.name)
    entries = survey(cache, store.folder.name)
    progress = ConsoleProgress()
    modalities = {entry.spec.modality for entry in entries if entry.spec}
    keys = {modality: store.content_keys(samples.samples, modality, progress) for modality in sorted(modalities)}
    show_coverage(samples, entries, keys)


@app.command()
@reported("nothing was changed")
def explain(
    sample: Annotated[str, typer.Argument(help="The id of a sample.", metavar="SAMPLE")],
    data: AnyData = None,
    encoders: AnyEncoders = None,
    cache: CacheFolder = "cache",
    columns: AnyColumns = None,
    device: Device = "auto",
    dtype: AnyDtype = None,
    cleaning: AnyCleaning = None,
    pooling: AnyPooling = None,
    max_length: AnyMaxLength = None,
    outputs: AnyOutputs = None,
    views: AnyViews = None,
    draft: AnyDraft = None,
) -> None:
    """Say why a sample would be a hit or a miss. Names the fields of the spec that differ.

    \b
    mmfeat cache explain 4597 --cleaning none
    """
    from mmfeat.cache.explain import explain_sample

    given: dict[str, Any] = {"dtype": dtype, "cleaning": cleaning, "pooling": pooling, "max_length": max_length}
    given |= {"outputs": _outputs(outputs), "views": views, "draft": draft}
    samples, specs = _asked(find_request(data, encoders, cache, columns, given), device)
    show_explanations(explain_sample(cache, samples, sample, specs))


@app.command()
@reported("nothing was lost; what was moved lies in the quarantine folder of the cache")
def verify(
    cache: CacheFolder = "cache",
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Move damaged files to CACHE/quarantine.")] = False,
    parity: Annotated[int, typer.Option(help="Also re-encode N samples by the plain library call.", min=0)] = 0,
    data: AnyData = None,
    columns: AnyColumns = None,
    seed: Seed = 0,
) -> None:
    """Check every checksum, count and hash. Exit code 1 if anything is damaged.

    \b
    mmfeat cache verify --parity 20
    """
    from mmfeat.cache.verify import verify_cache

    result = verify_cache(cache, quarantine=quarantine, progress=ConsoleProgress())
    show_verification(result, cache)
    sound = result.sound
    if parity and sound:
        sound = _verify_parity(cache, parity, data, columns, seed)
    elif parity:
        out.print("parity was not checked: that needs a sound cache")
    if not sound:
        raise typer.Exit(1)


@app.command()
@reported("what was not deleted yet is still there")
def gc(
    cache: CacheFolder = "cache",
    runs: Annotated[str, typer.Option(help="Folders of runs whose vectors stay, A,B, or none.")] = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List what no run and no latest extraction needs. Delete it with --yes.

    Encoders that changed within the last hour stay, as does the latest extraction of each data set.

    \b
    mmfeat cache gc
    """
    from mmfeat.garbage import delete_garbage, find_garbage

    without = runs == "none" or (runs == RUNS and not Path(RUNS).exists())  # a newcomer has no runs yet
    folders = [] if without else names(runs)
    garbage = find_garbage(cache, folders)
    show_garbage(garbage, folders)
    if garbage and yes:
        out.print(f"deleted {size_of(delete_garbage(garbage))}")
        out.print("next: mmfeat cache ls")
    elif garbage:
        out.print("nothing was deleted; the same command with --yes deletes what is listed")


@app.command()
@reported("no file was written")
def pack(
    out_file: Annotated[str, typer.Option("--out", help="The file to write.")] = "pack.h5",
    data: AnyData = None,
    encoders: AnyEncoders = None,
    cache: CacheFolder = "cache",
    columns: AnyColumns = None,
    device: Device = "auto",
    dtype: AnyDtype = None,
    cleaning: AnyCleaning = None,
    pooling: AnyPooling = None,
    max_length: AnyMaxLength = None,
    outputs: AnyOutputs = None,
    views: AnyViews = None,
    draft: AnyDraft = None,
) -> None:
    """Write one plain HDF5 file with ids, labels and vectors, aligned.

    \b
    mmfeat cache pack --out tweets.h5
    """
    from mmfeat.cache import Cache
    from mmfeat.cache.pack import write_pack

    given: dict[str, Any] = {"dtype": dtype, "cleaning": cleaning, "pooling": pooling, "max_length": max_length}
    given |= {"outputs": _outputs(outputs), "views": views, "draft": draft}
    samples, specs = _asked(find_request(data, encoders, cache, columns, given), device)
    written = write_pack(Path(out_file), Cache(cache, samples.name), samples, specs, ConsoleProgress())
    out.print(f"{counted(len(samples), 'sample')}, {counted(len(specs), 'encoder')}, {size_of(written)}")
    out.print(f"pack {out_file}")
    out.print("next: h5py reads it; docs/format.md says what is in it")


def _verify_parity(cache: str, count: int, data: str | None, columns: str | None, seed: int) -> bool:
    from mmfeat.cache import Cache
    from mmfeat.encoders import describe_encoders
    from mmfeat.parity import check_parity
    from mmfeat.samples import read_samples

    request = find_request(data, None, cache, columns, {})
    samples = read_samples(request.data, request.columns)
    towers = describe_encoders(request.encoders, request.options)
    results = list(check_parity(samples, towers, Cache(cache, samples.name), count, seed, ConsoleProgress()))
    show_parity(results)
    return all(result.holds for result in results)


def _asked(request: Request, device: str) -> tuple[SampleSet, list[EncoderSpec]]:
    """The samples and the specs that a request means on this machine."""
    from mmfeat.encoders import describe_encoders
    from mmfeat.requests import resolve_options
    from mmfeat.samples import read_samples

    towers = describe_encoders(request.encoders, resolve_options(request.options, device))
    return read_samples(request.data, request.columns), [tower.spec for tower in towers]


def _outputs(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(names(value))
