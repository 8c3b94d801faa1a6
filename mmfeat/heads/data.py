"""The input of heads: the vectors of all samples, on the device if the features are in memory, else read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.errors import HeadError
from mmfeat.heads.layers import Batch, Shape, Tokens, norm, norm_table
from mmfeat.heads.tokens import CompactTokens, pooled_tokens, read_tokens
from mmfeat.samples.table_columns import TABLE

ORDER = ("image", "text", TABLE)
CHUNK = 8192  # rows of one read
PREPARED = 2**24  # largest N * D that is normed beforehand; larger data are normed batch by batch
CONSTANT = 1e-6  # a column of no larger deviation does not vary
STATISTICS_ROWS = 65_536  # rows that give mean and deviation, evenly spaced where there are more


class Source:
    """One encoder: the plain vectors of N samples and the vectors of their augmented views."""

    def __init__(self, plain: Block | MappedBlock, views: Sequence[Block | MappedBlock], device: str) -> None:
        self.name, self.device = plain.name, device
        self.blocks = [plain, *views]
        self.masks = np.stack([block.mask for block in self.blocks])
        self.present = torch.from_numpy(self.masks).to(device)
        self.mask = self.present[0]
        self.values: Tensor | None = None
        if isinstance(plain, Block):
            self.values = torch.cat(
                [torch.from_numpy(block.vectors) for block in self.blocks if isinstance(block, Block)]
            ).to(device)
        self.width = self.values.shape[1] if self.values is not None else int(getattr(plain, "width", 0))

    def take(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """(K, B) rows and (K, B) view numbers -> (K, B, D) float32; the plain picture replaces a missing view."""
        if views is None or len(self.blocks) == 1:
            indices = rows
        else:
            views = torch.where(views < len(self.blocks), views, 0)  # another encoder may have more views
            indices = rows + torch.where(self.present[views, rows], views, 0) * len(self.mask)
        if self.values is not None:
            return self.values.index_select(0, indices.flatten()).float().view(*rows.shape, self.width)
        return self._read(indices.cpu().numpy().ravel()).view(*rows.shape, self.width)

    def _read(self, indices: np.ndarray) -> Tensor:
        out = np.zeros((len(indices), self.width), np.float32)
        views, rows = np.divmod(indices, len(self.mask))
        for number in np.unique(views):
            block, asked = self.blocks[number], np.flatnonzero(views == number)
            asked = asked[np.argsort(rows[asked], kind="stable")]  # the order of the rows on disk
            assert isinstance(block, MappedBlock)
            values = block.batch(rows[asked])[0]
            if values.shape[1]:  # the token axis of a batch without any vector is empty
                out[asked] = values[:, 0]
        return torch.from_numpy(out).to(self.device)

    def statistics(self, rows: np.ndarray, unit: bool = False) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D,) standard deviation of the present rows, of which `unit` scales each to the length 1; the
        deviation is 1 where nothing varies."""
        rows = rows[self.masks[0, rows]]
        if len(rows) > STATISTICS_ROWS:
            rows = rows[np.linspace(0, len(rows) - 1, STATISTICS_ROWS).astype(np.int64)]
        pieces = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        mean, variance = (torch.zeros(self.width, dtype=torch.float64) for _ in range(2))
        for piece in pieces:
            mean += self._piece(piece, unit).sum(0) / len(rows)
        for piece in pieces:
            variance += (self._piece(piece, unit) - mean).square().sum(0) / len(rows)
        std = variance.sqrt()
        return mean.float(), torch.where(std > CONSTANT, std, 1.0).float()

    def _piece(self, rows: np.ndarray, unit: bool) -> Tensor:
        values = self.take(torch.from_numpy(rows[None]).to(self.device))[0].cpu().double()
        return F.normalize(values, dim=-1) if unit else values


