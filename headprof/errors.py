"""Errors that a user can cause. Each message is one sentence that says what is wrong and how to mend it."""


class HeadprofError(Exception):
    """Something a user can mend. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class UsageError(HeadprofError):
    """The request itself cannot be served: an unknown method, a budget that is too small, a file that is not there."""

    exit_code = 2


class ModelError(HeadprofError):
    """The model or its tokenizer cannot be found, read or used."""


class ProbeError(HeadprofError):
    """Probes cannot be built, or too few of them were answered."""


class ProfileError(HeadprofError):
    """A head profile is missing, damaged, or belongs to another model."""


class InterruptedRun(HeadprofError):
    """The user stopped a run whose results so far are kept."""

    exit_code = 130


class CacheError(HeadprofError):
    """A compressed cache cannot be used in the way that was asked."""
