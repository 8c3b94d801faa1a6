"""`mmfeat encoders`: list the encoders that can be named, and say how one of them makes a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmfeat.cli.console import out
from mmfeat.cli.flags import Device, interruptible, requests
from mmfeat.errors import ConfigError

if TYPE_CHECKING:
    from mmfeat.encoders.catalogue import Listed

SHOWN = 40  # models of a family; more are listed with --match


@interruptible("nothing was written")
def encoders(
    name: Annotated[str | None, typer.Argument(help="Encoders to show the recipe of, as for --encoders.")] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="List the encoders of a family: st, bert, hf, clip, timm, torchvision, hashing, hog, lexicon."
        ),
    ] = None,
    match: Annotated[str, typer.Option(help="With --family: list only names that contain this text.")] = "",
    device: Device = "auto",
) -> None:
    """List the encoders that can be named. Of a named one: its whole recipe, before anything is loaded.

    \b
    mmfeat encoders st:BAAI/bge-small-en-v1.5
    """
    if name and (family or match):
        raise ConfigError("--family and --match list encoders; leave them out to see the recipe of one")
    if match and not family:
        raise ConfigError(f"--match {match}: name where, as in --family timm")
    if name:
        _show_recipe(name, device)
    elif family:
        _show_family(family, match)
    else:
        _show_overview()


def _show_overview() -> None:
    from mmfeat.encoders.catalogue import cached_models, families, recommended

    for size, models in recommended().items():
        out.print(f"{size}: for text, for photos, and for both")
        for model in models:
            _show(model)
    if cached := cached_models():
        out.print("in the hub cache")
        for model in cached:
            _show(model)
    out.print("families")
    for family, (count, words) in families().items():
        known = f"{count:,} named; mmfeat encoders --family {family}" if count > 1 else ""
        out.print(f"  {family}: {words}" + (f" ({known})" if known else ""))
    out.print("the figures are published ones, not measured by mmfeat")
    out.print("next: mmfeat encoders NAME; it says the whole recipe")


def _show_family(family: str, match: str) -> None:
    from mmfeat.encoders.catalogue import families, listed

    known = families()
    if family not in known:
        raise ConfigError(f"--family {family}: use one of {', '.join(known)}")
    found = listed(family, match)
    for model in found[:SHOWN]:
        _show(model)
    if (more := len(found) - SHOWN) > 0:
        out.print(f"and {more:,} more; --match TEXT narrows the list")
    if not found:
        holding = f" that holds {match!r}" if match else " that is recommended or cached"
        out.print(f"no name of {family}{holding}; {family} takes {known[family][1]}")


def _show_recipe(name: str, device: str) -> None:
    from mmfeat.encoders.recipe import recipe
    from mmfeat.encoders.spec import EncoderOptions
    from mmfeat.extraction.requests import resolve_options

    for request in requests(name):
        for model, lines in recipe(request, resolve_options(EncoderOptions(), device)):
            out.print(model)
            for what, how in lines:
                out.print(f"  {what}: {how}")
    out.print(f"next: mmfeat extract --data DATA --encoders {name}")


def _show(model: Listed) -> None:
    out.print(f"  {model.name}: {', '.join(model.facts)}")
    if model.figure:
        out.print(f"    {model.figure} ({model.source})")