class TableSource(Source):
    """The columns of a table, of which a present row may lack numbers."""

    def statistics(self, rows: np.ndarray, unit: bool = False) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D,) standard deviation of the numbers that are there. The deviation is infinite where nothing
        varies, so that a category that no training row has counts for nothing."""
        values = self._piece(rows[self.masks[0, rows]], unit=False)
        mean = values.nanmean(0).nan_to_num()
        std = (values - mean).square().nanmean(0).sqrt()
        return mean.float(), torch.where(std > CONSTANT, std, torch.inf).float()


class HeadData:
    """The vectors and tokens of N samples, from which batches for heads are made. A fusion is built for `shape`.

    `modality` is text, image, table, or both, which stands for all that there are. `tokens` is "tokens" where
    cross-attention reads token states, "pooled" where it reads each pooled vector as one token, and "" for other heads.
    """

    tables: NormedTables | None = None
    compact: Mapping[str, list[CompactTokens]] | None = None

    def __init__(self, features: Features, modality: str = "both", device: str = "cpu", tokens: str = "") -> None:
        self.ids, self.device, self._classes = features.ids, device, features.classes
        wanted = [name for name in ORDER if modality in ("both", name)]
        self.sources = {name: list(_sources(features, name, device)) for name in wanted}
        self.sources = {name: sources for name, sources in self.sources.items() if sources}
        if not self.sources:
            raise HeadError(f"no pooled vectors of {modality}; extract them with --outputs pooled")
        self.token_blocks = {
            name: [block for block in features.mapped if (block.modality, block.output) == (name, "tokens")]
            for name in self.sources
            if name != TABLE
        }
        self.attend = tokens
        self.views = max(len(source.blocks) for sources in self.sources.values() for source in sources) - 1
        self.complete = all(source.masks[0].all() for sources in self.sources.values() for source in sources)
        self.shape = Shape(
            {name: tuple(source.width for source in sources) for name, sources in self.sources.items()},
            self._token_widths(),
        )
        self._statistics: dict[tuple[bytes, bool], dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._normed: dict[bytes, dict[str, list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """D, the width of all encoders side by side."""
        return self.shape.total

    @property
    def token_values(self) -> int:
        """Numbers in the tokens of a sample that has the longest sequence of every source."""
        if self.attend != "tokens":
            return sum(map(sum, self.shape.tokens.values()))
        widths = (zip(self.token_blocks[name], widths, strict=True) for name, widths in self.shape.tokens.items())
        return sum(int(block.lengths.max(initial=0)) * width for pairs in widths for block, width in pairs)

    @property
    def classes(self) -> dict[int, np.ndarray]:
        """First column of an encoder in `rows` -> the (C, D) vectors of the class names by the same model."""
        starts = np.cumsum([0, *(source.width for source in self._all())]).tolist()
        return {
            start: self._classes[source.name]
            for start, source in zip(starts, self._all(), strict=False)
            if source.name in self._classes and source.width  # 0 where the encoder saw no sample
        }

    @property
    def layout(self) -> tuple[tuple[int, ...], bool]:
        """The widths of the encoders in `rows`, and whether the last of them is a table."""
        return tuple(source.width for source in self._all()), TABLE in self.sources

    def rows(self, rows: np.ndarray, view: int = 0) -> np.ndarray:
        """(n, D) float32 input of baselines: all encoders side by side, NaN where a vector is missing."""
        indices = torch.from_numpy(np.asarray(rows, np.int64)[None]).to(self.device)
        views = torch.full_like(indices, view) if view else None
        parts = []
        for source in self._all():
            part = source.take(indices, views)[0].cpu().numpy()
            part[~source.masks[0, rows]] = np.nan
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def batch(
        self, rows: Tensor, views: Tensor | None = None, dropped: Tensor | None = None, keep: Tensor | None = None
    ) -> Batch:
        """The input of K heads for (K, B) rows, their view numbers, and the index of the modality that each row loses.

        The index is that of the modality among those there are, or -1 for none; `keep` are dropout factors.
        """
        vectors = self._vectors(rows, views)
        kept = {name: dropped != number if dropped is not None else None for number, name in enumerate(self.sources)}
        masks = {name: [self._mask(s, rows, kept[name]) for s in sources] for name, sources in self.sources.items()}
        tokens = self._tokens(rows, vectors, masks, kept)
        return Batch(vectors, masks, tokens, keep, self.tables is not None, self.compact is not None)

    def statistics(self, rows: np.ndarray, unit: bool = False) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Mean and standard deviation of each encoder over training rows, with `unit` of vectors scaled to the length
        1; computed once."""
        key = rows.tobytes(), unit
        if key not in self._statistics:
            self._statistics[key] = {
                name: [source.statistics(rows, unit) for source in sources] for name, sources in self.sources.items()
            }
        return self._statistics[key]

    def prepared(self, keys: Sequence[np.ndarray]) -> HeadData:
        """These data with vectors normed in advance where N * D is small, which saves a quarter of a small head's time.

        `keys` holds, for each of K heads, the rows whose statistics standardise the vectors of the head.
        """
        plain = self.views == 0 and self.attend != "pooled" and all(s.values is not None for s in self._all())
        if not plain or len(self) * self.width > PREPARED:
            return self
        prepared = copy(self)
        prepared.tables = NormedTables(self, keys)
        return prepared

    def compacted(self, compact: Callable[[MappedBlock], CompactTokens]) -> HeadData:
        """These data with compact tokens, on which heads train: their projections have fewer weights."""
        compacted = copy(self)
        compacted.compact = {name: list(map(compact, blocks)) for name, blocks in self.token_blocks.items()}
        widths = {name: tuple(tokens.width for tokens in sources) for name, sources in compacted.compact.items()}
        compacted.shape = replace(self.shape, tokens=widths)
        return compacted

    def expanded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a head, trained on compact tokens or not, for tokens as they are cached."""
        names = {
            f"tokens.{modality}.projections.{number}.weight": tokens
            for modality, sources in (self.compact or {}).items()
            for number, tokens in enumerate(sources)
        }
        return {name: names[name].expanded(x) if name in names else x for name, x in tensors.items()}

    def by_length(self, rows: Tensor) -> Tensor:
        """(K, B) rows -> (K, B) positions, by the number of compact tokens: those that are cut together are alike."""
        if not self.compact:
            return torch.arange(rows.shape[1], device=self.device).expand_as(rows)
        lengths = torch.stack([tokens.lengths[rows] for tokens in list(self.compact.values())[-1]]).sum(0)
        return lengths.argsort(dim=1, stable=True)

    def normed_vectors(self, rows: np.ndarray) -> dict[str, list[Tensor]]:
        """(N, D) vectors of each encoder, normed with the statistics of `rows`; computed once."""
        key = rows.tobytes()
        if key not in self._normed:
            everything = torch.arange(len(self), device=self.device)[None]
            self._normed[key] = {
                name: [
                    (norm_table if name == TABLE else norm)(
                        source.take(everything)[0], *(statistic.to(self.device) for statistic in statistics)
                    )
                    for source, statistics in zip(self.sources[name], by_source, strict=True)
                ]
                for name, by_source in self.statistics(rows).items()
            }
        return self._normed[key]

    def keep_heads(self, heads: Tensor) -> None:
        """Continue with these heads of the stack."""
        if self.tables is not None:
            self.tables.keep_heads(heads)

    def _vectors(self, rows: Tensor, views: Tensor | None) -> dict[str, list[Tensor]]:
        if self.tables is not None:
            return self.tables.take(rows)
        return {name: [source.take(rows, views) for source in sources] for name, sources in self.sources.items()}

    def _all(self) -> Iterator[Source]:
        return (source for sources in self.sources.values() for source in sources)

    def _mask(self, source: Source, rows: Tensor, kept: Tensor | None) -> Tensor | None:
        """(K, B) mask of present vectors; None where all are present, which saves the missing embedding's gradient."""
        if self.complete and kept is None:
            return None
        present = source.mask[rows]
        return present if kept is None else present & kept

    def _token_widths(self) -> dict[str, tuple[int, ...]]:
        if self.attend == "pooled":
            return {name: tuple(source.width for source in self.sources[name]) for name in self.token_blocks}
        if self.attend == "tokens":
            return {name: tuple(block.width for block in blocks) for name, blocks in self.token_blocks.items()}
        return {}

    def _tokens(
        self,
        rows: Tensor,
        vectors: dict[str, list[Tensor]],
        masks: dict[str, list[Tensor | None]],
        kept: dict[str, Tensor | None],
    ) -> dict[str, Tokens]:
        if self.attend == "pooled":
            return pooled_tokens(vectors, masks)
        if not self.attend:
            return {}
        if self.compact is not None:
            tokens = {name: [source.take(rows) for source in sources] for name, sources in self.compact.items()}
        else:
            tokens = {
                name: [read_tokens(block, rows, self.device) for block in blocks]
                for name, blocks in self.token_blocks.items()
            }
        return {
            name: [(x, mask if lost is None else mask & lost.unsqueeze(-1)) for x, mask in tokens[name]]
            for name, lost in kept.items()
            if name in tokens
        }


