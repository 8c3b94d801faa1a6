"""Code of a checkpoint: it runs only where the user trusts it, and then makes the vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import Tower, describe_encoders, load_encoders, load_reference, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from mmfeat.system.trust import is_trusted, trust_remote_code
from tests.cli.test_main import fails
from tests.cli.typed import invoke
from tests.encoders.test_sentence import write_checkpoint
from tests.encoders.tiny_hf import change_json

OPTIONS = EncoderOptions(dtype="float32", cleaning="none")
TEXTS = ["What a wonderful day of this", "so tired", "the bus"]
MARK = "from pathlib import Path\nPath({mark!r}).touch()\n"
CONFIGURATION = """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own_bert"
"""
MODELING = """
from transformers import BertModel
from .configuration_own import OwnConfig

class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **kwargs):
        return super().__call__(text[::-1] if isinstance(text, str) else [one[::-1] for one in text], **kwargs)
"""
MODULE = """
from sentence_transformers.sentence_transformer.modules import Normalize

class Own(Normalize):
    def forward(self, features, **kwargs):
        features["sentence_embedding"] = features["sentence_embedding"] * 3
        return features
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that code of a checkpoint writes when it runs."""
    return tmp_path / "ran"


def write_own(kind: str, backbone: Path, folder: Path, mark: Path) -> str:
    """A checkpoint with code of its own for its model, its tokenizer or a module; returns its request."""
    planted = MARK.format(mark=str(mark))
    if kind == "module":
        write_checkpoint(folder, backbone)
        modules = json.loads((folder / "modules.json").read_text())
        modules.append({"idx": len(modules), "name": "own", "path": "own", "type": f"own_{folder.name}.Own"})
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "own").mkdir()
        (folder / "own" / "config.json").write_text("{}")
        (folder / f"own_{folder.name}.py").write_text(planted + MODULE)
        return f"st:{folder}"
    shutil.copytree(backbone, folder)
    if kind == "model":
        (folder / "configuration_own.py").write_text(planted + CONFIGURATION)
        (folder / "modeling_own.py").write_text(planted + MODELING)
        classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
        change_json(folder / "config.json", auto_map=classes, model_type="own_bert", architectures=["OwnModel"])
    if kind == "tokenizer":
        (folder / "tokenization_own.py").write_text(planted + TOKENIZATION)
        classes = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        change_json(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="OwnTokenizer")
        change_json(folder / "config.json", model_type="bert")
    return f"bert:{folder}"


def vectors(towers: list[Tower]) -> np.ndarray:
    (encoder,) = load_encoders(towers, "cpu")
    return encoder.embed([encoder.prepare(text) for text in TEXTS])[0]


@pytest.mark.parametrize("family", ["bert", "st"])
def test_a_model_of_its_own_runs_only_if_trusted(family: str, tiny_bert: Path, tmp_path: Path, mark: Path) -> None:
    write_own("model", tiny_bert, tmp_path / "own_model", mark)
    request = f"{family}:{tmp_path / 'own_model'}"
    with pytest.raises(EncoderError, match=r"needs code of its own, configuration_own.py; read it, then add --trust-r"):
        describe_encoders([request], OPTIONS)
    assert not mark.exists()
    with trust_remote_code():
        towers = describe_encoders([request], OPTIONS)
        ours, reference = vectors(towers), load_reference(towers[0])
        assert mark.exists()
        assert towers[0].spec.remote_code == 1
        np.testing.assert_allclose(ours, np.stack([reference(text) for text in TEXTS]), atol=1e-5)
        transformers = quiet_transformers()
        model = transformers.AutoModel.from_pretrained(tmp_path / "own_model", trust_remote_code=True).eval()
        inputs = transformers.AutoTokenizer.from_pretrained(tiny_bert)(TEXTS[0], return_tensors="pt")
        published = model(**inputs).last_hidden_state[0].mean(0).detach().numpy()
        np.testing.assert_allclose(ours[0], published, atol=1e-5)
        plain = vectors(describe_encoders([f"{family}:{tiny_bert}"], OPTIONS))
        np.testing.assert_allclose(ours, 2 * plain, atol=1e-5)
    for load in (lambda: open_towers(towers[0]), lambda: load_reference(towers[0])):
        with pytest.raises(EncoderError, match="then add --trust-remote-code"):  # a spec is no consent
            load()


def test_a_module_of_its_own_runs_only_if_trusted(tiny_bert: Path, tmp_path: Path, mark: Path) -> None:
    request = write_own("module", tiny_bert, tmp_path / "checkpoint", mark)
    with pytest.raises(EncoderError, match=r"own_checkpoint.Own in modules.json; read it, then add --trust-remote-co"):
        describe_encoders([request], OPTIONS)
    assert not mark.exists()
    with trust_remote_code():
        towers = describe_encoders([request], OPTIONS)
        ours, reference = vectors(towers), load_reference(towers[0])
        np.testing.assert_allclose(ours, np.stack([reference(text) for text in TEXTS]), atol=1e-5)
        np.testing.assert_allclose(ours, 3 * vectors(describe_encoders([f"bert:{tiny_bert}"], OPTIONS)), atol=1e-5)
    assert mark.exists()


def test_code_for_what_the_library_knows_is_left_out_unless_trusted(
    tiny_bert: Path, tmp_path: Path, mark: Path
) -> None:
    request = write_own("tokenizer", tiny_bert, tmp_path / "own_tokenizer", mark)
    towers = describe_encoders([request], OPTIONS)
    plain = vectors(towers)
    assert towers[0].spec.remote_code == 0
    assert not mark.exists()
    with trust_remote_code():
        trusted = describe_encoders([request], OPTIONS)
        assert trusted[0].spec.remote_code == 1
        assert np.abs(vectors(trusted) - plain).max() > 1e-3
    assert mark.exists()


def test_the_code_is_part_of_the_identity(tiny_bert: Path, tmp_path: Path, mark: Path) -> None:
    request = write_own("model", tiny_bert, tmp_path / "own_model", mark)
    with trust_remote_code():
        (before,) = describe_encoders([request], OPTIONS)
        (tmp_path / "own_model" / "parts").mkdir()
        (tmp_path / "own_model" / "parts" / "more.py").write_text("x = 1\n")
        (after,) = describe_encoders([request], OPTIONS)
    assert before.spec.differences(after.spec) == ["weights"]
    assert not mark.exists()  # to describe runs nothing


def test_code_of_another_repository_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    change_json(folder / "config.json", auto_map={"AutoModel": "someone/else--modeling.Model"}, model_type="own_bert")
    with trust_remote_code(), pytest.raises(EncoderError, match="its code is in another repository, someone/else"):
        describe_encoders([f"bert:{folder}"], OPTIONS)


def test_each_command_needs_the_flag_again(
    tiny_bert: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    request = write_own("model", tiny_bert, tmp_path / "own_model", mark)
    texts = [" ".join(3 * chr(97 + (7 * i + k * k) % 26) for k in range(5)) for i in range(24)]
    lines = [{"id": str(i), "text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    extract = ("extract", "--data", "a.jsonl", "--encoders", request, "--dtype", "float32")
    heads = ("heads", "--fusion", "none", "--baselines", "logistic", "--folds", "2", "--seeds", "1")
    predict = ("predict", "--text", "so tired")
    for command in (extract, (*extract, "--dry-run")):
        fails(invoke(*command), "needs code of its own", "then add --trust-remote-code")
    assert not mark.exists()
    answer = invoke(*extract, "--trust-remote-code")
    assert answer.exit_code == 0, answer.output
    mark.unlink()
    fails(invoke(*heads), "needs code of its own", "then add --trust-remote-code")
    trained = invoke(*heads, "--trust-remote-code")
    assert trained.exit_code == 0, trained.output
    fails(invoke(*predict), "needs code of its own", "then add --trust-remote-code")
    fails(invoke("cache", "verify", "--parity", "2"), "needs code of its own", "then add --trust-remote-code")
    assert not mark.exists()
    assert invoke(*predict, "--trust-remote-code").exit_code == 0
    assert not is_trusted()
