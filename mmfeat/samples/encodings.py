"""Encodings of texts: UTF-8 first, else one guess for a whole data set, or the encoding that the user names."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mmfeat.errors import DataError
from mmfeat.samples.alphabets import ALPHABETS, DENSE, LATIN, RARITY, WIDE, strangeness
from mmfeat.system.wording import counted

LAST = ("cp1252", "latin-1")  # a few bytes are no character of cp1252; latin-1 decodes any bytes
ALIKE = (0.06, 0.1)  # differences of charset-normalizer's chaos and coherence that tell nothing
STRANGE = 0.6  # strangeness of texts for each byte above ASCII with which they are of no encoding
NEAR = 1.0  # difference of strangeness that tells little: that of one letter
JUDGED = (120, 240)  # texts that are looked at letter by letter, and bytes of each
LONGEST_WORD = 32  # letters
SPACELESS = "cp874"  # of Thai, which leaves no space between words
DAMAGED = "utf-8, damaged"
MENDED = 3  # letters above ASCII that are UTF-8 for each that is not
GUESSES = 3  # encodings of one data set at most, beside UTF-8 and `LAST`
SAMPLE_BYTES = 1 << 18  # bytes of texts that a guess looks at
SHOWN = 30  # letters of an example

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before the mark of UTF-16, with which this mark begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HIGH = re.compile(rb"[\x80-\xff]+")
_CHINESE_MARKS = re.compile(rb"(\xa1[\xa1-\xbf])+")  # quotes, dashes and points of an English text in GB18030
_IDEOGRAPH = re.compile("[\u3400-\u9fff\uac00-\ud7a3]")
_KANA, _HALF_KANA = re.compile("[\u3040-\u30ff]"), re.compile("[\uff61-\uff9f]")


@dataclass(frozen=True)
class Guess:
    """An encoding that was guessed, the candidates that fit as well, and a text that was decoded by the guess."""

    encoding: str
    others: tuple[str, ...]
    example: str

    def __str__(self) -> str:
        sure = f"{', '.join(self.others)} would fit too" if self.others else "no other fits"
        return f"{self.encoding} ({sure}): {self.example!r}"


class Decoder:
    """Decodes the texts of one data set, each by itself: UTF-8, else `named`, else what the data set's texts tell.

    `learn` shows the decoder texts of the data set; `counts` says how many texts were decoded by each encoding, and
    `notes` what was guessed. `unit` is the word for what is decoded at a time.
    """

    def __init__(self, named: str = "", unit: str = "text") -> None:
        self.named, self._unit = _checked(named) if named else "", unit
        self.counts: Counter[str] = Counter()
        self._sample: list[bytes] = []
        self._stride, self._seen, self._size = 1, 0, 0
        self._guesses: tuple[Guess, ...] | None = None

    @property
    def whole(self) -> str:
        """The named encoding if its bytes may be taken for ASCII or contain newlines, so that it holds for all."""
        return self.named if re.match(r"utf_?(16|32|7)|iso2022|hz", codecs.lookup(self.named or "utf-8").name) else ""

    def learn(self, texts: Iterable[bytes]) -> None:
        """Take in texts that are not UTF-8; of many, every second, every fourth and so on is kept."""
        for text in texts:
            if _mended(text) is not None:
                continue
            self._seen += 1
            if self._seen % self._stride == 0:
                self._sample.append(text)
                self._size += len(text)
            if self._size > SAMPLE_BYTES and len(self._sample) > 1:
                self._sample, self._stride = self._sample[1::2], self._stride * 2
                self._size = sum(map(len, self._sample))
        self._guesses = None

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """The encodings of the texts that are not UTF-8, the most frequent first; a text is of the first that fits."""
        if self._guesses is None:
            self._guesses, left = (), [] if self.named else self._sample
            while left and len(self._guesses) < GUESSES and (guess := guess_encoding(left)) is not None:
                self._guesses += (guess,)
                left = [text for text in left if _by(text, guess.encoding) is None]
        return self._guesses

    @property
    def notes(self) -> list[str]:
        """What was guessed, how sure that is, and an example; one line an encoding."""
        if self.named:
            return []
        guessed = {guess.encoding: str(guess) for guess in self.guesses}
        damaged = self.counts[DAMAGED]
        return [
            f"{counted(damaged, self._unit)} UTF-8 but for bytes that were cut or damaged, each of them read as \ufffd"
        ] * bool(damaged) + [
            f"{counted(count, self._unit)} not UTF-8, read as {guessed.get(name, f'{name} (no encoding fits)')}; "
            "--encoding NAME corrects it"
            for name, count in self.counts.items()
            if not name.startswith("utf-")
        ]

    def decode(self, data: bytes, where: str = "") -> str:
        """The text of `data`. Raises `DataError` with `where` for a text that is not of the named encoding."""
        text, encoding = self._decoded(data, where)
        self.counts[encoding] += 1
        return text

    def decode_lines(self, data: bytes, file: str, number: int) -> str:
        """The text of lines of a file, the first of which has this number; each line is decoded by itself."""
        texts, plain = [], 0
        for place, line in enumerate(data.splitlines(keepends=True), number):
            if line.isascii() and not self.whole:
                texts.append(line.decode("ascii"))
                plain += 1
            else:
                texts.append(self.decode(line, f"{file}:{place}"))
        self.counts["utf-8"] += plain
        return "".join(texts)

    def _decoded(self, data: bytes, where: str) -> tuple[str, str]:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and (text := _try(data, "utf-16")) is not None:
            return text, "utf-16"
        if not self.whole and (text := _try(data, "utf-8")) is not None:
            return text.removeprefix("\ufeff"), "utf-8"
        if self.named:
            if (text := _try(data, self.named)) is None:
                raise DataError(f"{where}: {_shown(data)} is not {self.named}; correct --encoding or leave it out")
            return text, self.named
        if (text := _mended(data)) is not None:
            return text, DAMAGED
        if not self._seen:
            self.learn([data])
        for guess in self.guesses:
            if (text := _by(data, guess.encoding)) is not None:
                return text, guess.encoding
        return next((text, last) for last in LAST if (text := _try(data, last)) is not None)


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, its encoding) of a text that belongs to no data set: UTF-8, UTF-16 behind its mark, or a guess."""
    decoder = Decoder()
    text = decoder.decode(data)
    return text, next(iter(decoder.counts))


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    return _try(data, "utf-8") is not None


