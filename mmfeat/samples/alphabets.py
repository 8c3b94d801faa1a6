"""Alphabets of languages beyond ASCII, by which short texts tell their encoding where statistics of words cannot."""

from __future__ import annotations

import re
from functools import cache, lru_cache

# Letters above ASCII of a language, the commonest first.
_WEST = {
    "French": "éèàêçôîùûâœëïæüÿ", "German": "üäöß", "Spanish": "óíáéñúü", "Portuguese": "ãçáéóíêõâúôàü",
    "Italian": "èàùòìé", "Swedish": "äåöéšž", "Danish": "øåæéòêô", "Icelandic": "áðéíóöþæúý",
    "Catalan": "óàéèíçòïúü", "Dutch": "ëéïèóöü",
}  # fmt: skip
_CENTRE = {
    "Czech": "íáěéřčžýšůúťňďó", "Slovak": "áíčéžýúšťľňôďóäŕĺ", "Polish": "łąężóćśńź", "Hungarian": "áéöóőíüúű",
    "Romanian": "ăîşţâ", "Croatian": "čšžćđ", "German": "üäöß",
}  # fmt: skip
_BALTIC = {"Lithuanian": "ėšųžūįąčę", "Latvian": "āīēšļņūžģķč", "Estonian": "äõüöšž"}
_CYRILLIC = {
    "Russian": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё", "Ukrainian": "оанивтреіслкдмпуяьзгбйчхїжцшюєщфґ",
    "Belarusian": "анаеіркстлўвдмпзыяугйьбчхцшжюфэё", "Serbian": "аоиенрстјвдкупмлзгбчшцжхњћљђфџ",
}  # fmt: skip
_GREEK = {"Greek": "αοιετσνηυρπκμλςίωόάδέήγύχθφώβξζψϊϋΐΰ"}
_HEBREW = {"Hebrew": "יוהלאתרשבמנחםקדעפטגסזןכצךףץ"}
_ARABIC = {"Arabic": "اليمنرتوبةدعسفحكقجهأشصطخىضثزإذءغئآظؤپچژگکًٌٍَُِّْ"}
_THAI = {"Thai": "านร่กเ้องมยัลวีดทตสิบหปคะไ์ขพจใุูำชแืโ็ผึซถธศณภษญฐฟฮฝฉฆฏฎฌฒฑฬๆฯ๊๋ๅฤ"}

# Encodings of one byte a letter and the alphabets that are written in them.
ALPHABETS = {
    "cp1252": _WEST, "cp1251": _CYRILLIC, "koi8_r": _CYRILLIC, "cp1250": _CENTRE, "iso8859_2": _CENTRE,
    "cp1253": _GREEK, "cp1254": {"Turkish": "ıüşğöçâîûİ"}, "cp1255": _HEBREW, "cp1256": _ARABIC, "cp1257": _BALTIC,
    "cp874": _THAI, "iso8859_15": _WEST, "cp850": _WEST, "mac_roman": _WEST, "cp852": _CENTRE, "koi8_u": _CYRILLIC,
    "iso8859_5": _CYRILLIC, "cp866": _CYRILLIC, "mac_cyrillic": _CYRILLIC, "iso8859_6": _ARABIC,
}  # fmt: skip
LATIN = tuple(name for name, of in ALPHABETS.items() if all(letters < "\u0250" for letters in of.values()))
# Encodings of two bytes a character, and the first bytes of their common ones.
WIDE = {
    "gb18030": (0xA1, 0xD7), "cp932": (0x81, 0x97), "cp949": (0xA1, 0xC8), "big5": (0xA1, 0xC6),
    "euc_jp": (0xA1, 0xCF),
}  # fmt: skip
# How many strange letters of a data set outweigh that an encoding is met more rarely than the others.
RARITY = dict.fromkeys((*ALPHABETS, *WIDE), 0.2)
RARITY |= {"cp1252": 0.0, "gb18030": 0.0, "koi8_u": 0.3, "iso8859_15": 0.5, "cp874": 0.5}
RARITY |= dict.fromkeys(("cp850", "mac_roman", "cp852", "iso8859_5", "cp866", "mac_cyrillic", "iso8859_6"), 1.0)
DENSE = ("gb18030", "cp949", "euc_jp")  # the second byte of a common character is above ASCII as well

