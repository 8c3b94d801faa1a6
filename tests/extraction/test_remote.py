"""Remote data: a table and its photos behind URLs are extracted like those on the disk."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mmfeat.cache.store import Cache
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import latest_request
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.keys import content_keys
from mmfeat.system.remote import RemoteFile, absolute, exists, is_remote
from mmfeat.system.web import PIECE, TIMEOUT
from tests.processes import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Three samples, one of which names a photo that is not there."""
    folder = tmp_path / "local"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "tweets.csv").write_text("id,text,image,label\na,one,0.png,x\nb,two,1.png,y\nc,three,gone.png,x\n")
    return folder


@pytest.fixture
def bucket(local: Path) -> Iterator[str]:
    """The same in a file system that has nothing to do with the disk."""
    files = fsspec.filesystem("memory")
    for path in local.iterdir():
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_remote_pairs_give_the_vectors_of_local_ones(local: Path, bucket: str, tmp_path: Path) -> None:
    asked = ["hashing", "hog"]
    here = extract_features(local / "tweets.csv", asked, cache=tmp_path / "here")
    there = extract_features(f"{bucket}/tweets.csv", asked, cache=tmp_path / "there")
    assert (there.samples.name, here.new) == ("tweets", there.new)
    assert there.missing["image"] == {"unreadable: No such file or directory": 1}
    assert here.missing["image"] == {"image file not found": 1}
    samples = read_samples(f"{bucket}/tweets.csv").samples
    assert samples[0].image == RemoteFile(f"{bucket}/0.png")
    specs = [tower.spec for tower in here.towers]
    local_samples = read_samples(local / "tweets.csv").samples
    ours = Cache(tmp_path / "here", "tweets").load(local_samples, specs).blocks
    theirs = Cache(tmp_path / "there", "tweets").load(samples, specs).blocks
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.vectors, other.vectors)
    assert latest_request(tmp_path / "there").data == f"{bucket}/tweets.csv"
    assert extract_features(f"{bucket}/tweets.csv", asked, cache=tmp_path / "there").nothing_to_do


def test_a_local_table_may_name_remote_photos(local: Path, bucket: str, tmp_path: Path) -> None:
    table = tmp_path / "mixed.jsonl"
    table.write_text(f'{{"id": "a", "image": "{bucket}/0.png"}}\n{{"id": "b", "image": "local/1.png"}}\n')
    result = extract_features(table, ["hog"], cache=tmp_path / "cache")
    assert list(result.new.values()) == [2]


