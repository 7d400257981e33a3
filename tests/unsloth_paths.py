"""Hybrids: the trainer of unsloth-zoo with parts of mlx-lm, and the other way round."""

from parity.paths.mlx import MlxPath
from parity.paths.unsloth import UnslothPath


def hybrid(name, home, donor, *parts):
    def made(self, cache):
        home.__init__(self, cache)
        self.donors = {part: donor(cache) for part in parts}
        for other in self.donors.values():
            other.donors = {}

    return type(name, (home,), {"__init__": made, "name": name, "__module__": __name__})


Loss = hybrid("Loss", UnslothPath, MlxPath, "loss")
Loader = hybrid("Loader", UnslothPath, MlxPath, "loader", "wiring")
Clip = hybrid("Clip", UnslothPath, MlxPath, "clip")
Optimizer = hybrid("Optimizer", UnslothPath, MlxPath, "optimizer")
Batching = hybrid("Batching", UnslothPath, MlxPath, "batching")
Lent = hybrid(
    "Lent", MlxPath, UnslothPath, "loader", "wiring", "batching", "loss", "clip", "optimizer"
)
