"""Tiny real models with random weights, a small generated data set, fixed seeds. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "a", "wonderful", "day", "so", "tired", "of", "this", "the", "bus"]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 generated pairs, 12 of them unlabelled."""
    from mmfeat.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("data") / "demo", pairs=120)


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
    """A CLIP with a one-layer ViT and a one-layer text tower in open_clip's folder layout."""
    from mmfeat.encoders.torchvision_ops import import_torchvision

    import_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(2)
    model = open_clip.CLIP(**config)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    return folder


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's own smallest ResNet in a local folder."""
    from mmfeat.encoders.torchvision_ops import import_torchvision

    import_torchvision()
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-timm"
    folder.mkdir()
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=5)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.9, "num_classes": 5}
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": {**pretrained, "classifier": "fc"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of a ResNet-18 with random weights and seven classes, as a `.pth` file."""
    from mmfeat.encoders.torchvision_ops import import_torchvision

    import_torchvision()
    import torch
    import torchvision

    path = tmp_path_factory.mktemp("models") / "resnet18-random.pth"
    torch.manual_seed(4)
    torch.save(torchvision.models.resnet18(weights=None, num_classes=7).state_dict(), path)
    return path
