"""Draws the pictures of the docs from real runs: the top of a report and its mistakes as PNG, terminals as SVG.

    python docs/make_images.py FOLDER [REPORT]    where `mmfeat heads` and `mmfeat report` were run; REPORT is another
                                                  page, such as that of the made shop of tests/audit/planted.py
    python docs/make_images.py FOLDER --screens COMMAND ...
                                                  what commands leave on small and large terminals, one after the other
                                                  in a copy of FOLDER: "mmfeat heads" becomes heads-80x24.svg

The report needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import tempfile
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1280, 900  # pixels of the report
PHONE = 390, 844
SIZES = (80, 24), (120, 40)  # columns and lines of a terminal
MISTAKES = 8  # cards of the gallery
NAMES = {"brown": "yellow", "default": None}  # pyte's names of colours -> rich's


def draw_screen(folder: Path, command: str, size: tuple[int, int], image: Path) -> None:
    """Run a command in `folder` and draw what it leaves on a terminal, from which a long output has scrolled away."""
    columns, lines = size
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[1m$ {command}\x1b[0m\r\n".encode())
    _run(folder, shlex.split(command), size, stream)
    rows = [_row(screen.buffer[line], columns) for line in range(lines)]
    console = Console(record=True, width=columns, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    console.print(Text("\n").join(rows), soft_wrap=True)
    drawing = console.export_svg(title=" ".join(command.split()[:2]), unique_id=image.stem)
    drawing = re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL)  # no web fonts
    image.write_text(drawing.replace("Fira Code", "ui-monospace"), encoding="utf-8")


def _run(folder: Path, words: list[str], size: tuple[int, int], stream: pyte.ByteStream) -> None:
    """Run a command in a terminal of its own, and feed what it writes to `stream`."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", *size[::-1], 0, 0))
        os.execve(sys.executable, [sys.executable, "-m", *words], {**os.environ, "TERM": "xterm-256color"})
    try:
        while part := os.read(terminal, 65536):
            stream.feed(part)
    except OSError:  # Linux ends a terminal so
        pass
    os.close(terminal)
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise SystemExit(f"{shlex.join(words)}: exit code {code}")


def _row(cells: dict[int, pyte.screens.Char], columns: int) -> Text:
    """A line of the screen with its styles, without spaces at its end."""
    row = Text()
    for (colour, bold), run in groupby((cells[column] for column in range(columns)), lambda cell: (cell.fg, cell.bold)):
        name = NAMES.get(colour, re.sub("^bright", "bright_", colour))
        name = f"#{name}" if name and re.fullmatch("[0-9a-f]{6}", name) else name
        row.append("".join(cell.data for cell in run), Style(color=name and Color.parse(name), bold=bold))
    row.rstrip()
    return row


def draw_screens(folder: Path, commands: list[str]) -> None:
    """Draw what each of the commands leaves on terminals of all sizes."""
    for size in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copytree(folder, Path(scratch) / "work", symlinks=True))
            for command in commands:
                name = f"{command.split()[1]}-{size[0]}x{size[1]}.svg"
                draw_screen(copy, command, size, IMAGES / name)


def draw_report(page: Path, image: Path, width: int, height: int) -> None:
    """The top of a page, as a browser of this size shows it."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.report.browser import open_browser, open_page

    with open_browser(width, height) as driver:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < height}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        open_page(driver, page)
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
    if sys.argv[2:3] == ["--screens"]:
        draw_screens(folder, sys.argv[3:])
        return
    pages = sorted(folder.glob("heads/*/report.html"), key=lambda path: path.stat().st_mtime)
    page = Path(sys.argv[2]) if len(sys.argv) > 2 else pages[-1]
    draw_report(page, IMAGES / "report.png", WIDTH, HEIGHT)
    draw_report(page, IMAGES / "report-phone.png", *PHONE)
    draw_mistakes(page, IMAGES / "mistakes.png")


if __name__ == "__main__":
    main()
