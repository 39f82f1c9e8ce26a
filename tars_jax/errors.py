"""Errors a person may meet: one clear line that says what was wrong and what to do.

The command line prints the message and exits with ``exit_code``; the HTTP layer answers with ``status``.
"""


class TarsError(Exception):
    """Base of every expected error. ``str(error)`` is the whole message for the user."""

    status = 500  # HTTP status when it reaches the API
    exit_code = 1  # process exit code when it reaches the command line


class InvalidRequest(TarsError):
    """The request itself is wrong: a bad option, an impossible value."""

    status = 400


class UnusedOption(InvalidRequest):
    """An option of the command line that what was asked for has no use for."""

    exit_code = 2  # as for an option that there is not


class FlatFitness(InvalidRequest):
    """All individuals of an optimizer have the same fitness: there is nothing to follow."""


class ModelNotFound(TarsError):
    """No such model in the store, the catalogue or on disk."""

    status = 404


class ModelFileError(TarsError):
    """A model file is truncated, malformed, hostile or of an unsupported kind."""


class CheckpointError(TarsError):
    """A checkpoint of an optimizer is damaged or belongs to another search."""


class PullError(TarsError):
    """No source of a model could deliver it; the message names each source with its reason."""


class ContextOverflow(InvalidRequest):
    """A prompt does not fit the context window."""


class ServerBusy(TarsError):
    """The queue is full."""

    status = 503


class NotEnoughMemory(TarsError):
    """A model does not fit the memory that is free; the message has the numbers."""


class DeadlineExceeded(TarsError):
    """The time a request had ended before its answer began."""

    status = 504


def refuse(faults: list[str], problem: str, kind: type[TarsError] = InvalidRequest) -> None:
    """Raise one error for all faults, if there are any: ``problem: fault; fault; and 3 more``."""
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise kind(f"{problem}: {shown}")
