"""The exceptions of mmfeat, in one tree. A message is one line: what is wrong, where, and how to fix it."""

from __future__ import annotations


class MmfeatError(Exception):
    """An error that a user can put right; the command line prints the message without a traceback."""


class ConfigError(MmfeatError):
    """A flag or configuration value that mmfeat does not understand."""


class ParameterError(ConfigError, ValueError):
    """A parameter or an array that a class of scikit-learn's kind cannot take; a `ValueError` too, as it expects."""


class DataError(MmfeatError):
    """The samples cannot be read as they are."""


class EncoderError(MmfeatError):
    """An encoder cannot be described or loaded."""


class HubError(EncoderError):
    """A model hub did not answer a request for weights."""


class CacheError(MmfeatError):
    """The feature cache is damaged, foreign or does not match."""


class CacheMissError(CacheError):
    """The features asked for are not extracted yet."""


class HeadError(MmfeatError):
    """A head cannot be trained on these features."""


class RunError(MmfeatError):
    """A run folder is missing, incomplete or does not fit the call."""


class SubmissionError(MmfeatError):
    """The submission would break the rules for submissions, so no file was written."""


class WriteError(MmfeatError):
    """The disk refused a write; everything written before is intact."""
