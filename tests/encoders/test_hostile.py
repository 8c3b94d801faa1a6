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

from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from tests.encoders.test_sentence import write_checkpoint
from tests.encoders.test_transformers_models import write_hf
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

    def code(self, *inner: str) -> None:
        """Put Python code beside the files of the checkpoint."""
        for name in inner or ("own.py",):
            (self.folder / name).write_text(OWN.format(marker=str(self.marker)))

    def change(self, file: str, **values: Any) -> None:
        path = self.folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**before, **values}))

    def pickled(self, name: str, instead: str = "*.safetensors") -> None:
        """Put a pickle in place of the weights that match a pattern."""
        for file in self.folder.glob(instead):
            file.unlink()
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(pickle.dumps({"weight": Payload(self.marker)}, protocol=2))

    def archived(self, name: str) -> None:
        """Put a payload into an archive as `torch.save` writes it, in place of the weights."""
        import torch

        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        torch.save({"weight": torch.zeros(2), "more": Payload(self.marker)}, self.folder / name)

    def of_bert(self) -> Place:
        shutil.copytree(self.bert, self.folder)
        self.code()
        return self

    def of_pictures(self) -> Place:
        write_hf(self.folder, "dinov2")
        self.code()
        return self

    def of_sentences(self, **options: Any) -> Place:
        write_checkpoint(self.folder, self.bert, **options)
        self.code()
        return self

    def of_clip(self, **text: Any) -> Place:
        write_clip(self.folder, text={"context_length": 16})
        for file in self.bert.glob("*token*"):
            shutil.copy(file, self.folder)
        described = json.loads((self.folder / "open_clip_config.json").read_text())
        described["model_cfg"]["text_cfg"] |= text
        (self.folder / "open_clip_config.json").write_text(json.dumps(described))
        self.code()
        return self

    def of_timm(self) -> Place:
        write_timm(self.folder, "test_resnet")
        self.code()
        return self


class Payload:
    """An object whose pickle writes the marker where it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def own_modules(place: Place, **module: str) -> None:
    listed = json.loads((place.folder / "modules.json").read_text())
    listed.append({"idx": len(listed), "name": "own", "path": "own", **module})
    (place.folder / "modules.json").write_text(json.dumps(listed))
    place.change("own/config.json")


def bert_model(place: Place) -> str:
    place.of_bert().change("config.json", auto_map=CODE, model_type="own", **TRUST)
    return f"bert:{place.folder}"


def bert_known_model(place: Place) -> str:
    place.of_bert().change("config.json", auto_map=CODE, **TRUST)
    return f"bert:{place.folder}"


def bert_tokenizer(place: Place) -> str:
    place.of_bert().change("tokenizer_config.json", auto_map=CODE, tokenizer_class="Own", **TRUST)
    return f"bert:{place.folder}"


def bert_old_tokenizer(place: Place) -> str:
    place.of_bert().change("tokenizer_config.json", auto_map=["own.Own", None], tokenizer_class="Own")
    return f"bert:{place.folder}"


def bert_kernel(place: Place) -> str:
    place.of_bert().change("config.json", attn_implementation="org/own@main", use_kernels=True)
    return f"bert:{place.folder}"


def bert_adapter(place: Place) -> str:
    place.of_bert().change("adapter_config.json", **ADAPTER)
    return f"bert:{place.folder}"


def bert_pickle(place: Place) -> str:
    place.of_bert().pickled("pytorch_model.bin")
    return f"bert:{place.folder}"


def bert_archive(place: Place) -> str:
    place.of_bert().archived("pytorch_model.bin")
    return f"bert:{place.folder}"


def bert_parts(place: Place) -> str:
    place.of_bert().pickled("part.bin")
    listed = {"weight_map": {"embeddings.word_embeddings.weight": "part.bin"}, "metadata": {}}
    place.change("pytorch_model.bin.index.json", **listed)
    return f"bert:{place.folder}"


def hf_model(place: Place) -> str:
    place.of_pictures().change("config.json", auto_map=CODE, model_type="own", **TRUST)
    return f"hf:{place.folder}"


def hf_known_processor(place: Place) -> str:
    place.of_pictures().change("preprocessor_config.json", auto_map=PICTURES, **TRUST)
    return f"hf:{place.folder}"


def hf_processors(place: Place) -> str:
    place.of_pictures()
    for file in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        place.change(file, auto_map=PICTURES, image_processor_type="Own", processor_class="Own", **TRUST)
    return f"hf:{place.folder}"


def hf_adapter(place: Place) -> str:
    place.of_pictures().change("adapter_config.json", **ADAPTER)
    return f"hf:{place.folder}"


def hf_pickle(place: Place) -> str:
    place.of_pictures().pickled("pytorch_model.bin")
    return f"hf:{place.folder}"


def st_module(place: Place) -> str:
    own_modules(place.of_sentences(), type="own.Own")
    return f"st:{place.folder}"


def st_module_alike(place: Place) -> str:
    own_modules(place.of_sentences(), type="sentence_transformers_own.Own")
    place.code("sentence_transformers_own.py")
    return f"st:{place.folder}"


def st_trusts_itself(place: Place) -> str:
    """Settings of the library's own first module, under their names of several versions."""
    place.of_sentences().change("config.json", auto_map=CODE, model_type="own")
    names = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")
    place.change("sentence_bert_config.json", **dict.fromkeys(names, TRUST), **TRUST)
    place.change("config_sentence_transformers.json", **TRUST)
    return f"st:{place.folder}"


