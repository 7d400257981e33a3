"""Path `mlx`."""

from parity.paths.mlx.path import MlxPath

__all__ = ["MlxPath"]
