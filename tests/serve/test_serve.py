"""The service answers as `mmfeat predict` does, to this machine only, within its limits, and its page works."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmfeat.cache.store import Cache
from mmfeat.cli.main import app
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.prediction.model import Model, load
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import read_samples
from mmfeat.serve.app import listen, make_server
from mmfeat.serve.service import Limits, Nearest, Service
from tests.processes import Command
from tests.report.browser import open_browser, requests
from tests.sweep.small_sweeps import sweep

TEXT = "what a wonderful day"
BOUNDARY = "----frontier"


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return sweep(place, fusion=["concat"], baselines=["ridge"]).run


@pytest.fixture(scope="module")
def model(run: Run) -> Model:
    return load(run, head="concat", modalities="both", device="cpu")


@pytest.fixture(scope="module")
def photo(place: Path) -> Path:
    return next(Path(str(sample.image)) for sample in read_samples(place / "demo").unlabelled if sample.image)


@dataclass
class Place:
    """A running server: its port, and the lines that it tells."""

    port: int
    lines: list[str]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(Status, answer), which is one line of JSON wherever it is no page."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named, encode_chunked=hasattr(body, "__next__"))
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.headers.get_content_type() != "application/json":
            return response.status, text
        assert "\n" not in text.removesuffix("\n")
        return response.status, json.loads(text)

    def form(self, *parts: tuple[str, str | bytes], **headers: str) -> tuple[int, Any]:
        """Post a form, in which bytes are a file."""
        body = b""
        for name, value in parts:
            file = '; filename="photo.jpg"' if isinstance(value, bytes) else ""
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
            body += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
        body += f"--{BOUNDARY}--\r\n".encode()
        return self.ask("POST", "/predict", body, Content_Type=f"multipart/form-data; boundary={BOUNDARY}", **headers)

    def json(self, value: Any, **headers: str) -> tuple[int, Any]:
        return self.ask("POST", "/predict", json.dumps(value), Content_Type="application/json", **headers)

    def upload(self, *heads: str) -> socket.socket:
        """A connection that has sent the heads of a request and nothing of its body."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        lines = ["POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", *heads]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return connection


@contextmanager
def serving(model: Model, nearest: Nearest | None = None, **limits: Any) -> Iterator[Place]:
    lines: list[str] = []
    with listen("127.0.0.1", 0) as opened:
        server = make_server(Service(model, Limits(**limits), nearest), "127.0.0.1", lines.append)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield Place(opened.getsockname()[1], lines)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Place]:
    with serving(model, Nearest(model, 4)) as place:
        yield place


def predicted(run: Run, *flags: str) -> tuple[str, dict[str, float]]:
    """Label and probabilities by the command."""
    named = ["--run", str(run.folder), "--head", "concat", "--modalities", "both", "--device", "cpu"]
    result = CliRunner().invoke(app, ["predict", *named, *flags])
    row = next(csv.DictReader(io.StringIO(result.stdout)))
    return row["tag"], {name.removeprefix("p_"): float(value) for name, value in row.items() if name.startswith("p_")}


def test_it_answers_as_predict_does(server: Place, run: Run, photo: Path) -> None:
    data = photo.read_bytes()
    coded = base64.b64encode(data).decode()
    for flags, parts, value in (
        (["--text", TEXT, "--image", str(photo)], [("text", TEXT), ("image", data)], {"text": TEXT, "image": coded}),
        (["--text", TEXT], [("text", TEXT)], {"text": TEXT, "image": None}),
        (["--image", str(photo)], [("image", data), ("text", " ")], {"image": coded}),
    ):
        label, probabilities = predicted(run, *flags)
        for status, answer in (server.form(*parts), server.json(value)):
            assert (status, answer["label"], answer["notes"]) == (200, label, [])
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-6)
    assert server.lines[-1].startswith("predict: 200 in ")


def test_neighbours_are_the_nearest_by_the_cache(server: Place, model: Model, place: Path) -> None:
    samples = read_samples(place / "demo").labelled
    sample = next(sample for sample in samples if sample.text and sample.image)
    features = Cache(place / "cache", "demo").load(samples, [tower.spec for tower in model.run.towers])
    row = features.ids.index(sample.id)
    blocks = [np.nan_to_num(block.vectors.astype(float)) for block in features.blocks]
    units = [vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30) for vectors in blocks]
    cosines = np.mean([vectors @ vectors[row] for vectors in units], axis=0)
    found = server.form(("text", sample.text or ""), ("image", Path(str(sample.image)).read_bytes()))[1]["neighbours"]
    assert [one["similarity"] for one in found] == pytest.approx(sorted(cosines, reverse=True)[:4], abs=1e-5)
    assert (found[0]["id"], found[0]["label"], found[0]["text"]) == (sample.id, sample.label, sample.text)
    with Image.open(io.BytesIO(base64.b64decode(found[0]["photo"].partition(",")[2]))) as small:
        assert (small.format, max(small.size) <= 160) == ("WEBP", True)


