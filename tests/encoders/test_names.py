"""Names of encoders as people paste them: marks of hubs, paths with odd letters, folders without a family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmfeat.cli.extract import notes_on_names
from mmfeat.encoders.names import family_of, split_requests
from mmfeat.encoders.registry import absolute_request, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.tiny_models import write_hub

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")


@pytest.mark.parametrize(
    ("pasted", "read"),
    [
        ("clip:hf-hub:org/name", "clip:hf-hub:org/name"),
        ("clip:hf_hub:org/name", "clip:hf-hub:org/name"),
        ("clip:https://huggingface.co/org/name", "clip:hf-hub:org/name"),
        ("clip:ViT-B-32/openai", "clip:ViT-B-32/openai"),
        ("timm:hf_hub:org/name", "timm:hf-hub:org/name"),
        ("timm:org/name.a1_in1k", "timm:hf-hub:org/name.a1_in1k"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k"),
        ("bert:hf-hub:org/name", "bert:org/name"),
        ("st:https://hf.co/org/name/tree/main", "st:org/name"),
        ("bert:org/name", "bert:org/name"),
        ("bert:hf-hub:bert-base-uncased", "bert:bert-base-uncased"),
        ("hog", "hog"),
    ],
)
def test_a_pasted_name_has_one_form(pasted: str, read: str) -> None:
    assert absolute_request(pasted) == read
    assert absolute_request(read) == read


@pytest.mark.parametrize("mark", ["", "file:", "file://"])
@pytest.mark.parametrize("name", ["a,b", "a:b", "a,b:c,d", "a=b", "a b"])
def test_a_path_with_commas_and_colons_is_one_path(tmp_path: Path, tiny_timm: Path, name: str, mark: str) -> None:
    folder = tmp_path / name
    shutil.copytree(tiny_timm, folder)
    for family in ("timm:", ""):
        asked = f"{family}{mark}{folder}"
        assert split_requests(f" hog ,{asked}, hashing,") == ["hog", asked, "hashing"]
        assert absolute_request(asked) == f"timm:{folder}"
        (tower,) = describe_encoders([asked], FLOAT32)
        assert (tower.request, tower.spec.variant) == (f"timm:{folder}", name)


def test_a_url_of_a_file_may_be_quoted(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert absolute_request(f"bert:file://{tmp_path}/a%20b") == f"bert:{tmp_path}/a b"


def test_paths_in_a_request_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.pt", "hog", "name"):
        (tmp_path / name).touch()
    assert split_requests("clip:ViT-B-32/a,b.pt,clip:ViT-B-32/openai=a,b.pt,hog") == [
        "clip:ViT-B-32/a,b.pt",
        "clip:ViT-B-32/openai=a,b.pt",
        "hog",
    ]
    assert absolute_request("clip:ViT-B-32/file:a,b.pt") == f"clip:ViT-B-32/{tmp_path}/a,b.pt"
    assert absolute_request("clip:ViT-B-32/openai=a,b.pt") == f"clip:ViT-B-32/openai={tmp_path}/a,b.pt"
    assert absolute_request("bert:name") == f"bert:{tmp_path}/name"
    assert absolute_request("hog") == "hog"  # a family, whatever lies here
    (tmp_path / "openai").mkdir()
    assert absolute_request("clip:ViT-B-32/openai") == "clip:ViT-B-32/openai"  # a tag; a folder has no weights of it


def test_a_folder_says_its_family(
    tmp_path: Path, tiny_bert: Path, tiny_clip: Path, tiny_timm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    shutil.copytree(tiny_bert, published)
    (published / "modules.json").write_text(json.dumps([{"type": "x", "path": ""}]))
    folders = {"bert": tiny_bert, "clip": tiny_clip, "timm": tiny_timm, "st": published}
    for family, folder in folders.items():
        monkeypatch.chdir(folder.parent)
        assert absolute_request(f"./{folder.name}") == absolute_request(folder.name) == f"{family}:{folder}"
        (note,) = notes_on_names([f"./{folder.name}", f"{family}:{folder}", "hashin"])
        assert note == f"./{folder.name}: no family is named; by its files this is {family}"
    for kind in ("clip", "siglip", "dinov2", "vit", "clip_vision_model"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert family_of(str(tmp_path)) == "hf"


def test_a_hub_name_says_its_family_by_its_cached_files(
    tmp_path: Path, tiny_bert: Path, tiny_clip: Path, tiny_timm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"bert": "bert:org/bert", "clip": "clip:hf-hub:org/clip", "timm": "timm:hf-hub:org/timm"}
    for family, folder in (("bert", tiny_bert), ("clip", tiny_clip), ("timm", tiny_timm)):
        write_hub(tmp_path / "hub", f"org/{family}", folder, monkeypatch)
        for written in (f"org/{family}", f"hf-hub:org/{family}", f"https://huggingface.co/org/{family}"):
            assert absolute_request(written) == read[family]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "org/name",
            r"no family is named, .* in the hub cache or on the hub; write the family before it, as in st",
        ),
        ("./nowhere", r"\./nowhere: no such weights file or folder"),
        ("file:/nowhere/at,all", r"no such weights file or folder"),
        ("clip:hf-hub:", r"no name of a repository; write hf-hub:ORG/NAME"),
        ("hf-hub:org/name/more", r"no name of a repository; write hf-hub:ORG/NAME"),
        ("timm:file:/nowhere", r"no such weights file or folder"),
        ("{folder}", r"no family is named, .* in this folder; write the family before it"),
        ("{folder}/weights.pt", r"a file of weights does not say its family; write clip:MODEL/FILE"),
        ("bert:" + "x" * 5000, r"."),
    ],
)
def test_a_name_that_says_too_little_gets_one_line(tmp_path: Path, asked: str, message: str) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(EncoderError, match=message) as caught:
        describe_encoders([asked.format(folder=tmp_path)], FLOAT32)
    assert "\n" not in str(caught.value)
