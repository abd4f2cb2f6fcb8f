"""The paged KV cache; see flashinfer_page."""

from flashinfer_page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens

__all__ = ["append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"]
