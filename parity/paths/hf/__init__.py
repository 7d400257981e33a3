"""Path `hf`."""

from parity.paths.hf.path import HfPath

__all__ = ["HfPath"]
