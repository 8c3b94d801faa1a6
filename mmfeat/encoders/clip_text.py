"""CLIP's text towers: which tokens can reach a vector, and passes over no more than these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmfeat.encoders.layers import Network, Point, find_layers
from mmfeat.encoders.torch_tower import stack

if TYPE_CHECKING:
    from torch import Tensor


def text_network(model: Any) -> Network:
    """A transformer of open_clip's or, inside it, one of transformers'."""
    tower = text_tower(model)
    if hasattr(tower, "config"):
        return Network(model.encode_text, find_layers(tower.transformer), Point(tower.transformer))
    # With an appended class token (CoCa) the norm comes after pooling and never sees the tokens.
    tokens = tower.ln_final if getattr(tower, "cls_emb", None) is None else tower.transformer
    return Network(model.encode_text, find_layers(tower), Point(tokens))


def text_tower(model: Any) -> Any:
    return getattr(model, "text", model)  # open_clip's plain CLIP is its own text tower


def kept_tokens(tower: Any, ids: Tensor) -> Tensor | None:
    """(B, T) of the tokens that can reach the vector, None for all.

    In a causal tower that pools at its end token, what follows that token cannot.
    """
    import torch

    if hasattr(tower, "config"):
        return ids != tower.config.pad_token_id
    own = "text_" if hasattr(tower, "text_pool_type") else ""
    pool_type = getattr(tower, f"{own}pool_type")
    if tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None or pool_type not in ("argmax", "eos"):
        return None
    found = ids if pool_type == "argmax" else ids.eq(getattr(tower, f"{own}eos_id")).int()
    ends = found.argmax(-1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device) <= ends


def text_length(tower: Any, ids: Tensor) -> int:
    """How many of the (T) tokens of one text can reach its vector."""
    kept = kept_tokens(tower, ids[None])
    return len(ids) if kept is None else int(kept.sum())


def trimmed(tower: Any, batch: list[Tensor]) -> Tensor:
    """(B, T) token ids as far as the longest text goes, where what follows cannot reach a vector."""
    ids = stack(batch)
    if hasattr(tower, "config"):  # a tower of transformers', which may count on its full width
        return ids
    return ids[:, : max(text_length(tower, one) for one in batch)]


def stand_in(tower: Any, mask: Tensor) -> Tensor:
    """(B, T) token ids that nobody looks at but for where the text ends, or where it is padded."""
    import torch

    if hasattr(tower, "config"):
        pad = tower.config.pad_token_id
        return torch.where(mask, pad + 1, pad)
    own = "text_" if hasattr(tower, "text_pool_type") else ""
    end = getattr(tower, f"{own}eos_id", None) or 1
    return torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)


def short_texts(model: Any) -> Callable[[Tensor], Tensor]:
    """open_clip's own `encode_text`, which takes 77 columns, for texts whose padding was cut off.

    Positions and causal mask are cut alike; what is gone could not have reached the vector.
    """
    import torch

    tower = text_tower(model)
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text
    whole, place = torch.nn.Module(), "model." if tower is model else "model.text."
    whole.model, whole.forward = model, model.encode_text

    def forward(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length == len(tower.attn_mask):
            return model.encode_text(ids)
        cut = {
            f"{place}positional_embedding": tower.positional_embedding[:length],
            f"{place}attn_mask": tower.attn_mask[:length, :length],
        }
        return torch.func.functional_call(whole, cut, (ids,))

    return forward
