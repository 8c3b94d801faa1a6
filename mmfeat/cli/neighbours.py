"""`mmfeat neighbours`: the samples nearest to a sample, a text or a photo, as a table or a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import ConsoleProgress, one_line, out, show_table
from mmfeat.cli.flags import LATEST_READING, AnyData, CacheFolder, Device, Parameters, interruptible, option, reading
from mmfeat.system.wording import size_of

if TYPE_CHECKING:
    from mmfeat.prediction.nearest import Neighbours


PARAMETERS: Parameters = {
    "id": (Annotated[str | None, typer.Argument(metavar="ID", help="The id of a sample.")], None),
    "text": (option("A text in place of an id; compared with photos where a model has both towers.", str | None), None),
    "image": (option("A photo in place of an id.", str | None), None),
    "encoder": (
        option("Encoder whose vectors are compared, as clip.text.  [default: the first that can]", str | None),
        None,
    ),
    "count": (option("Number of samples to find.", int, least=1), 10),
    "out": (option("Write a page with photos as well.", str | None), None),
    "data": (AnyData, None),
    "cache": (CacheFolder, "cache"),
    **LATEST_READING,
    "device": (Device, "auto"),
}


@flags.takes(PARAMETERS)
@interruptible("nothing was written")
def neighbours(context: typer.Context, **values: Any) -> None:
    """Find the samples nearest to a sample, a text or a photo. The vectors are those of the latest extraction.

    \b
    mmfeat neighbours 4597 --encoder bert
    mmfeat neighbours --text "a dog in the snow" --out page.html
    """
    from mmfeat.prediction.nearest import neighbours as find

    names = ("id", "text", "image", "data", "encoder", "count", "cache", "device")
    found = find(**{name: values[name] for name in names}, columns=reading(values), progress=ConsoleProgress())
    show_neighbours(found)
    if values["out"]:
        from mmfeat.report.nearest import write_neighbours

        size = write_neighbours(found, values["out"])
        out.print(f"page {values['out']} ({size_of(size)}; opens without a network)")
    out.print(
        f"next: {'open it in a browser' if values['out'] else 'the same command with --out page.html shows photos'}"
    )


def show_neighbours(found: Neighbours) -> None:
    """Print one line for each neighbour."""
    rows = []
    for sample, cosine in zip(found.samples, found.similarities, strict=True):
        rows.append((f"{cosine:.3f}", sample.id, sample.label or "", one_line(sample.text or "")))
    out.print(f"nearest to {found.query.id} by {found.encoder}")
    show_table(("cosine", "id", "label", "text"), rows)
    for note in found.notes:
        out.print(f"note: {note}")
