"""Every runtime gives torch's numbers, or is refused; what it stores is whole, and may be missing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmfeat.encoders.faster import FusedAttention, faster, fuse_attention
from mmfeat.encoders.registry import describe_encoders, load_encoders, open_towers
from mmfeat.encoders.runtime import GRAPH, TOLERANCE, FastestPass, Store, difference
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import LIBRARIES, Runtime, TorchTower
from tests.encoders.tiny_models import contents, embed, write_kind

FLOAT32 = EncoderOptions(dtype="float32", cleaning="none")
MANY = {"image": 10**9, "text": 10**9}
EXPORTED = ("test_resnet", "hf-dinov2", "clip", "bert", "st")
KINDS = (*EXPORTED, "test_vit", "test_efficientnet")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_clip: Path) -> Callable[[str], str]:
    made: dict[str, str] = {"clip": f"clip:{tiny_clip}", "bert": f"bert:{tiny_bert}", "st": f"st:{tiny_bert}"}
    root = tmp_path_factory.mktemp("runtimes")

    def request(kind: str) -> str:
        if kind not in made:
            made[kind] = write_kind(kind, root / kind, tiny_bert)
        return made[kind]

    return request


def tower_of(request: str) -> TorchTower:
    (tower,) = open_towers(describe_encoders([request], FLOAT32)[0])
    return tower


def batch_of(tower: TorchTower) -> Any:
    return tower.collate([tower.prepare(one) for one in contents(tower.specs[0].modality)])


@pytest.fixture(scope="module")
def exported(requests: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one exported tower, made once: an export takes seconds."""
    pytest.importorskip("onnxruntime")
    tower, folder = tower_of(requests("test_resnet")), tmp_path_factory.mktemp("exported")
    FastestPass(tower, Runtime("onnxruntime", folder))(batch_of(tower))
    return folder


