"""Notes for people on the encoders that they named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmfeat.encoders.lexicon import FOREIGN, english_share
from mmfeat.encoders.registry import Tower, absolute_request, is_family
from mmfeat.encoders.weights import MODULES


def notes_on(towers: Sequence[Tower]) -> list[str]:
    """A line for each tower that takes the tokens of a checkpoint whose authors publish another vector, and for each
    model with two towers of which only that of photos heeds `--layers`."""
    layered = {tower.request: tower.spec.layers for tower in towers if tower.spec.layers > 1}
    texts = {tower.request for tower in towers if (tower.spec.modality, tower.spec.layers) == ("text", 1)}
    requests = dict.fromkeys(tower.request for tower in towers if tower.spec.family == "bert")
    folders = {request: Path(request.partition(":")[2]) for request in requests}
    return [
        *(
            f"{request}: --layers {layered[request]} is about photos; texts have the model's own vectors"
            for request in layered
            if request in texts
        ),
        *(
            f"{request} has pooling and length of its own ({MODULES}); st:{folder} gives the vector as published"
            for request, folder in folders.items()
            if (folder / MODULES).is_file()
        ),
    ]


def notes_on_names(requests: Sequence[str]) -> list[str]:
    """A line for each request without a family, which says the family that its files have."""
    read = {request: absolute_request(request) for request in requests}
    return [
        f"{request}: no family is named; by its files this is {name.partition(':')[0]}"
        for request, name in read.items()
        if not is_family(request.partition(":")[0]) and is_family(name.partition(":")[0])
    ]


def notes_on_texts(towers: Sequence[Tower], texts: Iterable[str]) -> list[str]:
    """A line where a lexicon of English words is asked for texts that hardly are English."""
    if not any(tower.spec.family == "lexicon" for tower in towers) or (share := english_share(texts)) >= FOREIGN:
        return []
    return [f"lexicon knows English sentiment only; {share:.0%} of texts have one of ten common English words"]
