"""mmfeat as it is installed: what a wheel and an sdist hold, and what an installation says of its optional groups."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmfeat.version import install_command

ROOT = Path(__file__).parents[1]
ASK = "from mmfeat.version import install_command; print(install_command('onnx'))"
METADATA = "Metadata-Version: 2.4\nName: mmfeat\nVersion: 1\nRequires-Dist: torch>=2.6\n"
GROUPS = 'Requires-Dist: onnx>=1.16; extra == "onnx"\nRequires-Dist: peft; extra == "lora"\nProvides-Extra: onnx\n'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names of the files in a wheel and in an sdist (without its folder), built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("build") / "mmfeat"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", ".git", ".venv*", "*.egg-info", ".*_cache")
    )
    script = "from setuptools.build_meta import *; build_wheel('out'); build_sdist('out')"
    answer = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    (wheel,), (sdist,) = copy.glob("out/*.whl"), copy.glob("out/*.tar.gz")
    with zipfile.ZipFile(wheel) as packed, tarfile.open(sdist) as whole:
        files = {name.partition("/")[2] for name in (member.name for member in whole if member.isfile())}
        return set(packed.namelist()), files


def files_below(*folders: str) -> set[str]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_a_wheel_holds_the_package_and_nothing_else(built: tuple[set[str], set[str]]) -> None:
    wheel, _ = built
    assert {name for name in wheel if ".dist-info/" not in name} == files_below("mmfeat")
    assert {"mmfeat/py.typed", "mmfeat/__init__.pyi", "mmfeat/report/templates/report.html"} <= wheel


def test_an_sdist_is_a_checkout_that_can_be_tested(built: tuple[set[str], set[str]]) -> None:
    _, sdist = built
    assert sdist >= files_below("mmfeat", "tests", "docs", "benchmarks")
    assert sdist >= {"Makefile", "constraints.txt", "CONTRIBUTING.md", "heads/README.md", ".ci/run", "Dockerfile"}


def test_the_dockerfile_copies_what_there_is_and_ends_as_a_user() -> None:
    """No engine runs here, so what a build would stumble over is read: instructions, sources, the version of Python."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENTRYPOINT"}
    sources = [name for line in lines if line[0] == "COPY" for name in line[1:-1]]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    assert {"pyproject.toml", "README.md", "LICENSE", "mmfeat"} <= set(sources)  # what building a wheel reads
    assert [line[1] for line in lines if line[0] == "FROM"] == ["python:3.11-slim"]  # constraints.txt is of 3.11
    assert [line[1] for line in lines if line[0] == "USER"] == ["mmfeat"]
    assert lines[-1] == ["ENTRYPOINT", '["mmfeat"]']


def test_a_checkout_is_installed_again_with_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("onnx").endswith("pip install -e '.[onnx]'")
    monkeypatch.chdir(tmp_path)
    assert install_command("onnx").endswith(f"pip install -e '{ROOT}[onnx]'")


@pytest.mark.parametrize(("installer", "command"), [("pip", "pip install"), ("uv", "uv pip install")])
def test_beside_a_wheel_the_packages_of_the_group_are_named(tmp_path: Path, installer: str, command: str) -> None:
    """In site-packages there is no checkout, and the name may be another project's on an index."""
    info = tmp_path / "mmfeat-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA + GROUPS)
    (info / "INSTALLER").write_text(f"{installer}\n")
    (tmp_path / "mmfeat").symlink_to(ROOT / "mmfeat")
    answer = subprocess.run(
        [sys.executable, "-c", ASK], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert answer.stdout == f"{command} 'onnx>=1.16'\n", answer.stderr


def test_sources_that_were_not_installed_are_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: iter(()))
    monkeypatch.chdir(ROOT)
    assert install_command("onnx") == "pip install -e '.[onnx]'"


def test_no_text_asks_for_a_package_that_no_index_has() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("mmfeat/**/*.py"), *ROOT.glob("tests/**/*.py")]
    found = [page.name for page in pages if re.search(r"pip install ['\"]?mmfeat\b", page.read_text(encoding="utf-8"))]
    assert found == []
