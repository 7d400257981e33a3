"""A folder that somebody hands over, checked: what it is, what is wrong, what could not be told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from parity.adapters import fused, loading, mlx_files, peft_files
from parity.adapters.against import compare_artefacts
from parity.adapters.artefact import Adapter, Finding
from parity.adapters.base import Base, read_base
from parity.adapters.checks import check_files
from parity.adapters.export import check_export
from parity.adapters.fused import Model
from parity.adapters.gguf_file import SUFFIX
from parity.adapters.outcome import NO_BASE, Outcome
from parity.adapters.settings import CONFIG
from parity.capture.engine import Engine
from parity.errors import UsageError
from parity.judge.updates import layers, named

SCHEMA = 1
FILES_ONLY = "--files-only: no loader was started"


@dataclass(frozen=True)
class Result:
    """What a check gave.

    Attributes:
        folder: What was checked.
        described: What it is, in words.
        outcomes: Of each check.
        loaded: Whether a loader was to be asked.
    """

    folder: str
    described: dict[str, str]
    outcomes: list[Outcome]
    loaded: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All that is wrong."""
        return [finding for outcome in self.outcomes for finding in outcome.findings]

    @property
    def unchecked(self) -> list[Outcome]:
        """Checks that could not be made, or not in full."""
        return [outcome for outcome in self.outcomes if outcome.unchecked]

    @property
    def verdict(self) -> str:
        """`findings`, `incomplete` or `clean`."""
        if self.findings:
            return "findings"
        return "incomplete" if self.unchecked else "clean"

    @property
    def lacking(self) -> list[Outcome]:
        """Checks that were to be made, and could not."""
        wanted = ("loading", "logits") if self.loaded else ()
        return [o for o in self.unchecked if o.check in (*wanted, "against")]

    def sentence(self) -> str:
        """The verdict in words."""
        if self.findings:
            count = len(self.findings)
            return f"{count} finding{'s' * (count > 1)}"
        if not self.unchecked:
            return "nothing is wrong by any of the checks"
        names = ", ".join(outcome.check for outcome in self.unchecked)
        return f"nothing is wrong in what was checked; not checked, or not in full: {names}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "folder": self.folder,
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "described": self.described,
            "notes": self.notes,
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }


