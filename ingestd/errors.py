"""The one tree of errors a user can meet.

Each message is one sentence about what happened and to what; `hint` says what the operator can do.
The exit code is the class's: 2 for a mistake in the call, the configuration or a database file, 1 for the rest.
"""

from __future__ import annotations


class IngestdError(Exception):
    """Something failed that the operator can understand and act on."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message


class UsageError(IngestdError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration file cannot be used; the message has a line for every mistake in it."""


class SignalDatabaseError(UsageError):
    """A DBC, KCD, SYM or ARXML file cannot be used."""


class CaptureError(IngestdError):
    """A capture file cannot be read, or holds nothing that can be."""


class FeedError(IngestdError):
    """The feed cannot go on: imported before, imported otherwise, or claimed by somebody else."""


class StoreError(IngestdError):
    """PostgreSQL refused something; trying again will not help until somebody acts."""


class StoreRejected(StoreError):
    """PostgreSQL can never store these data; others may go in."""


class StoreUnavailable(StoreError):
    """PostgreSQL cannot be reached or cannot take data now; trying again later is right."""
