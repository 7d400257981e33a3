"""Factors that only unsloth-zoo has: `unsloth.use_cce` and the like."""

from __future__ import annotations

from typing import ClassVar, Literal

from parity.factors import Knobs


class UnslothKnobs(Knobs):
    """Its options without a counterpart in other trainers."""

    section: ClassVar[str] = "unsloth"

    use_cce: bool = False
    """Its chunked cross-entropy from hidden states instead of logits; it ships with it on."""
    patch_mode: Literal["patched", "unpatched"] = "patched"
    """Its replacements of model code for mx.compile."""
    load_in_4bit: bool = False
    """Quantizes the base weights as they are loaded; it ships with it on."""
    cast_norm_output: bool = True
    """In half precision, norms are in float32 and their outputs are cast back."""
    explicit_clip: bool = True
    """False leaves every clip option that `optim.clip` does not use at the release's own default,
    which is not the same as off and changed between releases."""
