"""Models and sides of a sweep that are functions of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parity.sweep.answers import Answer
from parity.sweep.bench import Bench, Logits, equal
from parity.sweep.models import Model
from parity.sweep.traps import changed

CONFIG = {
    "model_type": "toy", "hidden_size": 64, "num_attention_heads": 4, "qk_rope_head_dim": 8,
    "num_local_experts": 4, "hidden_act": "silu", "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
}  # fmt: skip


@dataclass
class Toy(Bench):
    """Sides that are functions of a configuration."""

    sides: dict[str, Callable] = field(default_factory=dict)

    def logits(self, side, model):
        try:
            return Logits(np.float64([self.sides[side](self.model_of(side, model).config)]))
        except ValueError as error:
            return Logits(None, f"mlx-lm does not load the model: {error}", side == "subject")

    def ask(self, question, configuration, model):
        subject, reference = (self.logits(side, model) for side in ("subject", "reference"))
        verdict = "agree" if equal(subject, reference) else "diverge"
        reason = subject.error or reference.error or "logits: 3 of 1e-5"
        if reference.values is None:
            verdict = "not asked"
        return Answer(question, configuration, verdict, reason, tolerance=1e-6), None

    def versions(self, model):
        return {}


class Folders:
    """Models that are their configurations."""

    def model(self, name, config, ties=False):
        return Model(Path("/nowhere"), {}, [], dict(config))

    def edited(self, model, changes):
        return self.model("", changed(model.config, changes))
