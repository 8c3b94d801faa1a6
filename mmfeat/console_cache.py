"""What a person sees of the cache."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mmfeat.console import out, show_table
from mmfeat.wording import counted, size_of

if TYPE_CHECKING:
    from mmfeat.cache import ContentKeys
    from mmfeat.cache.explain import Explanation
    from mmfeat.cache.survey import Entry
    from mmfeat.cache.verify import Verification
    from mmfeat.garbage import Garbage
    from mmfeat.parity import Parity
    from mmfeat.samples import SampleSet


SHOWN_PROBLEMS = 3
LINE = 100  # letters, of a list that grows with the machine's packages


def show_entries(entries: Sequence[Entry], cache: str) -> None:
    """One line an encoder, grouped by data set."""
    if not entries:
        out.print(f"nothing is cached in {cache}; next: mmfeat extract --data DATA --encoders A,B")
        return
    names = ("data", "encoder", "rows", "width", "dtype", "size", "age", "fingerprint")
    table = []
    for entry in entries:
        good, failed = entry.count()
        rows = f"{good:,}" + (f" +{failed:,} failed" if failed else "")
        dtype = entry.spec.storage if entry.spec else "?"
        name = entry.name if entry.spec else f"{entry.name} (damaged, or of another version)"
        width = str(entry.width or "-")
        sizes = (size_of(entry.bytes), age(entry.changed), entry.folder.name[-8:])
        table.append((entry.dataset, name, rows, width, dtype, *sizes))
    show_table(names, table)
    total = sum(entry.bytes for entry in entries)
    out.print(f"{counted(len(entries), 'encoder')}, {size_of(total)} in {cache}")
    if any(entry.problems for entry in entries):
        out.print(f"some files are damaged; next: mmfeat cache verify --cache {shlex.quote(cache)}")
    else:
        out.print("next: mmfeat cache info; it shows how much of a data set each encoder covers")


def show_coverage(samples: SampleSet, entries: Sequence[Entry], keys: Mapping[str, ContentKeys]) -> None:
    """How much of a data set each encoder covers, and what made its vectors."""
    out.print(f"{samples.source}: {len(samples):,} samples")
    for modality, found in keys.items():
        there = int(found.present.sum())
        out.print(
            f"  {modality}: {there:,} samples have one, {len(set(found.keys[found.present].tolist())):,} different"
        )
    for entry in entries:
        out.print(f"{entry.name} ({entry.folder})")
        if entry.spec is None:
            show_problems(entry)
            continue
        good, failed, missing = entry.covered(keys[entry.spec.modality])
        share = good / max(1, good + failed + missing)
        out.print(f"  covers {share:.1%}: {good:,} vectors, {failed:,} unreadable, {missing:,} missing")
        stored = sum(entry.count())
        dtype = f"{entry.width} x {entry.spec.storage}, computed in {entry.spec.arithmetic}"
        files = f"{size_of(entry.bytes)}, {counted(len(entry.shards), 'shard')}, {age(entry.changed)} old"
        out.print(f"  {counted(stored, 'row')} of {dtype}, {files}")
        out.print(f"  weights {entry.spec.weights[:40]}, fingerprint {entry.spec.fingerprint[:16]}")
        versions = entry.provenance.get("versions")
        if isinstance(versions, Mapping):
            made = ", ".join(f"{name} {version}" for name, version in versions.items())
            out.print(textwrap.fill(f"made with {made}", LINE, initial_indent="  ", subsequent_indent="    "))
        show_problems(entry)


def show_problems(entry: Entry) -> None:
    """The first few things that are wrong in an encoder's folder."""
    for problem in list(entry.problems.values())[:SHOWN_PROBLEMS]:
        out.print(f"  {problem}")
    if len(entry.problems) > SHOWN_PROBLEMS:
        out.print(f"  and {len(entry.problems) - SHOWN_PROBLEMS:,} more problems; mmfeat cache verify lists them all")


def show_explanations(explanations: Sequence[Explanation]) -> None:
    """The outcome for each encoder, and its reasons."""
    for explanation in explanations:
        first, *rest = explanation.reasons
        out.print(f"{explanation.encoder}: {explanation.outcome}: {first}")
        for reason in rest:
            out.print(f"  {reason}")
    if any(explanation.outcome == "miss" for explanation in explanations):
        out.print("next: mmfeat extract with these flags computes what is missing")


def show_verification(result: Verification, cache: str) -> None:
    """What was looked at, each damage, and what to do."""
    for damage in result.damages:
        out.print(f"damaged: {damage.path}: {damage.reason}")
        if damage.moved:
            out.print(f"  moved to {damage.moved}")
    if result.doubles:
        out.print(f"{result.doubles:,} rows are stored twice (harmless: the first is read)")
    checked = ", ".join(
        [counted(result.encoders, "encoder"), counted(result.shards, "shard"), counted(result.rows, "row")]
    )
    checked += f", {size_of(result.bytes)}"
    if not result.damages:
        out.print(f"all sound: {checked} in {cache}; there is nothing to do")
        return
    out.print(f"{len(result.damages)} damaged among {checked} in {cache}")
    moved = "mmfeat extract computes what was moved again"
    move = "" if result.sound else f"mmfeat cache verify --cache {shlex.quote(cache)} --quarantine; then "
    out.print(f"next: {move}{moved}")


def show_parity(results: Sequence[Parity]) -> None:
    """The largest deviation of each encoder from its library's plain float32 call."""
    for parity in results:
        if not parity.rows:
            out.print(f"parity not checked: {parity.encoder}: none of its rows is cached; mmfeat extract computes them")
            continue
        verdict = "holds" if parity.holds else "DOES NOT HOLD"
        worst = f", worst sample {parity.sample}" if parity.sample else ""
        deviation = f"largest deviation {parity.deviation:.1e}, smallest cosine {parity.cosine:.6f}"
        out.print(f"parity {verdict}: {parity.encoder}: {counted(parity.rows, 'row')}, {deviation}{worst}")


def show_garbage(garbage: Sequence[Garbage], runs: Sequence[str]) -> None:
    """What could go, and why."""
    table = [
        (str(piece.folder), str(len(piece.files)), size_of(piece.bytes), age(piece.changed), piece.reason)
        for piece in garbage
    ]
    looked = f"runs in {', '.join(runs)}" if runs else "no runs"
    if garbage:
        show_table(("folder", "files", "size", "age", "why"), table)
        out.print(f"{size_of(sum(piece.bytes for piece in garbage))} could go (looked at {looked} and all extractions)")
    else:
        out.print(f"nothing to delete (looked at {looked} and all extractions)")


def age(changed: float) -> str:
    """How long ago, for people."""
    seconds = max(0.0, time.time() - changed)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