def st_activation(place: Place) -> str:
    place.of_sentences(dense=8).change("2_Dense/config.json", activation_function="own.Own")
    return f"st:{place.folder}"


def st_router(place: Place) -> str:
    place.of_sentences()
    own_modules(place, type="sentence_transformers.base.modules.router.Router")
    place.change("own/router_config.json", types={"own": "own.Own"}, structure={"own": ["own"]}, parameters={})
    return f"st:{place.folder}"


def st_words(place: Place) -> str:
    place.of_sentences()
    own_modules(place, type="sentence_transformers.sentence_transformer.modules.word_embeddings.WordEmbeddings")
    place.change("own/wordembedding_config.json", tokenizer_class="own.Own", update_embeddings=False)
    return f"st:{place.folder}"


def st_adapter(place: Place) -> str:
    place.of_sentences().change("adapter_config.json", **ADAPTER)
    return f"st:{place.folder}"


def st_pickle(place: Place) -> str:
    place.of_sentences(dense=8).pickled("2_Dense/pytorch_model.bin", "2_Dense/*.safetensors")
    return f"st:{place.folder}"


def clip_trusts_itself(place: Place) -> str:
    place.of_clip(hf_tokenizer_name="org/own", tokenizer_kwargs=TRUST)
    place.change("tokenizer_config.json", auto_map=CODE, tokenizer_class="Own")
    return f"clip:{place.folder}"


def clip_tokenizer(place: Place) -> str:
    place.of_clip(hf_tokenizer_name=str(place.folder))
    place.change("tokenizer_config.json", auto_map=CODE, tokenizer_class="Own", **TRUST)
    return f"clip:{place.folder}"


def clip_text_model(place: Place) -> str:
    place.of_clip(hf_model_name=str(place.folder), hf_tokenizer_name=str(place.folder))
    place.change("config.json", auto_map=CODE, model_type="own", **TRUST)
    return f"clip:{place.folder}"


def clip_pickle(place: Place) -> str:
    place.of_clip().pickled("open_clip_pytorch_model.bin")
    return f"clip:{place.folder}"


def clip_file(place: Place) -> str:
    place.of_clip().pickled("weights.pt")
    return f"clip:tiny-clip/{place.folder}/weights.pt"


