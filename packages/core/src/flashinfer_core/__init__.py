"""What all flashinfer packages share: images and how they are found, compiled and launched; devices; errors."""

from flashinfer_core.version import __version__

__all__ = ["__version__"]