class NormedTables:
    """The normed vectors of one stack: for each encoder, an (N, D) table of each set of training rows, joined along N.

    `offsets` (K, 1) are the first rows of the tables that the K heads read.
    """

    def __init__(self, data: HeadData, keys: Sequence[np.ndarray]) -> None:
        tables = {rows.tobytes(): data.normed_vectors(rows) for rows in keys}
        index = {key: number for number, key in enumerate(tables)}
        self.tables = {
            name: [torch.cat([table[name][number] for table in tables.values()]) for number in range(len(sources))]
            for name, sources in data.sources.items()
        }
        self.offsets = torch.tensor([index[rows.tobytes()] * len(data) for rows in keys], device=data.device)[:, None]

    def keep_heads(self, heads: Tensor) -> None:
        """Continue with these heads of the stack."""
        self.offsets = self.offsets[heads]

    def take(self, rows: Tensor) -> dict[str, list[Tensor]]:
        """(K, B) rows -> (K, B, D) normed vectors of each encoder."""
        indices = (rows + self.offsets).flatten()
        return {
            name: [table.index_select(0, indices).view(*rows.shape, table.shape[-1]) for table in tables]
            for name, tables in self.tables.items()
        }


def _sources(features: Features, modality: str, device: str) -> Iterator[Source]:
    """Yield one source for each encoder of the modality, with the plain view first and augmented views by name."""
    everything: list[Block | MappedBlock] = [*features.blocks]
    everything += [block for block in features.mapped if block.output == "pooled"]
    pooled = [block for block in everything if block.modality == modality]
    for plain in pooled:
        if plain.view == "none":
            views = [block for block in pooled if block.view != "none" and block.source == plain.source]
            yield (TableSource if modality == TABLE else Source)(plain, views, device)
