"""Built-in text encoders: hashed n-grams, randomly projected. They need no download and learn nothing from texts.

Version 2, `hashing`, counts words, the 3- to 5-grams of characters in each word, and, in stretches of scripts without
spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese), 1- to 3-grams of characters. Counts are scaled logarithmically,
and each n-gram is added with a random sign to four of DIMENSIONS columns (Li, Hastie and Church, KDD 2006), so that a
column mixes many n-grams and may be standardised. The hash is this file's own: no library can change a vector.

Version 1, `hashing:1`, is what earlier versions of mmfeat wrote: scikit-learn's hashes of word 1-2-grams and of
character 2-5-grams in 2**16 columns each, projected to 512 dimensions.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec, Values
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING

WORD, SPACELESS = 1, 2  # kinds of characters
DIMENSIONS = 4096
COPIES = 4  # columns of an n-gram; 16 bits of its hash choose each column and sign
LIGHT = 0.25  # weight of three to five characters, which come along with many others; words and fewer weigh 1
PIECE = 1 << 20  # characters that are encoded at a time
BUILT_IN = "builtin:"

# First and last characters of the scripts without spaces, and of the punctuation and the full-width forms among them.
SPACELESS_BLOCKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x30FF),  # radicals, punctuation, kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),
    (0xFF00, 0xFF9F),
    (0x20000, 0x3FFFF),
)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))

Spans: TypeAlias = "tuple[np.ndarray, np.ndarray, bool]"  # starts, ends, and whether their weight is LIGHT


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one text tower; its arithmetic is always float32. The variant is a version, else the latest."""
    if variant not in ("", *VERSIONS):
        raise EncoderError(
            f"{family}:{variant}: no such version; name it {family}, or {family}:1 for the vectors of earlier caches"
        )
    return [
        EncoderSpec(
            family="hashing",
            modality="text",
            variant="",
            weights=BUILT_IN + (variant or max(VERSIONS)),
            cleaning=options.cleaning,
            arithmetic="float32",
            storage="float32",
        )
    ]


def load(variant: str, specs: list[EncoderSpec]) -> Encoder:
    """The encoder of the version in the specs."""
    version = specs[0].weights.removeprefix(BUILT_IN)
    if version not in VERSIONS:
        raise EncoderError(f"hashing: {specs[0].weights} is of a later version of mmfeat; update mmfeat")
    embed = VERSIONS[version]()
    return Encoder(tuple(specs), CLEANING[specs[0].cleaning], lambda texts: lambda: [embed(texts)])


