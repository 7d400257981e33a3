"""A setting of the model that one side reads otherwise, proven by handing the other the same value.

The reference runs once more on a copy of the checkpoint whose config.json holds the suspected value: if
it then agrees with the subject, that value is what the subject computes with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parity import resources
from parity.errors import NO_ANSWER, UsageError
from parity.judge.noise import HEADROOM, distance
from parity.stages.context import Context
from parity.stages.pair import Pair
from parity.trace import Trace

WINDOW, WIDE = "sliding_window", 2**20
DEFAULT_THETA = 10_000.0
"""What loaders take that find no rope theta."""


def suspected_setting(context: Context, rows: Trace, pair: Pair, position: int) -> str:
    """The setting with which the reference gives the subject's logits, in words; else empty.

    Args:
        context: The cell.
        rows: `ids.0` (B, T) of which `pair` holds both sides' `logits.0`.
        pair: Both sides' logits.
        position: The first position at which the place that was found is off.
    """
    recipe = context.recipes["reference"]
    try:
        folder = Path(resources.model_dir(recipe.model.source))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, UsageError):
        return ""
    ours, theirs = (t.arrays["logits.0"] for t in (pair.subject, pair.reference))
    floor = HEADROOM * pair.noise.floor("logits.0", theirs)
    ids = Trace({"ids.0": rows.arrays["ids.0"]})
    for what, changed in _suspects(config, position):
        with tempfile.TemporaryDirectory() as made:
            _copy(folder, Path(made), changed)
            other = recipe.override({"model.source": made})
            try:
                logits = context.capture("reference", "logits", other, ids).arrays["logits.0"]
            except NO_ANSWER:
                continue
        left = distance(ours, logits) if ours.shape == logits.shape else float("inf")
        if left <= floor:
            return (
                f"the reference with {what} in its configuration agrees with the subject (greatest |Δ| of "
                f"the logits {left:.2g}, before {distance(ours, theirs):.2g})"
            )
    return ""


def _suspects(config: Mapping[str, Any], position: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations with one setting read otherwise, which fit the first position that is off."""
    window = config.get(WINDOW)
    if isinstance(window, int) and position:
        values = {position: str(position), window - 1: str(window - 1), window + 1: str(window + 1)}
        if position >= window - 1:
            values[WIDE] = f"none ({WIDE})"
        for value, shown in values.items():
            if value not in (0, window):
                yield f"{WINDOW} = {shown} for {window}", {**config, WINDOW: value}
    # Position 0 is not turned: all rope settings agree there.
    if position == 1:
        for theta in dict.fromkeys([DEFAULT_THETA, *_thetas(config)]):
            changed = _with_theta(config, theta)
            if changed != config:
                yield f"rope theta = {theta:g} in all layers", changed


def _thetas(value: Any, key: str = "") -> Iterator[float]:
    """Every rope base that a configuration holds."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _thetas(inner, name)
    elif key in ("rope_theta", "rope_local_base_freq") and isinstance(value, (int, float)):
        yield float(value)


def _with_theta(value: Any, theta: float, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _with_theta(inner, theta, name) for name, inner in value.items()}
    return theta if key in ("rope_theta", "rope_local_base_freq") else value


def _copy(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint with another configuration; the other files are links."""
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