def marked_encoding(data: bytes) -> str:
    """The encoding that the first bytes of a file show by a byte-order mark or by their zeros; "" for none."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    even, odd = data[0:200:2], data[1:200:2]
    if len(data) >= 8 and b"\0" in data and (even + odd).count(0) * 3 > len(even + odd):
        return "utf-16-le" if odd.count(0) > even.count(0) else "utf-16-be"
    return ""


def guess_encoding(texts: list[bytes]) -> Guess | None:
    """The encoding in which most of some texts that are not UTF-8 were written; None where no candidate fits.

    Letters tell the encodings of one byte a letter, charset-normalizer those of two bytes a character.
    """
    paired = [text for text in texts if _is_paired(text)]
    texts = paired if len(paired) * 2 > len(texts) else [text for text in texts if not _is_paired(text)]
    if all(map(_CHINESE_MARKS.fullmatch, _HIGH.findall(b"\n".join(texts)))):
        return Guess("gb18030", (), _example(texts, "gb18030"))
    judged = [text[: JUDGED[1]] for text in texts[:: len(texts) // JUDGED[0] + 1]]
    costs = {name: RARITY[name] + _strangeness(judged, name) for name in (*ALPHABETS, *WIDE)}
    best = min(costs, key=lambda name: costs[name])
    if costs[best] > STRANGE * sum(map(_high, judged)):
        return None
    if best in WIDE:
        return _guess_wide(texts) or Guess(best, (), _example(texts, best))
    decoded = [_try(text, best) for text in judged]
    near = [name for name, cost in costs.items() if cost < costs[best] + NEAR]
    others = tuple(name for name in near if [_try(text, name) for text in judged] != decoded)
    return Guess(best, others, _example(texts, best))


def _guess_wide(texts: list[bytes]) -> Guess | None:
    """The encoding of two bytes a character in which texts were written."""
    from charset_normalizer import from_bytes

    data = b"\n".join(texts)
    matches = from_bytes(data, steps=20, chunk_size=2048, cp_isolation=[*WIDE], preemptive_behaviour=False)
    if not (fits := [match for match in matches if match.encoding in WIDE]):
        return None
    chaos = min(match.chaos for match in fits) + ALIKE[0]
    coherence = max(match.coherence for match in fits if match.chaos <= chaos) - ALIKE[1]
    alike = [match for match in fits if match.chaos <= chaos and match.coherence >= coherence]
    named = {name for match in alike for name in match.could_be_from_charset if name in WIDE}
    names = sorted(named, key=[*WIDE].index)
    agreeing = (name for name in names if sum(_by(text, name) is not None for text in texts) * 2 > len(texts))
    best = _corrected(next(agreeing, names[0]), names, data)
    text = data.decode(best)
    others = tuple(name for name in names if name != best and data.decode(name) != text)
    return Guess(best, others, _example(texts, best))


def _is_paired(text: bytes) -> bool:
    """Whether the bytes above ASCII come in pairs, as in Chinese, Japanese or Korean, and rarely in other texts."""
    return all(len(run) % 2 == 0 for run in _HIGH.findall(text))


def _high(data: bytes) -> int:
    return sum(map(len, _HIGH.findall(data)))


def _mended(data: bytes) -> str | None:
    """Decode UTF-8 of which few bytes are damaged, as where a program cut it; None for another text."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    return text if sum(letter > "\x7f" for letter in text) - bad >= MENDED * bad > 0 else None


