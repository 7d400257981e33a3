"""An adapter in the hands of a real loader: what it makes of the files, and what that does to logits."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from parity.adapters.artefact import Adapter, Finding
from parity.adapters.base import Base
from parity.adapters.outcome import Outcome, share
from parity.capture.engine import Engine
from parity.errors import CaptureError, Unsupported, UsageError
from parity.judge.updates import Updates, compare_modules, compare_updates
from parity.recipe import Recipe
from parity.trace import Array, Trace

ROWS, WIDTH = 2, 40
LOADS = "Does a real loader take it, with the modules, weights and scale of the files?"
MOVES = "Does it change the logits of the base?"


def loader_of(adapter: Adapter, base: Base) -> str:
    """The path whose loader an adapter is for.

    unsloth-zoo's reads from the adapter which base it needs, so that is only asked where it is the
    one that was given.
    """
    if adapter.layout == "peft":
        return "hf"
    if adapter.writer.startswith("unsloth") and importlib.util.find_spec("unsloth_zoo"):
        # It knows folders and hub ids, not the names of fixtures.
        folder, hub = Path(adapter.base), adapter.base.count("/") == 1
        if (hub and adapter.base == base.source) or (
            folder.is_dir() and folder.resolve() == base.folder.resolve()
        ):
            return "unsloth"
    return "mlx"


def load_and_measure(engine: Engine, path: str, adapter: Adapter, base: Base) -> list[Outcome]:
    """Whether a path's loader takes it as the files have it, and whether the logits move."""
    recipe = Recipe().override({"model.source": base.source})
    ids = _ids(base)
    before, reason = _logits(engine, path, recipe, ids)
    if before is None:
        reason = f"{path} does not run the base: {reason}"
        return [Outcome("loading", LOADS, [], reason), Outcome("logits", MOVES, [], reason)]
    scalars = {"folder": str(adapter.folder.resolve()), "content": content(adapter.folder)}
    try:
        trace = engine.capture(path, "load_adapter", recipe, Trace({"ids": ids}, scalars))
    except Unsupported as error:
        unloaded = f"{path} cannot load one: {error}"
        return [Outcome("loading", LOADS, [], unloaded), Outcome("logits", MOVES, [], unloaded)]
    except CaptureError as error:
        # It runs the base, so it is the adapter that it stops at.
        text = f"the loader of {path} does not take it: {_line(error)}"
        finding = Finding("loading", adapter.folder.name, text)
        reason = "the loader does not take it"
        return [Outcome("loading", LOADS, [finding]), Outcome("logits", MOVES, [], reason)]
    after = trace.arrays["loaded"]
    return [
        Outcome("loading", LOADS, *_as_written(path, adapter, trace)),
        _moved(path, adapter.folder.name, before, after),
    ]


def measure_model(engine: Engine, path: str, folder: Path, base: Base) -> Outcome:
    """Whether a fused or fully trained model gives other logits than its base."""
    found = list[Array]()
    for source in (base.source, str(folder.resolve())):
        values, reason = logits(engine, path, source, base)
        if values is None:
            return Outcome("logits", MOVES, [], f"{path} does not run {source}: {reason}")
        found.append(values)
    return _moved(path, folder.name, *found)


def logits(engine: Engine, path: str, source: str, base: Base) -> tuple[Array | None, str]:
    """Logits (B, T, V) of a model on rows of a base's vocabulary, or why there are none."""
    return _logits(engine, path, Recipe().override({"model.source": source}), _ids(base))


def content(folder: Path) -> str:
    """A digest of all files in a folder."""
    whole = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()[:16]


def _as_written(path: str, adapter: Adapter, trace: Trace) -> tuple[list[Finding], str]:
    given, loaded = adapter.updates(), Updates(trace.group("adapter"), trace.scalars["scales"])
    where, found = f"the loader of {path}", list[Finding]()
    unread = f"beside A and B not read back: {len(adapter.extra)}" if adapter.extra else ""
    if not given:
        return [], unread or "the files hold no pair of A and B"
    sets = compare_modules("modules", loaded, given)
    if not sets.verdict.green:
        more = [name for name in loaded if name not in given]
        idle = bool(more) and not any(loaded[name].any() for name in more)
        text = f"{where}: {sets.note}" + "; those it has beside do nothing, B is zero" * idle
        found.append(Finding("loading", sets.where, text))
    update = compare_updates("scale · A · B", loaded, given)
    if not update.verdict.green and given.keys() & loaded.keys():
        text = f"{where} gives another scale · A · B than the files hold: {update.note}"
        found.append(Finding("loading", update.where, text))
    written = {n: m.tensors["m"].read() for n, m in adapter.modules.items() if "m" in m.tensors}
    live = trace.group("magnitude")
    off = [n for n, m in written.items() if n not in live or not np.array_equal(live[n], m)]
    if off:
        text = f"{where} has not the magnitudes of the files: {share(off, written)}"
        found.append(Finding("loading", min(off), text))
    return found, unread


def _moved(path: str, where: str, before: Array, after: Array) -> Outcome:
    if before.shape != after.shape:
        text = f"the logits have shape {after.shape}, those of the base {before.shape}"
        return Outcome("logits", MOVES, [Finding("logits", where, text)])
    if not np.isfinite(after).all():
        text = f"{int((~np.isfinite(after)).sum())} logits are NaN or infinite"
        return Outcome("logits", MOVES, [Finding("logits", where, text)])
    gap = float(np.abs(after.astype(np.float64) - before).max())
    if gap == 0:
        text = f"the logits are those of the base, bit for bit (loaded by {path})"
        return Outcome("logits", MOVES, [Finding("logits", where, text)])
    size = float(np.abs(before).max())
    note = f"logits move by up to {gap:.3g}, the base's are up to {size:.3g} (loaded by {path})"
    return Outcome("logits", MOVES, note=note)


def _ids(base: Base) -> Array:
    size = base.vocabulary
    if size is None:
        raise UsageError(f"{base.folder / 'config.json'}: vocab_size is not a number of at least 2")
    return np.random.default_rng(0).integers(1, size, (ROWS, WIDTH)).astype(np.int32)


def _logits(engine: Engine, path: str, recipe: Recipe, ids: Array) -> tuple[Array | None, str]:
    try:
        trace = engine.capture(path, "logits", recipe, Trace({"ids.0": ids}, {"modules": False}))
    except (CaptureError, Unsupported) as error:
        return None, _line(error)
    return trace.arrays["logits.0"], ""


def _line(error: Exception) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
