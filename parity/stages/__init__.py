"""One file per stage: what is captured from both paths, and how it is compared.

Comparing sees NumPy arrays only; no framework is imported here.
"""

from __future__ import annotations

from parity.errors import UsageError, closest
from parity.stages.config import Config
from parity.stages.context import Stage
from parity.stages.cross_entropy import CrossEntropy
from parity.stages.decode import GreedyDecode
from parity.stages.exchange import Exchange
from parity.stages.fuse import Fuse
from parity.stages.gradient import Gradient
from parity.stages.kv_cache import KvCache
from parity.stages.logits import Logits
from parity.stages.lora_init import LoraInit
from parity.stages.loss_curve import LossCurve
from parity.stages.optimizer_step import OptimizerStep
from parity.stages.round_trip import RoundTrip
from parity.stages.supervised import SupervisedPositions
from parity.stages.tokenization import Tokenization

STAGES: tuple[Stage, ...] = (
    Config(),
    Tokenization(),
    SupervisedPositions(),
    Logits(),
    CrossEntropy(),
    LoraInit(),
    Gradient(),
    OptimizerStep(),
    LossCurve(),
    RoundTrip(),
    KvCache(),
    GreedyDecode(),
)
"""In the order in which data flows, which is the order of the search for a cause."""

ON_DEMAND: tuple[Stage, ...] = (Exchange(), Fuse())
"""Run where they are named: what one stack cannot read of another, or does not ship, is no fault of it."""

BY_NUMBER = tuple(sorted(STAGES, key=lambda stage: stage.number))
"""In the order in which they are run and shown; a number stays with its probe for good."""


def flow(name: str) -> int:
    """Where a stage stands in the flow of data; one that is not known stands last."""
    return next((at for at, stage in enumerate(STAGES) if stage.name == name), len(STAGES))


def find(name: str) -> Stage:
    """A stage by number or name.

    Raises:
        UsageError: There is none.
    """
    for stage in (*STAGES, *ON_DEMAND):
        if name in (stage.name, str(stage.number), f"{stage.number:02d}"):
            return stage
    known = ", ".join(f"{stage.number:02d} {stage.name}" for stage in (*BY_NUMBER, *ON_DEMAND))
    hint = closest(name, (stage.name for stage in (*STAGES, *ON_DEMAND)))
    raise UsageError(f"unknown probe {name!r}: {hint}give a number or name of {known}")
