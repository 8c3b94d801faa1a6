import itertools
import time

import numpy as np
import pytest

from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import (
    EQUAL_PHOTO,
    EQUAL_TEXT,
    NEAR_PHOTO,
    NEAR_TEXT,
    PHOTO_DISTANCE,
    SIMILARITY,
    duplicate_links,
    linked_groups,
    near_hashes,
    near_photos,
    text_letters,
)

LONG = "thank you for the competition pack received as part of the reward scheme, delighted"


def samples(texts: list[str | None]) -> list[Sample]:
    return [Sample(str(number), text) for number, text in enumerate(texts)]


def no_photos(count: int) -> np.ndarray:
    return np.zeros(count, "S32")


def duplicate_groups(texts: list[Sample], keys: np.ndarray, *hashes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return linked_groups(duplicate_links(texts, keys, *hashes).values(), len(texts))


def joined(one: str, other: str) -> bool:
    groups = duplicate_groups(samples([one, other]), no_photos(2))
    return bool(groups[0] == groups[1])


def test_groups_join_equal_texts_and_equal_photos_also_through_others() -> None:
    texts = [f"{LONG} http://a.b", LONG, "other", "third", None, None, "http://x.y", "@z"]
    keys = np.array([b"p", b"q", b"q", b"r", b"", b"", b"", b""], dtype="S32")
    groups = duplicate_groups(samples(texts), keys)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 6  # missing and emptied texts join nobody


@pytest.mark.parametrize(
    "other",
    [
        f"RT @someone: {LONG}",
        f"rt : {LONG.upper()}!!! \U0001f389",
        LONG.replace(",", "").replace(" ", "  ") + " http://t.co/abc",
        LONG + " again",
        LONG[:-4] + "…",
        "ｔｈａｎｋ" + LONG[5:],
    ],
)
def test_nearly_equal_texts_are_joined(other: str) -> None:
    assert joined(LONG, other)
    assert duplicate_links(samples([LONG, other]), no_photos(2))[NEAR_TEXT].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("so happy :)", "so happy :("),
        ("5%", "$5"),
        ("happy birthday to you", "happy birthday to you !!!"),
        ("今天很高兴", "今天很高兴！"),
        (LONG, LONG.replace("competition pack", "lovely book of birds").replace("delighted", "a pity")),
        ("why are you feeling dismal today? take the quiz now", "why are you feeling gloomy today? take the quiz now"),
        ("\U0001f389\U0001f389", "\U0001f494"),
        ("?" * 40, "!" * 40),
    ],
)
def test_short_and_different_texts_are_not_joined(one: str, other: str) -> None:
    assert not joined(one, other)


