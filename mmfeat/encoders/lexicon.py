"""Text encoder of 16 numbers: sentiment by the lexicon and rules of VADER (Hutto and Gilbert, ICWSM 2014), and marks.

The first numbers are what `SentimentIntensityAnalyzer.polarity_scores` of vaderSentiment gives; others are of the words
that its lexicon holds, and counts that cleaning takes away. The lexicon is English, so the sentiment is, too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.encoders.weights import path_identity
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import JUDGED
from mmfeat.version import install_command

COLUMNS = (  # sums and counts as log(1 + x)
    *("compound", "positive", "neutral", "negative"),  # VADER's scores
    *("sum of positive words", "sum of negative words", "most positive word", "most negative word"),
    *("!", "?", "hashtags", "mentions", "links", "words in capitals", "words", "retweet"),
)
VERSION = 1  # to be raised with a change of the columns
READ = 10_000  # first characters of a text that are read: VADER's time grows with the square of the words
FILES = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")
ENGLISH = frozenset(("the", "and", "you", "with", "this", "that", "your", "from", "have", "what"))
FOREIGN = 0.25  # texts are not taken for English below this share of texts with one of these words

_LINK = re.compile(r"https?://\S+|www\.\S+")
_WORD = re.compile(r"[^\W\d_]+")
_MARKS = (re.compile("!"), re.compile(r"\?"), re.compile(r"(?<!\w)#\w"), re.compile(r"(?<!\w)@\w"), _LINK)
_RETWEET = re.compile(r"\bRT\b")


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one text tower, whose identity is that of the installed lexicon and rules."""
    if variant:
        raise EncoderError(f"{family}:{variant}: this encoder has no variants; name it {family}")
    found: Any = importlib.util.find_spec("vaderSentiment")
    files = [Path(found.submodule_search_locations[0], name) for name in FILES] if found else []
    if not files or not all(map(Path.is_file, files)):
        raise EncoderError(f"{family} needs vaderSentiment; {install_command('lexicon')}")
    identities = " ".join([str(VERSION), *map(path_identity, files)])
    weights = f"sha256:{hashlib.sha256(identities.encode()).hexdigest()}"
    return [EncoderSpec("lexicon", "text", "", weights, arithmetic="float32", storage="float32")]


def load(variant: str, specs: list[EncoderSpec]) -> Encoder:
    """The encoder, whose whole work is in `prepare`, which readers run beside other encoders."""
    return Encoder(tuple(specs), describe_text, lambda batch: lambda: [np.stack(batch)], early=True)


def describe_text(text: str) -> np.ndarray:
    """(16,) float32 of one text as it was written: its `COLUMNS`."""
    text, analyzer = text[:READ], _analyzer()
    scores = analyzer.polarity_scores(text)
    words = _WORD.findall(_LINK.sub(" ", text))
    values = [analyzer.lexicon.get(word.lower(), 0.0) for word in words]
    positive, negative = np.maximum(values, 0), np.minimum(values, 0)
    counts = [len(mark.findall(text)) for mark in _MARKS]
    counts += [sum(len(word) > 1 and word.isupper() for word in words), len(words)]
    return np.array(
        [
            *(scores[name] for name in ("compound", "pos", "neu", "neg")),
            *(np.log1p(positive.sum()), -np.log1p(-negative.sum()), positive.max(initial=0), negative.min(initial=0)),
            *np.log1p(counts),
            _RETWEET.search(text) is not None,
        ],
        dtype=np.float32,
    )


def notes_on_texts(texts: Iterable[str]) -> list[str]:
    """A line where few of the first `JUDGED` texts are English; none without texts."""
    english = [not ENGLISH.isdisjoint(_WORD.findall(text.lower())) for text in islice(texts, JUDGED)]
    share = sum(english) / len(english) if english else 1.0
    if share >= FOREIGN:
        return []
    return [f"lexicon knows English sentiment only; {share:.0%} of texts have one of ten common English words"]


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
