import random

import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.errors import DataError
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.encodings import Decoder, decode_text

FRENCH = ["médecin à la forêt", "don’t worry – it’s fine", "straße grün über Köln", "café naïve", "niño mañana", "é"]


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("太好了 ☀".encode(), "太好了 ☀", "utf-8"),
        (b"\xef\xbb\xbfhello", "hello", "utf-8"),
        ("太好了".encode("gb18030"), "太好了", "gb18030"),
        (b"caf\xe9", "café", "cp1252"),
        (b"", "", "utf-8"),
        ("caf\u00e9".encode("utf-16"), "caf\u00e9", "utf-16"),
    ],
)
def test_a_text_alone(data: bytes, text: str, encoding: str) -> None:
    assert decode_text(data) == (text, encoding)


LANGUAGES = {
    "cp1252": FRENCH,
    "cp1250": ["Zażółć gęślą jaźń", "Dziękuję bardzo za pomoc", "żółty samochód stoi przed domem"],
    "iso8859_2": ["Zażółć gęślą jaźń", "Dziękuję bardzo za pomoc", "żółty samochód stoi przed domem"],
    "cp1251": ["Привет, как дела?", "Сегодня очень хорошая погода", "Я люблю читать книги"],
    "koi8_r": ["Привет, как дела?", "Сегодня очень хорошая погода", "Я люблю читать книги"],
    "cp1253": ["Καλημέρα σας", "Τι κάνετε σήμερα;", "Ευχαριστώ πολύ για τη βοήθεια"],
    "cp1254": ["Günaydın arkadaşlar", "şimdi ne yapıyorsun", "çok güzel bir gün"],
    "cp932": ["お帰りなさいませ", "今日はとても良い天気です", "写真を撮りました"],
    "euc_jp": ["お帰りなさいませ", "今日はとても良い天気です", "写真を撮りました"],
    "cp949": ["안녕하세요 반갑습니다", "오늘 날씨가 정말 좋네요", "사진이 예쁘다"],
    "big5": ["今天天氣很好", "我喜歡這張照片", "謝謝大家的支持"],
    "gb18030": ["太好了", "RT @a: we’re thrilled … http://t.c…", "今天天气很好，谢谢"],
}


@pytest.mark.parametrize("encoding", LANGUAGES)
def test_one_guess_for_a_table(tmp_path, encoding: str) -> None:
    texts = [*LANGUAGES[encoding], "plain ASCII"]
    rows = "".join(f'{n},"{text}",a\n' for n, text in enumerate(texts))
    (tmp_path / "t.csv").write_bytes(("id,text,label\n" + rows).encode(encoding))
    samples = read_samples(tmp_path / "t.csv")
    assert [sample.text for sample in samples] == texts
    assert samples.encodings == {"utf-8": 2, encoding: len(texts) - 1}
    (note,) = samples.notes
    assert f"not UTF-8, read as {encoding} (" in note
    assert "--encoding NAME corrects it" in note


def test_few_letters_between_letters_of_a_table_are_western(tmp_path) -> None:
    """Words of no language, which a detector finds unlikely in each encoding; a single quote in GB18030."""
    rows = [f"dir/é{n};dicaho mahohu café;x" for n in range(20)]
    (tmp_path / "t.csv").write_bytes("\n".join(["id;text;label", *rows]).encode("cp1252"))
    assert read_samples(tmp_path / "t.csv").samples[3].id == "dir/é3"
    assert decode_text("it’s “so” … good".encode("gb18030")) == ("it’s “so” … good", "gb18030")


SHORT = {
    "koi8_r": ["Привет, как дела?", "Спасибо за помощь"],
    "cp866": ["Привет, как дела?", "Где мои ключи"],
    "koi8_u": ["Дякую за допомогу", "Її книга лежить тут"],
    "iso8859_5": ["Сегодня хорошая погода", "Где мои ключи"],
    "iso8859_2": ["Děkuji vám za pomoc", "Šťastný nový rok"],
    "cp1250": ["Příliš žluťoučký kůň", "Szép őszi nap"],
    "cp852": ["Köszönöm szépen", "Hűvös őszi reggel"],
    "cp1254": ["şimdi ne yapıyorsun", "İstanbul güzel"],
    "cp1255": ["שלום לכולם", "תודה רבה על העזרה"],
    "cp1256": ["شكرا جزيلا على المساعدة", "أين مفاتيحي"],
    "cp1257": ["Ačiū už pagalbą", "Žąsis skrenda", "Šiandien graži diena"],
    "cp874": ["ขอบคุณมากครับ", "กุญแจอยู่ที่ไหน"],
    "mac_roman": ["médecin à la forêt", "Où est la clé ?"],
    "cp1252": ["Ærø — ½ price", "20 °C, ± 5 %"],
    "gb18030": ["我喜欢这张照片", "鑰匙在哪裡"],
}


