"""Path `trl`."""

from parity.paths.trl.path import TrlPath

__all__ = ["TrlPath"]
