"""The HTTP side of a service: its page and routes, what a request may be, and who may send one."""

# Annotations are no texts in this file: FastAPI looks at those of routes, whose types are imported inside a function.
import asyncio
import base64
import hashlib
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import fields
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from mmfeat.errors import ConfigError, DataError
from mmfeat.serve.service import Limits, Pair, Service
from mmfeat.system.wording import size_of
from mmfeat.version import install_command

GRACE = 5  # seconds that answers in work get when the server stops
PATIENCE = 10  # bodies so many times too large are cut off; others end first, since few clients read the answer sooner
NAMES = [field.name for field in fields(Pair)]
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is a free one. Raises `ConfigError` where that is impossible."""
    if port > 65535:  # a larger number would be taken as another port
        raise ConfigError(f"no port {port}; the last one is 65535, and 0 is a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; name another --host or --port") from error


def check_installed() -> None:
    """Raise `ConfigError` where the libraries of a server are not installed."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; {install_command('serve')}") from error


def make_server(service: Service, host: str, tell: Callable[[str], None]) -> Any:
    """The server of a service that listens on `host`; its `run(sockets=[...])` ends at an interrupt, after the answers
    in work have gone out.

    `tell` gets a line for each request for a prediction, without its contents.
    """
    import uvicorn

    logging.getLogger("uvicorn.error").addFilter(_plain)
    config = uvicorn.Config(
        make_app(service, host, tell), http="h11", loop="asyncio", ws="none", lifespan="off", proxy_headers=False,
        server_header=False, access_log=False, log_config=None, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    return uvicorn.Server(config)


def _plain(record: logging.LogRecord) -> bool:
    """Have an error of the server, as by a client that breaks the rules of HTTP, be a line without its traceback."""
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = f"error: {record.exc_info[1]}", ()
        record.exc_info = None
    return True


def make_app(service: Service, host: str, tell: Callable[[str], None]) -> Any:
    """The ASGI application of a service that listens on `host`."""
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import StarletteHTTPException
    from fastapi.responses import HTMLResponse

    app = FastAPI(title=f"mmfeat serve {service.model.run.name}", docs_url=None, redoc_url=None)
    names = {host.lower(), "localhost", socket.gethostname().lower()}
    page = resources.files("mmfeat.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": _policy(page), **SAFE}

    def line(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        text = json.dumps(value, ensure_ascii=False) + "\n"
        return Response(text, status, headers, "application/json")

    @app.middleware("http")
    async def guard(request: Request, following: Callable[[Request], Awaitable[Response]]) -> Response:
        begun = time.perf_counter()
        reason = why_foreign(request.method, request.headers, names)
        response = line({"error": reason}, 403) if reason else await following(request)
        response.headers.update(policy)
        if request.url.path == "/predict":
            tell(f"predict: {response.status_code} in {1000 * (time.perf_counter() - begun):.0f} ms")
        return response

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return line({"error": error.detail}, error.status_code, error.headers)

    @app.get("/", include_in_schema=False)
    async def shown() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> Response:
        return line(service.facts)

    @app.post("/predict", openapi_extra={"requestBody": {"required": True, "content": _schemas()}})
    async def predict(request: Request) -> Response:
        try:
            return line(await _answer(service, request))
        except DataError as error:
            return line({"error": str(error)}, 400)
        except StarletteHTTPException:
            raise
        except Exception as error:  # whatever a model raises is a line here and no secret of ours there
            tell(f"error: {type(error).__name__}: {' '.join(str(error).split())}")
            return line({"error": "the model failed; the terminal of the server says why"}, 500)

    return app


async def _answer(service: Service, request: Any) -> dict[str, Any]:
    """The answer to a request, within the limits of time and number. A prediction that is late is not interrupted: its
    slot is free when it ends."""
    import anyio
    from fastapi import HTTPException

    if not service.slots.acquire(blocking=False):
        raise HTTPException(503, "too many requests at one time; try again", {"Retry-After": "1"})
    future = None
    try:
        with anyio.fail_after(service.limits.seconds):
            pair = await read_pair(request, service.limits)
            future = service.submit(pair)
            return await asyncio.shield(asyncio.wrap_future(future))
    except TimeoutError:
        raise HTTPException(504, f"no answer within {service.limits.seconds:g} s; try again") from None
    finally:
        if future is None:
            service.slots.release()


async def read_pair(request: Any, limits: Limits) -> Pair:
    """The pair in the body of a request: multipart, or JSON with the photo in base64.

    Raises `DataError` for a body that is not as it says, and HTTP's own errors for one too large or of another type.
    """
    import msgspec
    from fastapi import HTTPException
    from starlette.formparsers import MultiPartException
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = _limited(request, limits.body)
    try:
        if kind == "multipart/form-data":
            values = await _fields(request, body, limits)
        elif kind == "application/json":
            values = msgspec.json.decode(b"".join([part async for part in body]))
        else:
            raise HTTPException(415, "send multipart/form-data or application/json")
        if isinstance(values, dict) and (odd := [name for name in values if name not in NAMES]):
            raise DataError(f"no field {odd[0][:80]!r}; send {', '.join(NAMES)}")
        return msgspec.convert(values, Pair)
    except ClientDisconnect:
        raise HTTPException(400, "the request ended before its body") from None
    except (msgspec.MsgspecError, MultiPartException, UnicodeError, RecursionError) as error:
        raise DataError(f"the body cannot be read: {error}") from error


async def _fields(request: Any, body: AsyncIterator[bytes], limits: Limits) -> dict[str, Any]:
    """The fields of a form, in memory: a file as bytes, a field as text, that of the table read as JSON."""
    import msgspec
    from starlette.formparsers import MultiPartParser

    most = {"max_files": 1, "max_fields": len(NAMES), "max_part_size": limits.body}
    parser = MultiPartParser(request.headers, body, **most)  # type: ignore[arg-type]
    parser.spool_max_size = limits.body + 1  # a larger file would go to the disk
    parts = (await parser.parse()).multi_items()
    values: dict[str, Any] = {name: part if isinstance(part, str) else await part.read() for name, part in parts}
    if len(values) < len(parts):
        raise DataError("a field stands twice in the form; send each once")
    if "table" in values:
        values["table"] = msgspec.json.decode(values["table"])
    return values


async def _limited(request: Any, most: int) -> AsyncIterator[bytes]:
    """The body of a request, refused as soon as it is known to be larger than `most` bytes."""
    from fastapi import HTTPException

    def too_large(close: bool) -> Exception:
        headers = {"Connection": "close"} if close else None
        return HTTPException(413, f"the body is larger than {size_of(most)}; send a smaller photo", headers)

    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > most:
        raise too_large(close=int(size) > PATIENCE * most)
    read = 0
    async for part in request.stream():
        read += len(part)
        if read > most:
            raise too_large(close=True)
        yield part


def why_foreign(method: str, headers: Mapping[str, str], names: set[str]) -> str:
    """The reason to refuse a request, "" for one of a program or of the page itself.

    A page elsewhere can reach this server under a name of its own that it points here (DNS rebinding), which an address
    is not; and it can post, of which browsers say where it comes from.
    """
    host, origin, site = (headers.get(name, "") for name in ("host", "origin", "sec-fetch-site"))
    if not _is_known(host, names):
        return f"not served under the name {host[:80]!r}; use the address of this machine"
    is_own = site in ("same-origin", "none") if site else not origin or urlsplit(origin).netloc == host
    return "" if is_own or method != "POST" else "sent by a page of another site"


def _is_known(host: str, names: set[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _policy(page: str) -> str:
    """What the page may do: run and wear what stands in it, show a photo that it was given, and ask this server."""
    script, style = (
        base64.b64encode(
            hashlib.sha256(page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()
        ).decode()
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _schemas() -> dict[str, Any]:
    """The two kinds of body, for programs that read /openapi.json."""
    text, table = {"type": "string"}, {"type": "object"}
    kinds = {"multipart/form-data": {"format": "binary"}, "application/json": {"contentEncoding": "base64"}}
    return {
        kind: {"schema": {"type": "object", "properties": {"text": text, "image": {**text, **extra}, "table": table}}}
        for kind, extra in kinds.items()
    }
