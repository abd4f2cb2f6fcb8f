"""What can go wrong, as types. Every text says what was asked, what the limit is, and what to do.

An exception is also the built-in that a caller would guess (`InvalidArgumentError` is a `ValueError`), so existing
`except` clauses keep working.
"""

from __future__ import annotations

from typing import Any


class FlashInferError(Exception):
    """Base of all errors that this library raises on purpose.

    `message` says what happened; `remedy` says what to do about it and is printed on a line of its own.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message}\n{remedy}" if remedy else message)
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        # Children have other signatures, so the default way (calling the class with `args`) cannot rebuild them.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[FlashInferError], args: tuple[Any, ...], state: dict[str, Any]) -> FlashInferError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidArgumentError(FlashInferError, ValueError):
    """Report an argument whose value, shape or device is wrong."""


class InvalidLayoutError(InvalidArgumentError, KeyError):
    """Report a kv_layout that is none; a KeyError too, as FlashInfer raises."""

    __str__ = Exception.__str__  # KeyError would print the text as a literal


class InvalidTypeError(FlashInferError, TypeError):
    """Report an argument whose type or dtype is wrong."""


class WorkspaceError(FlashInferError, ValueError):
    """Report a workspace that is too small or unfit."""


class UnsupportedOptionError(FlashInferError, NotImplementedError):
    """Report an option that exists in the interface and is not implemented for this value.

    `option` is the argument's name, `value` what was passed, `supported` a phrase that names what works.
    """

    def __init__(self, option: str, value: object, supported: str) -> None:
        super().__init__(f"{option}={value!r} is not supported", remedy=f"supported: {supported}")
        self.option = option
        self.value = repr(value)  # as text: the error may outlive or cross the process that made the value
        self.supported = supported


class UnsupportedDeviceError(FlashInferError, RuntimeError):
    """Report a device that has no kernels here."""


class MissingImageError(FlashInferError, RuntimeError):
    """Report a kernel that is neither shipped nor cached and may not or cannot be compiled."""


class CorruptImageError(FlashInferError, ValueError):
    """Report an image file whose bytes are not those that were written."""


class CompileError(FlashInferError, RuntimeError):
    """Report device code that does not compile.

    `log` is the compiler's own text.
    """

    def __init__(self, message: str, *, log: str = "", remedy: str = "") -> None:
        super().__init__(f"{message}\n{log.rstrip()}" if log else message, remedy=remedy)
        self.log = log


class DriverError(FlashInferError, RuntimeError):
    """Report a call of the GPU driver that failed."""


class InstallationError(FlashInferError, ImportError):
    """Report an installation that cannot work, with the command that mends it."""
