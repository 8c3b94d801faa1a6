"""`mmfeat audit`: the flags of the audit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmfeat.cli.console import SHOWN_LABELS, ConsoleProgress, out
from mmfeat.cli.flags import AnyColumns, AnyData, CacheFolder, Seed, interruptible, pairs
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.system.wording import head_label, interval, shown

if TYPE_CHECKING:
    from mmfeat.audit.result import Audit


SHOWN_ROWS = 12
SHOWN_ERRORS = 5
SHOWN_PARTS = 6
TEXT_WIDTH = 34
NEAR = (0, 2, 0, 0)
TABLES = ("duplicates", "conflicts", "leaks", "files", "label_errors", "balance", "profile")


def show_audit(audit: Audit) -> None:
    """Duplicates, leaks, oddities, profile, balance and label errors, each only where there is something."""
    out.print(f"{shown(audit.data)}: {audit.samples:,} samples, {audit.labelled:,} labelled")
    for note in audit.notes:
        out.print(f"note: {note}")
    _show_twins(audit)
    _show_leaks(audit)
    _show_odd(audit)
    _show_profile(audit)
    _show_balance(audit)
    _show_errors(audit)
    out.print(f"tables {audit.folder}/*.csv: {', '.join(TABLES)}")
    out.print(f"audit {audit.file}")


def _show_twins(audit: Audit) -> None:
    if not any(each["groups"] for each in audit.duplicates.values()):
        out.print("no duplicates in text or photo")
        return
    header = ("duplicates", "groups", "samples", "equal", "largest", "conflicts", "unlike pairs")
    table = Table(*header, box=None, padding=NEAR)
    for modality, each in audit.duplicates.items():
        conflict = audit.conflicts[modality]
        pairs = f"{conflict['disagreeing_pairs']:,} of {conflict['pairs']:,}" if conflict["pairs"] else ""
        counts = [f"{each[name]:,}" for name in ("groups", "samples", "exact_samples", "largest")]
        table.add_row(modality, *counts, f"{conflict['groups']:,}", pairs)
    out.print(table)
    pair = audit.conflicts["pair"]
    if pair["disagreeing_pairs"]:
        share = pair["disagreeing_pairs"] / pair["pairs"]
        out.print(f"  {share:.0%} of the pairs that are alike in text and photo have unlike labels")
        out.print(f"  if each label errs alone and evenly, {_percent(pair['wrong'])} of theirs are wrong")


def _show_leaks(audit: Audit) -> None:
    if audit.leaks is not None:
        tested, leaking = sum(audit.leaks["tested"].values()), audit.leaks["samples"]
        ways: dict[str, int] = {}
        for way in audit.leaks["ways"]:
            name = f"{way['part']}, {way['kind']} {way['modality']}"
            ways[name] = ways.get(name, 0) + way["samples"]
        out.print(f"leaks: {leaking:,} of {tested:,} tested samples have a twin in training")
        out.print(f"  splits in {audit.leaks['splits']}")
        if ways:
            out.print(f"  {', '.join(f'{name} {count:,}' for name, count in ways.items())}")
    if audit.shared:
        counts = ", ".join(f"{name} {count:,}" for name, count in audit.shared.items())
        out.print(f"unlabelled with a labelled twin (leaks.csv): {counts}")


def _show_odd(audit: Audit) -> None:
    if not audit.odd:
        out.print("no odd text or photo")
        return
    table = Table("odd", "what", "count", "first", "there", box=None, padding=NEAR)
    for each in audit.odd[:SHOWN_ROWS]:
        table.add_row(
            each["modality"], each["what"], f"{each['count']:,}", _cut(each["id"], 12), _cut(each["detail"], TEXT_WIDTH)
        )
    out.print(table)
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
        told = "languages" if "languages" in texts else "scripts"
        out.print(f"  {told}: {_first_shares(texts[told])}")
        odd = {name: count for name, count in audit.encodings.items() if name != "utf-8"}
        if odd:
            out.print(f"  not UTF-8: {', '.join(f'{count:,} {name}' for name, count in odd.items())}")
    if photos["photos"]:
        sides = (f"{photos[side]['median']:,.0f}" for side in ("width", "height"))
        least = min(photos[side]["min"] for side in ("width", "height"))
        out.print(f"photos: {photos['photos']:,}, median {' x '.join(sides)} pixels, least side {least:,.0f}")


def _first_shares(shares: Mapping[str, float], most: int = 5) -> str:
    names = list(shares)
    rest = sum(shares[name] for name in names[most:])
    found = [f"{name} {shares[name]:.1%}" for name in names[:most]]
    return ", ".join([*found, *([f"{len(names) - most} others {rest:.1%}"] if names[most:] else [])])


def _show_balance(audit: Audit) -> None:
    classes, parts = audit.balance["classes"], audit.balance["parts"]
    if not classes:
        out.print("no sample is labelled")
        return
    names = list(parts)[: 1 + SHOWN_PARTS]
    table = Table("class", "count", "share", *names[1:], box=None, padding=NEAR)
    for label in classes[:SHOWN_LABELS]:
        row = parts["all"]["classes"][label]
        share = f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        others = [f"{parts[name]['classes'][label]['share']:.1%}" for name in names[1:]]
        table.add_row(_cut(label, 20), f"{row['count']:,}", share, *others)
    out.print(table)
    if (more := len(classes) - SHOWN_LABELS) > 0:
        out.print(f"and {more} more classes in balance.csv")
    if audit.balance["p"] is not None and audit.balance["p"] < 0.05:
        out.print(f"the parts differ in their classes by more than chance (chi-squared, p {audit.balance['p']:.3g})")


def _show_errors(audit: Audit) -> None:
    found = audit.label_errors
    if found is None:
        return
    judge = head_label(found["head"], found["modalities"])
    out.print(f"label errors: {found['errors']:,} of {found['samples']:,} labels are doubted by {judge} of")
    out.print(f"  {found['run']}")
    table = Table("id", "label", "rather", "p", "p label", "text", box=None, padding=NEAR)
    for each in found["examples"][:SHOWN_ERRORS]:
        numbers = (f"{each[name]:.2f}" for name in ("probability", "self_confidence"))
        table.add_row(
            _cut(each["id"], 12), _cut(each["label"], 12), _cut(each["suggested"], 12), *numbers, _cut(each["text"], 28)
        )
    if found["examples"]:
        out.print(table)
    noise = found["noise"]
    shares = ", ".join(f"{name} {_percent(share)}" for name, share in list(noise["classes"].items())[:SHOWN_LABELS])
    if found["multilabel"]:
        out.print(f"estimated wrong: {shares}; with several classes a sample no ceiling is told")
    else:
        from mmfeat.runs.entry import Interval

        f1, accuracy, had = noise["macro_f1"], noise["accuracy"], interval(Interval(**found["macro_f1"]))
        out.print(f"estimated wrong: {_percent(noise['wrong'])}")
        out.print(f"  {shares}")
        out.print(f"noise ceiling: macro-F1 {_number(f1)} ({found['head']} has {had})")
        out.print(f"  accuracy {_number(accuracy)}")
        if f1["value"] < found["macro_f1"]["value"]:
            out.print("  below the head itself, which is confident where it errs: no ceiling at all")
    out.print("  if the head is right where it is confident; a weak head doubts good labels")


def _percent(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "none"
    return f"{score['value']:.0%} [{score['low']:.0%}, {score['high']:.0%}]"


def _number(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


Workers = Annotated[int, typer.Option("--workers", help="Photos read at once; 0 suits the machine.", min=0)]


@interruptible("no audit was written")
def audit(
    data: AnyData = None,
    columns: AnyColumns = None,
    split_dir: Annotated[
        str | None, typer.Option(help="Splits whose leaks are looked for, as of a run.  [default: the run's]")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A run that judges the labels, or none.  [default: the best on the data]")
    ] = None,
    heads: Annotated[str, typer.Option(help="Folder of the runs.")] = "heads",
    cache: CacheFolder = "cache",
    out_folder: Annotated[str, typer.Option("--out", help="Folder of the audits, one folder a data set.")] = "audit",
    workers: Workers = 0,
    seed: Seed = 42,
) -> None:
    """Find duplicates, conflicting labels, leaks, odd files and likely label errors; nothing is changed.

    \b
    mmfeat audit --data tweets --split-dir splits
    """
    place, named, extracted = _place(data, columns, cache)
    from mmfeat.audit.audit import audit_data

    found = audit_data(
        place,
        columns=named,
        split_dir=split_dir,
        run=run,
        heads=heads,
        out=out_folder,
        workers=workers,
        seed=seed,
        progress=ConsoleProgress(),
    )
    show_audit(found)
    judged = found.label_errors
    step = f"{'heads' if extracted else 'extract'} --data {shlex.quote(shown(place))}"
    if judged:
        step = f"report --run {shlex.quote(judged['run'])}"
    out.print(f"next: mmfeat {step}")


def _place(data: str | None, columns: str | None, cache: str) -> tuple[str, dict[str, str], bool]:
    """The data and the names of their columns, as given or as the latest extraction had them; whether there is one."""
    from mmfeat.extraction.requests import latest_request

    named = pairs(columns) if columns else None
    try:
        request = latest_request(cache, data)
    except CacheMissError as error:
        if data is None:
            raise ConfigError(
                f"nothing was extracted into {cache}, so --data is needed: a folder or a table"
            ) from error
        return data, named or {}, False
    if data is None:
        out.print(f"using {shown(request.data)}")
    return data or request.data, request.columns if named is None else named, True
