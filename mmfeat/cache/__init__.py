"""The feature cache: (content of a sample, spec of an encoder) -> vectors, in HDF5 shards that are written once and
whole. Start with `store`; `shard` defines the format; `survey`, `verify`, `explain`, `parity` and `pack` are the
commands about a whole cache. Imports `mmfeat.encoders` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "store": ["Cache"],
        "features": ["Features"],
        "writer": ["ShardWriter"],
        "verify": ["verify_cache"],
        "explain": ["explain_sample"],
        "parity": ["check_parity"],
        "pack": ["read_pack", "write_pack"],
    },
)
