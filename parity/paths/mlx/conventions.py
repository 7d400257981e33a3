"""What mlx-lm's `sanitize` adds to weights of a checkpoint, seen from what it does to known numbers.

`python -m parity.paths.mlx.conventions SOURCE` reads {name: shape} as JSON from its input and writes what
`asked` returns, for a process that has no MLX.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.names import canonical
from parity.paths.mlx.live import to_numpy

TRIED = 0.0, 2.5
"""Numbers that a checkpoint full of them is sanitized with: two tell an offset from any other change."""


def asked(source: str, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """What becomes of the vectors of a checkpoint while mlx-lm loads it.

    Matrices and kernels are not asked about: their orientation is known from their shapes.

    Args:
        source: Folder with the configuration.
        shapes: Of every tensor by the checkpoint's name.

    Returns:
        `offsets`, canonical name to the number that is added to each element; `otherwise`, canonical name
        to what becomes of `TRIED`, where that is no offset.
    """
    import mlx.core as mx
    from mlx_lm.utils import _get_classes, load_config

    config = load_config(Path(source))
    kind, arguments = _get_classes(config=config)
    found = []
    for number in TRIED:
        model = kind(arguments.from_dict(config))  # some change themselves while they sanitize
        weights = {name: mx.full(shape, number) for name, shape in shapes.items()}
        made = model.sanitize(weights) if hasattr(model, "sanitize") else weights
        found.append({canonical(n): v for n, v in made.items() if v.ndim == 1})
    offsets, otherwise = dict[str, float](), dict[str, list[float]]()
    for name, zero in found[0].items():
        pair = to_numpy(zero), to_numpy(found[1][name])
        low, high = ([float(v.min()), float(v.max())] for v in pair)
        if low[0] == low[1] and high == [low[0] + TRIED[1]] * 2:
            offsets |= {name: low[0]} if low[0] else {}
        else:
            otherwise[name] = [low[0], high[0]]
    return {"offsets": offsets, "otherwise": otherwise}


if __name__ == "__main__":
    print(json.dumps(asked(sys.argv[1], json.load(sys.stdin))))
