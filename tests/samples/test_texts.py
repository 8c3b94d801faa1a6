import pytest

from mmfeat.samples.contents import CLEANING, clean_tweet, decode_text


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("太好了 ☀".encode(), "太好了 ☀", "utf-8"),
        (b"\xef\xbb\xbfhello", "hello", "utf-8"),
        ("太好了".encode("gb18030"), "太好了", "gb18030"),
        (b"caf\xe9", "café", "latin-1"),
        (b"", "", "utf-8"),
        ("caf\u00e9".encode("utf-16"), "caf\u00e9", "utf-16"),
    ],
)
def test_decoding_falls_back_in_order(data: bytes, text: str, encoding: str) -> None:
    assert decode_text(data) == (text, encoding)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("RT @Bob_1: SO happy!! http://t.co/aB1 #SunnyDay", "rt : so happy!! sunnyday"),
        ("  a\t\nb  ", "a b"),
        ("☀ keep emoji, and punctuation.", "☀ keep emoji, and punctuation."),
        ("https://only.url", ""),
        ("#太好了", "太好了"),
    ],
)
def test_tweet_cleaning(raw: str, clean: str) -> None:
    assert clean_tweet(raw) == clean
    assert CLEANING["none"](raw) == raw
