"""Errors that the command line prints without a traceback."""

from examples.streams.domains import DataError

__all__ = ["ModelError"]


class ModelError(DataError):
    """A model that cannot be used; the message is meant for the user."""
