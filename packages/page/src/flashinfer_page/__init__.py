"""The paged KV cache: writing new tokens to it, and the tables that say where they are."""

from flashinfer_core.version import __version__
from flashinfer_page.append import append_paged_kv_cache
from flashinfer_page.tables import get_batch_indices_positions, get_seq_lens

__all__ = ["__version__", "append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"]