def _strangeness(texts: list[bytes], encoding: str) -> float:
    """How little texts look like ones of the encoding; a byte above ASCII that it does not decode counts 1, as does one
    of letters in a row that are too many for a word."""
    decoded = [_try(text, encoding) or _try(text[:-1] if len(text) == JUDGED[1] else text, encoding) for text in texts]
    lost = sum(_high(data) for data, text in zip(texts, decoded, strict=True) if text is None)
    if encoding not in (*WIDE, SPACELESS):
        runs = [run for data in texts for run in _HIGH.findall(data)]
        lost += sum(len(run) for run in runs if len(run) > LONGEST_WORD and len({*run}) > 1)
    return lost + strangeness([text for text in decoded if text is not None], encoding)


def _corrected(best: str, names: list[str], data: bytes) -> str:
    """The guess, or EUC-JP where that is like it: charset-normalizer overlooks kana."""
    if best in ("gb18030", "cp949") and "euc_jp" in names:
        text = data.decode("euc_jp")
        kana = len(_KANA.findall(text)) * 4 > sum(letter > "\x7f" for letter in text)
        return "euc_jp" if kana and not _HALF_KANA.search(text) else best
    return best


def _by(data: bytes, encoding: str) -> str | None:
    """The text in an encoding; None where it is not, or where the bytes above ASCII clearly show another one.

    A letter of a Western encoding stands alone between ASCII letters, where a Chinese encoding makes an ideograph of
    it and of the next letter. A Chinese, Japanese or Korean text has pairs.
    """
    text = _try(data, encoding)
    if text is None or encoding not in (*DENSE, *LATIN):
        return text
    runs = _HIGH.findall(data)
    if encoding in DENSE:
        odd = all(len(run) == 1 for run in runs) and len(_IDEOGRAPH.findall(text)) == len(runs)
    else:
        odd = sum(map(len, runs)) >= 6 and _is_paired(data)
    return None if odd else text


def _try(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _example(texts: list[bytes], encoding: str) -> str:
    """The surroundings of the first letter above ASCII of a text."""
    text = next((text for each in texts if (text := _by(each, encoding)) is not None), "")
    words = " ".join(text.split())
    first = next((place for place, letter in enumerate(words) if letter > "\x7f"), 0)
    start = max(0, first - SHOWN // 2)
    return words[start : start + SHOWN]


def _shown(data: bytes) -> str:
    return repr(data[:SHOWN])[1:]


def _checked(name: str) -> str:
    try:
        "".encode(name)
        return codecs.lookup(name).name if codecs.lookup(name).name != "iso8859-1" else "latin-1"
    except (LookupError, UnicodeError):
        raise DataError(f"--encoding {name}: no such encoding; as in utf-8, cp1252, gb18030, cp932, latin-1") from None