@pytest.mark.parametrize("encoding", SHORT)
def test_two_lines_tell_their_encoding_by_their_letters(encoding: str) -> None:
    decoder = Decoder()
    data = [text.encode(encoding) for text in SHORT[encoding]]
    decoder.learn(data)
    assert [decoder.decode(text) for text in data] == SHORT[encoding]


def test_utf8_that_was_cut_within_a_letter_is_still_utf8() -> None:
    decoder = Decoder()
    data = ["l’été arrive à pied…".encode()[:-1], "太好了，今天天气很好".encode()[1:], "Müller".encode("cp1252")]
    decoder.learn(data)
    assert [decoder.decode(text) for text in data] == [
        "l’été arrive à pied\ufffd",
        "\ufffd\ufffd好了，今天天气很好",
        "Müller",
    ]
    damaged, _ = decoder.notes
    assert damaged == "2 texts UTF-8 but for bytes that were cut or damaged, each of them read as \ufffd"


def write_folder(folder, texts: list[bytes]):
    (folder / "data").mkdir(parents=True)
    (folder / "train.txt").write_text("".join(f"{n},{'ab'[n % 2]}\n" for n in range(len(texts))))
    for number, text in enumerate(texts):
        (folder / "data" / f"{number}.txt").write_bytes(text)
    return folder


def test_texts_of_two_encodings_are_told_apart_by_file(tmp_path) -> None:
    pairs = [(text, name) for name in ("cp1252", "gb18030") for text in LANGUAGES[name] * 3] + [("天", "utf-8")]
    random.Random(0).shuffle(pairs)
    samples = read_samples(write_folder(tmp_path / "d", [text.encode(name) for text, name in pairs]))
    assert [sample.text for sample in samples] == [text for text, _ in pairs]
    assert samples.encodings == {"cp1252": 18, "gb18030": 9, "utf-8": 1}
    assert {note.split(" (")[0] for note in samples.notes} == {
        "9 texts not UTF-8, read as gb18030",
        "18 texts not UTF-8, read as cp1252",
    }


def test_the_named_encoding_holds_for_what_is_not_utf8(tmp_path) -> None:
    folder = write_folder(tmp_path / "d", ["é ü".encode("cp437"), "天".encode()])
    samples = read_samples(folder, {"encoding": "cp437"})
    assert [sample.text for sample in samples] == ["é ü", "天"]
    assert samples.notes == ()
    with pytest.raises(DataError, match=r"0.txt: '\\x82 \\x81' is not utf-8; correct --encoding or leave it out"):
        read_samples(folder, {"encoding": "utf-8"})
    with pytest.raises(DataError, match="--encoding nope: no such encoding; as in utf-8, cp1252"):
        read_samples(folder, {"encoding": "nope"})


def test_an_encoding_of_wide_characters_holds_for_all(tmp_path) -> None:
    (tmp_path / "t.csv").write_bytes("id,text\n1,日本\n".encode("iso2022_jp"))
    assert read_samples(tmp_path / "t.csv", {"encoding": "iso2022_jp"}).samples[0].text == "日本"


def test_many_texts_are_thinned_out_and_still_told() -> None:
    decoder = Decoder()
    decoder.learn(f"{text} {n}".encode("cp1251") for n in range(20_000) for text in LANGUAGES["cp1251"])
    assert [guess.encoding for guess in decoder.guesses] == ["cp1251"]
    assert len(decoder._sample) < 20_000


def test_audit_shows_the_guess(tmp_path) -> None:
    folder = write_folder(tmp_path / "d", [text.encode("cp1252") for text in FRENCH])
    assert any("read as cp1252" in note for note in audit_data(folder, out=tmp_path / "audit").notes)
