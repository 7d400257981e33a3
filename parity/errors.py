"""The errors a person or an engine reacts to; everything else is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Wrong use: the message names the offending value and says how to fix it (exit code 2)."""


class Unsupported(Exception):
    """A path cannot do what a recipe or stage asks; the message is the reason of the `skip`."""


class CaptureError(Exception):
    """A path failed while it carried out a stage.

    Attributes:
        detail: Traceback or the tail of the worker's stderr.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class MissingCapture(Exception):
    """A bundle lacks what a cell needs, which is named: an error of the cell, never a source left out."""


class UnmatchedNames(Exception):
    """Tensors that were handed over do not fit the path's own, by name: a divergence, no fault."""


class DiskFull(BaseException):
    """Nothing more can be kept: ends the command, whatever turns errors of single cells into answers."""


NO_ANSWER = (Unsupported, CaptureError, UnmatchedNames)
"""What a question may end in without an answer, where what is known already stands without it."""


class WrongChannel(Exception):
    """What was read from a run is not what it was read for: an error, whatever it would agree with."""


def closest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'mlx-lm'? ` where a name is close to a known one; else empty."""
    found = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}? " if found else ""
