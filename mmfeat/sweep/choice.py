"""The choice of a sweep: which heads on which modalities, and the encoders that this takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmfeat.baselines.trees import check_lightgbm
from mmfeat.encoders.registry import Tower
from mmfeat.errors import HeadError
from mmfeat.heads.registry import BASELINES, FUSIONS, NEEDS_TOKENS, TWINS
from mmfeat.samples.dataset import MODALITIES

MODALITY_SETS = ("both", "text", "image")


def usable_towers(towers: Sequence[Tower]) -> list[Tower]:
    """Pooled vectors, of all views, and tokens; prefixes are for fine-tuning."""
    usable = [tower for tower in towers if tower.spec.output in ("pooled", "tokens")]
    return [tower for tower in usable if tower.spec.output == "pooled" or tower.spec.view == "none"]


def needed_towers(towers: Sequence[Tower], pairs: Sequence[tuple[str, str]], attend: str) -> list[Tower]:
    """Tokens only where a head reads them; only modalities that some head sees."""
    reads_tokens = attend == "tokens" and any(head == NEEDS_TOKENS for head, _ in pairs)
    seen = {modality for _, modality in pairs}
    return [
        tower
        for tower in towers
        if (tower.spec.output == "pooled" or reads_tokens) and ("both" in seen or tower.spec.modality in seen)
    ]


def choose_pairs(
    fusion: Sequence[str], baselines: Sequence[str], modalities: Sequence[str], towers: Sequence[Tower], attend: str
) -> list[tuple[str, str]]:
    """(head, modality set) of everything to train, without heads that are another one where they are alone."""
    sets = _checked_modalities(modalities, towers)
    heads = _checked_heads(fusion, FUSIONS, "--fusion") + _checked_heads(baselines, BASELINES, "--baselines")
    if not heads:
        raise HeadError("no head was asked for; name one with --fusion or --baselines")
    check_lightgbm(heads)
    pairs = [(head, m) for m in sets for head in heads if m == "both" or TWINS.get(head) not in heads]
    if NEEDS_TOKENS not in heads or attend == "pooled":
        return pairs
    have = {tower.spec.modality for tower in towers if tower.spec.output == "tokens"}
    lacking = [
        (head, m) for head, m in pairs if head == NEEDS_TOKENS and not (set(MODALITIES) if m == "both" else {m}) <= have
    ]
    if lacking and NEEDS_TOKENS in fusion:
        raise HeadError(
            f"--fusion {NEEDS_TOKENS} on {lacking[0][1]} needs token states; run mmfeat extract --outputs "
            "pooled,tokens first, or let it attend to pooled vectors with --attend pooled"
        )
    return [pair for pair in pairs if pair not in lacking]


def _checked_heads(names: Sequence[str], known: Collection[str], flag: str) -> list[str]:
    """Names without repetition; `all` stands for every known one and `none` for nothing."""
    wanted = [each for name in names for each in (known if name == "all" else [name]) if each != "none"]
    if unknown := [name for name in wanted if name not in known]:
        hint = "; early fusion needs pixels: mmfeat finetune --fusion early" if "early" in unknown else ""
        raise HeadError(f"{flag} {','.join(unknown)}: use all, none, or some of {', '.join(known)}{hint}")
    return list(dict.fromkeys(wanted))


def _checked_modalities(names: Sequence[str], towers: Sequence[Tower]) -> list[str]:
    """The modality sets that the encoders can serve; with one modality there is no `both`."""
    present = {tower.spec.modality for tower in towers}
    unknown = [name for name in names if name not in MODALITY_SETS]
    if unknown:
        raise HeadError(f"--modalities {','.join(unknown)}: use some of {', '.join(MODALITY_SETS)}")
    usable = [name for name in dict.fromkeys(names) if name in present or (name == "both" and len(present) == 2)]
    if not usable:
        raise HeadError(f"--modalities {','.join(names)}: the encoders give {', '.join(sorted(present))} only")
    return usable
