"""Benchmarks: one file per operator and kind of device, run as `python -m benchmarks`."""
