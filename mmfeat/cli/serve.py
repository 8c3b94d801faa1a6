"""`mmfeat serve`: a run behind HTTP, with a page to try it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli.console import err, out, show_overlooked
from mmfeat.cli.flags import AnyRun, Device, Head, Heads, Modalities, Parameters, interruptible, option, requests, takes
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.system.wording import head_label

if TYPE_CHECKING:
    from mmfeat.prediction.model import Model
    from mmfeat.serve.service import Nearest

LOOPBACK = ("127.", "::1")
SHOWN = 5  # neighbours
_NEIGHBOURS = f"Number of nearest training samples in an answer.  [default: {SHOWN}; 0 with a --host open to others]"
PARAMETERS: Parameters = {
    "folder": (Annotated[str | None, typer.Argument(metavar="RUN", help="The same as --run.")], None),
    "run": (AnyRun, None),
    "host": (option("Address to listen on; 0.0.0.0 is open to the network."), "127.0.0.1"),
    "port": (option("Port to listen on; 0 is a free one.", int, least=0), 8000),
    "neighbours": (option(_NEIGHBOURS, int | None, least=0), None),
    "heads": (Heads, "heads"),
    "head": (Head, None),
    "modalities": (Modalities, None),
    "encoders": (option("Where the weights of the run are now, if they moved: bert:FOLDER,...", str | None), None),
    "device": (Device, "auto"),
}


@takes(PARAMETERS)
@interruptible("nothing was served")
def serve(context: typer.Context, **values: Any) -> None:
    """Answer pairs of text and photo over HTTP. The answers are those of `mmfeat predict`; a page lets you try it.

    \b
    mmfeat serve heads/RUN --port 8000
    curl -F text="what a day" -F image=@photo.jpg http://127.0.0.1:8000/predict
    """
    from mmfeat.prediction.model import load
    from mmfeat.serve.app import check_installed, listen, make_server
    from mmfeat.serve.service import Service

    run, host = values["run"] or values["folder"], values["host"]
    if values["run"] and values["folder"]:
        raise ConfigError(f"{values['folder']} and --run {values['run']} both name a run; give one of them")
    check_installed()
    which = {name: values[name] for name in ("heads", "head", "modalities", "device")}
    model = load(run, **which, encoders=requests(values["encoders"] or ""))
    with listen(host, values["port"]) as opened:
        address, port = opened.getsockname()[:2]
        is_open = not address.startswith(LOOPBACK)
        count = values["neighbours"] if values["neighbours"] is not None else 0 if is_open else SHOWN
        service = Service(model, nearest=_nearest(model, count))
        service.warm()
        if run is None:
            show_overlooked(model.run, values["head"], values["modalities"])
        if is_open:
            err.print("note: whoever reaches this machine can ask, unencrypted; --host 127.0.0.1 keeps it to yourself")
        out.print(f"{head_label(model.entry.head, model.entry.modalities)} of {model.run.folder}")
        out.print(f"serving http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")
        with suppress(KeyboardInterrupt):
            make_server(service, host, err.print).run(sockets=[opened])
        out.print("stopped")


def _nearest(model: Model, count: int) -> Nearest | None:
    """The search for so many neighbours, None for 0 and, with a note, where the cache is gone."""
    from mmfeat.serve.service import Nearest

    try:
        return Nearest(model, count) if count else None
    except CacheMissError as error:
        err.print(f"note: answers are without neighbours: {error}")
        return None
