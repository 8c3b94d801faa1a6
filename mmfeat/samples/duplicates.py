"""Duplicates: samples whose text or photo is equal or nearly equal to that of another sample.

Duplicates must stand on one side of every split: a head that has seen one sample knows the label of its duplicate.
Each rule gives links between two samples; samples that are linked, also through others, are one group. Alike photos
link two samples. Alike texts do where the photos agree, too, or where the text is one that two people would hardly
write without knowing of each other: less so where the photos beside it differ.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mmfeat.samples.contents import clean_tweet
from mmfeat.samples.dataset import Sample
from mmfeat.samples.thumbnails import show_one_photo

EQUAL_TEXT, NEAR_TEXT, EQUAL_PHOTO, NEAR_PHOTO = "equal text", "near text", "equal photo", "near photo"

# Texts are nearly equal if they share this much of their runs of letters (Jaccard index of the sets of runs).
SIMILARITY = 0.8
RUN = 5
# Least bytes of UTF-8, so that a Chinese character counts like three Latin letters. Two people write "so happy :)" or
# "happy birthday to you" without knowing of each other, and texts that short may differ only in their dropped signs.
SHORTEST_EQUAL = 24
SHORTEST_NEAR = 32

# Bits that the words of a text must hold for each doubling of the number N of samples. The N^2 / 2 pairs of samples
# take 2 log2(N) bits to tell apart; half of what words hold is known from the words before (Shannon, 1951).
BITS = 4
# So many times as many are asked of texts beside photos that differ: a title may tell a line of products and not one of
# them, whereas a post is one text, also where its photos are rows of their own.
TWICE = 2
# A text, or texts that are nearly equal, beside more different photos than this share of all samples is a phrase of the
# data set, such as "see the pictures for its condition", unless so few photos or so many bytes speak against that.
PHRASE_SHARE = 0.02  # a tenth of one of five folds
PHRASE_PHOTOS = 10
LONG = 280

# Most bits, of 63, in which hashes of equal photos may differ. 99.9 % of tweeted photos that were saved again, smaller
# or more compressed, stay within this distance; hashes of different photos differ in 8 bits at least.
PHOTO_DISTANCE = 4

# Number of the following candidates in a sorted list that each candidate is compared with, so that a template of
# thousands takes linear time.
NEIGHBOURS = 16
PIECE_LETTERS = 1 << 22
PIECE_TEXTS = 1 << 15
MOST_COUNTER_BITS = 24
SKETCH_BITS = 128

Look = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # rows -> thumbnails, known, as `SecondLook` gives them

# A word, or a character of a script that writes no spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_RETWEET = re.compile(r"^(?:\W*\brt\b)+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def linked_groups(links: Iterable[np.ndarray], count: int) -> np.ndarray:
    """(count,) group numbers of rows that some (L, 2) links join, directly or through other rows."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.concatenate(list(links)).T
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def duplicate_links(
    samples: Sequence[Sample],
    image_keys: np.ndarray,
    image_hashes: tuple[np.ndarray, np.ndarray] | None = None,
    look: Look | None = None,
) -> dict[str, np.ndarray]:
    """Rule -> (L, 2) row numbers that the rule links; enough links to connect a group, not all pairs.

    `image_keys` (N,) are content keys, empty without photo; `image_hashes` are (N,) perceptual hashes and whether
    each is known, as `mmfeat.samples.keys.image_hashes` gives; `look` gives the thumbnails that photos of alike hashes
    must share, too (without it, hashes alone decide). Texts are equal after tweet cleaning, or nearly equal in their
    letters and digits alone. Missing and emptied texts and photos link nobody.
    """
    if not len(samples) == len(image_keys):
        raise ValueError(f"{len(samples)} samples and {len(image_keys)} image keys; both must be of the same samples")
    near = np.empty((0, 2), int) if image_hashes is None else near_photos(image_keys, *image_hashes, look)
    photo_links = {EQUAL_PHOTO: _equal(image_keys.tolist()), NEAR_PHOTO: near}
    photos = np.where(image_keys != b"", linked_groups(photo_links.values(), len(samples)), -1)
    return {**_text_links([clean_tweet(sample.text or "") for sample in samples], photos), **photo_links}


