"""Texts: oddities of each text, and the profile of all texts: lengths, scripts, marks, languages."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.registry import count_cut, describe_encoders
from mmfeat.errors import CacheMissError, MmfeatError
from mmfeat.extraction.requests import latest_request
from mmfeat.samples.contents import clean_tweet
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import without_retweet

MISSING, EMPTY, EMPTIED, LONG = "missing", "empty", "emptied", "very long"
GARBLED, LOST, CONTROL = "garbled", "lost characters", "control characters"

NO_TEXT = ("no text", "no text file")  # reasons that `read_samples` gives for a missing text
LONGEST = 2000  # characters: four times the 512 tokens of usual text encoders
FAR = 10  # multiple of the median length
LANGUAGE_TEXTS = 20_000  # most texts whose language is detected, drawn at random
LANGUAGE_LETTERS = 20  # bytes of the shortest cleaned text whose language is detected
LANGUAGE_CONFIDENCE = 0.7
QUANTILES = {"min": 0, "q05": 5, "median": 50, "q95": 95, "max": 100}

_ELLIPSIS = " :\"'.…-|"
# Texts that were read in a wrong encoding and saved again: UTF-8 as cp1252 or GBK (the two bytes of an accent, an
# apostrophe, a byte-order mark), and Western letters as GBK, which makes an ideograph of a letter and its neighbour.
_GARBLED = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac[\u0098-\u00bf\u2122\u0153\u009d\u201c\u201d]|锟斤拷|鈥|\u00ef\u00bb\u00bf"
    "|(?<=[a-z])[\u3400-\u9fff](?=[a-z])"
)
# a?o for año, and ?? as a whole word or hashtag, for emoji and scripts; ??? at the end of a sentence is no match.
_LOST = re.compile("\ufffd|(?<=[^\\W\\d_A-Z])\\?(?=[^\\W\\d_A-Z])|(?:^|(?<=[\\s#]))\\?{2,}")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_URL = re.compile(r"https?:?\S*")
MARKS = {
    "link": re.compile(r"https?://\S"),
    "mention": re.compile(r"@\w"),
    "hashtag": re.compile(r"#\w"),
    "retweet": re.compile(r"\bRT @"),
    "emoji": re.compile("[\u2600-\u27bf\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff]"),
}
NO_LANGUAGES = "languages left out: py3langid is not installed ({install}); scripts are listed instead"


def is_bare(text: str | None) -> bool:
    """Whether a text is only links, mentions and the mark of a retweet; `:)` counts as text."""
    return not without_retweet(clean_tweet(text or "")).strip(_ELLIPSIS)


def are_absent(samples: Sequence[Sample]) -> bool:
    """Whether the data have no texts at all, as opposed to empty texts."""
    return all(sample.text is None and sample.text_error in NO_TEXT for sample in samples)


def text_findings(samples: Sequence[Sample]) -> list[tuple[tuple[str, str], ...]]:
    """Oddities of each text. Where the data have no texts at all, no text counts as missing."""
    if are_absent(samples):
        return [()] * len(samples)
    lengths = [len(sample.text) for sample in samples if sample.text]
    most = max(LONGEST, FAR * float(np.median(lengths or [0])))
    return [tuple(_oddities(sample, most)) for sample in samples]


def _oddities(sample: Sample, most: float) -> list[tuple[str, str]]:
    if sample.text is None:
        return [(EMPTY if sample.text_error == "empty text" else MISSING, sample.text_error)]
    text = sample.text
    bare = _URL.sub(" ", text)
    checks = [
        (is_bare(text), EMPTIED, f"only links and mentions: {text.strip()[:80]}"),
        (len(text) > most, LONG, f"{len(text):,} characters"),
        *((match, what, _around(match)) for what, patterns in _patterns().items() if (match := _first(patterns, bare))),
    ]
    return [(what, detail) for is_odd, what, detail in checks if is_odd]


@functools.cache
def _patterns() -> dict[str, tuple[re.Pattern[str], ...]]:
    """What each oddity looks like; garbled texts by ftfy's rules too, which know all encodings of one byte."""
    from ftfy.badness import BADNESS_RE

    return {GARBLED: (_GARBLED, BADNESS_RE), LOST: (_LOST,), CONTROL: (_CONTROL,)}