_HIGH = re.compile("[^\x00-\x7f]")
_JOINERS = "’\u00a0–—…·"  # signs that stand anywhere
_OUTSIDE = "‘“”«»•°¿¡„‚‹›№µ‰"  # signs that stand beside a word but not within it
_BEHIND = "©®™¼¾²³ªº´"  # signs with which no word begins
_APART = "€§£¥½×±÷¶"  # signs that touch no word
_LANGUAGE = 0.5  # cost of one more language
_RANK = 0.3  # cost of the rarest letter of an alphabet; 1 is that of a letter of another
_COMMON, _RARE = 0.3, 2.0  # costs of a character of two bytes


def strangeness(texts: list[str], encoding: str) -> float:
    """Sum over letters above ASCII of how little each belongs into texts of the encoding; near 0 for the right one.

    Each text counts by the language that fits it best, of as few languages as explain the texts.
    """
    if encoding in WIDE:
        return sum(_wide_cost(*found, encoding) for text in texts for found in _neighbours(text))
    left = [_costs(text, encoding) for text in texts]
    best, total = [float("inf")] * len(texts), float("inf")
    for _ in ALPHABETS[encoding]:
        tries = [[min(pair) for pair in zip(best, column, strict=True)] for column in zip(*left, strict=True)]
        found = min(tries, key=sum, default=best)
        if not sum(found) + _LANGUAGE < total:
            break
        best, total = found, sum(found)
    return total if texts else 0.0


def _costs(text: str, encoding: str) -> list[float]:
    """The strangeness of the text in each language of the encoding."""
    costs = [0.0] * len(ALPHABETS[encoding])
    for letter, before, after in _neighbours(text):
        begins, ends = before.isalpha(), after.isalpha()
        bad_place = {
            _JOINERS: False,
            _OUTSIDE: begins and ends,
            _BEHIND: ends or after > "\x7f",
            _APART: begins or ends,
        }
        if any(letter in signs and not bad for signs, bad in bad_place.items()):
            continue
        turned = (before.islower() and letter.isupper()) or (letter.islower() and after.isupper())
        mixed = encoding not in LATIN and any(near.isascii() and near.isalpha() for near in (before, after))
        for number, rank in enumerate(_ranks(encoding)):
            costs[number] += 1.0 if turned or mixed else rank.get(letter, 1.0)
    return costs


def _neighbours(text: str) -> list[tuple[str, str, str]]:
    """Each letter above ASCII, the one before and the one behind it."""
    places = (match.start() for match in _HIGH.finditer(text))
    return [(text[place], text[place - 1 : place], text[place + 1 : place + 2]) for place in places]


@cache
def _ranks(encoding: str) -> list[dict[str, float]]:
    """The cost of each letter in each alphabet of the encoding."""
    return [
        {form: 0.02 + _RANK * rank / len(of) for rank, small in enumerate(of) for form in (small, small.upper())}
        for of in ALPHABETS[encoding].values()
    ]


@lru_cache(1 << 16)
def _wide_cost(letter: str, before: str, after: str, encoding: str) -> float:
    alone = all(near.isascii() and near.isalpha() for near in (before, after))
    common = _is_common(letter, encoding) or (encoding == "gb18030" and _is_common(letter, "big5"))
    return _COMMON if common and not alone else _RARE


def _is_common(letter: str, encoding: str) -> bool:
    code, (first, last) = letter.encode(encoding, "replace"), WIDE[encoding]
    return len(code) == 2 and first <= code[0] <= last and (code[1] > 0x7F or encoding not in DENSE)
