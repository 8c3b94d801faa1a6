"""The audit: every fault that was put into a data set is found, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.audit.result import Audit, read_audit
from mmfeat.errors import ConfigError, DataError, RunError
from tests.audit.audited import FAULTY, LONG, again, photo, rows, write_folder

TABLES = {"duplicates", "conflicts", "leaks", "files", "label_errors", "balance", "profile"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("audited")
    write_folder(place / "tweets", FAULTY)
    audit_data(place / "tweets", heads=place / "heads", out=place / "audit")
    return place


def groups(place: Path, modality: str, table: str = "duplicates") -> list[list[tuple[str, str]]]:
    """(id, kind) of the members of each group, by group."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows(place / "audit" / "tweets" / f"{table}.csv"):
        if row["modality"] == modality:
            found.setdefault(row["group"], []).append((row["id"], row["kind"]))
    return list(found.values())


def test_equal_and_near_texts_and_photos(place: Path) -> None:
    assert groups(place, "text") == [
        [("a1", "exact"), ("a2", "exact"), ("u1", "exact")],
        [("b1", "near"), ("b2", "near")],
    ]
    assert groups(place, "image") == [
        [("a1", "exact"), ("a2", "near"), ("u1", "exact")],
        [("c1", "exact"), ("c2", "exact")],
    ]
    assert groups(place, "pair") == [[("a1", "exact"), ("a2", "near"), ("u1", "exact")]]


def test_conflicts_say_what_is_alike_and_the_labels(place: Path) -> None:
    assert groups(place, "text", "conflicts") == [[("a1", "exact"), ("a2", "exact")]]
    assert groups(place, "pair", "conflicts") == [[("a1", "near"), ("a2", "near")]]
    audit = read_audit(place / "audit" / "tweets")
    assert audit.conflicts["image"]["groups"] == 1  # c1 and c2 agree
    assert (audit.conflicts["pair"]["pairs"], audit.conflicts["pair"]["disagreeing_pairs"]) == (1, 1)
    assert audit.conflicts["text"]["pairs"] == 2
    assert {row["label"] for row in rows(audit.folder / "conflicts.csv")} == {"neg", "pos"}


def test_twins_of_unlabelled_samples_are_told_apart_from_leaks(place: Path) -> None:
    audit = read_audit(place / "audit" / "tweets")
    assert audit.shared == {"text": 1, "image": 1, "pair": 1}
    assert audit.leaks is None
    found = rows(audit.folder / "leaks.csv")
    assert {(row["id"], row["twin_id"], row["twin_label"], row["part"]) for row in found} == {
        ("u1", "a1", "neg", "unlabelled")
    }


def test_balance_with_intervals(place: Path) -> None:
    balance = read_audit(place / "audit" / "tweets").balance
    row = balance["parts"]["all"]["classes"]["pos"]
    assert (row["count"], balance["parts"]["all"]["samples"]) == (5, 9)
    assert row["low"] == pytest.approx(0.2667, abs=1e-3)  # Wilson, by hand
    assert row["high"] == pytest.approx(0.8112, abs=1e-3)


def test_the_audit_reads_back_as_it_was_and_everything_is_there(place: Path) -> None:
    audit = read_audit(place / "audit" / "tweets")
    assert Audit.from_json(json.loads(json.dumps(audit.to_json())), audit.folder) == audit
    assert {path.name for path in audit.folder.iterdir()} == {f"{name}.csv" for name in TABLES} | {"audit.json"}
    assert audit.samples == 10
    assert audit.labelled == 9
    assert audit.encodings == {"utf-8": 10}
    with pytest.raises(ValueError, match="not an audit"):
        Audit.from_json({**audit.to_json(), "format": 0}, audit.folder)
    with pytest.raises(DataError, match="no finished audit here"):
        read_audit(place)


