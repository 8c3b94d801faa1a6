"""Hostile checkpoints: whatever their files say, code of a checkpoint and pickles run nothing without consent.

Each plants a marker file, by Python code beside the weights or by a pickle. It is refused in one line, or encodes
without what was planted; no one is asked, and whoever would be asked says yes.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.test_sentence import write_checkpoint
from tests.encoders.test_transformers_models import write_hf
from tests.encoders.tiny_hf import change_json
from tests.encoders.tiny_models import contents, write_clip, write_timm, write_torchvision

FLOAT32 = EncoderOptions(dtype="float32", cleaning="none")
OWN = "from pathlib import Path\nPath({marker!r}).touch()\nclass Own:\n    pass\n"
CODE = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
PICTURES = {"AutoImageProcessor": "own.Own", "AutoProcessor": "own.Own", "AutoVideoProcessor": "own.Own"}
TRUST = {"trust_remote_code": True}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": ".",
    "auto_mapping": {"base_model_class": "Own", "parent_library": "own"},
}


@dataclass(frozen=True)
class Place:
    """Where a hostile checkpoint is made: an empty folder, a sound BERT, and the file that its code would write."""

    folder: Path
    bert: Path
    marker: Path

    def code(self, name: str = "own.py") -> Place:
        """Put Python code beside the files of the checkpoint."""
        (self.folder / name).write_text(OWN.format(marker=str(self.marker)))
        return self

    def change(self, file: str, **values: Any) -> Place:
        change_json(self.folder / file, **values)
        return self

    def module(self, kind: str) -> Place:
        """Add a module of this type to a checkpoint of sentence-transformers."""
        listed = json.loads((self.folder / "modules.json").read_text())
        listed.append({"idx": len(listed), "name": "own", "path": "own", "type": kind})
        (self.folder / "modules.json").write_text(json.dumps(listed))
        return self.change("own/config.json")

    def pickled(self, name: str, instead: str = "*.safetensors") -> Place:
        """Put a pickle in place of the weights that match a pattern."""
        for file in self.folder.glob(instead):
            file.unlink()
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(pickle.dumps({"weight": Payload(self.marker)}, protocol=2))
        return self

    def archived(self, name: str) -> Place:
        """Put a payload into an archive as `torch.save` writes it, in place of the weights."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        torch.save({"weight": torch.zeros(2), "more": Payload(self.marker)}, self.folder / name)
        return self

    def of_bert(self) -> Place:
        shutil.copytree(self.bert, self.folder)
        return self.code()

    def of_pictures(self) -> Place:
        write_hf(self.folder, "dinov2")
        return self.code()

    def of_sentences(self, **options: Any) -> Place:
        write_checkpoint(self.folder, self.bert, **options)
        return self.code()

    def of_clip(self, **text: Any) -> Place:
        write_clip(self.folder, text={"context_length": 16})
        for file in self.bert.glob("*token*"):
            shutil.copy(file, self.folder)
        described = json.loads((self.folder / "open_clip_config.json").read_text())
        described["model_cfg"]["text_cfg"] |= text
        return self.change("open_clip_config.json", **described).code()

    def of_timm(self) -> Place:
        write_timm(self.folder, "test_resnet")
        return self.code()

    def of_torchvision(self) -> Place:
        self.folder.mkdir()
        write_torchvision(self.folder / "sound.pth", "resnet18")
        return self


class Payload:
    """An object whose pickle writes the marker where it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def processors(place: Place) -> None:
    """Files of each kind of processor, which name a class that no library has."""
    place.of_pictures()
    for file in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        place.change(file, auto_map=PICTURES, image_processor_type="Own", processor_class="Own", **TRUST)


def trusts_itself(place: Place) -> None:
    """Settings of the library's own first module, under their names of several versions."""
    place.of_sentences().change("config.json", auto_map=CODE, model_type="own")
    names = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")
    place.change("sentence_bert_config.json", **dict.fromkeys(names, TRUST), **TRUST)
    place.change("config_sentence_transformers.json", **TRUST)


def own_load(place: Place) -> None:
    """timm would leave the file to a function of the model, or read weights from elsewhere."""
    place.of_timm().pickled("elsewhere.pth", "nothing")
    described = json.loads((place.folder / "config.json").read_text())["pretrained_cfg"]
    elsewhere = {"file": f"{place.folder}/elsewhere.pth", "url": f"file://{place.folder}/elsewhere.pth"}
    place.change("config.json", pretrained_cfg={**described, "custom_load": True, **elsewhere})
    place.pickled("pytorch_model.bin")


