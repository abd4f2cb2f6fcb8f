"""Booleans as bits; see flashinfer_attention.quantization."""

from flashinfer_attention.quantization import packbits, segment_packbits

__all__ = ["packbits", "segment_packbits"]