def check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert difference(torch.from_numpy(found), torch.from_numpy(expected)) <= TOLERANCE


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_tower_equals_torch(kind: str, requests: Callable, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    towers = describe_encoders([requests(kind)], FLOAT32)
    plain = load_encoders(towers, "cpu")
    for name in filter(importlib.util.find_spec, LIBRARIES):
        for encoder, other in zip(plain, load_encoders(towers, "cpu", Runtime(name, tmp_path)), strict=True):
            expected = embed(encoder)["pooled"]
            for _ in range(2):  # torch encodes the first batch
                check_equal(embed(other)["pooled"], expected)
            assert other.note().startswith({"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[name]), other.note()
            for one in contents(other.modality):  # other sizes of batches, other lengths
                (found,), (wanted,) = (each.embed([each.prepare(one)]) for each in (other, encoder))
                check_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_faster_torch_equals_torch_and_is_undone(kind: str, requests: Callable) -> None:
    towers = load_towers(requests(kind))
    for tower in towers:
        inputs, forward = batch_of(tower), tower.network.forward
        with torch.no_grad():
            expected = forward(inputs)
            changes = faster(tower.module, forward, inputs)
            changes.swap()
            found = forward(inputs)
            assert changes
            assert difference(found, expected) <= TOLERANCE
            changes.swap()
            assert torch.equal(forward(inputs), expected)


def test_products_are_faster_in_bfloat16_by_the_same_angle(requests: Callable) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    half = EncoderOptions(dtype="bfloat16", cleaning="none")
    (tower,) = describe_encoders([requests("bert")], half)
    plain, other = (load_encoders([tower], "cpu", runtime)[0] for runtime in (None, Runtime("torch", samples=MANY)))
    expected = torch.from_numpy(embed(plain)["pooled"])
    for _ in range(2):
        found = torch.from_numpy(embed(other)["pooled"])
        assert torch.nn.functional.cosine_similarity(found, expected).min() >= 0.999


def load_towers(request: str) -> list[TorchTower]:
    towers = [open_towers(tower)[0] for tower in describe_encoders([request], FLOAT32)]
    for tower in towers:
        fuse_attention(tower.module)
    return towers


@pytest.mark.parametrize("kind", ["test_resnet", "test_efficientnet"])
def test_batch_norms_are_folded(kind: str, requests: Callable) -> None:
    tower = tower_of(requests(kind))
    inputs = batch_of(tower)
    with torch.no_grad():
        changes = faster(tower.module, tower.network.forward, inputs)
        changes.swap()
        norms = [one for one in tower.module.modules() if isinstance(one, torch.nn.BatchNorm2d)]
        for norm in norms:  # they take no part in the pass now
            norm.running_mean.fill_(float("nan"))
        assert norms
        assert tower.network.forward(inputs).isfinite().all()


def test_a_graph_that_differs_is_refused_and_said(requests: Callable, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    tower = tower_of(requests("test_resnet"))
    forward = tower.network.forward
    odd = replace(tower.network, forward=lambda x: forward(x) * (1 + 1e-3 * torch.compiler.is_exporting()))
    chosen = FastestPass(replace(tower, network=odd), Runtime("onnxruntime", tmp_path))
    inputs = batch_of(tower)
    chosen(inputs)
    assert torch.equal(chosen(inputs), forward(inputs))
    assert "ONNX Runtime is not used: it differs from torch by 1e-03 of a row's largest value" in chosen.note


def test_a_stored_graph_of_other_numbers_is_made_anew(requests: Callable, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    tower, (graph,) = tower_of(requests("test_resnet")), folder.rglob(GRAPH)
    inputs, before = batch_of(tower), graph.read_bytes()
    with torch.no_grad():
        next(tower.module.parameters()).mul_(1.5)
        chosen = FastestPass(tower, Runtime("onnxruntime", folder))
        chosen(inputs)
        assert chosen.name == "onnxruntime"
        assert difference(chosen(inputs), tower.network.forward(inputs)) <= TOLERANCE
        assert graph.read_bytes() != before


def test_a_runtime_that_fails_later_gives_way_to_torch(requests: Callable, exported: Path) -> None:
    tower = tower_of(requests("test_resnet"))
    inputs, chosen = batch_of(tower), FastestPass(tower, Runtime("onnxruntime", exported, writes=False))
    chosen(inputs)
    smaller = inputs[:, :32] if inputs.shape[-1] == 3 else inputs[..., :32]  # a height that the graph does not take
    assert torch.equal(chosen(smaller), tower.network.forward(smaller))
    assert "torch from then on, as it failed" in chosen.note


def test_of_large_weights_there_is_no_copy(requests: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfeat.encoders.runtime.LARGEST", 1000)
    tower = tower_of(requests("test_resnet"))
    chosen = FastestPass(tower, Runtime("onnxruntime", tmp_path))
    chosen(batch_of(tower))
    assert (chosen.name, chosen.forward) == ("plain", tower.network.forward)
    assert "too large for a copy" in chosen.note
    assert not list(tmp_path.rglob(GRAPH))


def test_a_small_job_stays_with_torch(requests: Callable, tmp_path: Path) -> None:
    (encoder,) = load_encoders(
        describe_encoders([requests("test_resnet")], FLOAT32), "cpu", Runtime("auto", tmp_path, samples={"image": 9})
    )
    embed(encoder)
    assert encoder.note() == ""
    assert not list(tmp_path.iterdir())


def test_auto_exports_once_and_keeps_its_decision(requests: Callable, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    tower, runtime = tower_of(requests("test_resnet")), Runtime("auto", folder, samples=MANY)
    FastestPass(tower, runtime)(batch_of(tower))
    (decision,), (graph,) = folder.rglob("*.json"), folder.rglob(GRAPH)
    known, made = json.loads(decision.read_text()), graph.stat().st_mtime_ns
    assert known["machine"]["threads"] == torch.get_num_threads()
    decision.write_text(json.dumps({**known, "runtime": "onnxruntime"}))
    again = FastestPass(tower, runtime)
    again(batch_of(tower))
    assert again.name == "onnxruntime"
    assert graph.stat().st_mtime_ns == made
    decision.write_text("{")  # what cannot be read is found anew
    FastestPass(tower, runtime)(batch_of(tower))
    assert json.loads(decision.read_text()).keys() == known.keys()


def test_a_cache_that_cannot_be_written_works_without_storing(requests: Callable, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "file").touch()
    tower = tower_of(requests("test_resnet"))
    chosen = FastestPass(tower, Runtime("onnxruntime", tmp_path / "file"))
    chosen(batch_of(tower))
    assert chosen.name == "onnxruntime"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_export_leaves_no_graph(requests: Callable, tmp_path: Path) -> None:
    request = requests("test_resnet")
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.encoders.test_runtime import *\n"
        "def half(path): path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = Store(tower_of(sys.argv[1]), Runtime('auto', Path(sys.argv[2])))\n"
        "with store.graph(half, False): pass"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, request, str(tmp_path)], cwd=root, timeout=120, env=os.environ)
    (folder,) = tmp_path.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    with Store(tower_of(request), Runtime("auto", tmp_path)).graph(lambda path: None, False) as (path, is_new):
        assert (path.name, is_new) == (GRAPH, True)
    assert [path.name for path in folder.iterdir()] == [GRAPH]


@pytest.fixture
def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(32, 4, batch_first=True).eval().requires_grad_(False)


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    return {"none": None, "boolean": causal, "additive": torch.zeros(7, 7).masked_fill(causal, float("-inf"))}


@pytest.mark.parametrize("name", masks())
def test_fused_attention_equals_torch(attention: nn.MultiheadAttention, name: str) -> None:
    x, mask = torch.randn(3, 7, 32), masks()[name]
    wanted, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    found, weights = FusedAttention(attention)(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert weights is None


def test_what_fused_attention_cannot_do_goes_to_torch(attention: nn.MultiheadAttention) -> None:
    x, y, padding = torch.randn(3, 7, 32), torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    fused = FusedAttention(attention)
    for arguments, options in (
        ((x, y, y), {"need_weights": False}),
        ((x, x, x), {"need_weights": True}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": padding}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.zeros(12, 7, 7)}),
    ):
        for ours, theirs in zip(fused(*arguments, **options), attention(*arguments, **options), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_only_plain_attention_is_replaced_and_only_once(attention: nn.MultiheadAttention) -> None:
    odd = nn.MultiheadAttention(32, 4, batch_first=True, kdim=16, vdim=16)
    late = nn.MultiheadAttention(32, 4, batch_first=False)
    model = nn.ModuleDict({"plain": attention, "odd": odd, "late": late})
    for _ in range(2):
        fuse_attention(model)
    assert isinstance(model["plain"], FusedAttention)
    assert model["plain"].attention is attention
    assert (model["odd"], model["late"]) == (odd, late)