def test_a_phrase_that_many_write_joins_nobody_unless_the_photos_agree() -> None:
    """ "as pictured" once put 308 of 800 rows into one fold and none into the others."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(400)]
    own = [" ".join(rng.choice(words, 12)) for _ in range(568)]
    phrases = ["as pictured", "As pictured, see all of the photos for the condition of this item before you bid on it"]
    for phrase in phrases:
        texts = samples([*own, *[phrase] * 232])
        keys = np.array([b"%d" % row for row in range(800)], "S32")
        keys[[700, 701]] = b"one photo"
        links = duplicate_links(texts, keys)
        assert links[EQUAL_TEXT].tolist() == links[EQUAL_PHOTO].tolist() == [[700, 701]]
        assert not len(links[NEAR_TEXT])
        assert len(set(duplicate_groups(texts, keys).tolist())) == 799


@pytest.mark.parametrize(("photos", "is_joined"), [(200, False), (8, True), (0, True)])
def test_a_template_beside_many_photos_joins_nobody(photos: int, is_joined: bool) -> None:
    """Texts that are nearly equal count together; photos that are missing or shared say nothing against them."""
    words = ["".join(letters) for letters in np.random.default_rng(0).choice(list("abcdefghij"), (400, 6))]
    rest = [" ".join(np.random.default_rng(row).choice(words, 12)) for row in range(600)]
    lots = [f"lot {row:03}: as pictured, look at every one of these photographs before bidding" for row in range(200)]
    keys = np.array(
        [b"%d" % row for row in range(600)] + [b"lot%d" % (row % max(photos, 1)) for row in range(200)], "S32"
    )
    keys[600:] = keys[600:] if photos else b""
    links = duplicate_links(samples([*rest, *lots]), keys)
    assert (len(links[NEAR_TEXT]) >= 199) == is_joined
    assert (len(links[NEAR_TEXT]) > 0) == is_joined


def test_a_title_of_a_line_of_products_joins_no_two_photos() -> None:
    """Of 40 pairs of garments that such titles once joined, 27 were different garments."""
    rng = np.random.default_rng(0)
    makers, kinds = ([f"{kind}{number:05}" for number in range(200)] for kind in "mk")
    titles = [f"{rng.choice(makers)} boys {rng.choice(kinds)} printed white shirt" for _ in range(1000)]
    line = "somebody boys nothing plain modest printed white shirt"
    post = "a sentence that somebody wrote about what nobody else has ever seen in this wide world"
    texts = samples(
        [*titles, *[line] * 4, *[post] * 2, *["another girls something fancy showy printed white shirt"] * 3]
    )
    keys = np.array([b"%d" % row for row in range(len(texts))], "S32")
    keys[1001] = keys[1000]
    keys[[1003, 1008]] = b""
    groups = duplicate_groups(texts, keys)
    assert groups[1000] == groups[1001]
    assert len({*groups[[1000, 1002, 1003]].tolist()}) == 3  # without a photo it could be either
    assert groups[1004] == groups[1005]  # photos of one post
    assert len({*groups[1006:].tolist()}) == 3
    keys[1007] = keys[1006]
    assert len({*duplicate_groups(texts, keys)[1006:].tolist()}) == 1  # one photo alone stands beside the text


def test_a_long_text_joins_however_many_photos_stand_beside_it() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(400)]
    texts = [" ".join(rng.choice(words, 60)) for _ in range(60)] + [" ".join(words[:60])] * 40
    groups = duplicate_groups(samples(texts), np.array([b"%d" % row for row in range(100)], "S32"))
    assert len(set(groups[60:].tolist())) == 1
    assert len(set(groups.tolist())) == 61


@pytest.mark.parametrize(("count", "is_joined"), [(10, True), (4000, False)])
def test_the_same_words_tell_less_among_more_samples(count: int, is_joined: bool) -> None:
    """A title of common words is that of one product among ten, and of many among thousands."""
    rng = np.random.default_rng(0)
    makers, kinds = ([f"{kind}{number:05}" for number in range(30)] for kind in "mk")
    titles = [f"{rng.choice(makers)} men {rng.choice(kinds)} dial watch" for _ in range(count)]
    links = duplicate_links(samples(["somebody men nothing dial watch"] * 2 + titles), no_photos(count + 2))
    assert ([0, 1] in links[EQUAL_TEXT].tolist()) == is_joined


def test_words_said_again_and_emoji_tell_nothing() -> None:
    rest = [f"quite another text about number {number}" for number in range(50)]
    for text in ("ha " * 30, "🎉 " * 30):
        assert len(duplicate_links(samples([text, text, *rest]), no_photos(52))[EQUAL_TEXT]) == 0


def test_chinese_texts_are_compared_by_character() -> None:
    text = "今天在北京的公园里看到了很多漂亮的花朵，心情非常好，下次还要和朋友们一起来这里散步聊天"
    assert joined(text, text.replace("，", " ") + "！！")
    assert joined(text, text + "吧")
    assert not joined(text, text.replace("公园里看到了很多漂亮的花朵", "商店里买到了几本便宜的旧书"))


def test_letters_keep_vowel_signs_and_drop_what_is_no_letter() -> None:
    assert text_letters("rt : it's 5 o'clock_☕️!") == "its5oclock"
    assert text_letters("की") != text_letters("कि")
    assert text_letters("❤️ ok") == "ok"
    assert text_letters("art of rt") == "artofrt"


def test_similarity_is_that_of_all_pairs() -> None:
    """The fast search finds what comparing each pair finds, up to what others connect already."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(300)]
    texts = [" ".join(rng.choice(words, 15)) for _ in range(200)]
    for text in texts[:100]:
        changed = text.split()[: rng.integers(11, 16)]
        if rng.random() < 0.5:
            changed[rng.integers(len(changed))] = str(rng.choice(words))
        texts.append(" ".join(changed))
    runs = [{text[at : at + 5] for at in range(len(text) - 4)} for text in map(text_letters, texts)]
    similar = {
        (one, other)
        for one, other in itertools.combinations(range(len(texts)), 2)
        if len(runs[one] & runs[other]) >= SIMILARITY * len(runs[one] | runs[other])
    }
    assert 20 < len(similar) < 80
    assert set(map(tuple, duplicate_links(samples(texts), no_photos(len(texts)))[NEAR_TEXT].tolist())) == similar