def test_a_run_whose_cache_is_gone_has_no_neighbours(run: Run, model: Model, tmp_path: Path) -> None:
    gone = replace(run, config=replace(run.config, cache=str(tmp_path)))
    with pytest.raises(CacheMissError, match="no vectors of training samples"):
        Nearest(Model(gone, model.entry, "cpu"), 5)
    with serving(model) as place:
        assert place.json({"text": TEXT})[1]["neighbours"] == []


def test_many_ask_at_once_and_each_gets_its_own_answer(server: Place) -> None:
    texts = [f"{word} {number}" for number in range(4) for word in ("happy", "tired")]
    alone = {text: server.json({"text": text})[1] for text in texts}
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda t=text: found.update({t: server.json({"text": t})[1]})) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_it_says_what_it_is(server: Place, model: Model) -> None:
    status, facts = server.ask("GET", "/health")
    assert (status, facts["status"], facts["classes"]) == (200, "ok", list(model.classes))
    assert facts["head"] == "concat on both"
    assert "/predict" in server.ask("GET", "/openapi.json")[1]["paths"]
    for path in ("/docs", "/redoc", "/../pyproject.toml", "/page.html"):
        assert server.ask("GET", path) == (404, {"error": "Not Found"})


def test_what_cannot_be_predicted_is_refused_in_a_line(server: Place, tmp_path: Path) -> None:
    lists = [
        (server.json({}), 400, "neither text nor image"),
        (server.form(("text", " "), ("image", b"")), 400, "neither text nor image"),
        (server.json({"image": base64.b64encode(b"no photo").decode()}), 400, "image: not a photo that can be read"),
        (server.form(("image", b"%!PS-Adobe-3.0 EPSF-3.0")), 400, "image: not a photo that can be read"),
        (server.json({"image": "/etc/hostname"}), 400, "Invalid base64"),
        (server.form(("image", "http://127.0.0.1/a.jpg")), 400, "Invalid base64"),
        (server.json({"image_url": "x"}), 400, "no field 'image_url'; send text, image, table"),
        (server.form(("text", "a"), ("text", "b")), 400, "a field stands twice"),
        (server.form(("text", "a"), ("table", '{"price": 3}')), 400, "no column 'price' in the run"),
        (server.form(("text", "a"), ("table", "{")), 400, "the body cannot be read"),
        (server.json([1]), 400, "Expected `object`, got `array`"),
        (server.json({"text": 3}), 400, "Expected `str | null`, got `int`"),
        (server.ask("POST", "/predict", "[" * 99_999, Content_Type="application/json"), 400, "cannot be read"),
        (server.ask("POST", "/predict", b'{"text": "\xff"}', Content_Type="application/json"), 400, "UTF-8"),
        (server.ask("POST", "/predict", "x", Content_Type="multipart/form-data"), 400, "boundary"),
        (server.ask("POST", "/predict", "text=a", Content_Type="text/plain"), 415, "send multipart/form-data or"),
        (server.ask("GET", "/predict"), 405, "Method Not Allowed"),
    ]
    for (status, answer), wanted, words in lists:
        assert status == wanted, answer
        assert words in answer["error"]
        assert set(answer) == {"error"}


def test_a_photo_that_breaks_off_is_refused(server: Place, photo: Path) -> None:
    status, answer = server.form(("text", TEXT), ("image", photo.read_bytes()[:-400]))
    assert (status, answer["error"].partition(":")[0]) == (400, "image")


