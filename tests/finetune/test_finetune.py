"""Stage 2: the cached path equals the full one, a killed training ends like a whole one, and the result predicts."""

from __future__ import annotations

import csv
import re
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmfeat.cli.finetune import SETTINGS, judge
from mmfeat.encoders.layers import capture
from mmfeat.encoders.registry import describe_encoders, load_encoders, open_towers
from mmfeat.errors import ConfigError, DataError, EncoderError, RunError
from mmfeat.finetune.finetune import Finetuned, finetune_heads
from mmfeat.finetune.processes import train_on_ray
from mmfeat.finetune.settings import ALL, FinetuneSettings, parse_unfreeze
from mmfeat.finetune.unfreeze import Resumed, adapt, moving_parameters, why_not_resumed
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.verdict import over_parent, parent_run
from mmfeat.system.ray_cluster import join_cluster, leave_cluster
from tests.encoders.tiny_models import contents
from tests.finetune.small_finetunes import QUICK, tune, weights
from tests.processes import Command
from tests.sweep.small_sweeps import FLOAT32, make_place, sweep

CHECKPOINT = "cells/fold[01]-1.checkpoint.safetensors"
KINDS = [
    "bert",
    "clip",
    "resnet18",
    "test_resnet",
    "test_vit",
    "clip-resnet",
    "hf-clip",
    "hf-siglip",
    "hf-dinov3_vit",
    "hf-convnext",
]


def opened(models: Callable[[str], str], kind: str, modality: str, count: int) -> Any:
    towers = describe_encoders([models(kind)], FLOAT32)
    tower = next(tower for tower in towers if tower.spec.modality == modality)
    return open_towers(tower, [replace(tower.spec, output="prefix", layer=count, pooling="none")])[0]