def _first(patterns: Sequence[re.Pattern[str]], text: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := pattern.search(text))), None)


def _around(match: re.Match[str]) -> str:
    """A match with 20 characters on either side, as one printable line."""
    shown = match.string[max(match.start() - 20, 0) : match.end() + 20]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def text_profile(texts: Sequence[str]) -> dict[str, Any]:
    """Quantiles of lengths, the share of texts with each mark, and the share of texts by main script."""
    if not texts:
        return {"texts": 0}
    lengths = {"characters": [len(text) for text in texts], "words": [len(text.split()) for text in texts]}
    scripts = Counter(main_script(text) for text in texts)
    return {
        "texts": len(texts),
        **{unit: quantiles(values) for unit, values in lengths.items()},
        "marks": {name: sum(bool(mark.search(text)) for text in texts) / len(texts) for name, mark in MARKS.items()},
        "scripts": {name: count / len(texts) for name, count in scripts.most_common()},
    }


def quantiles(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    return dict(zip(QUANTILES, np.percentile(values, list(QUANTILES.values())).tolist(), strict=True))


class _Scripts(dict[str, str]):
    """Character -> script, the first word of the Unicode name; "" for a character that is no letter."""

    def __missing__(self, char: str) -> str:
        name = unicodedata.name(char, "") if char.isalpha() else ""
        self[char] = name.split(" ")[0].split("-")[0].lower() if name else ""
        return self[char]


_SCRIPTS = _Scripts()


def main_script(text: str) -> str:
    """The script of most letters (`latin`, `cjk`, ...) without links and mentions; `none` without letters."""
    cleaned = clean_tweet(text)
    if cleaned.isascii():
        return "latin" if any(map(str.isalpha, cleaned)) else "none"
    counts = Counter(filter(None, map(_SCRIPTS.__getitem__, cleaned)))
    return counts.most_common(1)[0][0] if counts else "none"


def language_classifier() -> Callable[[str], tuple[str, float]] | None:
    """Text -> (ISO 639-1 code, probability) by py3langid, which needs no download; None without it."""
    try:
        import py3langid.langid  # noqa: F401
    except ImportError:
        return None
    return _load_classifier()


@functools.cache
def _load_classifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return functools.lru_cache(2 * LANGUAGE_TEXTS)(classify)  # twice, since labelled texts are profiled again


def text_languages(texts: Sequence[str], seed: int = 42) -> dict[str, float] | None:
    """Language -> share of texts; `unsure` for short texts and for a confidence below 0.7; None without py3langid."""
    classify = language_classifier()
    if classify is None or not texts:
        return None
    if len(texts) > LANGUAGE_TEXTS:
        texts = [texts[row] for row in np.random.default_rng(seed).choice(len(texts), LANGUAGE_TEXTS, replace=False)]
    counts = Counter(_language(clean_tweet(text), classify) for text in texts)
    return {name: count / len(texts) for name, count in counts.most_common()}


def _language(cleaned: str, classify: Callable[[str], tuple[str, float]]) -> str:
    if len(cleaned.encode()) < LANGUAGE_LETTERS:  # bytes: a Chinese character says as much as three letters
        return "unsure"
    code, probability = classify(cleaned)
    return code if probability >= LANGUAGE_CONFIDENCE else "unsure"


def cut_texts(cache: str | Path, data: str | Path, texts: Sequence[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Encoder -> how many `texts` are longer than it reads, and its limit in tokens, by its own tokenizer.

    The encoders are those of the latest extraction of the data. Beside them notes about those that cannot be opened.
    """
    try:
        request = latest_request(cache, data)
        any_dtype = replace(request.options, dtype="float32", convolutional_dtype="")  # it cuts no text
        towers = describe_encoders(list(request.encoders), any_dtype)
    except CacheMissError:
        return {}, []
    except MmfeatError as error:
        return {}, [f"texts not counted against the length that encoders read: {error}"]
    found, notes = {}, []
    for tower in {tower.spec.name: tower for tower in towers if tower.spec.modality == "text"}.values():
        try:
            count, limit = count_cut(tower, texts)
        except MmfeatError as error:
            notes.append(f"texts not counted against the length that {tower.spec.name} reads: {error}")
            continue
        if count:
            found[tower.spec.name] = {"texts": count, "limit": limit}
    return found, notes
