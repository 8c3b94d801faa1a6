"""Encoders: frozen towers that turn one modality into vectors, one file a family. Start with `spec`, which describes
an encoder completely, then `hog` as the smallest family, then `registry`. Imports `mmfeat.samples` and packages to its
left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "spec": ["Encoder", "EncoderOptions", "EncoderSpec"],
        "registry": ["FAMILIES", "Family", "Tower", "describe_encoders", "load_encoders", "load_reference"],
    },
)
