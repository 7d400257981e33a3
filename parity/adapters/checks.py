"""What is asked of an adapter's files: each check is a function with findings or a reason to give none.

A check that could not be made says why: it is no evidence that nothing is wrong.
"""

from __future__ import annotations

from parity.adapters import setting_checks, tensor_checks
from parity.adapters.artefact import Adapter
from parity.adapters.base import Base
from parity.adapters.outcome import Check, Outcome
from parity.adapters.tensor_checks import is_turned
from parity.errors import UsageError
from parity.judge.updates import named

CHECKS: tuple[Check, ...] = (
    setting_checks.settings, setting_checks.trained_on, setting_checks.kind, setting_checks.rank,
    setting_checks.scale, setting_checks.modules, setting_checks.layers, setting_checks.bias,
    tensor_checks.keys, tensor_checks.shapes, tensor_checks.dtype, tensor_checks.values,
    tensor_checks.effect,
)  # fmt: skip


def check_files(adapter: Adapter, base: Base | None) -> list[Outcome]:
    """All that files alone can tell.

    Raises:
        UsageError: The base takes none of the modules.
    """
    if base is not None:
        _check_fit(adapter, base)
    outcomes = []
    for check in CHECKS:
        found, unchecked = check(adapter, base)
        question = (check.__doc__ or "").strip()
        outcomes.append(Outcome(check.__name__, question, found, unchecked))
    return outcomes


def _check_fit(adapter: Adapter, base: Base) -> None:
    names = set(adapter.modules) or (set(adapter.extra) if adapter.kind == "full" else set())
    theirs = base.modules if adapter.modules else base.tensors
    if not names:
        return
    known = [name for name in names if name in theirs]
    if not known:
        raise UsageError(
            f"--base {base.source}: it has none of the {len(names)} modules of {adapter.folder} "
            f"({named(sorted(names))}): give the model that the adapter was trained on"
        )
    widths = [
        (sizes, base.modules[name])
        for name in known
        if adapter.modules and (sizes := adapter.sizes(adapter.modules[name])) and sizes.fits
        and not is_turned(adapter, name, sizes)
    ]  # fmt: skip
    fits = [
        module for sizes, module in widths
        if None in (module.inputs, module.outputs)
        or (sizes.inputs, sizes.outputs) == (module.inputs, module.outputs)
    ]  # fmt: skip
    if widths and not fits:
        sizes, module = widths[0]
        raise UsageError(
            f"--base {base.source}: none of the {len(widths)} modules of {adapter.folder} fits it: "
            f"{module.key} is {module.inputs} → {module.outputs}, the adapter's is "
            f"{sizes.inputs} → {sizes.outputs}: give the model that the adapter was trained on"
        )