def _text_links(cleaned: list[str], photos: np.ndarray) -> dict[str, np.ndarray]:
    """The links of cleaned texts; `photos` (N,) are numbers that only samples of one photo share, -1 without photo."""
    letters = [text_letters(text) for text in cleaned]
    sizes = np.array([len(text.encode()) for text in letters], int)
    bits = _information(cleaned) / (BITS * math.log2(max(len(cleaned), 2)))
    says = (sizes >= SHORTEST_EQUAL) & (bits >= 1)
    equal = _equal([text if enough else "" for text, enough in zip(letters, says.tolist(), strict=True)])
    again = np.zeros(len(cleaned), bool)
    again[equal[:, 1]] = True
    near = np.concatenate([equal, _near_texts(letters, np.flatnonzero(says & (sizes >= SHORTEST_NEAR) & ~again))])
    beside = _photos_beside(linked_groups([near], len(cleaned)), photos)
    phrase = beside > max(PHRASE_PHOTOS, PHRASE_SHARE * len(cleaned))
    says &= (beside <= 1) | ((bits >= TWICE) & ~phrase) | (sizes >= LONG)
    shared = [
        text if enough else (text, photo) if text and photo >= 0 else None
        for text, enough, photo in zip(cleaned, says.tolist(), photos.tolist(), strict=True)
    ]
    one_photo = (photos[near[:, 0]] == photos[near[:, 1]]) & (photos[near[:, 0]] >= 0)
    return {EQUAL_TEXT: _equal(shared), NEAR_TEXT: near[says[near].all(axis=1) | one_photo]}


def _information(cleaned: list[str]) -> np.ndarray:
    """(N,) the bits that the different words of each text hold, by how often all texts have these words."""
    counts = Counter(word for text in cleaned for word in _WORD.findall(without_retweet(text)))
    total = math.log2(max(counts.total(), 1))
    bits = {word: total - math.log2(count) for word, count in counts.items()}
    # In the order of the text, not of a set: the order changes the last digits of a sum.
    texts = (dict.fromkeys(_WORD.findall(without_retweet(text))) for text in cleaned)
    return np.array([sum(map(bits.__getitem__, words)) for words in texts], float)


