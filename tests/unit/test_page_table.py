"""Page tables are read as far as kernels will, and a wrong entry is named."""

from __future__ import annotations

from typing import List

import pytest
import torch

from flashinfer_core import page_table
from flashinfer_core.errors import InvalidArgumentError

BAD = 2**31 - 1
PAGES = 8


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(table: List[int], q_lens: List[int], kv_lens: List[int], *, page_size: int = 16, window: int = -1) -> None:
    kv_indptr = torch.tensor([0, *(-(-n // page_size) for n in kv_lens)]).cumsum(0).int()
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    page_table.check_pages(
        ints(*table), q_indptr, kv_indptr, ints(*kv_lens), page_size=page_size, pages=PAGES, window_left=window
    )


def test_a_right_table_passes() -> None:
    check([7, 0, 3, 3, BAD], [3, 0, 1], [40, 0, 16])
    check([], [], [])
    check([BAD], [1], [0])


@pytest.mark.parametrize("page", [BAD, -1, PAGES, -(2**31)])
@pytest.mark.parametrize("entry", range(4))
def test_a_wrong_entry_is_named(entry: int, page: int) -> None:
    table = [7, 0, 3, 1]
    table[entry] = page
    request, index = ((0, 0), (0, 1), (0, 2), (1, 0))[entry]
    text = f"page_table names page {page} as page {index} of request {request}, but the cache has 8 pages"
    with pytest.raises(InvalidArgumentError, match=text):
        check(table, [1, 1], [40, 16])


def test_entries_that_no_query_reads_may_hold_anything() -> None:
    check([BAD, 3], [0, 1], [16, 16])  # the first request has no query
    check([BAD, BAD, 3], [1], [40], window=7)  # keys 32 to 39
    with pytest.raises(InvalidArgumentError, match="as page 1 of request 0"):
        check([BAD, BAD, 3], [1], [40], window=8)
    with pytest.raises(InvalidArgumentError, match="as page 1 of request 0"):
        check([BAD, BAD, 3], [2], [40], window=7)  # the first of two queries sees key 31
    check([BAD, BAD, 3], [1], [40], window=0)


@pytest.mark.parametrize("page_size", [1, 3, 1000])
def test_page_sizes(page_size: int) -> None:
    entries = -(-40 // page_size)
    check([0] * entries, [1], [40], page_size=page_size)
    with pytest.raises(InvalidArgumentError, match=f"as page {entries - 1} of request 0"):
        check([0] * (entries - 1) + [PAGES], [1], [40], page_size=page_size)


def test_a_cache_of_more_pages_than_int32_names() -> None:
    page_table.check_pages(ints(BAD), ints(0, 1), ints(0, 1), ints(16), page_size=16, pages=2**32)
    with pytest.raises(InvalidArgumentError, match="names page -1"):
        page_table.check_pages(ints(-1), ints(0, 1), ints(0, 1), ints(16), page_size=16, pages=2**32)


def test_tables_are_always_read_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK", "0")
    assert page_table.is_checked(torch.device("cpu"))
    assert not page_table.is_checked(torch.device("cuda", 0))
    monkeypatch.setenv("FLASHINFER_CHECK", "1")
    assert page_table.is_checked(torch.device("cuda", 0))
