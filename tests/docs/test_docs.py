"""The documentation keeps its promises: links lead somewhere, commands are understood, quoted messages exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import mmfeat
from tests.docs.markdown import PAGES, ROOT, anchors, blocks, links, prose
from tests.docs.test_commands_page import COMMANDS

NARROW = ["how-it-works", "format", "commands", "python", "recipes", "scaling", "troubleshooting", "README"]
TROUBLE = ROOT / "docs/troubleshooting.md"
ABOUT = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=ABOUT)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def rows(page: Path) -> list[str]:
    """The rows of the tables of a page."""
    return re.findall(r"^\|.*", prose(page), flags=re.MULTILINE)


def typed(page: Path) -> list[str]:
    """The mmfeat commands in the console blocks of a page; in those in tables too where they can be typed."""
    lines = [
        line for block in blocks(page, "console", "bash", "sh") for line in block.text.replace("\\\n", " ").splitlines()
    ]
    if page in (ROOT / "docs/python.md", ROOT / "docs/recipes.md"):
        lines += [text for row in rows(page) for text in re.findall(r"`(mmfeat [^`]+)`", row)]
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("mmfeat ")]


@pytest.mark.parametrize("page", PAGES, ids=ABOUT)
def test_commands_are_understood(page: Path) -> None:
    """Command, flags and the types of their values; nothing is run."""
    for line in typed(page):
        words = shlex.split(re.split(r" >|\|", line)[0], comments=True)[1:]
        if words[0].startswith("--"):
            continue
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        assert name in COMMANDS, line
        rest = words[len(name.split()) :]
        if "--config" in rest:  # which is mmfeat's own and may stand anywhere
            at = rest.index("--config")
            rest = ["--data", "in the file", *rest[:at], *rest[at + 2 :]]
        try:
            COMMANDS[name].make_context(name, rest)
        except Exception as error:  # of click, which newer versions of typer have inside
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("name", NARROW)
def test_lines_are_not_too_long(name: str) -> None:
    lines = (ROOT / "docs" / f"{name}.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]


def test_every_page_is_in_the_index() -> None:
    listed = {link for link in links(ROOT / "docs/README.md") if not link.startswith("..")}
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}
    assert pages | {"quickstart.ipynb"} == listed
    assert "docs/README.md" in links(ROOT / "README.md")


@cache
def strings() -> list[str]:
    """All texts of the program, with ... for what is filled in, and the Makefile."""
    found = [" ".join((ROOT / "Makefile").read_text().split())]
    for path in (ROOT / "mmfeat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(each.value) if isinstance(each, ast.Constant) else "..." for each in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    return [
        cell for cell in re.findall(r"^\| `([^`]+)` \|", TROUBLE.read_text(), flags=re.MULTILINE) if cell != "message"
    ]


def test_enough_messages_are_explained() -> None:
    assert 25 <= len(quoted()) == len(set(quoted()))


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_are_those_of_the_program(message: str) -> None:
    wanted = re.compile(".*".join(re.escape(part) for part in message.split("...")), flags=re.DOTALL)
    assert any(wanted.search(text) for text in strings())


def test_calls_in_tables_are_understood() -> None:
    """Each name is public, and its parameters take what is given."""
    calls = [text for row in rows(ROOT / "docs/python.md") for text in re.findall(r"`([^`]*mmfeat\.\w+\([^`]*)`", row)]
    assert len(calls) > 3
    for call in (node for text in calls for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "mmfeat":
            given = {str(each.arg): each.value for each in call.keywords}
            inspect.signature(getattr(mmfeat, call.func.attr)).bind(*call.args, **given)
