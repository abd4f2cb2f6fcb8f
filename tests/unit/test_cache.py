"""The user's cache survives what real machines do to it, and never runs what somebody else wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator

import pytest

from flashinfer_core import cache
from flashinfer_core.images import Image
from tiny_package import GPU, find, needs_nvrtc, write

SAMPLE = Image("scale-3", "scale<3>", "sm_80", "entry", "5ca1e", "s", "NVRTC 13.0", (), 8, 0, 0, 0.5, bytes(5000))

# Finds an image as a process of its own: on a machine with root's powers, as a user that no database knows.
FIND = """
import json, logging, os, resource, sys
from tiny_package import GPU, find
from flashinfer_core import nvrtc
nvrtc.find()
uid, file_limit = int(sys.argv[1]), int(sys.argv[2])
if uid:
    os.setgid(uid); os.setuid(uid)
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
messages = []
handler = logging.Handler(); handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("flashinfer").addHandler(handler)
print("ready", flush=True); sys.stdin.readline()
image = find(GPU, "sm_80")
print(json.dumps({"bytes": len(image.payload), "key": image.key, "messages": messages}))
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MEMORY", {})
    cache._warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make FLASHINFER_CACHE_DIR the only folder that exists."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    monkeypatch.setenv("HOME", "/proc")  # no process can make a folder there
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may enter, with the tiny package in it."""
    path = Path(tempfile.mkdtemp(prefix="flashinfer-test-", dir="/tmp"))
    path.chmod(0o755)
    write(path)
    yield path
    for parent in path.iterdir():
        parent.chmod(0o755)
    shutil.rmtree(path)


def _start(folder: Path, *, uid: int = 0, file_limit: int = 0, **environment: str) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join([str(folder), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", FIND, str(uid), str(file_limit)],
        env={**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def _other_user() -> int:
    return 54321 if os.geteuid() == 0 else 0


def test_order_of_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"flashinfer-images-{os.geteuid()}"
    expected = [Path("/a"), Path("/x/flashinfer-images"), Path("/h/.cache/flashinfer-images"), own]
    assert cache.folders() == expected
    monkeypatch.delenv("FLASHINFER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.folders() == expected[2:]


def test_entry_is_kept_for_other_processes_and_only_for_this_user(folder: Path) -> None:
    assert cache.load(SAMPLE.key) is None
    assert not folder.exists()
    assert cache.store(SAMPLE) == str(folder)
    cache._MEMORY.clear()
    assert cache.load(SAMPLE.key) == SAMPLE
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [(path.name, path.stat().st_mode & 0o777) for path in folder.iterdir()] == [("5ca1e.image", 0o600)]


@needs_nvrtc
@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "another image"])
def test_damaged_entry_is_rebuilt(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    image = find(GPU, "sm_80")
    entry = cache.entry(folder, image.key)
    whole = entry.read_bytes()
    rubbish = {
        "empty": b"",
        "truncated": whole[:-100],
        "garbage": os.urandom(len(whole)),
        "another image": SAMPLE.to_bytes(),
    }
    entry.write_bytes(rubbish[damage])
    cache._MEMORY.clear()
    caplog.clear()
    assert find(GPU, "sm_80").payload == image.payload
    told = [record.getMessage() for record in caplog.records]
    assert told[-1].startswith("compiled scale-3 for sm_80")
    assert (f"removing the damaged cache entry {entry}" in told[0]) == (damage != "another image")
    assert Image.from_bytes(entry.read_bytes()).payload == image.payload


def test_damaged_entry_is_removed(folder: Path) -> None:
    cache.store(SAMPLE)
    cache._MEMORY.clear()
    entry = cache.entry(folder, SAMPLE.key)
    entry.write_bytes(entry.read_bytes()[:-1])
    assert cache.load(SAMPLE.key) is None
    assert not entry.exists()


@needs_nvrtc
def test_eight_processes_compile_once_each_at_most_and_leave_one_file(open_folder: Path) -> None:
    folder = open_folder / "cache"
    processes = [_start(open_folder, FLASHINFER_CACHE_DIR=str(folder)) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [_finish(process) for process in processes]
    compiles = [sum("compiled scale-3" in text for text in result["messages"]) for result in results]
    assert max(compiles) == 1
    assert len({(result["key"], result["bytes"]) for result in results}) == 1
    assert [path.name for path in folder.iterdir()] == [f"{results[0]['key']}.image"]
    ninth = _finish(_start(open_folder, FLASHINFER_CACHE_DIR=str(folder)))
    assert ninth["messages"] == []


@needs_nvrtc
def test_read_only_home_is_no_error(open_folder: Path) -> None:
    home = open_folder / "home"
    home.mkdir()
    home.chmod(0o555)
    temporary = f"/tmp/flashinfer-images-{_other_user() or os.geteuid()}"
    existed = Path(temporary).exists()
    result = _finish(_start(open_folder, uid=_other_user(), HOME=str(home)))
    assert f"(kept in {temporary})" in result["messages"][0]
    assert list(home.iterdir()) == []
    if not existed:
        shutil.rmtree(temporary)


@needs_nvrtc
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user without a home needs root")
def test_no_home_at_all_is_no_error(open_folder: Path) -> None:
    result = _finish(_start(open_folder, uid=54322, TMPDIR="/proc"))
    assert "(kept in /tmp/flashinfer-images-54322)" in result["messages"][0]
    shutil.rmtree("/tmp/flashinfer-images-54322")


def test_nothing_writable_means_memory(folder: Path) -> None:
    folder.write_text("a file in the way")
    assert cache.store(SAMPLE) == "memory"
    assert cache.load(SAMPLE.key) == SAMPLE


@needs_nvrtc
def test_disk_that_fills_during_the_write_leaves_nothing(open_folder: Path) -> None:
    folder = open_folder / "cache"
    path = str(folder)
    result = _finish(_start(open_folder, file_limit=1000, FLASHINFER_CACHE_DIR=path, HOME="/proc", TMPDIR=path))
    assert "(kept in memory)" in result["messages"][0]
    assert list(folder.iterdir()) == []


def test_no_space_left_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, target)

    monkeypatch.setattr(os, "replace", full)
    assert cache.store(SAMPLE) == "memory"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "entry"])
@pytest.mark.parametrize("owner", ["others may write", "another user"])
def test_what_others_control_is_not_used(
    what: str, owner: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store(SAMPLE)
    cache._MEMORY.clear()
    path = folder if what == "folder" else cache.entry(folder, SAMPLE.key)
    if owner == "others may write":
        path.chmod(path.stat().st_mode | 0o020)
    elif os.geteuid() == 0:
        os.chown(path, 54321, 54321)
    else:
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    for _ in range(2):
        assert cache.load(SAMPLE.key) is None
    [record] = caplog.records
    assert f"not using the cache at {path}: it " in record.getMessage()
    assert cache.entry(folder, SAMPLE.key).exists()
    if what == "folder":
        assert cache.store(SAMPLE) == "memory"


def test_links_are_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(SAMPLE)
    cache._MEMORY.clear()
    entry = cache.entry(folder, SAMPLE.key)
    entry.rename(tmp_path / "elsewhere.image")
    entry.symlink_to(tmp_path / "elsewhere.image")
    assert cache.load(SAMPLE.key) is None
    monkeypatch.delenv("FLASHINFER_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"flashinfer-images-{os.geteuid()}").symlink_to(folder)
    assert "link" in cache.rejection(cache.folders()[-1])