def test_what_breaks_in_the_server_is_a_line_without_a_traceback(
    server: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as an answer for which a client that breaks the rules of HTTP has closed the connection."""
    try:
        raise RuntimeError("can't handle event type Response")
    except RuntimeError as error:
        logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)
    assert caplog.messages == ["error: can't handle event type Response"]
    assert "Traceback" not in caplog.text


def test_only_this_machine_and_the_page_itself_may_ask(server: Place) -> None:
    own = f"127.0.0.1:{server.port}"
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[",
    ):
        for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/openapi.json"), ("POST", "/predict")):
            assert server.ask(method, path, Host=host)[0] == 403
    for host in ("localhost", f"localhost:{server.port}", own, "[::1]:8000"):
        assert server.ask("GET", "/health", Host=host)[0] == 200
    foreign = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}]
    foreign += [{"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site", "Origin": f"http://{own}"}]
    for headers in foreign:
        assert server.json({"text": "a"}, Host=own, **headers) == (403, {"error": "sent by a page of another site"})
    for headers in ({"Origin": f"http://{own}"}, {"Sec_Fetch_Site": "same-origin"}):
        assert server.json({"text": "a"}, Host=own, **headers)[0] == 200


def test_what_is_too_large_is_refused_before_it_is_read(model: Model) -> None:
    file = io.BytesIO()
    Image.new("1", (300, 100)).save(file, "PNG")
    with serving(model, body=2_000, pixels=20_000, text=10) as place:
        assert place.form(("image", file.getvalue()))[1]["error"].startswith(
            "image: 300 x 100 pixels, more than 20,000"
        )
        assert place.json({"text": "a" * 11})[1]["error"].startswith("text: 11 characters, more than 10")
        for size in (2_001, 10**19):
            with place.upload(f"Content-Length: {size}") as connection:
                assert connection.recv(9999).startswith(b"HTTP/1.1 413 ")
        endless = (b" " * 500 for _ in range(10**9))
        with pytest.raises(OSError, match=r"reset|pipe"):
            place.ask("POST", "/predict", endless, Content_Type="application/json")
        assert place.json({"text": "a"})[0] == 200


def test_whoever_is_slow_or_one_too_many_waits_in_vain(model: Model) -> None:
    with serving(model, seconds=0.5, requests=2) as place:
        slow = [place.upload("Content-Length: 9") for _ in range(2)]
        end = time.monotonic() + 20
        while place.json({"text": "a"})[0] == 200 and time.monotonic() < end:
            pass  # the two may not have been taken yet
        assert place.json({"text": "a"})[0] == 503
        for connection in slow:
            assert connection.recv(9999).startswith(b"HTTP/1.1 504 ")
            connection.close()
        assert place.json({"text": "a"})[0] == 200
        gone = place.upload("Content-Length: 9")
        gone.close()
        assert place.json({"text": "a"})[0] == 200


def test_a_model_that_fails_tells_the_terminal_only(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    for file in (tmp_path / "run").rglob("*.safetensors"):
        file.write_bytes(b"")
    with serving(load(tmp_path / "run", head="concat", device="cpu")) as place:
        status, answer = place.json({"text": "a"})
        assert (status, answer["error"]) == (500, "the model failed; the terminal of the server says why")
        assert re.search(r"error: .*not a whole head", place.lines[0])


def test_a_port_that_is_taken_is_named() -> None:
    with (
        listen("127.0.0.1", 0) as opened,
        pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1 port \d+: "),
    ):
        listen("127.0.0.1", opened.getsockname()[1])
    with pytest.raises(ConfigError, match="no port 99999"):
        listen("127.0.0.1", 99999)


def test_the_command_serves_until_it_is_interrupted(run: Run, tmp_path: Path) -> None:
    command = Command(["serve", run.folder, "--port", "0", "--device", "cpu"], tmp_path)
    line = command.wait_for_line("serving ")
    place = Place(int(line.split()[1].rpartition(":")[2]), [])
    assert place.json({"text": TEXT})[0] == 200
    command.send_signal(signal.SIGINT)
    out, err = command.wait()
    assert command.returncode == 0
    assert out.splitlines()[-1] == "stopped"
    assert err.splitlines()[-1].startswith("predict: 200 in ")


def test_the_page_predicts_in_a_narrow_browser(server: Place, run: Run, photo: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    label, probabilities = predicted(run, "--text", TEXT, "--image", str(photo))
    address = f"http://127.0.0.1:{server.port}/"
    with open_browser() as driver:
        screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        grounds = []
        for scheme in ("dark", "light"):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            driver.get(address)
            WebDriverWait(driver, 30).until(lambda d: d.title == run.name)
            grounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len({*grounds}) == 2
        driver.find_element(By.ID, "photo").send_keys(str(photo))
        driver.find_element(By.ID, "text").send_keys(TEXT)
        driver.find_element(By.ID, "go").click()
        WebDriverWait(driver, 30).until(lambda d: d.find_element(By.ID, "label").text)
        assert driver.find_element(By.ID, "label").text == label
        shown = [row.text.split() for row in driver.find_elements(By.CSS_SELECTOR, "#classes tr")]
        assert [name for name, _ in shown] == sorted(probabilities, key=lambda name: -probabilities[name])
        assert len(driver.find_elements(By.CSS_SELECTOR, "#neighbours li")) == 4
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert driver.find_element(By.ID, "seen").size["width"] > 50
        assert all(url.startswith(address) for url in requests(driver))
        wrong = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not wrong
        driver.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
        driver.find_element(By.ID, "go").click()
        WebDriverWait(driver, 30).until(lambda d: d.find_element(By.ID, "error").text)
        assert "neither text nor image" in driver.find_element(By.ID, "error").text
