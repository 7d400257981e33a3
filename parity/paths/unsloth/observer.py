"""What leaves the compiled step of `MLXTrainer`, and whether it is what it should be.

Python sees nothing of a compiled step. What it computes leaves in its optimizer's state, which is among
its outputs; losses and norms that its callbacks report must agree with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parity.errors import WrongChannel
from parity.names import canonical
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.live import to_numpy
from parity.trace import Array

REPORT_TOLERANCE = 1e-5, 1e-3
"""Relative distance of a callback's loss and gradient norm from what was carried out.

Its loss is a product with the tokens divided by them again; its norm one running float32 sum.
"""


@dataclass
class Run:
    """What left the steps, by optimizer step, and what the trainer returned at its end."""

    micro_losses: list[Array] = field(default_factory=list)
    micro_tokens: list[Array] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reports: list[tuple[Any, ...]] = field(default_factory=list)
    weights: list[dict[str, Array]] = field(default_factory=list)
    updates: list[dict[str, Array]] = field(default_factory=list)
    """With fed gradients: the weights after each step, and what its optimizer was given."""
    gradient: dict[str, Array] = field(default_factory=dict)
    """If asked for: the last gradient before any clip."""
    outcome: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    trainer: Any = None

    def check(self, steps: int, half: bool) -> None:
        """Refuses a run whose channels contradict each other or cannot be what they should be.

        Raises:
            WrongChannel: With the channel and the step.
        """
        counts = {"callbacks": len(self.reports), "gradient norms": len(self.norms)}
        if wrong := {name: n for name, n in counts.items() if n != steps}:
            raise WrongChannel(f"{steps} steps were trained, but there are {wrong}")
        for step, report in enumerate(self.reports):
            losses, tokens = self.micro_losses[step], self.micro_tokens[step]
            carried = np.average(losses, weights=tokens), self.norms[step]
            for name, ours, theirs, slack in zip(
                ("loss", "gradient norm"),
                carried,
                (report[2], report[8]),
                REPORT_TOLERANCE,
                strict=True,
            ):
                slack = 2e-2 if half and name != "loss" else slack
                if theirs is not None and not np.isclose(
                    ours, theirs, rtol=slack, atol=0, equal_nan=True
                ):
                    raise WrongChannel(
                        f"{name} of step {step + 1}: the trainer reports {theirs:.9g}, "
                        f"but {ours:.9g} left its step"
                    )
        moved = any(report[3] for report in self.reports)
        if steps >= 3 and moved and len(set(self.norms)) == 1:
            raise WrongChannel(
                f"the gradient norm is {self.norms[0]:.9g} at each of {steps} steps: "
                "this is no gradient norm"
            )


class StepObserver:
    """Entries of an optimizer's state by which losses, tokens and gradient norms leave a step."""

    _LOSSES, _TOKENS, _NORM = "parity_losses", "parity_tokens", "parity_norm"
    _GRADIENT, _UPDATE = "parity_gradient", "parity_update"

    def __init__(self, parts: int, gradients: bool = False, updates: bool = False) -> None:
        self.parts, self.gradients, self.updates = parts, gradients, updates
        self.state: Any = {}
        self._recorded = False

    def attach(self, optimizer: Any) -> Any:
        """Makes the entries before the step is compiled: its inputs must not change later."""
        import mlx.core as mx

        self.state = optimizer.state
        self.state[self._LOSSES] = mx.zeros(self.parts)
        self.state[self._TOKENS] = mx.zeros(self.parts)
        self.state[self._NORM] = mx.array(float("nan"))
        inner = optimizer.apply_gradients

        def apply_gradients(gradient: Any, parameters: Any) -> Any:
            self.record(gradient)
            if self.updates:
                self.state[self._UPDATE] = dict(_mlx.flat(gradient))
            return inner(gradient, parameters)

        optimizer.apply_gradients = apply_gradients
        return optimizer

    def micro_batch(self, loss: Any, tokens: Any, gradient: Any) -> None:
        """One micro-batch; of a step of one the gradient is at hand here."""
        import mlx.core as mx

        for name, value in ((self._LOSSES, loss), (self._TOKENS, tokens)):
            new = value.astype(mx.float32).reshape(1)
            self.state[name] = mx.concatenate([self.state[name][1:], new])
        self._recorded = False
        if self.parts == 1:
            self.record(gradient)

    def record(self, gradient: Any) -> None:
        """The step's gradient, at the first place before clip and optimizer where it is seen."""
        if self._recorded:
            return
        self._recorded = True
        self.state[self._NORM] = _mlx.gradient_norm(gradient)
        if self.gradients:
            self.state[self._GRADIENT] = dict(_mlx.flat(gradient))

    def read(self, run: Run) -> None:
        """Takes what has left the step that has just ended."""
        run.micro_losses.append(to_numpy(self.state[self._LOSSES]).astype(np.float64))
        run.micro_tokens.append(to_numpy(self.state[self._TOKENS]).astype(np.float64))
        run.norms.append(float(self.state[self._NORM].item()))
        if self.gradients:
            run.gradient = _named(self.state[self._GRADIENT])
        if self.updates:
            run.updates.append(_named(self.state[self._UPDATE]))


def _named(tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {canonical(name): to_numpy(value) for name, value in tensors.items()}
