"""Draws the pictures of the docs from a real run: a session as SVG, the top of a report and its mistakes as PNG.

    python docs/make_images.py FOLDER [REPORT]    where `mmfeat extract` and `mmfeat heads` were run; the mistakes are
                                                  those of REPORT, a page of other data, if it is given

The report needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1180, 900  # pixels of the report
COLUMNS = 108
LINES = 26  # of one command
MISTAKES = 8  # cards of the gallery


def draw_session(folder: Path, commands: list[str], image: Path) -> None:
    """Run commands in `folder` and draw what they print, as it stands."""
    console = Console(record=True, width=COLUMNS, file=open(tempfile.mkstemp()[1], "w"), highlight=False)  # noqa: SIM115
    for command in commands:
        console.print(f"[bold]$ {command}[/bold]")
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=3600)
        lines = done.stdout.rstrip().splitlines()
        for line in lines[:LINES]:
            console.print(line, markup=False, overflow="ellipsis", no_wrap=True)
        if len(lines) > LINES:
            console.print(f"({len(lines) - LINES} more lines)", style="dim")
        console.print()
    drawing = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="mmfeat"), flags=re.DOTALL)  # no web fonts
    image.write_text(drawing.replace("Fira Code", "ui-monospace"), encoding="utf-8")


def draw_report(page: Path, image: Path) -> None:
    """The top of a page, as a browser shows it."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.report.browser import open_browser, open_page

    with open_browser(WIDTH, HEIGHT) as driver:
        open_page(driver, page)
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.save_screenshot(str(image))


def draw_mistakes(page: Path, image: Path) -> None:
    """The first `MISTAKES` cards of the gallery: the surest mistakes."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.report.browser import open_browser, open_page

    with open_browser(WIDTH, 2 * HEIGHT) as driver:
        open_page(driver, page)
        script = r"""
            const drawn = (card) => !/[\u2e80-\uffff]/.test(card.textContent);  // fonts often lack the others
            const cards = [...document.querySelectorAll('#samples > li')];
            document.querySelector('#samples').replaceChildren(...cards.filter(drawn).slice(0, arguments[0]));
            const photos = [...document.querySelectorAll('#samples img')];
            photos.forEach((photo) => photo.loading = 'eager');
            const done = arguments[arguments.length - 1];
            Promise.all(photos.map((photo) => photo.decode())).then(() => done());"""
        driver.execute_async_script(script, MISTAKES)
        driver.find_element("id", "samples").screenshot(str(image))


def main() -> None:
    folder = Path(sys.argv[1])
    IMAGES.mkdir(exist_ok=True)
    draw_session(folder, ["mmfeat heads", "mmfeat report", "mmfeat submit"], IMAGES / "session.svg")
    page = max(folder.glob("heads/*/report.html"), key=lambda path: path.stat().st_mtime)
    draw_report(page, IMAGES / "report.png")
    draw_mistakes(Path(sys.argv[2]) if len(sys.argv) > 2 else page, IMAGES / "mistakes.png")


if __name__ == "__main__":
    main()
