"""mmfeat as it is installed: what a wheel and an sdist hold, and what an installation says of its optional groups."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfeat.version import install_command

ROOT = Path(__file__).parents[1]
ASK = "from mmfeat.version import install_command; print(install_command('onnx'))"
METADATA = "Metadata-Version: 2.4\nName: mmfeat\nVersion: 1\nRequires-Dist: torch>=2.6\n"
GROUPS = 'Requires-Dist: onnx>=1.16; extra == "onnx"\nRequires-Dist: peft; extra == "lora"\nProvides-Extra: onnx\n'


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
