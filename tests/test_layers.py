"""The shape of the package: data flows one way, heavy libraries load late, files fit a screen."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import mmfeat

ORDER = (
    "errors, version < system < samples < encoders < cache < extraction < evaluation < baselines < heads < runs "
    "< sweep < finetune < prediction < audit < report < export < reproduce < cli"
)
RANK = {name: rank for rank, row in enumerate(ORDER.split(" < ")) for name in row.split(", ")}
ROOT = Path(mmfeat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
LIGHT = {"mmfeat", "numpy", "PIL", "xxhash", "typing_extensions", "lazy_loader"}  # the rest loads late
# Modules of torch code, and the scikit-learn estimator, which nobody imports before they train or encode something.
TORCH = ("encoders/attention", "heads/", "finetune/", "export/")
LINES, FUNCTION_LINES, ENTRIES = 400, 60, 25


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def place_of(module: str) -> str:
    """The package, or the file beside the packages, that a module of mmfeat lies in."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top of the file) of all imports that run; names of mmfeat with the module they come from."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if node not in typing_only and isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        if node not in typing_only and isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", top) for alias in node.names]
    return found


def foreign(path: Path, top_only: bool = False) -> set[str]:
    """The libraries that a file imports."""
    names = {module.split(".")[0] for module, top in imports(path) if top or not top_only}
    return names - {"mmfeat"} - sys.stdlib_module_names


files = pytest.mark.parametrize("path", FILES, ids=name_of)


@files
def test_a_package_imports_only_from_its_left(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for module, _ in imports(path):
        if module.split(".")[0] == "mmfeat" and place_of(module) != own:
            assert RANK[place_of(module)] < RANK[own], f"{own} imports {module}"


@files
def test_heavy_libraries_load_where_they_are_needed(path: Path) -> None:
    allowed = {"torch"} if name_of(path).startswith(TORCH) else set()
    allowed |= {"sklearn"} if name_of(path) == "heads/classifier.py" else set()
    allowed |= {"typer", "rich"} if name_of(path).startswith("cli/") else set()
    assert foreign(path, top_only=True) - LIGHT <= allowed


@files
def test_only_the_command_line_imports_its_packages(path: Path) -> None:
    assert not foreign(path) & {"typer", "rich", "click"} or name_of(path).startswith("cli/")


@files
def test_no_pickle_anywhere(path: Path) -> None:
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"pickle", "joblib", "dill", "shelve", "marshal"}
    source = path.read_text()
    assert source.count("torch.load(") == source.count("weights_only=True")


@files
def test_files_and_functions_can_be_seen_at_once(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_every_package_says_what_it_is(package: Path) -> None:
    tree = ast.parse((package / "__init__.py").read_text())
    assert ast.get_docstring(tree), "a docstring: what the package does, where to start reading, what it may import"
    assert "__all__" in ast.unparse(tree)


def test_the_house_is_small_and_has_no_circle() -> None:
    """Every module can be the first one that is imported; a circle would break one of them."""
    assert len([path for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))]) <= ENTRIES
    modules = [name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in FILES]
    modules = [f"mmfeat.{name}" for name in modules if name not in ("__init__", "__main__")]
    code = (
        f"import importlib, sys, torch, sklearn\nfor name in {modules!r}:\n"
        "    for old in [m for m in sys.modules if m.startswith('mmfeat')]: del sys.modules[old]\n"
        "    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_public_names_resolve() -> None:
    """Also after the module behind a name was imported, which must not take its place."""
    for name in [*mmfeat.__all__, *mmfeat.__all__]:
        assert name == "__version__" or callable(getattr(mmfeat, name)), name
    with pytest.raises(AttributeError, match="nope"):
        mmfeat.nope  # noqa: B018
