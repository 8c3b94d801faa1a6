"""`mmfeat audit`: the flags of the audit, and its findings as lines and tables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import SHOWN_LABELS, ConsoleProgress, one_line, out, show_notes, show_table
from mmfeat.cli.flags import LATEST_READING, AnyData, CacheFolder, Heads, Labels, Parameters, Seed, option, reading
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.system.wording import counted, head_label, interval, shown

if TYPE_CHECKING:
    from mmfeat.audit.result import Audit


SHOWN_ROWS = 12  # kinds of odd files
SHOWN_ERRORS = 5  # likely label errors
SHOWN_PARTS = 6  # parts of a data set in the table of classes
SHOWN_SHARES = 5  # languages or scripts
TABLES = ("duplicates", "conflicts", "leaks", "files", "label_errors", "balance", "profile")


def show_audit(audit: Audit) -> None:
    """Print duplicates, leaks, oddities, profile, balance and label errors; parts without findings are left out."""
    out.print(f"{shown(audit.data)}: {counted(audit.samples, 'sample')}, {audit.labelled:,} labelled")
    show_notes(audit.notes)
    _show_twins(audit)
    _show_leaks(audit)
    _show_odd(audit)
    _show_profile(audit)
    _show_balance(audit)
    _show_errors(audit)
    out.print(f"tables {audit.folder}/*.csv: {', '.join(TABLES)}")
    out.print(f"audit {audit.file}")


def _show_twins(audit: Audit) -> None:
    if not any(counts["groups"] for counts in audit.duplicates.values()):
        out.print("no duplicates in text or photo")
        return
    header = ("duplicates", "groups", "samples", "equal", "largest", "conflicts", "pairs at odds")
    rows = []
    for modality, counts in audit.duplicates.items():
        conflict = audit.conflicts[modality]
        unlike = f"{conflict['disagreeing_pairs']:,} of {conflict['pairs']:,}" if conflict["pairs"] else ""
        cells = [f"{counts[name]:,}" for name in ("groups", "samples", "exact_samples", "largest")]
        rows.append((modality, *cells, f"{conflict['groups']:,}", unlike))
    show_table(header, rows, ("largest", "equal", "samples"))
    pair = audit.conflicts["pair"]
    if pair["disagreeing_pairs"]:
        of_pairs = f"{pair['disagreeing_pairs']:,} of {pair['pairs']:,} duplicate pairs"
        out.print(f"  {of_pairs} carry different labels: look at conflicts.csv")
        out.print(f"  if errors are random, {_percent(pair['wrong'])} of the labels of duplicates are wrong")


def _show_leaks(audit: Audit) -> None:
    if audit.leaks is not None:
        tested, leaking = sum(audit.leaks["tested"].values()), audit.leaks["samples"]
        ways: dict[str, int] = {}
        for way in audit.leaks["ways"]:
            name = f"{way['part']}, {way['kind']} {way['modality']}"
            ways[name] = ways.get(name, 0) + way["samples"]
        out.print(f"leaks: {leaking:,} of {tested:,} samples have a duplicate among those their fold trained on")
        out.print(f"  splits in {audit.leaks['splits']}")
        if ways:
            out.print(f"  {', '.join(f'{name} {count:,}' for name, count in ways.items())}")
    if audit.shared:
        counts = ", ".join(f"{name} {count:,}" for name, count in audit.shared.items())
        out.print(f"unlabelled samples with a labelled duplicate: {counts}")


def _show_odd(audit: Audit) -> None:
    if not audit.odd:
        out.print("no odd text or photo")
        return
    rows = [(o["modality"], o["what"], f"{o['count']:,}", o["id"], one_line(o["detail"])) for o in audit.odd]
    show_table(("odd", "what", "count", "first", "there"), rows[:SHOWN_ROWS])
    if (more := len(audit.odd) - SHOWN_ROWS) > 0:
        out.print(f"and {more} more kinds in files.csv")


def _show_profile(audit: Audit) -> None:
    texts, photos = audit.profile["all"]["text"], audit.profile["all"]["image"]
    if texts["texts"]:
        length = texts["characters"]
        marks = ", ".join(f"{name} {share:.0%}" for name, share in texts["marks"].items() if share >= 0.005)
        out.print(
            f"texts: {texts['texts']:,}, median {length['median']:,.0f} characters (5 % below {length['q05']:,.0f}, "
            f"5 % above {length['q95']:,.0f})"
        )
        if marks:
            out.print(f"  with {marks}")
        for name, cut in texts.get("cut", {}).items():
            out.print(f"  {cut['texts']:,} are longer than the {cut['limit']:,} tokens that {shown(name)} reads")
        kind = "languages" if "languages" in texts else "scripts"
        out.print(f"  {kind}: {_first_shares(texts[kind])}")
        odd = {name: count for name, count in audit.encodings.items() if name != "utf-8"}
        if odd:
            out.print(f"  not UTF-8: {', '.join(f'{count:,} {name}' for name, count in odd.items())}")
    if photos["photos"]:
        sides = (f"{photos[side]['median']:,.0f}" for side in ("width", "height"))
        least = min(photos[side]["min"] for side in ("width", "height"))
        out.print(f"photos: {photos['photos']:,}, median {' x '.join(sides)} pixels, least side {least:,.0f}")


def _first_shares(shares: Mapping[str, float]) -> str:
    first, rest = list(shares.items())[:SHOWN_SHARES], list(shares.values())[SHOWN_SHARES:]
    others = [f"{len(rest)} others {sum(rest):.1%}"] if rest else []
    return ", ".join([f"{name} {share:.1%}" for name, share in first] + others)


def _show_balance(audit: Audit) -> None:
    from mmfeat.evaluation.significance import LEVEL

    classes, parts = audit.balance["classes"], audit.balance["parts"]
    if not classes:
        out.print("no sample is labelled")
        return
    names = list(parts)[: 1 + SHOWN_PARTS]
    rows = []
    for label in classes[:SHOWN_LABELS]:
        row = parts["all"]["classes"][label]
        share = f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        others = [f"{parts[name]['classes'][label]['share']:.1%}" for name in names[1:]]
        rows.append((label, f"{row['count']:,}", share, *others))
    show_table(("class", "count", "share", *names[1:]), rows, names[:0:-1])
    if (more := len(classes) - SHOWN_LABELS) > 0:
        out.print(f"and {more} more classes in balance.csv")
    if audit.balance["p"] is not None and audit.balance["p"] < LEVEL:
        out.print(f"the parts differ in their classes by more than chance (chi-squared, p {audit.balance['p']:.3g})")


def _show_errors(audit: Audit) -> None:
    errors = audit.label_errors
    if errors is None:
        return
    judge = head_label(errors["head"], errors["modalities"])
    out.print(f"label errors: {errors['errors']:,} of {errors['samples']:,} labels are in doubt, says {judge} of")
    out.print(f"  {errors['run']}")
    rows = []
    for row in errors["examples"][:SHOWN_ERRORS]:
        numbers = (f"{row[name]:.2f}" for name in ("probability", "self_confidence"))
        rows.append((row["id"], row["label"], row["suggested"], *numbers, one_line(row["text"])))
    if rows:
        show_table(("id", "label", "rather", "p", "p label", "text"), rows)
    _show_noise(errors)


def _show_noise(errors: Mapping[str, Any]) -> None:
    """Print the share of wrong labels, and the noise ceiling: the scores of a perfect head on these labels."""
    from mmfeat.runs.entry import Interval

    noise, scored = errors["noise"], errors["macro_f1"]
    if planted := noise.get("planted"):
        found = f"test of this list: of labels changed on purpose, {planted['found']:.0%} are at its top"
        out.print(f"{found} (chance: {planted['share']:.0%})")
    if not noise["claimed"]:
        out.print("wrong labels: none are proven; a model this unsure doubts as many right ones")
        return
    shares = ", ".join(f"{name} {_percent(share)}" for name, share in list(noise["classes"].items())[:SHOWN_LABELS])
    if errors["multilabel"]:
        out.print("wrong labels, beyond those that a model this unsure doubts by mistake:")
        out.print(f"  {shares}")
        return
    out.print(f"wrong labels: {_percent(noise['wrong'])}, beyond those that a model this unsure doubts by mistake")
    out.print(f"  {shares}")
    reached = interval(Interval(**scored))
    out.print(f"noise ceiling: a perfect model would score macro-F1 {_number(noise['macro_f1'])}")
    out.print(f"  and accuracy {_number(noise['accuracy'])} on these labels; {errors['head']} has {reached}")


def _percent(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "none"
    return f"{score['value']:.0%} [{score['low']:.0%}, {score['high']:.0%}]"


def _number(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


PARAMETERS: Parameters = {
    "data": (AnyData, None),
    **LATEST_READING,
    "labels": (Labels, None),
    "export": (option("Write the labels in doubt to this CSV file, to correct them.", str | None), None),
    "split_dir": (option("Splits to search for leaks, such as a run folder.  [default: the run's]", str | None), None),
    "run": (option("The run that judges the labels, or none.  [default: the best on the data]", str | None), None),
    "heads": (Heads, "heads"),
    "cache": (CacheFolder, "cache"),
    "out": (option("Folder of the audits, with a folder for each data set."), "audit"),
    "workers": (option("Photos that are read at once; 0: by the machine.", int, least=0), 0),
    "seed": (Seed, 42),
}


@flags.takes(PARAMETERS, "no audit was written")
def audit(context: typer.Context, **values: Any) -> None:
    """Find duplicates, leaks, odd files and likely label errors. Nothing is changed.

    \b
    mmfeat audit --data tweets --split-dir splits
    """
    where = {name: values.pop(name) for name in ("data", "cache", "labels", *LATEST_READING)}
    data, columns, extracted = _data_and_columns(where)
    from mmfeat.audit.audit import audit_data

    result = audit_data(data, columns=columns, cache=where["cache"], **values, progress=ConsoleProgress())
    show_audit(result)
    if values["export"] and result.label_errors:
        out.print(f"labels in doubt {values['export']} ({counted(result.label_errors['errors'], 'sample')})")
        name = shlex.quote(values["export"])
        out.print(f"next: fill in its column label where a label is wrong; mmfeat heads --labels {name}")
        return
    step = f"{'heads' if extracted else 'extract'} --data {shlex.quote(shown(data))}"
    if result.label_errors:
        step = f"report --run {shlex.quote(result.label_errors['run'])}"
    out.print(f"next: mmfeat {step}")


def _data_and_columns(given: Mapping[str, Any]) -> tuple[str, dict[str, str], bool]:
    """Return data, names of its columns, and whether it was extracted; the latest extraction fills in what is None."""
    data, cache = given["data"], given["cache"]
    from mmfeat.extraction.requests import latest_request

    try:
        request = latest_request(cache, data)
    except CacheMissError as error:
        if data is None:
            raise ConfigError(
                f"nothing was extracted into {cache}, so --data is needed: a folder or a table"
            ) from error
        return data, reading(given) or {}, False
    if data is None:
        out.print(f"using {shown(request.data)}")
    named = reading(given, request.columns)
    return data or request.data, request.columns if named is None else named, True
