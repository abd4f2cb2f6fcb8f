"""Page tables, read before a kernel trusts them: a wrong entry would be an address outside the cache.

One pass in C++ over the entries that will be used, which on a CPU takes 0.1 % (pages of 16 tokens) to 0.4 % (of 1) of
the decode step behind it, so there it is always done. On a GPU it would wait for the device, so there
FLASHINFER_CHECK=1 asks for it.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer_core import settings
from flashinfer_core.errors import InvalidArgumentError


def is_checked(device: torch.device) -> bool:
    """Say whether page tables on `device` are read before each launch."""
    return device.type == "cpu" or settings.enabled("FLASHINFER_CHECK")


def check_pages(
    page_table: torch.Tensor,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    page_size: int,
    pages: int,
    window_left: int = -1,
) -> None:
    """Raise InvalidArgumentError that names request and page where attention would use an entry not in [0, pages).

    page_table: int32 [entries], anywhere, with room for all keys. q_indptr, kv_indptr: int32 [B + 1], kv_len: int32
    [B], on the host. Pages that no query sees (window_left: keys before its own; -1: all) are not looked at.
    """
    table = page_table.cpu()
    bad = _host().bad_page(
        table.data_ptr(), table.shape[0], kv_indptr.data_ptr(), kv_len.shape[0], page_size, pages,
        q_indptr.data_ptr(), kv_len.data_ptr(), window_left,
    )  # fmt: skip
    if bad is not None:
        request, index, page = bad
        raise InvalidArgumentError(
            f"page_table names page {page} as page {index} of request {request}, but the cache has {pages} pages"
        )


def check_targets(
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    page_size: int,
    pages: int,
    strict: bool,
) -> None:
    """Raise InvalidArgumentError for the first token that append cannot write: it has no request, or no page.

    batch_indices, positions: int32 [nnz]; kv_indices: int32 [entries]; kv_indptr: int32 [B + 1]; all anywhere.
    Negative positions are skipped. strict: a position beyond the pages of its request is an error too.
    """
    requests, tokens, table, indptr = (x.cpu() for x in (batch_indices, positions, kv_indices, kv_indptr))
    bad = _host().bad_append(
        table.data_ptr(), table.shape[0], indptr.data_ptr(), indptr.shape[0] - 1, page_size, pages,
        requests.data_ptr(), tokens.data_ptr(), tokens.shape[0], strict,
    )  # fmt: skip
    if bad is None:
        return
    kind, token, request, position, value = bad
    raise InvalidArgumentError(
        {
            "request": f"batch_indices[{token}] names request {request} of {indptr.shape[0] - 1}",
            "position": f"token {token}: request {request} has no page for its position {position}",
            "entry": f"kv_indptr points request {request} at entry {value} of kv_indices, which has {table.shape[0]}",
            "page": f"kv_indices names page {value} for position {position} of request {request}, "
            f"but the cache has {pages} pages",
        }[kind]
    )


def _host() -> Any:
    from flashinfer_core import _host  # not above: importing this module loads no extension

    return _host
