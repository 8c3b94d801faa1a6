"""Text models of other architectures: the vector of the library's own call, alone or in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders, load_reference, open_towers
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torch_tower import ByLength
from mmfeat.errors import EncoderError

TEXTS = ["What a wonderful day of this", "so tired", "@bob the bus", "a " * 60, "b c d e f g h", "so tired of this"]
PADDED = ("fnet", "funnel", "convbert", "canine")  # padding changes their vectors
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {**BODY, "max_position_embeddings": 130}
FNET = {name: value for name, value in SMALL.items() if "heads" not in name}
SHAPES: dict[str, dict[str, Any]] = {
    "fnet": FNET,
    "funnel": {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "num_decoder_layers": 1},
    "convbert": {**SMALL, "embedding_size": 16},
    "canine": {**SMALL, "num_hash_functions": 4, "num_hash_buckets": 200, "local_transformer_stride": 16},
    "modernbert": {**SMALL, "pad_token_id": 0, "local_attention": 8},
    "nomic_bert": SMALL,
    "qwen3": {**SMALL, "head_dim": 8, "num_key_value_heads": 1},
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
    "roberta": {**SMALL, "pad_token_id": 1},
    "deberta-v2": {**SMALL, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
}


@pytest.fixture(scope="module")
def write(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes a tiny model of an architecture beside the tokenizer of the tiny BERT, or its own."""
    transformers = quiet_transformers()
    words = len(transformers.AutoTokenizer.from_pretrained(tiny_bert))

    def made(kind: str, **shape: Any) -> Path:
        folder = tmp_path_factory.mktemp("models") / kind
        torch.manual_seed(9)
        size = {} if kind == "canine" else {"vocab_size": words}
        config = transformers.AutoConfig.for_model(kind, **size, **(shape or SHAPES[kind]))
        models = transformers.MODEL_MAPPING[type(config)]
        (models[0] if isinstance(models, tuple) else models)(config).save_pretrained(folder)
        if kind == "canine":
            transformers.CanineTokenizer().save_pretrained(folder)
        for file in tiny_bert.glob("token*") if kind != "canine" else ():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return made


def options(**changes: Any) -> EncoderOptions:
    return EncoderOptions(**{"dtype": "float32", "cleaning": "none", "max_length": 100, **changes})


CASES = [(kind, family) for kind in SHAPES for family in ("bert", "st")]
CASES.remove(("canine", "st"))  # its tokenizer takes seconds to load


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_any_batch_gives_the_vector_of_the_library_for_a_text_alone(kind: str, family: str, write: Any) -> None:
    towers = describe_encoders([f"{family}:{write(kind)}"], options(outputs=("pooled", "tokens")))
    (opened,) = open_towers(towers[0], [tower.spec for tower in towers])
    assert isinstance(opened.network.forward, ByLength) is (kind in PADDED)
    encoder = opened.encoder("cpu")
    pooled, tokens = encoder.embed([encoder.prepare(text) for text in TEXTS])
    for tower, values in zip(towers, (pooled, tokens), strict=True):
        reference = load_reference(tower)
        for text, value in zip(TEXTS, values, strict=True):
            np.testing.assert_allclose(value, reference(text), atol=1e-5)


def test_the_tower_that_is_fine_tuned_gives_the_same_and_learns(write: Any) -> None:
    """Fine-tuning runs the forward pass over its own batches."""
    (tower,) = describe_encoders([f"bert:{write('fnet')}"], options())
    opened, reference = open_towers(tower)[0], load_reference(tower)
    opened.module.requires_grad_(True)
    vectors = opened.network.forward(opened.collate([opened.prepare(text) for text in TEXTS]))
    np.testing.assert_allclose(vectors.detach().numpy(), np.stack([reference(text) for text in TEXTS]), atol=1e-5)
    vectors.sum().backward()
    assert torch.isfinite(opened.module.get_input_embeddings().weight.grad).all()


def test_a_text_of_too_few_tokens_is_refused_alone(write: Any) -> None:
    (encoder,) = load_encoders(describe_encoders([f"bert:{write('funnel')}"], options()), "cpu")
    with pytest.raises(ValueError, match="the model takes 3 tokens or more"):
        encoder.prepare("")


@pytest.mark.parametrize(
    ("kind", "shape", "asked", "message"),
    [
        ("fnet", FNET, {"outputs": ("prefix:1",)}, "no list of layers is known for this model; use tokens, pooled"),
        (
            "reformer",
            {
                "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "feed_forward_size": 24,
                "axial_pos_embds": False, "max_position_embeddings": 128, "attn_layers": ["lsh"],
                "lsh_attn_chunk_length": 16, "is_decoder": False,
            },
            {},
            "the model gives another vector of a text at each call; use another checkpoint",
        ),
        (
            "nystromformer",
            {**SMALL, "segment_means_seq_len": 64, "num_landmarks": 8},
            {},
            "NystromformerModel cannot encode a text .*; use another checkpoint",
        ),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_gets_one_line(
    kind: str, shape: dict[str, Any], asked: dict[str, Any], message: str, write: Any
) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoders(describe_encoders([f"bert:{write(kind, **shape)}"], options(**asked)), "cpu")
    assert "\n" not in str(caught.value)
