"""Weights that are not whole, of another shape or of another model: one short line each, and never random vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.tiny_models import write_hub

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


def half(file: Path) -> None:
    """Keep every second tensor."""
    state = load_file(file)
    save_file({name: state[name] for name in list(state)[::2]}, file, metadata={"format": "pt"})


def reshaped(file: Path) -> None:
    """Make each vector one longer."""
    state = load_file(file)
    longer = {name: torch.cat([value, value[:1]]) if value.ndim == 1 else value for name, value in state.items()}
    save_file(longer, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")


def sharded(file: Path) -> None:
    """Only the first of two files, and the list of both."""
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    file.rename(file.with_name(parts[0]))
    listed = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(listed))


def empty(file: Path) -> None:
    file.write_bytes(b"")


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (half, r"\d+ tensors missing, the first is \w|the weights lack \d+ tensors, the first is \w"),
    (reshaped, r"\d+ tensors of another shape, the first is [\w.]+: \[\d+\] for \[\d+\]"),
    (cut, "a file is cut short"),
    (empty, "a file is cut short"),
    (pointer, "a pointer of Git LFS and not the file itself; run git lfs pull"),
    (sharded, "1 of 2 files of weights are missing, the first is model-00002-of-00002.safetensors"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
@pytest.mark.parametrize("family", ["clip", "timm", "resnet18"])
def test_broken_weights_get_one_line(
    family: str,
    fault: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    tiny_clip: Path,
    tiny_timm: Path,
    resnet_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "folder"
    if family == "resnet18":
        import torch
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(torch.load(resnet_file, weights_only=True), folder / "model.safetensors")
        requests = [f"resnet18:{folder}/model.safetensors"]
    else:
        shutil.copytree({"clip": tiny_clip, "timm": tiny_timm}[family], folder)
        requests = [f"{family}:{folder}", f"{family}:hf-hub:org/name"]
    fault(next(folder.glob("*.safetensors")))
    if fault is sharded and family == "resnet18":
        return  # a file is named, so no other one is needed
    if family != "resnet18":
        write_hub(tmp_path / "hub", "org/name", folder, monkeypatch)
    for request in requests if fault not in (pointer, sharded) else requests[:1]:  # hubs have whole files
        with pytest.raises(EncoderError, match=reason) as error:
            load_encoders(describe_encoders([request], FLOAT32), "cpu")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 260 + len(str(folder))


@pytest.mark.parametrize("family", ["clip", "timm"])
@pytest.mark.parametrize(("kind", "other"), [("dinov2", "hf"), ("siglip", "hf"), ("clip", "hf"), ("bert", "bert")])
def test_a_folder_of_another_family_says_which(tmp_path: Path, family: str, kind: str, other: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EncoderError, match=rf"its files are for {other}, so name {other}:{tmp_path}") as error:
        describe_encoders([f"{family}:{tmp_path}"], FLOAT32)
    assert "\n" not in str(error.value)


def test_timm_and_clip_say_each_other(
    tmp_path: Path, tiny_clip: Path, tiny_timm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub(tmp_path / "hub", "org/clip", tiny_clip, monkeypatch)
    write_hub(tmp_path / "hub", "org/timm", tiny_timm, monkeypatch)
    with pytest.raises(EncoderError, match="so name timm:hf-hub:org/timm"):
        describe_encoders(["clip:hf-hub:org/timm"], FLOAT32)
    with pytest.raises(EncoderError, match="so name clip:hf-hub:org/clip"):
        describe_encoders(["timm:hf-hub:org/clip"], FLOAT32)
    with pytest.raises(EncoderError, match=rf"so name timm:{tiny_timm}"):
        describe_encoders([f"clip:{tiny_timm}"], FLOAT32)
    with pytest.raises(EncoderError, match=rf"so name clip:{tiny_clip}"):
        describe_encoders([f"timm:{tiny_clip}"], FLOAT32)


def test_a_torchscript_archive_gets_one_line(tmp_path: Path, tiny_clip: Path) -> None:
    """OpenAI's own files of CLIP are such archives."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_clip, folder)
    next(folder.glob("*.safetensors")).unlink()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(
        EncoderError, match="a TorchScript archive, whose code is not run; save its state_dict"
    ) as error:
        load_encoders(describe_encoders([f"clip:{folder}"], FLOAT32), "cpu")
    assert "\n" not in str(error.value)
