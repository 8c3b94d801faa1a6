"""Tiny real models with random weights, a small generated data set, fixed seeds. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.encoders import hashing
from mmfeat.encoders.registry import FAMILIES
from mmfeat.system.trust import keep_private
from tests.encoders.tiny_models import write_clip, write_kind, write_timm, write_torchvision

os.environ["HF_HUB_OFFLINE"] = "1"
keep_private()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for their threads
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch first
os.environ.setdefault("RAY_worker_niceness", "0")  # a test waits for Ray's workers while others keep the machine busy

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "a", "wonderful", "day", "so", "tired", "of", "this", "the", "bus"]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def _code_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers keeps its copies of code of checkpoints among the files of the tests."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Write without waiting until the disk has everything: the power stays on, but for the processes that
    tests/cache/faults.py starts."""
    connect = sqlite3.connect

    def unsynced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        with contextlib.suppress(sqlite3.Error):  # a damaged file is refused by whoever reads it
            connection.execute("pragma synchronous = off")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(sqlite3, "connect", unsynced)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_projection() -> None:
    """Load the built-in text encoder once for all tests: to draw its projection takes a fifth of a second."""
    loaded = cache(lambda specs: hashing.load("", list(specs)))
    FAMILIES["hashing"] = replace(FAMILIES["hashing"], load=lambda variant, specs: loaded(tuple(specs)))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated pairs, 12 of them unlabelled."""
    from mmfeat.samples.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("data") / "demo", pairs=120)


@pytest.fixture(scope="module")
def place(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo data and a cache of their vectors, in which a module may train."""
    from tests.sweep.small_sweeps import make_place

    return make_place(demo_folder, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def small_demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 generated pairs, for what is trained many times."""
    from mmfeat.samples.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("small") / "demo", pairs=60)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT and a word-piece tokenizer in transformers' own layout."""
    from mmfeat.encoders.torchvision_ops import import_torchvision

    import_torchvision()
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    letters = [prefix + chr(code) for code in range(97, 123) for prefix in ("", "##")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(WORDS + letters))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with a two-layer ViT and a two-layer text tower in open_clip's folder layout."""
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's own smallest ResNet in a local folder."""
    return write_timm(tmp_path_factory.mktemp("models") / "tiny-timm", "test_resnet")


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a ResNet-18 with random weights and seven classes, as a `.pth` file."""
    return write_torchvision(tmp_path_factory.mktemp("models") / "resnet18-random.pth", "resnet18")


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_clip: Path, resnet_file: Path
) -> Callable[[str], str]:
    """Kind -> request of a small model of that kind, made when first asked for."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {"bert": f"bert:{tiny_bert}", "clip": f"clip:{tiny_clip}", "resnet18": f"resnet18:{resnet_file}"}

    def request(kind: str) -> str:
        if kind not in made:
            made[kind] = write_kind(kind, folder / kind, tiny_bert)
        return made[kind]

    return request
