"""What the tests of the documentation read: the pages, their code blocks, links and anchors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(ROOT / place / "README.md" for place in ("cache", "heads", "benchmarks")),
    ]
)
_FENCE = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class Code(NamedTuple):
    """A code block: its language, what stands behind that, and where it begins."""

    language: str
    note: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Code]:
    """The code blocks of these languages, in order."""
    source = page.read_text()
    found = []
    for match in _FENCE.finditer(source):
        indent, language, note, text = match.groups()
        plain = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        found.append(Code(language, note.strip(), plain, source[: match.start()].count("\n") + 1))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Where the page links to."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`, as GitHub makes it of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", _LINK.sub("", heading).strip().lower())
        plain = name = words.replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found.add(name)
    return found