def test_the_same_data_give_the_same_bytes(place: Path) -> None:
    audit_data(place / "tweets", heads=place / "heads", out=place / "second", workers=3)
    for file in (place / "audit" / "tweets").iterdir():
        assert (place / "second" / "tweets" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_data_hash_is_a_run_s_and_changes_with_a_label(place: Path, tmp_path: Path) -> None:
    from mmfeat.cache.store import Cache
    from mmfeat.runs.run import hash_data
    from mmfeat.samples.dataset import read_samples

    labelled = read_samples(place / "tweets").labelled
    cache = Cache(tmp_path, "tweets")
    keys = {modality: cache.content_keys(labelled, modality) for modality in ("text", "image")}
    before = read_audit(place / "audit" / "tweets").data_hash
    assert before == hash_data(labelled, keys)
    changed = [(*each[:3], "pos" if each[0] == "a1" else each[3]) for each in FAULTY]
    assert audit_data(write_folder(tmp_path / "tweets", changed), run="none", out=tmp_path / "a").data_hash != before


def test_a_table_with_named_columns_and_no_photos(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"guid,caption,tag\n1,{LONG},pos\n2,{LONG},neg\n3,,pos\n4,  ,\n")
    columns = {"id": "guid", "text": "caption", "label": "tag"}
    audit = audit_data(tmp_path / "t.csv", columns=columns, out=tmp_path / "audit", run="none")
    assert audit.folder == tmp_path / "audit" / "t"
    assert audit.conflicts["text"]["exact_groups"] == audit.conflicts["pair"]["exact_groups"] == 1
    assert [(each["modality"], each["what"], each["count"]) for each in audit.odd] == [("text", "missing", 2)]
    assert "no sample has a photo" in audit.notes
    assert audit.profile["all"]["image"] == {"photos": 0}
    assert not any("label errors" in note for note in audit.notes)


def test_short_texts_without_photos_in_common_are_no_pairs(tmp_path: Path) -> None:
    samples = [("1", "so happy", None, "pos"), ("2", "so happy", None, "neg"), ("3", "so happy", photo(1), "pos")]
    samples += [("4", "so happy", again(1), "neg"), ("5", LONG, None, "pos"), ("6", LONG, None, "neg")]
    write_folder(tmp_path / "tweets", samples)
    audit = audit_data(tmp_path / "tweets", out=tmp_path / "audit", run="none")
    assert [[id for id, _ in group] for group in groups(tmp_path, "pair")] == [["3", "4"], ["5", "6"]]
    assert audit.conflicts["pair"]["pairs"] == audit.conflicts["text"]["pairs"] == 2
    assert groups(tmp_path, "text") == [[("3", "exact"), ("4", "exact")], [("5", "exact"), ("6", "exact")]]


def test_photos_without_any_text(tmp_path: Path) -> None:
    samples = [("1", None, photo(1), "pos"), ("2", None, again(1), "neg"), ("3", None, photo(2), "neg")]
    audit = audit_data(write_folder(tmp_path / "d", samples), out=tmp_path / "audit", run="none")
    assert audit.conflicts["pair"]["disagreeing_pairs"] == 1  # without text the photo is all there is
    assert audit.odd == []
    assert audit.profile["all"]["text"] == {"texts": 0}
    assert "no sample has a text" in audit.notes


def test_all_texts_empty(tmp_path: Path) -> None:
    samples = [(str(number), " \n", photo(number), "pos" if number % 2 else "neg") for number in range(4)]
    audit = audit_data(write_folder(tmp_path / "d", samples), out=tmp_path / "audit", run="none")
    assert audit.duplicates["text"]["groups"] == audit.duplicates["pair"]["groups"] == 0
    assert audit.profile["all"]["text"] == {"texts": 0}
    assert [(each["what"], each["count"]) for each in audit.odd] == [("empty", 4)]


def test_no_labels_at_all_and_one_class(tmp_path: Path) -> None:
    bare = [(id, text, image, "") for id, text, image, _ in FAULTY]
    audit = audit_data(write_folder(tmp_path / "bare", bare), out=tmp_path / "audit")
    assert audit.labelled == 0
    assert audit.balance["classes"] == []
    assert audit.shared == {}
    assert audit.duplicates["text"]["groups"] == 2
    assert all(each["groups"] == 0 and each["wrong"] is None for each in audit.conflicts.values())
    one = [(id, text, image, "pos") for id, text, image, _ in FAULTY]
    audit = audit_data(write_folder(tmp_path / "one", one), out=tmp_path / "audit")
    assert audit.balance["parts"]["all"]["classes"]["pos"]["share"] == 1
    assert all(each["groups"] == 0 and each["wrong"] is None for each in audit.conflicts.values())


def test_files_that_belong_to_no_sample(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", FAULTY)
    (folder / "data" / "zz.jpg").write_bytes(photo(9))
    (folder / "data" / "a1.png").write_bytes(photo(9))
    (folder / "data" / "notes.md").write_text("mine")
    notes = audit_data(folder, out=tmp_path / "audit").notes
    assert [note for note in notes if "belong to no sample" in note] == [
        "3 files of the data folder belong to no sample (first: a1.png)"
    ]


def test_nothing_is_written_among_the_data(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", FAULTY)
    before = sorted(folder.rglob("*"))
    for out in (tmp_path, folder, folder / "audit"):
        with pytest.raises(ConfigError, match="lies among the data"):
            audit_data(folder, out=out)
    with pytest.raises(ConfigError, match="--out is empty"):
        audit_data(folder, out="")
    assert sorted(folder.rglob("*")) == before


def test_an_unfinished_audit_has_no_summary(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", FAULTY)
    audit = audit_data(folder, out=tmp_path / "audit")
    (audit.folder / "profile.csv").unlink()
    (audit.folder / "profile.csv").mkdir()  # a table that cannot be written
    with pytest.raises(Exception, match=r"profile\.csv"):
        audit_data(folder, out=tmp_path / "audit")
    with pytest.raises(DataError, match="no finished audit"):
        read_audit(audit.folder)


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", FAULTY)
    with pytest.raises(RunError, match="no finished run here"):
        audit_data(folder, out=tmp_path / "audit", run=tmp_path / "nowhere")
    assert any("no run in" in note for note in audit_data(folder, out=tmp_path / "a", heads=tmp_path).notes)
