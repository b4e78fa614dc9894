"""The version of this package."""

from abft_kernels import __version__

__all__ = ["__version__"]
