"""Importing an installed flashinfer: quick, and without a trace on disk, in the network or on a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from environments import Environment
from fake_driver import FakeDriver

pytestmark = pytest.mark.install

LIMIT_SECONDS = 0.1

# Python tells its audit hooks of every file opened, folder made, socket made, process started and library loaded.
WATCH = """
import json, os, sys
seen = []
def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"{event} {path} {mode}")
    elif event == "ctypes.dlopen":
        if any(word in str(arguments[0]) for word in ("cuda", "nvrtc")):
            seen.append(f"{event} {arguments[0]}")
    elif event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "os.system", "shutil.", "tempfile.")):
        seen.append(event)
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"):
        seen.append(f"{event} {arguments[0]}")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    address = os.environ.get("FLASHINFER_INDEX")
    if not address:
        pytest.skip("FLASHINFER_INDEX names no index; `nox -s tests` makes one")
    made = Environment(tmp_path_factory.mktemp("import"), address)
    made.install("flashinfer-python")
    return made


def seconds(environment: Environment, before: str, module: str) -> float:
    """Return the least of three times that `import module` takes after `before`, each in a new process."""
    code = f"{before}\nimport time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return min(float(environment.python(code)) for _ in range(3))


@pytest.mark.parametrize(("before", "module"), [("", "flashinfer_core"), ("import torch", "flashinfer")])
def test_import_is_quick(environment: Environment, before: str, module: str) -> None:
    assert seconds(environment, before, module) < LIMIT_SECONDS


@pytest.mark.parametrize(("before", "module"), [("", "flashinfer_core"), ("import torch", "flashinfer")])
def test_import_touches_nothing(environment: Environment, before: str, module: str) -> None:
    code = f"{before}\n{WATCH}\nsys.addaudithook(note)\nimport {module}\nprint(json.dumps(seen))"
    assert json.loads(environment.python(code)) == []


def test_the_watch_sees_what_it_is_for(environment: Environment, tmp_path: Path) -> None:
    actions = f"open({str(tmp_path / 'a')!r}, 'w'); os.mkdir({str(tmp_path / 'b')!r}); import socket; socket.socket()"
    seen = json.loads(environment.python(f"{WATCH}\nsys.addaudithook(note)\n{actions}\nprint(json.dumps(seen))"))
    assert [event.split()[0] for event in seen] == ["open", "os.mkdir", "socket.__new__"]


def test_core_does_not_import_torch(environment: Environment) -> None:
    environment.python("import sys, flashinfer_core; assert 'torch' not in sys.modules")


@pytest.mark.parametrize(("before", "module"), [("", "flashinfer_core"), ("import torch", "flashinfer")])
def test_import_asks_the_driver_nothing(environment: Environment, before: str, module: str, tmp_path: Path) -> None:
    driver = FakeDriver(tmp_path)
    loaded = "print('flashinfer_core._host' in sys.modules)"
    # What torch asks is its own; without the import of ours there must be as much.
    assert environment.python(f"{before}\nimport sys; {loaded}", **driver.variables) == "False\n"
    asked = driver.calls
    driver.forget()
    assert environment.python(f"{before}\nimport sys, {module}; {loaded}", **driver.variables) == "False\n"
    assert driver.calls == asked
    environment.python("from flashinfer_core import _host; assert _host.device_count() == 1", **driver.variables)
    assert driver.calls[-2:] == ["cuInit", "cuDeviceGetCount"]
