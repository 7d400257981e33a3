"""Schemas of traces: names or name patterns, shapes with named dimensions, dtypes, scalars.

A name may hold an index (`row.N`, any capital letter after a dot) and a word (`adapter/<name>`). All
names with one letter have the same indices, counted from 0, and the letter is also a dimension: how
many there are. A dimension of a plain name is one number over the whole call, inputs and outputs; that
of an indexed name is one number for each index; that of a name with a word is one for each word.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError

from parity.trace import Array, Trace

KINDS = {"float": "f", "int": "iu", "bool": "b", "number": "iuf"}
"""Kind to the letters that NumPy has for it (`dtype.kind`); a number is whole or not."""
SHOWN = 5
"""Violations that a message names; the rest are counted."""


@dataclass(frozen=True)
class ArraySpec:
    """An array, or all arrays of a pattern.

    Attributes:
        name: Such as `loss`, `ids.N`, `adapter/<name>`; `<weight>` is a name that is no factor of LoRA's.
        shape: Such as `()`, `(B, W)`, `(B, T + 1)`, `(K, 3)`; `(*S)` is any shape, the same wherever
            S stands; `(...)` is any shape; alternatives are separated by `|`.
        kind: A key of `KINDS`.
        meaning: A phrase.
        together: Empty where it is required; else what is optional as a whole: of items with the same
            word all are there or none.
        instead: The name of a spec that may stand in its place.
    """

    name: str
    shape: str
    kind: str
    meaning: str
    together: str = ""
    instead: str = ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the names look like; an index is a group `index_N`, a word a group `word`."""
        parts = re.split(r"(<\w+>|(?<=\.)[A-Z](?=/|$))", self.name)
        return re.compile("".join(map(_fragment, parts)))

    @property
    def letter(self) -> str:
        """The letter of its index, or empty."""
        found = re.search(r"\.([A-Z])(?=/|$)", self.name)
        return found[1] if found else ""

    def described(self) -> str:
        """One line of a table."""
        return f"{self.name} {self.shape} {self.kind}"


@dataclass(frozen=True)
class ScalarSpec:
    """A scalar: any value that JSON can hold.

    Attributes:
        name: Such as `tokens`; `<name>` is any name.
        type: What pydantic's TypeAdapter accepts for it.
        meaning: A phrase.
        together: As in `ArraySpec`.
        length: The dimension that a list has.
    """

    name: str
    type: Any
    meaning: str
    together: str = ""
    length: str = ""

    def described(self) -> str:
        """One line of a table."""
        name = getattr(self.type, "__name__", "") if isinstance(self.type, type) else ""
        shown = name if name and not getattr(self.type, "__args__", ()) else str(self.type)
        length = f" of {self.length}" if self.length else ""
        return f"{self.name}: {shown.replace('typing.', '')}{length}"


Spec = ArraySpec | ScalarSpec


def _fragment(part: str) -> str:
    if part == "<weight>":
        return r"(?P<word>(?!.*\.lora_\w+$).+)"
    if part.startswith("<"):
        return "(?P<word>.+)"
    if re.fullmatch(r"[A-Z]", part):
        return rf"(?P<index_{part}>\d+)"
    return re.escape(part)


