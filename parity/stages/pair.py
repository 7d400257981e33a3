"""Both sides' traces of one capture, and the noise that is measured around the reference on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from parity.judge import noise as sources
from parity.judge.noise import REPEATS, Noise, Sources
from parity.trace import Array, Trace

ROUNDED = "the referee's implementation in the recipe's dtype"
APART = "one side alone compiles its step, and"


class Extent(IntEnum):
    """How much of a cell is asked."""

    DIFFERENCE = 0
    """Whether the sides differ, where bits decide: not whether each repeats itself."""
    VERDICT = 1
    """What its verdict depends on, as far as the first that diverges."""
    HINTS = 2
    """Also what a hint is drawn from."""
    SIDE = 3
    """Also which side is off, by the float64 run, where bits decide."""
    RECORD = 4
    """Also what is reported and decides nothing, such as each path as it is shipped."""


class Measured(NamedTuple):
    """A trace that a floor is measured with, or why there is none."""

    trace: Trace | None
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """Both sides' traces of one capture, and what is measured around the reference on demand.

    `measure` gives, by source of noise: the float64 run, the same implementation in the recipe's
    dtype (`ROUNDED`), the reference with its inputs moved, a repeat of either side.
    """

    subject: Trace
    reference: Trace
    exact: bool
    rounded_is_reference: bool
    model_dtype: str
    half: bool
    main: str
    measure: Callable[[str], Measured]
    reduction: Callable[[], float]
    compiled_apart: Callable[[], bool] = lambda: False
    """Whether only one side compiles its step."""
    trains: bool = False
    """Whether the capture is of training."""
    extent: Extent = Extent.RECORD
    _measured: dict[str, Measured] = field(default_factory=dict)
    _noises: dict[str, Noise] = field(default_factory=dict)

    def measured(self, source: str) -> Measured:
        """What a source gives, measured when first asked for."""
        if source not in self._measured:
            self._measured[source] = self.measure(source)
        return self._measured[source]

    @property
    def noise(self) -> Noise:
        """The noise around the reference, by array name."""
        return self.noise_of("")

    def noise_of(self, group: str) -> Noise:
        """The noise of one group of arrays, by name inside the group.

        Within one framework nothing is measured unless bits differ. Then each side is run once more:
        if both repeat themselves bits decide, and the float64 run tells which side is off, where that
        is asked; if one does not, the floor does. It does as well where one side alone compiles its step and the
        compiler moves bits of the reference on this device, as it may on a GPU, or where that could
        not be measured.
        """
        if group not in self._noises:
            self._noises[group] = self._noise(group)
        return self._noises[group]

    def _noise(self, group: str) -> Noise:
        if not self.exact:
            return self._measured_noise(group)
        if _equal(_arrays(self.subject, group), _arrays(self.reference, group)):
            equal = dict.fromkeys(
                (sources.REFEREE, sources.PERTURBED), "not measured: bits are equal"
            )
            return Noise(exact=True, absent=equal)
        if self.extent is Extent.DIFFERENCE:
            undecided = (sources.REFEREE, sources.PERTURBED)
            return Noise(exact=True, absent=dict.fromkeys(undecided, "not asked for: bits decide"))
        repeats, why, absent = self._repeats(group)
        if why:
            return replace(self._measured_noise(group, absent), repeats=repeats, why_floor=why)
        tells = self.extent >= Extent.SIDE
        referee = self._trace(sources.REFEREE, absent) if tells else None
        # No hint is drawn from the rounding of a whole training, which takes longest.
        wanted = tells or (self.extent is Extent.HINTS and not self.trains)
        moved = self._trace(sources.PERTURBED, absent) if wanted else None
        for source, trace in ((sources.REFEREE, referee), (sources.PERTURBED, moved)):
            if trace is None:
                absent.setdefault(source, "not asked for: bits decide")
        return Noise(
            exact=True,
            referee=_arrays(referee, group),
            rounded_is_reference=False,
            perturbed=_arrays(moved, group),
            dtype=self.dtype,
            absent=absent,
        )

    def rounding(self, name: str) -> Sources:
        """The sources of one array of the reference, also where bits are what counts.

        Where the float64 run is another implementation than the reference it is not asked for.
        """
        value = self.reference.arrays[name]
        if self.rounded_is_reference:
            return self._measured_noise("").sources(name, value)
        moved, reason = self.measured(sources.PERTURBED)
        absent = {
            sources.PERTURBED: reason,
            sources.REFEREE: "not measured: it is another implementation than the reference",
        }
        return Noise(False, perturbed=_arrays(moved, ""), dtype=self.dtype, absent=absent).sources(
            name, value
        )

    @property
    def dtype(self) -> str:
        """What the reference declares that its arrays were computed in, no coarser than the recipe's.

        Empty: the arrays' own.
        """
        declared = str(self.reference.scalars.get("dtype", ""))
        if sources.EPS.get(declared, 0.0) > sources.EPS[self.model_dtype]:
            return self.model_dtype
        return declared

    def _measured_noise(self, group: str, absent: Mapping[str, str] | None = None) -> Noise:
        reasons = dict(absent or {})
        rounded = self.reference if self.rounded_is_reference else self._trace(ROUNDED, reasons)
        return Noise(
            exact=False,
            referee=_arrays(self._trace(sources.REFEREE, reasons), group),
            rounded=_arrays(rounded, group),
            rounded_is_reference=self.rounded_is_reference,
            perturbed=_arrays(self._trace(sources.PERTURBED, reasons), group),
            reduction=self.reduction(),
            dtype=self.dtype,
            half=self.half,
            absent=reasons,
            main=self.main,
        )

    def _trace(self, source: str, absent: dict[str, str]) -> Trace | None:
        trace, reason = self.measured(source)
        if trace is None:
            # Without it the distance to the float64 run is not known.
            absent.setdefault(sources.REFEREE if source == ROUNDED else source, reason)
        return trace

    def _repeats(self, group: str) -> tuple[dict[str, Mapping[str, Array]], str, dict[str, str]]:
        """By source how far a side is from itself, why the floor decides, and runs that failed."""
        moved: dict[str, Mapping[str, Array]] = {}
        why: list[str] = []
        absent: dict[str, str] = {}
        runs = [
            (REPEATS[side], trace, f"the {side} does not repeat itself bit for bit on this device")
            for side, trace in (("reference", self.reference), ("subject", self.subject))
        ]
        if self.compiled_apart():
            reason = f"{APART} that moves bits on this device"
            runs.append((sources.COMPILED, self.reference, reason))
        for source, trace, reason in runs:
            again = self._trace(source, absent)
            ours, theirs = _arrays(trace, group), _arrays(again, group)
            if again is None and source == sources.COMPILED:
                why.append(
                    f"{APART} whether that moves bits could not be measured ({absent[source]})"
                )
            if again is None or _equal(ours, theirs):
                continue
            moved[source] = {
                name: np.abs(value.astype(np.float64) - theirs[name])
                for name, value in ours.items()
                if name in theirs and theirs[name].shape == value.shape and value.dtype.kind == "f"
            }
            why.append(reason)
        return moved, " and ".join(why), absent


def _arrays(trace: Trace | None, group: str) -> Mapping[str, Array]:
    if trace is None:
        return {}
    return trace.group(group) if group else trace.arrays


def _equal(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name], equal_nan=a[name].dtype.kind == "f") for name in a
    )
