"""Samples: the data that users bring. Readers of folders and tables, decoding of texts and photos, augmented views,
labels, keys of contents, near duplicates, and the generated demo data. Start with `dataset`. Imports `mmfeat.system`
and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "contents": ["clean_tweet"],
        "dataset": ["Sample", "SampleSet", "read_samples"],
        "demo": ["write_demo"],
        "keys": ["ContentKeys", "StatIndex", "content_keys"],
        "labels": ["Targets", "read_targets"],
        "photos": ["Decoding", "decode_image"],
    },
)
