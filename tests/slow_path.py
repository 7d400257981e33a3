"""A path whose loss takes longer than anybody waits."""

from __future__ import annotations

import time

from parity.paths.mlx.path import MlxPath


class Slow(MlxPath):
    name = "slow"

    def cross_entropy(self, recipe, inputs):
        time.sleep(600)
        return super().cross_entropy(recipe, inputs)
