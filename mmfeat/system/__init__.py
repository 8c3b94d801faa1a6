"""The machine, for every package: whole files and locks, URLs, devices and precisions, progress, numbers as words for
people, and joining a Ray cluster. Start with `files`. Imports only `mmfeat.errors`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "files": ["write_atomic", "read_json", "write_json"],
        "hardware": ["resolve_device", "resolve_dtype"],
        "wording": ["Progress", "Silent"],
    },
)