def test_ten_thousand_texts_of_one_template_cost_little() -> None:
    texts = [f"somebody liked a video called number {number} and asks you to watch it" for number in range(10_000)]
    start = time.monotonic()
    duplicate_groups(samples(texts), no_photos(len(texts)))
    assert time.monotonic() - start < 30


def test_photos_are_joined_by_content_and_by_hash() -> None:
    keys = np.array([b"a", b"a", b"b", b"c", b"d", b""], "S32")
    hashes = np.array([0, 0, 1 << 60, 3, (1 << 60) | 6, 3], np.uint64)
    known = np.array([False, False, True, True, True, False])
    links = duplicate_links(samples([None] * 6), keys, (hashes, known))
    assert links[EQUAL_PHOTO].tolist() == [[0, 1]]
    assert sorted(map(sorted, links[NEAR_PHOTO].tolist())) == [[2, 3], [2, 4], [3, 4]]
    groups = duplicate_groups(samples([None] * 6), keys, (hashes, known))
    assert groups[0] == groups[1] != groups[2] == groups[3] == groups[4]
    assert groups[5] not in groups[:5]  # a flat picture without a hash joins nobody


def test_photos_that_cannot_be_looked_at_again_are_not_joined() -> None:
    keys, hashes, known = np.array([b"a", b"b", b"c"], "S32"), np.zeros(3, np.uint64), np.ones(3, bool)
    cells = np.tile(np.arange(192, dtype=np.uint8), (3, 1))
    assert near_photos(keys, hashes, known, lambda rows: (cells[rows], rows != 1)).tolist() == [[0, 2]]


def test_every_hash_within_the_distance_is_found_and_none_beyond() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 63, 400, dtype=np.uint64)
    flips = [rng.choice(64, count, replace=False) for count in rng.integers(0, PHOTO_DISTANCE + 4, 400)]
    near = [int(value) ^ sum(1 << int(bit) for bit in bits) for value, bits in zip(base, flips, strict=True)]
    found = {tuple(sorted(pair)) for pair in near_hashes(np.concatenate([base, np.array(near, np.uint64)])).tolist()}
    assert found == {(row, row + 400) for row, bits in enumerate(flips) if len(bits) <= PHOTO_DISTANCE}


def test_a_picture_that_thousands_post_links_each_of_them_once() -> None:
    links = near_hashes(np.full(50_000, 7, np.uint64))
    assert len(links) == 49_999
    assert len(near_hashes(np.empty(0, np.uint64))) == 0


def test_each_rule_names_its_links() -> None:
    links = duplicate_links(samples([LONG, LONG, f"rt : {LONG}", "else"]), no_photos(4))
    assert links[EQUAL_TEXT].tolist() == [[0, 1]]
    assert [0, 2] in links[NEAR_TEXT].tolist()
    assert not len(links[EQUAL_PHOTO]) + len(links[NEAR_PHOTO])


def test_no_samples_are_no_groups_and_counts_must_agree() -> None:
    assert duplicate_groups([], no_photos(0)).tolist() == []
    with pytest.raises(ValueError, match="1 samples and 2 image keys"):
        duplicate_groups(samples(["a"]), no_photos(2))
