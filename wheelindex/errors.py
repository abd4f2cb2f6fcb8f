"""What can be wrong with a wheel or with adding it."""

from __future__ import annotations


class WheelIndexError(Exception):
    """Base of all errors of wheelindex."""


class BadWheelError(WheelIndexError):
    """A wheel that no index should offer."""


class ConflictError(WheelIndexError):
    """A wheel whose name the index already has with other bytes."""
