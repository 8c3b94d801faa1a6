"""Built-in text encoder: hashed word and character n-grams, randomly projected (scikit-learn).

Needs no download. Word 1-2-grams and character 2-5-grams are counted in 2**16 hashed columns each,
scaled logarithmically, projected to 512 dimensions (Li, Hastie and Church, KDD 2006) and L2-normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec, Values
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING

DIMENSIONS = 512
HASHED_COLUMNS = 2**16
SEED = 0


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one text tower; its arithmetic is always float32."""
    if variant:
        raise EncoderError(f"{family}:{variant}: this encoder has no variants; name it {family}")
    return [
        EncoderSpec(
            family="hashing",
            modality="text",
            variant="",
            weights="builtin:1",
            cleaning=options.cleaning,
            arithmetic="float32",
            storage="float32",
        )
    ]


def load(specs: list[EncoderSpec]) -> Encoder:
    """The encoder of two vectorisers and a seeded projection."""
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.random_projection import SparseRandomProjection

    clean = CLEANING[specs[0].cleaning]
    columns = [
        HashingVectorizer(n_features=HASHED_COLUMNS, ngram_range=(1, 2), norm=None, token_pattern=r"(?u)\b\w+\b"),
        HashingVectorizer(n_features=HASHED_COLUMNS, analyzer="char_wb", ngram_range=(2, 5), norm=None),
    ]
    projection = SparseRandomProjection(DIMENSIONS, random_state=SEED)
    projection.fit(sparse.csr_matrix((1, 2 * HASHED_COLUMNS), dtype=np.float32))

    def embed(texts: list[str]) -> list[Values]:
        counts = sparse.hstack([vectorizer.transform(texts) for vectorizer in columns], format="csr")
        counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
        vectors = np.asarray(projection.transform(counts).todense(), dtype=np.float32)
        return [vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)]

    return Encoder(tuple(specs), clean, lambda texts: lambda: embed(texts))


def reference(variant: str, spec: EncoderSpec) -> Callable[[str], np.ndarray]:
    """The encoder itself with a batch of one text: no other library computes these vectors."""
    encoder = load([spec])
    return lambda text: np.asarray(encoder.embed([encoder.prepare(text)])[0][0])
