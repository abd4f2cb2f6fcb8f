"""The plots of time over its floor: what they cover, and that a small grid is measured and written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List

import pytest
import torch

from benchmarks import scaling

SMALL = scaling.Grid((1, 2), 32, (16, 32), (1, 2), (1, 16), (2, 32), (8, 16))


def test_the_gpu_grid_is_what_was_promised() -> None:
    grid = scaling.GPU_GRID
    assert (grid.batches[0], grid.batches[-1]) == (1, 512)
    assert (grid.lengths[0], grid.lengths[-1]) == (128, 131072)
    assert (grid.page_sizes[0], grid.page_sizes[-1]) == (1, 256)
    for sizes in (grid.batches, grid.lengths, grid.page_sizes, grid.prompts):
        assert all(after == 2 * before for before, after in zip(sizes, sizes[1:]))


def test_a_floor_is_the_longest_of_launch_bytes_and_operations() -> None:
    machine = scaling.Machine("m", "cpu", torch.float32, lambda _: 1.0, bandwidth=10.0, rate=100.0, idle=3.0)
    assert [machine.floor(20), machine.floor(50), machine.floor(50, 700)] == [3, 5, 7]


def test_a_step_is_growth_beyond_that_of_the_floor() -> None:
    before, after = scaling.Point(1, 2.0, 5.0), scaling.Point(2, 4.0, 10.0)
    assert scaling.step(before, after) == 1
    assert scaling.step(before, after._replace(taken=20.0)) == 2


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works: List[object] = []

    def time(work: object) -> float:
        works.append(work())  # type: ignore[operator]
        return 7.0

    machine = scaling.Machine("m", "cpu", torch.float32, time, 1000.0, 1000.0, 0.0)
    monkeypatch.setattr(scaling, "this_machine", lambda: machine)
    monkeypatch.setattr(scaling, "CPU_GRID", SMALL)
    monkeypatch.setattr(scaling, "_copies", lambda *_: 0)
    assert scaling.main(["--write", str(tmp_path / "docs" / "scaling.md")]) == 0
    page = (tmp_path / "docs" / "scaling.md").read_text()
    pictures = re.findall(r"\]\((.+)\)", page)
    assert pictures == [f"scaling-{name}.svg" for name in ("batch", "length", "page", "prefill")]
    for picture in pictures:
        assert (tmp_path / "docs" / picture).read_text().startswith("<svg ")
    assert len(works) == 2 + 4 + 2 + 2
    assert all(torch.isfinite(output).all() for output in works if isinstance(output, torch.Tensor))
    assert "| 32 keys each | 2 | 524.3 | 7.0 | 0.01 | 0.50 |" in page
    assert "| 1 prompt | 16 | 2228.2 | 7.0 | 0.00 | " in page
