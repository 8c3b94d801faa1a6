"""The three default encoders in their real architectures with random weights, as local files.

    python benchmarks/random_weights.py weights
    mmfeat extract --data demo \\
        --encoders clip:weights/clip-vit-b-32,bert:weights/bert-base,resnet50:weights/resnet50.pth

Their vectors mean nothing; what runs is the real code at its real size, without a model hub.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

from mmfeat.encoders.torchvision_ops import import_torchvision


def write_clip(folder: Path, name: str = "ViT-B-32", small: bool = False) -> None:
    """One of open_clip's models in its own folder layout; a `small` one has two layers of 64."""
    import_torchvision()
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = open_clip.get_model_config(name)
    if small:
        config["vision_cfg"] |= {"layers": 2, "width": 64}
        config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
    state = open_clip.CLIP(**config).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def write_bert(folder: Path, small: bool = False) -> None:
    """transformers' BertModel in its base size or with two layers of 64, and a tokenizer of single characters."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [prefix + character for character in string.printable.strip() for prefix in ("", "##")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(special + pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.BertConfig(vocab_size=len(vocabulary), **(sizes if small else {}))
    transformers.BertModel(config).save_pretrained(folder)


def write_resnet(path: Path, name: str = "resnet50") -> None:
    """One of torchvision's models as a plain state dict."""
    import_torchvision()
    import torch
    import torchvision

    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), path)


def main(folder: Path, small: bool = False) -> None:
    import torch

    torch.manual_seed(0)
    write_clip(folder / "clip-vit-b-32", small=small)
    write_bert(folder / "bert-base", small)
    write_resnet(folder / "resnet50.pth")
    print(f"random CLIP ViT-B/32, BERT-base and ResNet-50 in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
