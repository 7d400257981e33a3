"""Settings that say one thing in two ways are made to say the same: a checkpoint's always do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def consistent(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose number of dense layers is that of its list of kinds."""
    found = {k: consistent(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    kinds = found.get("mlp_layer_types")
    if isinstance(kinds, list) and set(kinds) <= {"dense", "sparse"}:
        dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        for key in ("first_k_dense_replace", "num_dense_layers"):
            if isinstance(found.get(key), int):
                found[key] = dense
    return found