def test_parquet_is_read_remotely_too(bucket: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    with fsspec.open(f"{bucket}/t.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], "text": ["one"]}), file)
    assert [sample.text for sample in read_samples(f"{bucket}/t.parquet")] == ["one"]


def test_what_is_not_there_or_cannot_be_reached_is_one_line(bucket: str) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/no\.csv: no such folder or table"):
        read_samples(f"{bucket}/no.csv")
    with pytest.raises(DataError, match=r"nowhere://x/t\.csv: .*use a local path or a protocol that fsspec knows"):
        read_samples("nowhere://x/t.csv")


def test_a_url_may_go_on_with_a_query(bucket: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/signed.csv?key=1", b"id,text\na,one\n")
    assert len(read_samples(f"{bucket}/signed.csv?key=1")) == 1


def test_a_cache_is_no_url(bucket: str) -> None:
    with pytest.raises(ConfigError, match="--cache memory://bucket/cache: a cache lies in a folder"):
        extract_features(f"{bucket}/tweets.csv", ["hashing"], cache=f"{bucket}/cache")


def test_places() -> None:
    assert is_remote("s3://bucket/x.csv")
    assert not is_remote("C:/data/x.csv")
    assert not is_remote(Path("data/x.csv"))
    assert absolute("s3://bucket/x.csv") == "s3://bucket/x.csv"
    assert absolute("x.csv") == str(Path.cwd() / "x.csv")
    assert exists(".")
    assert RemoteFile("s3://bucket/a/x.jpg").name == "x.jpg"


@pytest.fixture
def site(local: Path) -> Iterator[str]:
    """The same files from a server on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    (local / "page.png").write_text("<html><body>Sign in</body></html>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(local))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_photos_behind_http_are_those_of_files(site: str, local: Path, tmp_path: Path) -> None:
    cells = [f"{site}/0.png", f"{site}/1.png?w=200&x=1", f"{site}/gone.png", f"{site}/page.png", "1.png"]
    table = tmp_path / "urls.csv"
    table.write_text("id,image\n" + "".join(f"s{number},{cell}\n" for number, cell in enumerate(cells)))
    result = extract_features(table, ["hog"], cache=tmp_path / "cache", columns={"image-root": site})
    assert result.failures == [("s3", "not an image")]
    assert result.missing["image"].total() == 1
    here = extract_features(local / "tweets.csv", ["hog"], cache=tmp_path / "cache")
    samples = read_samples(table, {"image-root": site}).samples
    kept = (0, 1, 4)
    specs = [tower.spec for tower in result.towers]
    (theirs,) = Cache(tmp_path / "cache", "urls").load([samples[row] for row in kept], specs).blocks
    (ours,) = Cache(tmp_path / "cache", "tweets").load(read_samples(local / "tweets.csv").samples, specs).blocks
    np.testing.assert_array_equal(theirs.vectors, ours.vectors[[0, 1, 1]])
    assert here.new.total() == 2


def test_a_missing_client_is_an_extra_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **options: object) -> None:
        raise ImportError("no client")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for url, extra in {"https://a.b/1.jpg": "http", "s3://bucket/1.jpg": "s3", "gs://bucket/1.jpg": "gcs"}.items():
        with pytest.raises(DataError, match=rf"pip install -e .*\[{extra}\]"):
            RemoteFile(url).read_bytes()
        assert extra in extras
    with pytest.raises(DataError, match="no client; pip install what it names"):
        RemoteFile("abfs://a/1.jpg").read_bytes()


class Hostile(SimpleHTTPRequestHandler):
    """A server whose answers are named by the path."""

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.strip("/").partition(".")[0]
        if name == "silent":
            time.sleep(60)
        elif name in ("loop", "file"):
            self._begin(302, Location="/loop.png" if name == "loop" else "file:///etc/passwd")
        elif name.isdigit():
            self.send_error(int(name))
        elif name == "nothing":
            self.close_connection = True
        elif name in ("words", "headers"):
            with contextlib.suppress(OSError):
                self.wfile.write(b"HELLO\r\n" if name == "words" else b"HTTP/1.1 200 OK\r\nA: " + b"a" * 2**20)
        elif name == "bomb":
            self._begin(200, **{"Content-Encoding": "gzip"})
            press = zlib.compressobj(wbits=31)
            with contextlib.suppress(OSError):
                for _ in range(600):
                    self.wfile.write(press.compress(bytes(PIECE)))
        elif name == "liar":
            self._begin(200, **{"Content-Encoding": "br", "Transfer-Encoding": "chunked"})
            self.wfile.write(b"FFFFFFFFFFFFFFFFFF\r\n0")
        elif name == "good":
            self._begin(200)
            self.wfile.write(self.server.photo)  # type: ignore[attr-defined]
        else:
            self._begin(200, **{"Content-Length": "1000"} if name in ("slow", "cut") else {})
            with contextlib.suppress(OSError):
                for _ in range(1 if name == "cut" else 600):
                    self.wfile.write(b"0" * (1 if name == "slow" else PIECE if name == "endless" else 10))
                    time.sleep(0.1 if name == "slow" else 0)

    def _begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()


@pytest.fixture
def hostile(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hostile server, of which nothing is waited for longer than 0.3 s, or 0.9 s for a whole file."""
    monkeypatch.setenv(TIMEOUT, "0.3")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        server.photo = (local / "0.png").read_bytes()  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.block_on_close = False


REASONS = {
    "silent": "no whole answer within 0.3 to 0.9 s",
    "slow": "no whole answer within 0.3 to 0.9 s",
    "loop": "more than 5 redirects",
    "file": "no address of HTTP, or a redirect to something else",
    "404": "HTTP 404 Not Found",
    "403": "HTTP 403 Forbidden",
    "500": "HTTP 500 Internal Server Error",
    "endless": "larger than 256 MB",
    "cut": "no connection (ClientPayloadError)",
    "nothing": "no connection (ServerDisconnectedError)",
    "words": "no connection (ClientResponseError)",
    "headers": "no connection (ClientResponseError)",
    "liar": "no connection (ClientResponseError)",
    "bomb": "no whole answer within 0.3 to 0.9 s",
}


def test_a_hostile_server_costs_seconds_and_has_a_reason(hostile: str, tmp_path: Path) -> None:
    names = ["good", *REASONS, "good"]
    table = tmp_path / "urls.csv"
    table.write_text("id,image\n" + "".join(f"s{n},{hostile}/{name}.png\n" for n, name in enumerate(names)))
    start = time.monotonic()
    samples = read_samples(table).samples
    keys = content_keys(samples, "image")
    assert time.monotonic() - start < 30  # less than one photo waited for without limits
    assert keys.present.tolist() == [name == "good" for name in names]
    reasons = dict(zip(names, keys.reasons, strict=True))
    for name in ("endless", "bomb"):
        assert reasons.pop(name) in (f"unreadable: {REASONS[other]}" for other in ("endless", "slow"))  # busy machine
    wanted = {name: f"unreadable: {reason}" for name, reason in REASONS.items() if name not in ("endless", "bomb")}
    assert reasons == {"good": "", **wanted}


def test_a_server_of_another_protocol_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(DataError, match=r"ftp://127.0.0.1:1/t.csv: Connection refused; check the address"):
        read_samples("ftp://127.0.0.1:1/t.csv")


def test_a_table_behind_a_hostile_server_is_one_line(hostile: str) -> None:
    for name in ("silent", "loop", "file", "404"):
        with pytest.raises(DataError, match=re.escape(f"{hostile}/{name}.csv: {REASONS[name]}; check the address")):
            read_samples(f"{hostile}/{name}.csv")
    late = {"slow": "no answer in time", "endless": REASONS["endless"], "cut": REASONS["cut"]}
    for name, reason in late.items():
        with pytest.raises(DataError, match=re.escape(f"{hostile}/{name}.csv: cannot be read ({reason}); download it")):
            read_samples(f"{hostile}/{name}.csv")
    unreachable = (hostile.replace("http", "https"), "http://127.0.0.1:1")
    for address, reason in zip(unreachable, ("[SSL: WRONG_VERSION_NUMBER]", "Connect call failed"), strict=True):
        with pytest.raises(DataError, match=re.escape(f"{address}/good.csv: no connection ({reason}")):
            read_samples(f"{address}/good.csv")


def test_a_host_that_never_answers_is_asked_a_few_times_only(hostile: str) -> None:
    silent = hostile.replace("127.0.0.1", "localhost")
    reasons = []
    for number in range(4):
        with pytest.raises(OSError, match="answer") as caught:
            RemoteFile(f"{silent}/silent.png?{number}").read_bytes()
        reasons.append(caught.value.strerror)
    assert reasons == [
        REASONS["silent"],
        "localhost never answers",
        "localhost never answers",
        "localhost never answers",
    ]


def test_secrets_in_urls_are_neither_written_nor_shown(site: str, local: Path, tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(40)]
    rows = [f"{name},text {number},{number % 2}.png,{'xy'[number % 2]}" for number, name in enumerate(names)]
    (local / "t.csv").write_text("id,text,image,label\n" + "\n".join([*rows, "z,new,gone.png,"]) + "\n")
    held = site.replace("://", "://anna:pass-5ecret@")
    data, root = f"{held}/t.csv?token=tok-5ecret", f"image-root={held}"
    heads = ("--fusion", "none", "--baselines", "ridge", "--folds", "2", "--no-group")
    commands = [
        ("extract", "--data", data, "--encoders", "hashing,hog", "--columns", root),
        ("audit", "--data", data, "--columns", root),
        ("heads", "--data", data, "--columns", root, *heads),
        ("report", "--data", data),
        ("submit", "--data", data, "--columns", root),
    ]
    for command in commands:
        process = Command(command, tmp_path)
        said = "".join(process.wait())
        assert process.returncode == 0, said
        assert "5ecret" not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if b"5ecret" in path.read_bytes()]
    again = Command(["heads", "--folds", "3"], tmp_path)
    assert "token=*** was recorded without its keys and tokens; name the whole address again" in again.wait()[1]
    assert again.returncode == 1
