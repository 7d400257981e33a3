"""Path `unsloth`."""

from parity.paths.unsloth.path import UnslothPath

__all__ = ["UnslothPath"]
