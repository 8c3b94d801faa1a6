"""Extraction: samples x encoders -> cache. Finds what is missing, reads and decodes each content once for all
encoders, encodes in batches, and writes in the background, here or on a Ray cluster. Start with `extract`. Imports
`mmfeat.cache` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "extract": ["ExtractSettings", "extract_features"],
        "forecast": ["forecast_extraction"],
        "requests": ["Request", "latest_request"],
    },
)
