"""Path `mlx-lm`."""

from parity.paths.mlx_lm.path import MlxLmPath

__all__ = ["MlxLmPath"]
