"""The shape of the package: data flows one way, heavy libraries load late, files fit a screen."""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mmfeat

ORDER = (
    "errors, version < system < samples < encoders < cache < extraction < evaluation < baselines < heads < runs "
    "< sweep < finetune < prediction < audit < report < export < serve < reproduce < cli"
)
RANK = {name: rank for rank, row in enumerate(ORDER.split(" < ")) for name in row.split(", ")}
ROOT = Path(mmfeat.__file__).parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))
MODULES = {".".join(["mmfeat", *file[:-3].split("/")]).removesuffix(".__init__"): file for file in FILES}
LIGHT = {"mmfeat", "numpy", "PIL", "xxhash", "typing_extensions", "lazy_loader"}  # the rest loads late
# Modules of torch code, and the scikit-learn estimator, which nobody imports before they train or encode something.
TORCH = ("encoders/faster", "encoders/runtime", "heads/", "finetune/", "export/")
LINES, FUNCTION_LINES, ENTRIES = 400, 60, 25


def package_of(module: str) -> str:
    """The package, or the file beside the packages, in which a module of mmfeat lies."""
    return f"{module}.__init__".split(".")[1]


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@cache
def imports(file: str) -> list[tuple[str, bool]]:
    """(module, whether the import waits for a call) of all imports that run."""
    tree = parsed(file)
    branches = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    typing_only = {node for branch in branches for node in ast.walk(branch)}
    late = {node for function in functions for node in ast.walk(function)}
    result = []
    for node in set(ast.walk(tree)) - typing_only:
        if isinstance(node, ast.Import):
            result += [(alias.name, node in late) for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            result += [(name if name in MODULES else node.module, node in late) for name in names]
    return result


def libraries(file: str, late: bool) -> set[str]:
    """The other people's packages that a file imports as it is loaded, or `late`."""
    names = {module.split(".")[0] for module, waits in imports(file) if waits == late}
    return names - {"mmfeat"} - sys.stdlib_module_names


def test_a_package_imports_only_from_its_left() -> None:
    for file in FILES:
        package = file.split("/")[0].removesuffix(".py")
        for module, _ in imports(file) if package in RANK else ():
            if module.split(".")[0] == "mmfeat" and package_of(module) != package:
                assert RANK[package_of(module)] < RANK[package], f"{file} imports {module}"


def test_heavy_libraries_load_where_they_are_needed() -> None:
    for file in FILES:
        allowed = {"torch"} if file.startswith(TORCH) else set()
        allowed |= {"sklearn"} if file in ("heads/classifier.py", "extraction/transformer.py") else set()
        allowed |= {"typer", "rich"} if file.startswith("cli/") else set()
        assert libraries(file, late=False) - LIGHT <= allowed, file
        assert file.startswith("cli/") or not libraries(file, late=True) & {"typer", "rich", "click"}, file


def test_no_pickle_anywhere() -> None:
    for file in FILES:
        used = {module.split(".")[0] for module, _ in imports(file)}
        assert not used & {"pickle", "joblib", "dill", "shelve", "marshal"}, file
        source = (ROOT / file).read_text()
        assert source.count("torch.load(") == source.count("weights_only=True"), file


def test_files_and_functions_can_be_seen_at_once() -> None:
    for file in FILES:
        assert (ROOT / file).read_text().count("\n") <= LINES, file
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{file}: {node.name}"


def test_every_package_says_what_it_is() -> None:
    """What the package does, where to start reading, what it may import."""
    for file in FILES:
        if file.endswith("/__init__.py"):
            assert ast.get_docstring(parsed(file)), file
            assert "__all__" in ast.unparse(parsed(file)), file


def test_the_house_is_small_and_has_no_circle() -> None:
    """Every module can be the first one that is imported."""
    assert len([path for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))]) <= ENTRIES
    needs = {name: {module for module, late in imports(file) if not late} for name, file in MODULES.items()}
    list(TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle
    for name in MODULES.keys() - {"mmfeat.__main__"}:
        importlib.import_module(name)


def test_public_names_resolve() -> None:
    """Also after the module behind a name was imported, which must not take its place."""
    for name in [*mmfeat.__all__, *mmfeat.__all__]:
        assert name == "__version__" or callable(getattr(mmfeat, name)), name
    with pytest.raises(AttributeError, match="nope"):
        mmfeat.nope  # noqa: B018