def clip_checkpoint(place: Place) -> str:
    place.of_clip().archived("weights.ckpt")
    return f"clip:tiny-clip/{place.folder}/weights.ckpt"


def timm_pickle(place: Place) -> str:
    place.of_timm().pickled("pytorch_model.bin")
    return f"timm:{place.folder}"


def timm_own_load(place: Place) -> str:
    """timm would leave the file to a function of the model, or read weights from elsewhere."""
    place.of_timm().pickled("elsewhere.pth", "nothing")
    described = json.loads((place.folder / "config.json").read_text())["pretrained_cfg"]
    elsewhere = {"file": f"{place.folder}/elsewhere.pth", "url": f"file://{place.folder}/elsewhere.pth"}
    place.change("config.json", pretrained_cfg={**described, "custom_load": True, **elsewhere})
    place.pickled("pytorch_model.bin")
    return f"timm:{place.folder}"


def timm_architecture(place: Place) -> str:
    place.of_timm().change("config.json", architecture=f"local-dir:{place.folder}", auto_map=CODE, **TRUST)
    return f"timm:{place.folder}"


def torchvision_pickle(place: Place) -> str:
    place.folder.mkdir()
    place.pickled("weights.pth")
    return f"resnet18:{place.folder}/weights.pth"


def torchvision_archive(place: Place) -> str:
    place.folder.mkdir()
    write_torchvision(place.folder / "sound.pth", "resnet18")
    place.archived("weights.ckpt")
    return f"resnet18:{place.folder}/weights.ckpt"


def tuned_pickle(place: Place) -> str:
    place.folder.mkdir()
    place.pickled("bert-1-1.safetensors")
    return f"finetuned:{place.folder}/bert-1-1.safetensors"


# What makes each checkpoint, and what the refusal says; "" where the library's own code makes the vector all the same.
HOSTILE: list[tuple[Callable[[Place], str], str]] = [
    (bert_model, "needs code of its own, own.py; read it, then add --trust-remote-code"),
    (bert_known_model, ""),
    (bert_tokenizer, ""),
    (bert_old_tokenizer, ""),
    (bert_kernel, "would run code of org/own@main on the hub"),
    (bert_adapter, "an adapter"),
    (bert_pickle, "not a plain state dict"),
    (bert_archive, "not a plain state dict"),
    (bert_parts, "not a plain state dict"),
    (hf_model, "needs code of its own, own.py"),
    (hf_known_processor, ""),
    (hf_processors, "it needs code of the checkpoint"),
    (hf_adapter, "an adapter"),
    (hf_pickle, "not a plain state dict"),
    (st_module, "needs code of its own, own.Own in modules.json"),
    (st_module_alike, "needs code of its own"),
    (st_trusts_itself, "needs code of its own"),
    (st_activation, "needs code of its own, own.Own in 2_Dense/config.json"),
    (st_router, "it needs code of the checkpoint"),
    (st_words, "it needs code of the checkpoint"),
    (st_adapter, "an adapter"),
    (st_pickle, "not a plain state dict"),
    (clip_trusts_itself, "tells its tokenizer trust_remote_code"),
    (clip_tokenizer, "its tokenizer"),
    (clip_text_model, "cannot be loaded"),
    (clip_pickle, "not a plain state dict"),
    (clip_file, "not a plain state dict"),
    (clip_checkpoint, "not a plain state dict"),
    (timm_pickle, "not a plain state dict"),
    (timm_own_load, "cannot be loaded"),
    (timm_architecture, "cannot be loaded"),
    (torchvision_pickle, "not a plain state dict"),
    (torchvision_archive, "not a plain state dict"),
    (tuned_pickle, "not a fine-tuned tower"),
]


@pytest.mark.parametrize(("write", "reason"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_no_code_of_a_checkpoint_runs(
    write: Callable[[Place], str],
    reason: str,
    tmp_path: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = Place(tmp_path / "folder", tiny_bert, tmp_path / "marker")
    request = write(place)
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
