"""One exception tree. A message is one line that says what, where and how to fix it."""

from __future__ import annotations


class MmfeatError(Exception):
    """Anything a user can put right; the command line prints it without a traceback."""


class ConfigError(MmfeatError):
    """A flag or configuration value that mmfeat does not understand."""


class DataError(MmfeatError):
    """The samples cannot be read as they are."""


class EncoderError(MmfeatError):
    """An encoder cannot be described or loaded."""


class HubError(EncoderError):
    """Weights were asked of a model hub that did not answer."""


class CacheError(MmfeatError):
    """The feature cache is damaged, foreign or does not match."""


class CacheMissError(CacheError):
    """Features were asked for that nobody extracted yet."""


class HeadError(MmfeatError):
    """A head cannot be trained on these features."""


class RunError(MmfeatError):
    """A run folder is missing, incomplete or does not fit."""


class SubmissionError(MmfeatError):
    """The submission would break its own rules, so it was not written."""


class WriteError(MmfeatError):
    """The disk refused; everything committed before is intact."""