def _version_1() -> Callable[[list[str]], Values]:
    """Two vectorisers and a seeded projection of scikit-learn."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.random_projection import SparseRandomProjection

    hashed = 2**16
    columns = [
        HashingVectorizer(n_features=hashed, ngram_range=(1, 2), norm=None, token_pattern=r"(?u)\b\w+\b"),
        HashingVectorizer(n_features=hashed, analyzer="char_wb", ngram_range=(2, 5), norm=None),
    ]
    projection = SparseRandomProjection(512, random_state=0)
    projection.fit(sparse.csr_matrix((1, 2 * hashed), dtype=np.float32))

    def embed(texts: list[str]) -> np.ndarray:
        counts = sparse.hstack([vectorizer.transform(texts) for vectorizer in columns], format="csr")
        counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
        return _unit(np.asarray(projection.transform(counts).todense(), dtype=np.float32))

    return embed


def _version_2() -> Callable[[list[str]], Values]:
    return lambda texts: np.concatenate([_embed(piece) for piece in _pieces(texts)])


VERSIONS = {"1": _version_1, "2": _version_2}


def _pieces(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of about PIECE characters; every text is whole."""
    numbers = [before // PIECE for before in accumulate((len(text) + 1 for text in texts), initial=0)][: len(texts)]
    for number in dict.fromkeys(numbers):
        yield [text for text, own in zip(texts, numbers, strict=True) if own == number]


def _embed(texts: list[str]) -> np.ndarray:
    """(B, DIMENSIONS) float32 vectors of length 1, or 0 for a text without words and n-grams."""
    spaced = [f" {' '.join(text.lower().split())} " for text in texts]
    rows = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(text) for text in spaced])
    codes = np.frombuffer("".join(spaced).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    keys = np.sort(_keys(codes, rows))
    starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    return _unit(_projected(keys[starts], np.diff(starts, append=len(keys)), len(texts)))


@functools.cache
def _kinds() -> np.ndarray:
    """(0x110000,) int8 kind of each character: SPACELESS, WORD (letters, digits and underscores), or 0."""
    kinds = np.zeros(sys.maxunicode + 1, dtype=np.int8)
    for word in re.finditer(r"\w+", "".join(map(chr, range(len(kinds))))):
        kinds[slice(*word.span())] = WORD
    for first, last in SPACELESS_BLOCKS:
        kinds[first : last + 1] = SPACELESS
    return kinds


def _words(kinds: np.ndarray) -> Spans:
    """Words: letters, digits and underscores in a row, outside the scripts without spaces."""
    edges = np.flatnonzero(np.diff(kinds == WORD))  # the text begins and ends with a space
    return edges[::2] + 1, edges[1::2] + 1, False


def _grams(codes: np.ndarray, kinds: np.ndarray) -> Iterator[Spans]:
    """N-grams of characters, of which only the first and the last may be the space beside a word."""
    space = codes == ord(" ")
    before = np.concatenate([[0], np.cumsum(space)])  # spaces before each position
    stretch = before[1:]  # each space begins a stretch, which is a word and whatever it is written together with
    spaceless = np.bincount(stretch, weights=kinds == SPACELESS)[stretch] > 0
    for lengths, places in (((1, 2, 3), spaceless), ((3, 4, 5), ~spaceless)):
        for length in lengths if places.any() else ():
            last = max(len(codes) - length + 1, 0)
            inner = space if length == 1 else before[length - 1 : -1] > before[1 : last + 1]
            chosen = np.flatnonzero(places[:last] & ~inner)
            yield chosen, chosen + length, length > 2


def _mixed(values: np.ndarray) -> np.ndarray:
    """The bits of (n,) uint64, each changed by all others (the last steps of SplitMix64, Steele and others 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _segment_hashes(codes: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function (starts, ends) -> uint64 hashes of these parts of the text: polynomials of its characters.

    A prefix sum holds all of them, modulo 2**64 (Karp and Rabin 1987), so that a hash costs one subtraction.
    """
    values = _mixed(codes.astype(np.uint64) + np.uint64(1))
    powers = np.cumprod(np.full(len(codes), _BASE))
    shifts = np.cumprod(np.full(len(codes), _INVERSE))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    return lambda starts, ends: (sums[ends] - sums[starts]) * shifts[starts]


def _keys(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) uint64, a key for each word and n-gram: 20 bits of the row, 43 bits of the hash and one bit that marks a
    light n-gram."""
    kinds = _kinds()[codes]
    spans = [_words(kinds), *_grams(codes, kinds)]
    starts, ends = (np.concatenate(part) for part in list(zip(*spans, strict=True))[:2])
    light = np.repeat(np.array([marked for *_, marked in spans], np.uint64), [len(first) for first, *_ in spans])
    mixed = _mixed(_segment_hashes(codes)(starts, ends) + light) >> np.uint64(21)
    return (rows[starts] << np.uint64(44)) | (mixed << np.uint64(1)) | light


def _projected(keys: np.ndarray, counts: np.ndarray, texts: int) -> np.ndarray:
    """(B, DIMENSIONS) float32: the weight of each n-gram with its signs in its columns."""
    weights = (np.log1p(counts) * np.where(keys & np.uint64(1), LIGHT, 1.0)).astype(np.float32)
    first = (keys >> np.uint64(44)).astype(np.int64) * DIMENSIONS
    bits = _mixed(keys & np.uint64((1 << 44) - 1))
    own = (bits >> np.arange(0, 16 * COPIES, 16, dtype=np.uint64)[:, None]).astype(np.uint16)
    sums = np.zeros(texts * DIMENSIONS, np.float32)
    columns = (first + (own & (DIMENSIONS - 1))).ravel()  # add.at has a fast path for arrays of one axis
    np.add.at(sums, columns, np.where(own >> 15, weights, -weights).ravel())
    return sums.reshape(texts, DIMENSIONS)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale the float32 rows to the length 1, in place; a row of zeros stays."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    vectors /= np.maximum(lengths, 1e-12)[:, None]
    return vectors