ROUTER = "sentence_transformers.base.modules.router.Router"
WORDS = "sentence_transformers.sentence_transformer.modules.word_embeddings.WordEmbeddings"
PART = {"weight_map": {"embeddings.word_embeddings.weight": "part.bin"}, "metadata": {}}
OWN_TOKENIZER = {"auto_map": CODE, "tokenizer_class": "Own"}
NO_DICT = "not a plain state dict"
# The request, in which {} is the folder; what the refusal says, "" where the library's own code makes the vector all
# the same; and what makes the checkpoint.
HOSTILE: list[tuple[str, str, Callable[[Place], object]]] = [
    ("bert:{}", "needs code of its own, own.py; read it, then add --trust-remote-code",
        lambda at: at.of_bert().change("config.json", auto_map=CODE, model_type="own", **TRUST)),
    ("bert:{}", "", lambda at: at.of_bert().change("config.json", auto_map=CODE, **TRUST)),
    ("bert:{}", "", lambda at: at.of_bert().change("tokenizer_config.json", **OWN_TOKENIZER, **TRUST)),
    ("bert:{}", "",
        lambda at: at.of_bert().change("tokenizer_config.json", auto_map=["own.Own", None], tokenizer_class="Own")),
    ("bert:{}", "would run code of org/own@main on the hub",
        lambda at: at.of_bert().change("config.json", attn_implementation="org/own@main", use_kernels=True)),
    ("bert:{}", "an adapter", lambda at: at.of_bert().change("adapter_config.json", **ADAPTER)),
    ("bert:{}", NO_DICT, lambda at: at.of_bert().pickled("pytorch_model.bin")),
    ("bert:{}", NO_DICT, lambda at: at.of_bert().archived("pytorch_model.bin")),
    ("bert:{}", NO_DICT, lambda at: at.of_bert().pickled("part.bin").change("pytorch_model.bin.index.json", **PART)),
    ("hf:{}", "needs code of its own, own.py",
        lambda at: at.of_pictures().change("config.json", auto_map=CODE, model_type="own", **TRUST)),
    ("hf:{}", "", lambda at: at.of_pictures().change("preprocessor_config.json", auto_map=PICTURES, **TRUST)),
    ("hf:{}", "it needs code of the checkpoint", processors),
    ("hf:{}", "an adapter", lambda at: at.of_pictures().change("adapter_config.json", **ADAPTER)),
    ("hf:{}", NO_DICT, lambda at: at.of_pictures().pickled("pytorch_model.bin")),
    ("st:{}", "needs code of its own, own.Own in modules.json", lambda at: at.of_sentences().module("own.Own")),
    ("st:{}", "needs code of its own",
        lambda at: at.of_sentences().module("sentence_transformers_own.Own").code("sentence_transformers_own.py")),
    ("st:{}", "needs code of its own", trusts_itself),
    ("st:{}", "needs code of its own, own.Own in 2_Dense/config.json",
        lambda at: at.of_sentences(dense=8).change("2_Dense/config.json", activation_function="own.Own")),
    ("st:{}", "it needs code of the checkpoint", lambda at: at.of_sentences().module(ROUTER).change(
        "own/router_config.json", types={"own": "own.Own"}, structure={"own": ["own"]}, parameters={})),
    ("st:{}", "it needs code of the checkpoint", lambda at: at.of_sentences().module(WORDS).change(
        "own/wordembedding_config.json", tokenizer_class="own.Own", update_embeddings=False)),
    ("st:{}", "an adapter", lambda at: at.of_sentences().change("adapter_config.json", **ADAPTER)),
    ("st:{}", NO_DICT,
        lambda at: at.of_sentences(dense=8).pickled("2_Dense/pytorch_model.bin", "2_Dense/*.safetensors")),
    ("clip:{}", "tells its tokenizer trust_remote_code",
        lambda at: at.of_clip(hf_tokenizer_name="org/own", tokenizer_kwargs=TRUST).change(
            "tokenizer_config.json", **OWN_TOKENIZER)),
    ("clip:{}", "its tokenizer", lambda at: at.of_clip(hf_tokenizer_name=str(at.folder)).change(
        "tokenizer_config.json", **OWN_TOKENIZER, **TRUST)),
    ("clip:{}", "cannot be loaded",
        lambda at: at.of_clip(hf_model_name=str(at.folder), hf_tokenizer_name=str(at.folder)).change(
            "config.json", auto_map=CODE, model_type="own", **TRUST)),
    ("clip:{}", NO_DICT, lambda at: at.of_clip().pickled("open_clip_pytorch_model.bin")),
    ("clip:tiny-clip/{}/weights.pt", NO_DICT, lambda at: at.of_clip().pickled("weights.pt")),
    ("clip:tiny-clip/{}/weights.ckpt", NO_DICT, lambda at: at.of_clip().archived("weights.ckpt")),
    ("timm:{}", NO_DICT, lambda at: at.of_timm().pickled("pytorch_model.bin")),
    ("timm:{}", "cannot be loaded", own_load),
    ("timm:{}", "cannot be loaded", lambda at: at.of_timm().change(
        "config.json", architecture=f"local-dir:{at.folder}", auto_map=CODE, **TRUST)),
    ("resnet18:{}/weights.pth", NO_DICT, lambda at: at.of_torchvision().pickled("weights.pth")),
    ("resnet18:{}/weights.ckpt", NO_DICT, lambda at: at.of_torchvision().archived("weights.ckpt")),
    ("finetuned:{}/a.safetensors", "not a fine-tuned tower", lambda at: at.pickled("a.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize(("named", "reason", "write"), HOSTILE)
def test_no_code_of_a_checkpoint_runs(
    named: str,
    reason: str,
    write: Callable[[Place], object],
    tmp_path: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = Place(tmp_path / "folder", tiny_bert, tmp_path / "marker")
    write(place)
    request = named.format(place.folder)
    if "clip:tiny" in request:
        import open_clip

        config = json.loads((place.folder / "open_clip_config.json").read_text())["model_cfg"]
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    for use, answer in ((encode, "y\n" * 9), (refer, "")):
        monkeypatch.setattr("sys.stdin", terminal := io.StringIO(answer))
        try:
            use(request)
            refused = ""
        except EncoderError as error:
            refused = str(error)
        assert not place.marker.exists()
        assert "\n" not in refused
        assert len(refused) < 500
        assert (reason in refused) if reason else not refused, refused
        assert terminal.read() == answer  # nothing was asked
    assert capfd.readouterr() == ("", "")


def encode(request: str) -> None:
    for encoder in load_encoders(describe_encoders([request], FLOAT32), "cpu"):
        encoder.embed([encoder.prepare(contents(encoder.modality)[0])])


def refer(request: str) -> None:
    for tower in describe_encoders([request], FLOAT32):
        load_reference(tower)(contents(tower.spec.modality)[0])