def read(folder: Path) -> Adapter | Model:
    """The artefact in a folder.

    Raises:
        UsageError: There is none, a file is missing or damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: give the folder that holds {CONFIG}")
    files = {file.name for file in folder.iterdir()}
    mlx, peft = mlx_files.WEIGHTS in files, peft_files.WEIGHTS in files
    if mlx and peft:
        raise UsageError(
            f"{folder} holds {mlx_files.WEIGHTS} and {peft_files.WEIGHTS}: no loader reads both, "
            "keep the one that is meant"
        )
    if mlx or peft:
        if CONFIG not in files:
            raise UsageError(
                f"{folder} holds no {CONFIG}: without it no rank and no scale is known"
            )
        return mlx_files.read(folder) if mlx else peft_files.read(folder)
    if CONFIG in files:
        more = "adapter_model.bin, which is not read: save it as safetensors"
        held = f"; it holds {more}" if "adapter_model.bin" in files else ""
        raise UsageError(
            f"{folder} holds {CONFIG}, but neither {mlx_files.WEIGHTS} nor {peft_files.WEIGHTS}{held}"
        )
    if "config.json" in files and any(
        f.startswith("model") and f.endswith(".safetensors") for f in files
    ):
        return fused.read_model(folder)
    held = ", ".join(sorted(files)[:5]) or "nothing"
    raise UsageError(
        f"{folder} is no adapter ({CONFIG} with {mlx_files.WEIGHTS} or {peft_files.WEIGHTS}) and no "
        f"fused model (config.json with model*.safetensors); it holds {held}"
    )


def check(
    folder: Path,
    source: str | None = None,
    against: Path | None = None,
    loader: str | None = None,
    engine: Callable[[], AbstractContextManager[Engine]] | None = None,
) -> Result:
    """Checks an artefact.

    Args:
        folder: Where it is.
        source: Its base: a fixture's name, a folder or a hub id.
        against: Another artefact.
        loader: The path whose loader is asked; None chooses by what wrote it.
        engine: Starts what runs loaders; None reads files alone.

    Raises:
        UsageError: Files are missing or damaged, or the base does not fit.
    """
    if folder.suffix == SUFFIX:
        return _export(folder, source, against, engine)
    found = read(folder)
    other = read(against) if against else None
    base = read_base(source) if source else None
    if isinstance(found, Model):
        found, outcomes = fused.check_model(found, base)
        described = _model(found)
    else:
        outcomes, described = check_files(found, base), describe(found)
    if base is None or engine is None:
        reason = NO_BASE if base is None else FILES_ONLY
        outcomes += _unloaded(found, reason)
    else:
        with engine() as running:
            outcomes += _loaded(running, found, base, loader)
    notes, outcomes = _by_loader(outcomes)
    if other is not None:
        if isinstance(other, Model):
            other, _ = fused.check_model(other, base)
        outcomes.append(compare_artefacts(found, other, base))
    return Result(str(folder), described, outcomes, base is not None and engine is not None, notes)


def _export(
    file: Path,
    source: str | None,
    against: Path | None,
    engine: Callable[[], AbstractContextManager[Engine]] | None,
) -> Result:
    """As `check`, of a GGUF file."""
    if source is not None:
        raise UsageError(f"--base is of no use for {file.name}: give --against, the exported model")
    if engine is None or against is None:
        return Result(str(file), *check_export(file, against, None))
    with engine() as running:
        return Result(str(file), *check_export(file, against, running), loaded=True)


def _loaded(
    engine: Engine, found: Adapter | Model, base: Base, loader: str | None
) -> list[Outcome]:
    if isinstance(found, Model):
        return [loading.measure_model(engine, loader or "mlx", found.folder, base)]
    return loading.load_and_measure(engine, loader or loading.loader_of(found, base), found, base)


def _unloaded(found: Adapter | Model, reason: str) -> list[Outcome]:
    logits = Outcome("logits", loading.MOVES, [], reason)
    if isinstance(found, Model):
        return [logits]
    return [Outcome("loading", loading.LOADS, [], reason), logits]


def _by_loader(outcomes: list[Outcome]) -> tuple[list[str], list[Outcome]]:
    """A loader knows the model's modules better than the names in the base's files.

    Where it took the adapter exactly as the files have it, what was found by these names is a note.
    """
    loaded = next((o for o in outcomes if o.check == "loading"), None)
    if loaded is None or loaded.findings or loaded.unchecked:
        return [], outcomes
    notes, kept = list[str](), list[Outcome]()
    for outcome in outcomes:
        renamed = [finding for finding in outcome.findings if finding.by_names]
        notes += [f"{f.where}: {f.text}; the loader takes the adapter as it is" for f in renamed]
        rest = [finding for finding in outcome.findings if not finding.by_names]
        kept.append(replace(outcome, findings=rest))
    return notes, kept


def describe(adapter: Adapter) -> dict[str, str]:
    """What an adapter is, in words."""
    names = sorted(adapter.modules)
    scales, ranks = dict[str, None](), dict[str, None]()
    for name in names:
        scale, (rank, _) = adapter.scale(name), adapter.rank(name)
        value = "none" if scale.value is None else f"{scale.value:g}"
        scales[f"{value}, from {scale.source}" if scale.value is not None else scale.source] = None
        ranks[str(rank)] = None
    if not names:
        scales[f"none: {adapter.kind} has no scale"] = None
    dtypes = sorted({tensor.dtype_name for tensor in adapter.tensors.values()})
    kinds = sorted({name.rpartition(".")[2] for name in names})
    described = {
        "kind": {"full": "full fine-tuning: weights, no LoRA"}.get(adapter.kind, adapter.kind),
        "written by": adapter.writer,
        "rank": ", ".join(ranks) or "none",
        "scale": "; ".join(scales),
        "modules": f"{len(names)}: {', '.join(kinds)}" if names else "none",
        "layers": layers(names).removeprefix("layers ").removeprefix("layer "),
        "dtype": ", ".join(dtypes) or "no tensor",
        "base": adapter.base or "not named",
    }
    if adapter.extra:
        described["other tensors"] = f"{len(adapter.extra)}: {named(sorted(adapter.extra))}"
    return described


def _model(model: Model) -> dict[str, str]:
    files = model.files
    dtypes = sorted({tensor.dtype_name for tensor in files.tensors.values()})
    described = {
        "kind": "a whole model: an adapter fused into its base, or full fine-tuning",
        "model type": str(files.config.get("model_type", "not named")),
        "layers": str(files.layers),
        "tensors": str(len(files.tensors)),
        "dtype": ", ".join(dtypes),
    }
    if model.changed is not None:
        changed = sorted(name.removesuffix(".weight") for name in model.changed)
        described["changed"] = (
            f"{len(changed)} tensors ({named(changed)})" if changed else "no tensor"
        )
    return described
