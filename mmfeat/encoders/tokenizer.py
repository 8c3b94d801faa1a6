"""Tokenizers of checkpoints of transformers and sentence-transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.weights import checkpoint_json, checkpoint_modules, has_file, one_line
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING

PROBE = "Capital"
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# Shares of the embeddings that a tokenizer reaches: below the first it is of another model, whatever else agrees; from
# the second on the rest is padding. Between them the numbers of the special tokens decide.
FOREIGN, PADDED = 0.5, 0.9


def is_cased(variant: str) -> bool:
    """Whether capitals of a text reach the model of a hub name or local folder, by its tokenizer files alone.

    A checkpoint that leaves this open counts as cased: to keep capitals changes nothing where the tokenizer drops them.
    """
    folder = text_folder(variant)
    if _setting(variant, f"{folder}sentence_bert_config.json"):
        return False
    if _setting(variant, f"{folder}tokenizer_config.json") is False:
        return True
    if tokenizer := checkpoint_json(variant, f"{folder}tokenizer.json"):
        return not isinstance(tokenizer, dict) or not _lowers(tokenizer.get("normalizer"))
    # The vocabulary of BERT alone: its tokenizer drops capitals by default. Those with codes of their own keep them.
    return not has_file(variant, f"{folder}vocab.txt") or has_file(variant, f"{folder}bpe.codes")


def text_folder(variant: str) -> str:
    """The folder inside a checkpoint that holds its tokenizer, "" or a name and a slash."""
    modules = checkpoint_modules(variant)
    return f"{modules[0]['path']}/" if modules and modules[0]["path"] else ""


@contextlib.contextmanager
def tokenizer_errors(asked: str, variant: str, folder: str = "") -> Iterator[None]:
    """Raise a one-line `EncoderError` where a tokenizer cannot be loaded since its files are missing or damaged."""
    try:
        yield
    except Exception as error:  # each kind of tokenizer has errors of its own
        if "tokenizer" in str(error).lower():
            check_files(asked, variant, FILES, folder)
        _check_readable(asked, checkpoint_json(variant, f"{folder}tokenizer.json"))
        raise


def _check_readable(asked: str, content: Any) -> None:
    """Raise `EncoderError` for the content of a `tokenizer.json`, or None, that the library tokenizers cannot read."""
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(content)) if content is not None else None
    except Exception as error:  # the library raises plain exceptions
        raise EncoderError(
            f"{asked}: tokenizer.json cannot be read ({one_line(error)}); copy it from the model's source"
        ) from error


def check_files(
    asked: str, variant: str, names: Iterable[str], folder: str = "", source: str = "the model's source"
) -> None:
    """Raise `EncoderError` where a tokenizer lacks all of its files: transformers makes one of a few tokens then."""
    names = sorted(set(names))
    if names and not any(has_file(variant, f"{folder}{name}") for name in names):
        raise EncoderError(f"{asked}: no tokenizer files here ({', '.join(names)}); copy them from {source}")


def check_fit(asked: str, tokenizer: Any, model: Any) -> Callable[[str], None]:
    """Raise `EncoderError` where a tokenizer and the embeddings of a model of transformers belong to two models.

    Returns a check of a text, which raises `ValueError` for one that names an added token without an embedding, as
    Gemma's `<image_soft_token>` is.
    """
    rows = _embeddings(model)
    if not rows:
        return lambda text: None
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    special = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    used = {number for token, number in vocabulary.items() if token not in added}
    used.update(number for number in special.values() if number is not None)
    share = sum(number < rows for number in vocabulary.values()) / rows
    if max(used) >= rows or share < FOREIGN or (share < PADDED and not _agree(special, getattr(model, "config", None))):
        raise EncoderError(
            f"{asked}: the tokenizer has {len(vocabulary)} tokens, the model {rows} embeddings, so one of them is of "
            "another model; copy the tokenizer files from the model's source"
        )
    lacking = [token for token, number in vocabulary.items() if number >= rows]

    def check(text: str) -> None:
        if named := next((token for token in lacking if token in text), None):
            raise ValueError(f"the model has no embedding of {named}")

    return check


class Tokens(dict[str, Any]):
    """The inputs of one text by name; `cut` is the number of tokens that were kept of a longer text, else 0."""

    cut = 0


def preparing(asked: str, tokenizer: Any, model: Any, spec: EncoderSpec, **options: Any) -> Callable[[str], Tokens]:
    """The `prepare` of a tower whose tokenizer is one of transformers, called with some `options`."""
    clean, check, cuts = CLEANING[spec.cleaning], check_fit(asked, tokenizer, model), watch_cuts(tokenizer)

    def prepare(text: str) -> Tokens:
        text = clean(text)
        check(text)
        tokens = Tokens(tokenizer(text, truncation=True, max_length=spec.max_length, **options))
        tokens.cut = cuts.pop() if cuts else 0
        return tokens

    return prepare


class Text(str):
    """A text that its library tokenizes batch by batch; `cut` as in `Tokens`, known once the text was in a batch.

    `length` is its number of tokens, uncut.
    """

    cut = 0
    length = 0


def watch_cuts(tokenizer: Any) -> list[int]:
    """A list that holds `Tokens.cut` of each text in the latest call of a tokenizer, so that no text is counted twice.

    The tokenizer is one of transformers, one of open_clip around it, or open_clip's own; of any other the list stays
    empty.
    """
    cuts: list[int] = []
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(inner, "_encode_plus"):
        inner._encode_plus = _watched(inner, cuts)
    elif hasattr(inner, "encode") and hasattr(inner, "context_length"):
        encode, length = inner.encode, inner.context_length

        def counted(text: str) -> list[int]:
            tokens = list[int](encode(text))
            cuts[:] = [length if len(tokens) + 2 > length else 0]  # the tokens of start and end
            return tokens

        inner.encode = counted
    return cuts


def cuts_of(tokenizer: Any, call: Callable[[str], Any], spec: EncoderSpec) -> Callable[[str], int]:
    """`Tokens.cut` of a text, by a call of a tokenizer as an encoder makes it for the cleaned text."""
    cuts, clean = watch_cuts(tokenizer), CLEANING[spec.cleaning]

    def cut(text: str) -> int:
        call(clean(text))
        return cuts.pop() if cuts else 0

    return cut


def _watched(tokenizer: Any, cuts: list[int]) -> Callable[..., Any]:
    """The method behind each call of a tokenizer of transformers, which from now on fills `cuts`."""
    encode = tokenizer._encode_plus

    def watched(text: Any, **options: Any) -> Any:
        if tokenizer.is_fast:
            encoded = encode(text=text, **options)
            cuts[:] = [len(one.ids) if one.overflowing else 0 for one in encoded.encodings or ()]
            return encoded
        if not isinstance(text, str):  # a tokenizer in Python then calls this method for each text
            cuts.clear()
            return encode(text=text, **options)
        encoded = encode(text=text, **{**options, "return_overflowing_tokens": True})
        cuts.append(len(encoded["input_ids"]) if encoded.pop("overflowing_tokens", None) else 0)
        encoded.pop("num_truncated_tokens", None)
        return encoded

    return watched


def _embeddings(model: Any) -> int:
    """The number of tokens that a model has an embedding of; 0 where characters or pieces of text have none."""
    try:
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embedding
        return len(table.weight)
    except (NotImplementedError, AttributeError, TypeError):
        return 0


def _agree(special: dict[str, int | None], config: Any) -> bool:
    """Whether a tokenizer and a configuration give the same numbers to the special tokens that both of them name."""
    asked = {name: getattr(config, name, None) for name in special}
    pairs = ((number, asked[name]) for name, number in special.items())
    return all(ours is None or not isinstance(theirs, int) or ours == theirs for ours, theirs in pairs)


def _setting(variant: str, file: str) -> Any:
    settings = checkpoint_json(variant, file)
    return settings.get("do_lower_case") if isinstance(settings, dict) else None


def _lowers(normalizer: Any) -> bool:
    """Whether the normalizer of a `tokenizer.json` makes capitals small; False for one that cannot be read."""
    import tokenizers

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        alone = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": normalizer, "model": empty}))
    except Exception:  # the library raises plain exceptions, and loading the tokenizer will say more
        return False
    return alone.normalizer is not None and alone.normalizer.normalize_str(PROBE).islower()
