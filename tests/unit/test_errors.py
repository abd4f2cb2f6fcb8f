"""Errors carry a remedy, are the built-ins that callers guess, and cross process borders."""

from __future__ import annotations

import pickle

import pytest

from flashinfer_core import errors

CASES = [
    (errors.InvalidArgumentError("q has rank 2", remedy="pass rank 3"), ValueError),
    (errors.InvalidTypeError("q is float64", remedy="pass float16"), TypeError),
    (errors.WorkspaceError("too small", remedy="pass 8 bytes"), ValueError),
    (errors.UnsupportedOptionError("window_left", 5, "-1"), NotImplementedError),
    (errors.UnsupportedDeviceError("sm_70", remedy="use sm_75"), RuntimeError),
    (errors.MissingImageError("none", remedy="reinstall"), RuntimeError),
    (errors.CorruptImageError("short"), ValueError),
    (errors.CompileError("broken", log="a.cuh(1): error", remedy="the offending line"), RuntimeError),
    (errors.DriverError("no libcuda", remedy="install a driver"), RuntimeError),
    (errors.InstallationError("wrong torch", remedy="pip install"), ImportError),
]


@pytest.mark.parametrize(("error", "builtin"), CASES, ids=[type(error).__name__ for error, _ in CASES])
def test_is_a_builtin_and_survives_pickling(error: errors.FlashInferError, builtin: type[Exception]) -> None:
    assert isinstance(error, errors.FlashInferError)
    assert isinstance(error, builtin)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_every_error_is_tried_here() -> None:
    tried = {type(error) for error, _ in CASES}
    assert tried == set(errors.FlashInferError.__subclasses__())


def test_remedy_is_the_last_line() -> None:
    error = errors.CompileError("broken", log="line 1\nline 2\n", remedy="do this")
    assert str(error).splitlines() == ["broken", "line 1", "line 2", "do this"]


def test_unsupported_option_names_option_value_and_what_works() -> None:
    error = errors.UnsupportedOptionError("pos_encoding_mode", "ALIBI", "NONE")
    assert str(error) == "pos_encoding_mode='ALIBI' is not supported\nsupported: NONE"