@pytest.mark.parametrize(
    ("kind", "modality"),
    [
        *((kind, "text") for kind in ("bert", "clip", "hf-clip", "hf-siglip")),
        *((kind, "image") for kind in KINDS if kind != "bert"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_beginning_at_a_layer_gives_the_vectors_and_gradients_of_the_whole_pass(
    models: Callable[[str], str], kind: str, modality: str, count: int
) -> None:
    whole, part = (opened(models, kind, modality, count) for _ in range(2))
    inputs = whole.collate([whole.prepare(content) for content in contents(modality)])
    with torch.no_grad(), capture([whole.network.point(whole.specs[0])]) as captured:
        whole.network.forward(inputs)
    hidden, kept = captured[0], whole.keep(inputs)
    kept = torch.ones(hidden.shape[:2], dtype=torch.bool) if kept is None else kept
    longest = int(kept.sum(1).max())
    resumed = Resumed(part, count, "cpu")
    names = moving_parameters(part, lambda: resumed(hidden[:1], kept[:1]), count, True)
    assert names
    weights = torch.linspace(-1, 1, whole.network.forward(inputs).shape[1])
    results = []
    for tower, forward in (
        (whole, lambda: whole.network.forward(inputs)),
        (part, lambda: resumed(hidden[:, :longest], kept[:, :longest])),
    ):
        parameters = [tower.module.get_parameter(name).requires_grad_(True) for name in names]
        vectors = forward()
        results.append((vectors.detach(), torch.autograd.grad((vectors * weights).sum(), parameters)))
    (full, full_slopes), (short, short_slopes) = results
    assert (part.network.forward(inputs) - full).abs().max() <= 1e-5  # a pass leaves the layers as they were
    assert (full - short).abs().max() <= 1e-4 * max(1, float(full.abs().max()))
    for name, one, other in zip(names, full_slopes, short_slopes, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm() + 1e-6, name


def test_a_model_that_cannot_begin_there_is_told_why(models: Callable[[str], str]) -> None:
    (text,) = contents("text")[:1]
    assert why_not_resumed(opened(models, "bert", "text", 1), 1, [text], "cpu") == ""
    tower = opened(models, "bert", "text", 1)
    forward = tower.network.forward
    other = replace(
        tower, network=replace(tower.network, forward=lambda inputs: forward(inputs) + inputs["input_ids"].max())
    )
    assert "changes its vectors" in why_not_resumed(other, 1, [text], "cpu")


def test_only_the_last_layers_and_norms_move(models: Callable[[str], str]) -> None:
    tower = opened(models, "clip", "text", 1)
    inputs = tower.collate([tower.prepare("a day")])
    names = moving_parameters(tower, lambda: tower.network.forward(inputs), 1, False)
    assert {name.split(".")[0] for name in names} == {"transformer", "ln_final"}
    assert all(".1." in name for name in names if name.startswith("transformer"))
    assert "text_projection" in moving_parameters(tower, lambda: tower.network.forward(inputs), 1, True)
    everything = moving_parameters(tower, lambda: tower.network.forward(inputs), ALL, False)
    assert everything["token_embedding.weight"] == 2
    assert everything["ln_final.weight"] == 0
    assert not any(name.startswith("visual") for name in everything)


@pytest.fixture(scope="module")
def place(small_demo_folder: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data, their cache and a run of heads on BERT and HOG."""
    place = make_place(small_demo_folder, tmp_path_factory.mktemp("work"), [f"bert:{tiny_bert}", "hog"])
    sweep(place, [f"bert:{tiny_bert}", "hog"], ensembles=False)
    return place


@pytest.fixture(scope="module")
def tuned(place: Path) -> Finetuned:
    return tune(place)


def test_a_run_has_both_stages_and_their_interpolation(place: Path, tuned: Finetuned) -> None:
    entries = {entry.head: entry for entry in tuned.run.leaderboard}
    assert set(entries) == {"stage-1", "stage-2", "wise-ft"}
    assert [tower.path for tower in tuned.run.results.moving] == ["cached"]
    assert {"value", "low", "high", "p", "p_holm", "mcnemar"} <= set(entries["stage-2"].to_json()["over_stage_1"])
    assert set(entries["stage-2"].scores) == {"train", "validation", "test"}
    (first,) = (place / "heads").glob("*/concat-both/metrics.json")
    assert first.is_file()
    assert tune(place).reused


def test_the_last_weights_are_interpolated_as_said(tuned: Finetuned) -> None:
    entry = tuned.run.entry("wise-ft")
    heads = {
        name: load_file(tuned.run.folder / f"{name}-both" / "final-0.safetensors")
        for name in ("stage-1", "stage-2", "wise-ft")
    }
    assert len(entry.alphas) == 2
    for name, first in heads["stage-1"].items():
        blended = torch.lerp(first, heads["stage-2"][name], entry.alpha)
        torch.testing.assert_close(heads["wise-ft"][name], blended)


def test_a_run_names_all_that_it_reads(tuned: Finetuned) -> None:
    """So that `cache gc` keeps it: the encoders, the prefix, and the vectors of the fine-tuned towers."""
    towers = [tower for entry in tuned.run.leaderboard for final in entry.final for tower in final.towers]
    assert len(towers) == 2
    specs = [named.spec for named in (*tuned.run.config.towers, *towers)]
    assert {spec.fingerprint for spec in specs} == tuned.run.fingerprints
    assert {tower.spec.output for tower in tuned.run.config.prefixes} == {"prefix"}


def test_the_same_call_gives_the_same_weights(place: Path, tuned: Finetuned) -> None:
    again = tune(place, "again", workers=1)
    assert weights(again.run) == weights(tuned.run)


def test_the_full_path_gives_what_the_cached_one_gives(place: Path, tuned: Finetuned) -> None:
    full = tune(place, settings=replace(QUICK, path="full"))
    assert [tower.path for tower in full.run.results.moving] == ["full"]
    rows = [list(csv.reader((run.folder / "stage-2-both/out_of_fold.csv").open()))[1:] for run in (tuned.run, full.run)]
    numbers = [np.array([[float(cell) for cell in row[-3:]] for row in each]) for each in rows]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.01


def start(place: Path, out: str) -> Command:
    """`mmfeat finetune` for the run that `tune` makes, with a checkpoint after each step."""
    flags = ("--epochs", 2, "--lr-encoder", 1e-3, "--checkpoint-seconds", 0, "--seeds", 1)
    return Command(["finetune", "--heads", "heads", "--out", out, *flags], place)


@pytest.mark.parametrize(
    "moment",
    [
        "cells/fold[01]-1.checkpoint.safetensors",
        "cells/fold[01]-1.safetensors",
        "cells/final-1.*",
        "stage-1-both/*.json",
    ],
    ids=["checkpoint", "first cell", "final", "results"],
)
def test_a_killed_training_ends_in_the_same_weights(place: Path, tuned: Finetuned, moment: str, tmp_path: Path) -> None:
    process = start(place, str(tmp_path))
    process.wait_for(tmp_path, f"*/{moment}")
    process.kill()
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("cells/[!.]*.safetensors"))
    again = tune(place, str(tmp_path))
    assert again.run.folder == folder
    assert not again.reused
    assert weights(again.run) == weights(tuned.run)
    for name in ("out_of_fold.csv", "curves.csv"):
        one, other = ((run.folder / "stage-2-both" / name).read_bytes() for run in (again.run, tuned.run))
        assert one == other, name
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "cells").exists()


def test_control_c_is_one_line(place: Path, tuned: Finetuned, tmp_path: Path) -> None:
    process = start(place, str(tmp_path))
    process.wait_for(tmp_path, f"*/{CHECKPOINT}")
    process.send_signal(signal.SIGINT)
    _, err = process.wait()
    assert process.returncode == 130
    said = [line for line in err.splitlines() if line.startswith(("interrupted", "Traceback", "mmfeat"))]
    assert said == ["interrupted; what was finished is kept, the same command goes on from there"]
    assert weights(tune(place, str(tmp_path)).run) == weights(tuned.run)


def test_a_tuned_tower_is_an_encoder_of_its_own(place: Path, tuned: Finetuned) -> None:
    (file,) = (tuned.run.folder / "stage-2-both").glob("bert-*.safetensors")
    (before,) = describe_encoders([tuned.run.towers[0].request], FLOAT32)
    (tower,) = describe_encoders([f"finetuned:{file}"], FLOAT32)
    assert tower.spec.fingerprint != before.spec.fingerprint
    assert tower.spec.differences(before.spec) == ["variant", "weights"]
    one, other = (load_encoders([each], "cpu")[0] for each in (before, tower))
    text = "what a day"
    vectors = [encoder.embed([encoder.prepare(text)])[0][0] for encoder in (one, other)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    broken = file.with_name("broken.safetensors")
    broken.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EncoderError, match="not a fine-tuned tower"):
        describe_encoders([f"finetuned:{broken}"], FLOAT32)
    broken.unlink()


def test_the_example_of_the_docs_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", docs.split("## Stage 2")[1], flags=re.DOTALL)
    (run,) = (place / "heads").glob("*/run.json")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code.replace("heads/RUN", str(run.parent)), namespace)
    assert np.isfinite(namespace["vectors"]).all()


@pytest.mark.parametrize("head", ["stage-1", "stage-2", "wise-ft"])
def test_every_stage_predicts(place: Path, tuned: Finetuned, head: str, tmp_path: Path) -> None:
    found = write_submission(tuned.run.folder, head=head, out=tmp_path / "submission.csv")
    assert found.rows > 0
    assert found.head == head


@pytest.mark.parametrize(
    "changes",
    [
        {"unfreeze": (("text", ALL),)},
        {"gradual": True, "unfreeze": (("text", 2),)},
        {"schedule": "cosine", "accumulate": 2, "layer_decay": 0.5, "gradient_checkpointing": True, "amp": "bfloat16"},
    ],
    ids=["all layers", "gradual", "other settings"],
)
def test_other_ways_to_train_run(place: Path, changes: dict[str, Any]) -> None:
    run = tune(place, settings=replace(QUICK, epochs=1, **changes)).run
    assert run.leaderboard[0].samples > 0


def test_without_a_run_stage_1_is_trained_first(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train one with mmfeat heads --fusion cross-attention first.* needs token"):
        finetune_heads(cache=place / "cache", heads=tmp_path, out=tmp_path, head="cross-attention")
    run = finetune_heads(
        cache=place / "cache", heads=tmp_path, out=tmp_path, settings=replace(QUICK, epochs=1), seeds=1
    ).run
    (first,) = tmp_path.glob("*/concat-both/metrics.json")
    assert run.config.parent == first.parents[1].name


def test_flags_are_checked_before_anything_is_done(place: Path) -> None:
    assert parse_unfreeze("text:1,image:all") == (("text", 1), ("image", ALL))
    for wrong in ("text", "text:0", "", "text:1,text:2"):
        with pytest.raises(ConfigError, match="--unfreeze"):
            parse_unfreeze(wrong)
    for settings, said in (
        (replace(QUICK, unfreeze=(("clip", 1),)), "no such modality"),
        (replace(QUICK, unfreeze=(("text", 9),)), "has 2 layers"),
        (replace(QUICK, unfreeze=(("text", 1), ("bert", 2))), "bert is named twice"),
        (replace(QUICK, unfreeze=()), "nothing moves"),
        (replace(QUICK, unfreeze=(("text", ALL),), path="cached"), "all layers move"),
    ):
        with pytest.raises(ConfigError, match=said):
            tune(place, settings=settings)
    with pytest.raises(DataError, match="no such folder or table"):
        tune(place, data=place / "elsewhere")
    with pytest.raises(ConfigError, match="no layers that could be trained"):
        tune(place, settings=replace(QUICK, unfreeze=(("image", 1),)))


@pytest.fixture
def cluster() -> Iterator[None]:
    """One for all calls of a test: to start it takes longer than to train."""
    ray, _ = join_cluster(None)
    yield
    leave_cluster(ray)


@pytest.mark.usefixtures("cluster")
def test_ray_train_gives_what_one_process_gives(place: Path, tuned: Finetuned) -> None:
    run = tune(place, "ray", engine="ray", workers=2).run
    assert run.folder.name == tuned.run.folder.name
    name = "stage-2-both/out_of_fold.csv"
    both = [list(csv.reader((each.folder / name).open()))[1:] for each in (run, tuned.run)]
    numbers = [np.array([[float(cell) for cell in row[-3:]] for row in rows]) for rows in both]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.01
    assert not list((place / "ray").glob(".*"))

    def refuse(**_: Any) -> None:
        raise ConfigError("refused in a worker")

    with pytest.raises(ConfigError, match="refused in a worker"):
        train_on_ray(refuse, {"out": str(place / "ray")}, 1, "cpu", None)


def test_adapters_are_merged_into_the_delta(place: Path) -> None:
    pytest.importorskip("peft")
    run = tune(place, settings=replace(QUICK, lora=2)).run
    (file,) = (run.folder / "stage-2-both").glob("bert-*.safetensors")
    assert not any("lora" in name for name in load_file(file))
    assert run.results.moving[0].parameters < 20_000


def test_adapters_go_into_the_tower_that_moves_alone(models: Callable[[str], str]) -> None:
    """The layers of CLIP's other tower end in the same names."""
    pytest.importorskip("peft")
    tower = opened(models, "clip", "text", 1)
    inputs = tower.collate([tower.prepare("a day")])
    names, merged = adapt(tower, moving_parameters(tower, lambda: tower.network.forward(inputs), 1, False), 2)
    assert names
    assert not any(name.startswith("visual") for name in names)
    assert merged().keys() <= {name.replace(".base_layer", "") for name, _ in tower.module.named_parameters()}


def test_the_flags_are_those_of_the_settings() -> None:
    defaults = FinetuneSettings()
    assert {name: default for name, (_, default) in SETTINGS.items()} == {
        name: getattr(defaults, name) for name in SETTINGS
    }


def test_the_step_that_comes_next_is_with_the_better_run(
    place: Path, tuned: Finetuned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best entry of the parent counts, not only the head that stage 2 started from."""
    monkeypatch.chdir(place)
    parent = parent_run(tuned.run)
    assert parent
    assert parent.folder.parent.resolve() == (place / "heads").resolve()
    label, test = over_parent(tuned.run, parent)
    assert test
    assert label in ("stage-2 on both", "wise-ft on both")
    judge(tuned.run)
    printed = capsys.readouterr().out
    assert f"the {parent.leaderboard[0].label} of {parent.name}" in " ".join(printed.split())
    better, other = (tuned.run, parent) if test.difference.value > 0 else (parent, tuned.run)
    following = printed.splitlines()[-1]
    assert following.startswith("next: mmfeat submit --run ")
    assert better.name in following
    assert (other.name in following) == test.tie
    judge(replace(tuned.run, folder=place / "far" / "away" / tuned.run.name))  # without its parent
    assert "is gone or changed" in capsys.readouterr().out


def test_two_processes_train_as_one_does(place: Path, tuned: Finetuned) -> None:
    """Data parallel over gloo, in an environment as torchrun makes it: equal up to the rounding of sums."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        team = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    flags = ("--heads", "heads", "--out", "two", "--seeds", 1, "--epochs", 2, "--lr-encoder", 1e-3, "--device", "cpu")
    processes = [Command(["finetune", *flags], place, RANK=str(rank), **team) for rank in range(2)]
    said = [process.wait() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "".join(out for out, _ in said).count("next: ") == 1  # one of them speaks
    (folder,) = (place / "two").iterdir()
    assert folder.name == tuned.run.folder.name
    name = "stage-2-both/out_of_fold.csv"
    both = [list(csv.reader((place_of / name).open()))[1:] for place_of in (folder, tuned.run.folder)]
    numbers = [np.array([[float(cell) for cell in row[-3:]] for row in rows]) for rows in both]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.01