def _photos_beside(groups: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """(N,) the number of different photos that stand beside the texts of each group of alike texts."""
    pairs = np.unique(np.column_stack([groups, photos])[photos >= 0], axis=0)
    return np.bincount(pairs[:, 0], minlength=len(groups))[groups]


def without_retweet(cleaned: str) -> str:
    """A cleaned text without the mark of a retweet."""
    return _RETWEET.sub("", cleaned)


def text_letters(cleaned: str) -> str:
    """The letters and digits of a cleaned text without the mark of a retweet, in one spelling."""
    text = without_retweet(cleaned)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
    return text.translate(_KEPT)


def near_photos(keys: np.ndarray, hashes: np.ndarray, known: np.ndarray, look: Look | None) -> np.ndarray:
    """(L, 2) row numbers of photos whose hashes and thumbnails are alike.

    Photos whose hashes are linked, also through others, are sorted by their mean colour; each is compared with those
    that follow, so that a photo is found among many others of the same hash.
    """
    if look is None:
        rows = np.flatnonzero(known)
        return rows[near_hashes(hashes[rows])]
    rows = np.flatnonzero(known)[np.unique(keys[known], return_index=True)[1]]
    links = near_hashes(hashes[rows])
    clusters = linked_groups([links], len(rows))
    several = np.flatnonzero(np.bincount(clusters, minlength=1)[clusters] > 1)
    number = np.full(len(rows), -1)
    number[several] = np.arange(len(several))
    thumbnails, seen = look(rows[several])
    order = np.lexsort((thumbnails.mean(axis=1), clusters[several]))
    pairs = [number[links], *(order[np.column_stack(sides)] for sides in _neighbours(clusters[several][order]))]
    kept = []
    for some in pairs:
        some = some[seen[some].all(axis=1) & show_one_photo(thumbnails, some)]
        ends = hashes[rows[several[some]]]
        kept.append(some[_unlike_bits(ends[:, :1], ends[:, 1:]) <= PHOTO_DISTANCE])
    return rows[several[_distinct(np.sort(np.concatenate(kept), axis=1))]]


def near_hashes(hashes: np.ndarray) -> np.ndarray:
    """(L, 2) row numbers of hashes (N,) uint64 that differ in at most `PHOTO_DISTANCE` bits.

    The bits are cut into two more bands than bits may differ, so at least two bands of similar hashes are equal, and
    only hashes that are equal in two bands are compared.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    rows = np.arange(len(hashes))
    links = [np.column_stack([rows, first[inverse]])[first[inverse] != rows]]
    bands = [sum(1 << int(bit) for bit in part) for part in np.array_split(np.arange(64), PHOTO_DISTANCE + 2)]
    for one, other in itertools.combinations(bands, 2):
        masked = distinct & np.uint64(one | other)
        order = np.argsort(masked, kind="stable")
        for left, right in _neighbours(masked[order]):
            pairs = order[np.column_stack([left, right])]
            unlike = _unlike_bits(distinct[pairs[:, :1]], distinct[pairs[:, 1:]])
            links.append(first[pairs[unlike <= PHOTO_DISTANCE]])
    return _distinct(np.concatenate(links))


class _Kept(dict[int, "int | None"]):
    """Table for `str.translate` that keeps letters, digits and the vowel signs that belong to letters."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        is_sign = unicodedata.category(char) in ("Mn", "Mc") and "VARIATION SELECTOR" not in unicodedata.name(char, "")
        self[code] = code if char.isalnum() or is_sign else None
        return self[code]


_KEPT = _Kept()


def _equal(contents: Sequence[object]) -> np.ndarray:
    """(L, 2) links of each row to the first row with the same content; empty content links nobody."""
    first: dict[object, int] = {}
    links = [(first.setdefault(content, row), row) for row, content in enumerate(contents) if content]
    return _as_links((one, other) for one, other in links if one != other)


def _distinct(pairs: np.ndarray) -> np.ndarray:
    """The pairs (P, 2) of row numbers, sorted, each once."""
    packed = _ordered(pairs.astype(np.uint64) @ np.array([1 << 32, 1], np.uint64))
    return np.column_stack([packed >> np.uint64(32), packed & np.uint64((1 << 32) - 1)]).astype(int)


def _ordered(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending, several times faster than `numpy.unique`; `values` is sorted in place."""
    values.sort()
    return values[np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])]


def _as_links(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(list(pairs), dtype=int).reshape(-1, 2)


def _near_texts(letters: list[str], rows: np.ndarray) -> np.ndarray:
    """(L, 2) links of those rows whose texts share most runs of letters."""
    texts = [letters[row] for row in rows.tolist()]
    return rows[_as_links(_similar(texts, _candidates(texts)))]


def _similar(texts: list[str], pairs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs that are as similar as `SIMILARITY` asks, without pairs that other pairs connect already."""
    parent = list(range(len(texts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for one, group in itertools.groupby(pairs.tolist(), key=lambda pair: pair[0]):
        runs = _runs(texts[one])
        for _, other in group:
            if root(one) != root(other):
                others = _runs(texts[other])
                shared = len(runs & others)
                if shared >= SIMILARITY * (len(runs) + len(others) - shared):
                    parent[root(other)] = root(one)
                    yield one, other


def _runs(text: str) -> set[str]:
    return {text[start : start + RUN] for start in range(len(text) - RUN + 1)}


def _candidates(texts: list[str]) -> np.ndarray:
    """(P, 2) pairs of texts, sorted, that may be similar: they share one of their rarest runs of letters.

    Prefix filtering (Chaudhuri, Ganti and Kaushik, 2006; Bayardo, Ma and Srikant, 2007): with the runs of two
    sets in one order, similar sets share one of the first few. With the rarest first, hardly any other sets do.
    """
    shift = np.uint64(64 - min(max(sum(map(len, texts)).bit_length(), 8), MOST_COUNTER_BITS))
    counts = np.zeros(1 << (64 - int(shift)), np.int64)
    for _, _, hashes in _hashed_pieces(texts):
        counts += np.bincount((hashes >> shift).astype(np.int64), minlength=len(counts))
    level = np.minimum(np.log2(np.maximum(counts, 1)) * 8, 255).astype(np.uint64)
    rarest = [_rarest(start, owner, hashes, level[hashes >> shift]) for start, owner, hashes in _hashed_pieces(texts)]
    if not rarest:
        return np.empty((0, 2), int)
    runs, rows, sizes, sketches = (np.concatenate(column) for column in zip(*rarest, strict=True))
    order = np.lexsort((rows, sizes[rows], runs))
    runs, rows = runs[order], rows[order]
    pairs = [np.empty((0, 2), int)]
    for left, right in _neighbours(runs):
        some = rows[np.column_stack([left, right])]
        # Each run flips one bit of a sketch, so at most as many bits differ as there are runs in only one text.
        most = (1 - SIMILARITY) / (1 + SIMILARITY) * sizes[some].sum(axis=1)
        some = some[_unlike_bits(sketches[some[:, 0]], sketches[some[:, 1]]) <= most]
        pairs.append(_distinct(np.sort(some, axis=1)))
    return _distinct(np.concatenate(pairs))


def _hashed_pieces(texts: list[str]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield pieces of `texts`: (index of the first text, text of each run from there on, hash of each run)."""
    lengths = np.array([len(text) for text in texts], dtype=int)
    ends = np.cumsum(lengths)
    start = 0
    while start < len(texts):
        before = ends[start] - lengths[start]
        stop = max(int(np.searchsorted(ends, before + PIECE_LETTERS)), start + 1)
        stop = min(stop, start + PIECE_TEXTS, len(texts))
        owner = np.repeat(np.arange(stop - start), lengths[start:stop])
        letters = np.frombuffer("".join(texts[start:stop]).encode("utf-32-le", "surrogatepass"), np.uint32)
        count = len(letters) - RUN + 1
        whole = owner[:count] == owner[RUN - 1 :]
        hashes = np.zeros(count, np.uint64)
        for offset in range(RUN):
            hashes = (hashes ^ letters[offset : offset + count]) * _MULTIPLIER
            hashes ^= hashes >> np.uint64(29)
        yield start, owner[:count][whole], (hashes * _MULTIPLIER)[whole]
        start = stop


def _rarest(
    start: int, owner: np.ndarray, hashes: np.ndarray, level: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rarest runs of each text of a piece, as many as a similar text can lack and one more.

    Returns (R,) runs, rarer ones smaller, and (R,) the row of the text; then, for each text of the piece, how many
    different runs it has, and its sketch: (T, SKETCH_BITS / 64) uint64 parities of how many runs fall on each bit.
    """
    sets = _ordered((owner.astype(np.uint64) << np.uint64(48)) | (level << np.uint64(40)) | (hashes >> np.uint64(24)))
    text = (sets >> np.uint64(48)).astype(int)
    sizes = np.bincount(text, minlength=int(owner.max()) + 1)
    rank = np.arange(len(sets)) - (np.cumsum(sizes) - sizes)[text]
    first = rank <= sizes[text] - np.ceil(SIMILARITY * sizes[text])
    bits = text * SKETCH_BITS + (sets & np.uint64(SKETCH_BITS - 1)).astype(int)
    odd = np.bincount(bits, minlength=len(sizes) * SKETCH_BITS) % 2
    sketches = np.packbits(odd.astype(bool)).view(np.uint64).reshape(len(sizes), -1)
    return sets[first] & np.uint64((1 << 48) - 1), text[first] + start, sizes, sketches


def _unlike_bits(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) the number of bits in which the rows of two (N, W) uint64 arrays differ."""
    return _BITS[(one ^ other).view(np.uint8)].sum(axis=1)


def _neighbours(ordered: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices of equal values that are at most `NEIGHBOURS` apart in a sorted array."""
    for step in range(1, NEIGHBOURS + 1):
        left = np.flatnonzero(ordered[step:] == ordered[:-step])
        if not len(left):
            return
        yield left, left + step
