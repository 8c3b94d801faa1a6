"""Texts: from bytes on disk to the string an encoder sees."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

# GB18030 contains GBK; latin-1 accepts any bytes.
ENCODINGS = ("utf-8", "gb18030", "latin-1")

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_URL = re.compile(r"http\S+")
_MENTION = re.compile(r"@\w+")
_HASHTAG = re.compile(r"#(\w+)")
_SPACE = re.compile(r"\s+")


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, its encoding): UTF-8, GB18030 or latin-1, or UTF-16 behind a byte-order mark."""
    for encoding in ("utf-16", *ENCODINGS) if data.startswith(_UTF16_MARKS) else ENCODINGS:
        try:
            return data.decode(encoding).removeprefix("\ufeff"), encoding
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 decodes any bytes")


def without_surrogates(text: str) -> str:
    """The text without lone surrogates, which JSON and a command line may hold and UTF-8 does not."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_tweet(text: str) -> str:
    """Drop URLs and @mentions, keep a hashtag's word, collapse white space, lower-case."""
    text = _HASHTAG.sub(r"\1", _MENTION.sub("", _URL.sub("", text)))
    return _SPACE.sub(" ", text).strip().lower()


def clean_none(text: str) -> str:
    """The text without any change."""
    return text


CLEANING: dict[str, Callable[[str], str]] = {"tweet": clean_tweet, "none": clean_none}