@dataclass
class Bindings:
    """What dimensions and index letters stand for, as far as traces have shown it.

    Attributes:
        sizes: (scope, dimension) to its number and the name that showed it.
        counts: Letter to how many there are and what showed it.
        shapes: (scope, `S` of `*S`) to a shape and the name that showed it.
    """

    sizes: MutableMapping[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    counts: dict[str, tuple[int, str]] = field(default_factory=dict)
    shapes: MutableMapping[tuple[str, str], tuple[tuple[int, ...], str]] = field(
        default_factory=dict
    )

    def copy(self) -> Bindings:
        """Another one that knows the same."""
        return Bindings(dict(self.sizes), dict(self.counts), dict(self.shapes))


def violations(specs: Sequence[Spec], trace: Trace, bindings: Bindings) -> list[str]:
    """Everything in a trace that does not fit its specs, a phrase each; adds to the bindings."""
    scalars = [spec for spec in specs if isinstance(spec, ScalarSpec)]
    arrays = [spec for spec in specs if isinstance(spec, ArraySpec)]
    matches = _matches(arrays, trace.arrays)
    present = {spec.together for spec in arrays if matches[spec]}
    present |= {spec.together for spec in scalars if spec.name in trace.scalars}
    known = {name for names in matches.values() for name in names}
    # Unknown names first: a misspelt name explains one that is missing.
    found = [
        f"{name} {value.shape} {value.dtype} is not part of it"
        for name, value in sorted(trace.arrays.items())
        if name not in known
    ]
    found += _scalars(scalars, trace.scalars, present, bindings)
    found += _indices(arrays, matches, present, bindings)
    for spec in arrays:
        for name, match in sorted(matches[spec].items()):
            found += _array(spec, name, match, trace.arrays[name], bindings)
    return found


def shortened(found: Sequence[str]) -> str:
    """Violations as one line."""
    more = len(found) - SHOWN
    return "; ".join(found[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _matches(
    specs: Iterable[ArraySpec], arrays: Mapping[str, Array]
) -> dict[ArraySpec, dict[str, re.Match[str]]]:
    """The names that fit each spec, each name with the first spec that it fits."""
    found: dict[ArraySpec, dict[str, re.Match[str]]] = {spec: {} for spec in specs}
    for name in arrays:
        for spec, names in found.items():
            if match := spec.pattern.fullmatch(name):
                names[name] = match
                break
    return found


def _scalars(
    specs: Sequence[ScalarSpec], scalars: Mapping[str, Any], present: set[str], bindings: Bindings
) -> list[str]:
    found = []
    if not any(spec.name.startswith("<") for spec in specs):
        names = {spec.name for spec in specs}
        strange = sorted(scalars.keys() - names)
        found += [f"scalar {name} = {_short(scalars[name])} is not part of it" for name in strange]
    for spec in specs:
        if spec.name.startswith("<"):
            continue
        if spec.name not in scalars:
            if not spec.together or spec.together in present:
                found.append(f"scalar {spec.described()} is missing ({spec.meaning})")
            continue
        value = scalars[spec.name]
        try:
            TypeAdapter(spec.type).validate_python(value)
        except ValidationError:
            found.append(f"scalar {spec.name} is {_short(value)}, expected {spec.described()}")
            continue
        if spec.length:
            count, shown = bindings.counts.setdefault(spec.length, (len(value), spec.name))
            if count != len(value):
                found.append(
                    f"scalar {spec.name} has {len(value)} items, but there are {count} of {shown}"
                )
    return found


def _indices(
    specs: Sequence[ArraySpec],
    matches: Mapping[ArraySpec, Mapping[str, re.Match[str]]],
    present: set[str],
    bindings: Bindings,
) -> list[str]:
    """Names that are missing: plain ones, and indices that other names of the letter have."""
    found = []
    sets = {
        spec: {int(match[f"index_{spec.letter}"]) for match in matches[spec].values()}
        for spec in specs
        if spec.letter
    }
    for spec, indices in sets.items():
        if indices and spec.letter not in bindings.counts:
            every = set().union(*(s for other, s in sets.items() if other.letter == spec.letter))
            bindings.counts[spec.letter] = max(every) + 1, spec.name
    stand_ins = {spec.name for spec in specs if matches[spec]}
    for spec in specs:
        if spec.together and spec.together not in present:
            continue
        if not spec.letter:
            if not matches[spec] and spec.instead not in stand_ins:
                found.append(f"{spec.described()} is missing ({spec.meaning})")
            continue
        count, shown = bindings.counts.get(spec.letter, (None, ""))
        if count is None:
            found.append(f"{spec.described()} is missing ({spec.meaning})")
            continue
        lost = [index for index in range(count) if index not in sets[spec]]
        if lost:
            names = [spec.name.replace(f".{spec.letter}", f".{index}") for index in lost[:3]]
            found.append(
                f"{', '.join(names)}{', …' if lost[3:] else ''} {spec.shape} {spec.kind} "
                f"{'are' if lost[1:] else 'is'} missing: there are {count} of {shown}"
            )
        if beyond := sorted(index for index in sets[spec] if index >= count):
            name = spec.name.replace(f".{spec.letter}", f".{beyond[0]}")
            found.append(f"{name} is one too many: there are {count} of {shown}")
    return found


def _array(
    spec: ArraySpec, name: str, match: re.Match[str], value: Array, bindings: Bindings
) -> list[str]:
    found = []
    if value.dtype.kind not in KINDS[spec.kind]:
        found.append(f"{name} is {value.dtype}, expected {spec.kind}")
    groups = match.groupdict()
    scope = groups.get("word") or (groups[f"index_{spec.letter}"] if spec.letter else "")
    if scope and "word" not in groups:
        scope = f"{spec.letter}={scope}"
    complaints = []
    for shape in spec.shape.split("|"):
        # What an alternative binds counts only if it fits as a whole.
        sizes, shapes = ChainMap({}, bindings.sizes), ChainMap({}, bindings.shapes)
        trial = Bindings(sizes, bindings.counts, shapes)
        complaint = _shape(shape.strip().strip("()"), name, value.shape, scope, trial)
        if complaint is None:
            bindings.sizes.update(sizes.maps[0])
            bindings.shapes.update(shapes.maps[0])
            return found
        complaints.append(complaint)
    return [*found, f"{name} has shape {value.shape}, expected {spec.shape}{complaints[0]}"]


def _shape(
    shape: str, name: str, actual: tuple[int, ...], scope: str, bindings: Bindings
) -> str | None:
    """None if a shape fits; else the reason, which follows the shape in a message."""
    if shape == "...":
        return None
    if shape.startswith("*"):
        expected, shown = bindings.shapes.setdefault((scope, shape[1:]), (actual, name))
        return None if expected == actual else f", the shape {expected} of {shown}"
    dimensions = [part.strip() for part in shape.split(",") if part.strip()]
    if len(dimensions) != len(actual):
        return ""
    for dimension, size in zip(dimensions, actual, strict=True):
        if dimension.isdigit():
            if int(dimension) != size:
                return ""
            continue
        letter, _, more = (part.strip() for part in dimension.partition("+"))
        number = size - int(more or 0)
        if letter in bindings.counts and letter.isupper():
            known, shown = bindings.counts[letter]
        else:
            known, shown = bindings.sizes.setdefault((scope, letter), (number, name))
        if known != number:
            return f", where {letter} is {known} in {shown}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
