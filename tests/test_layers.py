"""Data flows one way: a module imports only from modules to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmfeat

PACKAGE = Path(mmfeat.__file__).parent

# Left to right. Modules of one row do not import each other.
LAYERS = [
    ["version", "errors", "progress", "wording"],
    ["files", "texts", "images", "views", "hardware", "remote", "cluster", "locks", "provenance"],
    ["tables", "ids", "folders"],
    ["samples"],
    ["encoders.torchvision_ops", "encoders.spec", "encoders.weights"],
    ["encoders.layers", "encoders.delta"],
    ["encoders.attention"],
    ["encoders.torch_tower"],
    ["encoders.pixels", "encoders.clip_text"],
    [f"encoders.{name}" for name in ("bert", "clip", "hashing", "hog", "timm_models", "torchvision_models")],
    ["encoders"],
    ["features"],
    ["cache.index", "cache.hdf5", "cache.layout", "cache.rows"],
    ["cache.keys", "cache.shard"],
    ["cache.reading", "cache.writer", "cache.known"],
    ["cache.table"],
    ["cache.store"],
    ["cache", "requests"],
    ["cache.survey", "cache.pack", "plan"],
    ["cache.explain", "cache.verify", "parity", "reader", "batching", "clocks"],
    ["pipeline"],
    ["extractor", "embedder"],
    ["ray_extract"],
    ["extract"],
    ["forecast"],
    ["targets", "duplicates", "perceptual", "resampling"],
    ["splits", "metrics", "calibration"],
    ["split_files", "statistics", "ensembles"],
    ["protocol"],
    ["search_space"],
    ["search_file"],
    ["search"],
    ["heads.settings", "presets"],
    ["heads.layers", "heads.losses", "heads.draws", "heads.optimiser", "heads.stopping"],
    ["heads.inputs", "heads.probabilities", "heads.basis"],
    ["heads.concat", "heads.late", "heads.data", "heads.linear", "heads.neighbours", "heads.trees"],
    ["heads.gated", "heads.film", "heads.cross_attention", "heads.baselines", "heads.stack"],
    ["heads.film_concat"],
    ["heads"],
    ["heads.jobs"],
    ["engine", "choice"],
    ["trials"],
    ["scoring", "finals"],
    ["runs", "tuning"],
    ["entries"],
    ["committee", "leaderboard", "ranking", "records", "prediction_file"],
    ["predictions"],
    ["problem", "demo", "garbage", "run_folders", "comparison", "drift"],
    ["sweep_run", "mlflow_log"],
    ["sweep"],
    ["finetune.settings", "finetune.team", "finetune.files", "finetune.readers", "finetune.lora", "finetune.resume"],
    ["finetune.ray_train", "run_arguments"],
    ["finetune.unfreeze", "finetune.early", "finetune.stage_one"],
    ["finetune.plan"],
    ["finetune.moving"],
    ["finetune.model"],
    ["finetune.training", "finetune.work"],
    ["finetune.cells"],
    ["finetune.results"],
    ["finetune.finish"],
    ["finetune.run"],
    ["finetune", "predictor"],
    ["inference", "classifier", "reproduce"],
    ["submit", "model"],
    ["predict"],
    [f"audit.{name}" for name in ("texts", "photos", "label_errors", "balance", "stray", "result")],
    ["audit.twins", "audit.opinions"],
    ["audit.conflicts", "audit.leaks"],
    ["audit.findings", "audit.tables"],
    ["audit.run"],
    ["audit"],
    ["export.graph", "export.onnx_file"],
    ["export.build"],
    ["export.towers", "export.card"],
    ["export.run"],
    ["export"],
    ["report.section"],
    ["report", "report.plots", "report.results"],
    [
        "report.scores",
        "report.reliability",
        "report.modalities",
        "report.training",
        "report.facts",
        "report.labels",
        "report.audited",
        "report.compared",
    ],
    ["report.gallery", "report.papers"],
    ["report.page"],
    ["report.write"],
    ["console", "config"],
    [f"console_{name}" for name in ("cache", "heads", "finetune", "runs", "predict", "audit")] + ["flags"],
    [f"cli_{name}" for name in ("cache", "heads", "predict", "audit", "export")],
    ["cli_finetune"],
    ["commands"],
    ["cli_runs", "cli_report"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {f"mmfeat.{name}" if name != "__init__" else "mmfeat": rank for rank, row in enumerate(LAYERS) for name in row}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "transformers",
    "sklearn",
    "scipy",
    "skimage",
    "skops",
    "h5py",
    "pyarrow",
    "optuna",
    "ray",
    "loky",
    "fsspec",
    "matplotlib",
    "jinja2",
    "py3langid",
    "cleanlab",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "mlflow",
}
TORCH_MODULES = {
    f"mmfeat.heads.{name}"
    for name in (
        *("layers", "losses", "draws", "optimiser", "inputs", "data", "stack"),
        *("late", "concat", "gated", "film", "film_concat", "cross_attention"),
    )
} | {
    "mmfeat.encoders.attention",
    *(
        f"mmfeat.finetune.{name}"
        for name in (
            *("team", "readers", "lora", "resume", "unfreeze", "early", "moving", "model", "training", "cells"),
            *("plan", "stage_one", "results", "finish"),
        )
    ),
    *(f"mmfeat.export.{name}" for name in ("graph", "build", "towers")),
}


def module_name(path: Path) -> str:
    parts = ["mmfeat", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    nodes = [node for node in (tree.body if top_level_only else ast.walk(tree)) if node not in typing_only]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (children & FILES.keys()) or {node.module}
    return found


def test_every_module_has_a_place() -> None:
    assert set(FILES) == set(RANK)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_left(name: str) -> None:
    for imported in imports(FILES[name]):
        if imported.split(".")[0] == "mmfeat":
            assert imported in RANK, imported
            # A package's own table of parts stands to the right of the parts.
            assert RANK[imported] < RANK[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_are_imported_where_they_are_needed(name: str) -> None:
    heavy = {module for module in imports(FILES[name], top_level_only=True) if module.split(".")[0] in HEAVY}
    allowed = {"torch", "torch.nn", "torch.utils.checkpoint"} if name in TORCH_MODULES else set()
    if name == "mmfeat.classifier":  # a scikit-learn estimator, which the package exports on demand
        allowed = {module for module in heavy if module.split(".")[0] == "sklearn"}
    assert heavy <= allowed


@pytest.mark.parametrize("name", FILES)
def test_only_the_command_line_imports_its_packages(name: str) -> None:
    used = {module.split(".")[0] for module in imports(FILES[name])} & {"typer", "rich", "click"}
    assert not used or name.removeprefix("mmfeat.").startswith(("cli", "console", "flags"))


@pytest.mark.parametrize("name", FILES)
def test_no_pickle_anywhere(name: str) -> None:
    assert not {module.split(".")[0] for module in imports(FILES[name])} & {
        "pickle",
        "joblib",
        "dill",
        "shelve",
        "marshal",
    }
    source = FILES[name].read_text()
    assert source.count("torch.load(") == source.count("weights_only=True")


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_can_be_seen_at_once(name: str) -> None:
    source = FILES[name].read_text()
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_exports_resolve() -> None:
    """Also after the module behind a name was imported, which must not take its place."""
    for name in [*mmfeat.__all__, *mmfeat.__all__]:
        assert name == "__version__" or callable(getattr(mmfeat, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        mmfeat.nope  # noqa: B018
