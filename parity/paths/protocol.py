"""The protocol of a path and the registry.

A path carries out a recipe with one implementation. It has one method a stage; each takes the
recipe and the stage's inputs and returns a `Trace`. All arrays are NumPy; adapter names are
canonical (`layers.3.self_attn.q_proj.lora_a`) and in MLX orientation: lora_a (in, r),
lora_b (r, out).

======================  ============================================================================
method                  inputs → what the trace holds
======================  ============================================================================
tokenization            scalars `texts` [str], `conversations` [[{role, content}]] →
                        `row.N` ids (n,) of each training row as it is trained on, `offset.N` ()
                        first supervised token of the row (0: all), `text.N`, `chat.N`;
                        scalars `decoded` [str], one a text, `bos`, `eos`, `pad`, `vocab_size`
batches                 → `ids.N` (B, W), `lengths.N` (B, 2) of (offset, tokens) per micro-batch,
                        for steps × accumulation micro-batches
logits                  `ids.N` (B, T); scalar `modules` bool → `logits.N` (B, T, V) float32
                        (float64 from a float64 run); with `modules`, `module.N/<name>` outputs in
                        the order of calls, scalar `order` [name]; scalar `dtype`; outputs of
                        modules named in `replace/<name>` are replaced by these
supervised_positions    `batches/ids.N`, `batches/lengths.N`, or scalar `count` of the path's own
                        micro-batches → `ids.N` (B, W), `lengths.N` (B, 2), `supervised.N` (K, 3) of
                        (row, position, target id): the loss depends on the logits at input
                        `position`, whose target is the row's token `position` + 1; scalar `pieces`
                        {target id: text}
cross_entropy           `logits` (B, T, V), `ids` (B, T + 1), `lengths` (B, 2) → `loss` (),
                        `supervised` (B, T) bool, `targets` (B, T) id or -1, `token_loss` (B, T);
                        scalar `tokens`
lora_init               → `adapter/<name>`; scalars `trainable` [name], `rank`, `scale`, `dropout`,
                        `layers` [int], `dtype`
gradient                `adapter/<name>`, `ids` (B, W), `lengths` (B, 2); scalar `modules` bool →
                        `loss` (), `norm` (), `gradient/<name>`, before any clip; scalar `tokens`;
                        with `modules`, gradients of the loss at each module: `activation/<name>`
                        with respect to its output, `input/<name>` to its first argument as far as
                        it goes through this module, scalar `order` [name] of calls; a gradient that
                        arrives at an output named in `replace/<name>` is replaced on its way back;
                        what the model returns is named `logits`, a second call `<name>#2`
optimizer_step          `weight/<name>`, `gradient.N/<name>` → `weight.N/<name>` after each step,
                        clip included
train                   optional `adapter/<name>` to start from (else the path's own init), optional
                        `batches/ids.N`, `batches/lengths.N` → `loss` (steps,), `gradient_norm`
                        (steps,) before any clip, `tokens` (steps,), `adapter/<name>` at the end,
                        `batches/...` as trained on
kv_cache                `adapter/<name>`, `turn.N` (n,) ids of a conversation of T tokens, odd turns
                        being replies; scalar `trim` → `uncached` (T, V) logits, each turn from a
                        forward over the prefix it ends; `lengthened` (T,) how far these move when
                        the forward goes on to the end; `prefill` (T, V) each turn at once through
                        one cache; `steps` (K, V) at `positions` (K,): the path's own generation over
                        all turns, the replies forced on it; where the cache can be trimmed `trimmed`
                        (n, V): turn `trim` taken back and fed again, else scalar `untrimmed` why
                        not; scalars `window` int or none, `caches` [name]
decode                  `adapter/<name>`; scalars `prompts` [str], `expected` str → `ids.N`
                        generated, `margin.N` top-1 minus top-2 logit at each of them, `completion_loss` (P,)
                        teacher-forced on `expected`; scalars `text` [str]
config                  → scalars in the vocabulary of probe 00 (see `stages/config.py`)
======================  ============================================================================

A method that is not overridden, a factor that cannot be honoured, or an input that cannot be taken
raises `Unsupported` with the reason, which becomes a `skip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from parity.errors import Unsupported
from parity.recipe import Recipe
from parity.trace import Trace

METHODS = (
    "tokenization",
    "batches",
    "supervised_positions",
    "logits",
    "cross_entropy",
    "lora_init",
    "gradient",
    "optimizer_step",
    "train",
    "kv_cache",
    "decode",
    "config",
)


class TrainingPath:
    """One implementation of recipes. Subclasses import their framework inside methods."""

    name: ClassVar[str]
    framework: ClassVar[str]
    """`mlx` or `torch`; two paths of one framework are expected bit-identical, `operations` aside."""
    operations: ClassVar[Mapping[str, str]] = {}
    """Stage → what is computed there otherwise than usual in the framework. Two paths of one
    framework that differ in it are expected to agree within the noise floor in that stage."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions belong to the environment of a trace."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Factors it has no option for, with the one value it always has."""
    release: ClassVar[str] = ""
    """The one of them that `PATH@VERSION` names a release of; without one there is no such path."""
    without_dependencies: ClassVar[tuple[str, ...]] = ()
    """Those of them that run without what they require, which would not fit this machine."""
    hidden: ClassVar[tuple[str, ...]] = ()
    """Packages that its process cannot import: mlx-lm imports transformers, and that imports torch
    where it is installed, for 2 s and 180 MB of which no MLX path uses anything."""
    swappable: ClassVar[bool] = False
    """Whether its parts (see `parity.paths.parts`) can stand in another such path, and others in it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    @classmethod
    def made_of(cls) -> tuple[type[TrainingPath], ...]:
        """The paths whose code it runs."""
        return (cls,)

    def check(self, recipe: Recipe) -> None:
        """Asked before every method.

        Raises:
            Unsupported: A factor cannot be honoured.
        """
        factors = recipe.factors()
        for name, only in self.fixed.items():
            if factors[name] != only:
                raise Unsupported(
                    f"path {self.name!r} always has {name}={only}, not {factors[name]}"
                )

    def shipped(self) -> dict[str, Any]:
        """Factors as this path sets them when nobody says anything, read from the live library."""
        return {}

    def defaults(self, recipe: Recipe, inputs: Trace) -> Trace:
        """`shipped()` as a trace: it needs the framework, so it is asked for like a capture."""
        return Trace(scalars=self.shipped())

    def environment(self) -> dict[str, Any]:
        """Versions, device and settings of the running process."""
        return {}

    def tokenization(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Ids that are trained on, and ids of arbitrary text."""
        raise self._unsupported("tokenization")

    def batches(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Batches in the order they are trained on."""
        raise self._unsupported("batches")

    def supervised_positions(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Which targets the path's real loss depends on."""
        raise self._unsupported("supervised positions")

    def logits(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Logits of the base model."""
        raise self._unsupported("logits")

    def cross_entropy(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The path's real loss on given logits."""
        raise self._unsupported("cross_entropy")

    def lora_init(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The adapter before the first step."""
        raise self._unsupported("lora_init")

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """One gradient at a given adapter and batch."""
        raise self._unsupported("gradient")

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The path's real clip and optimizer on given weights and gradients."""
        raise self._unsupported("optimizer_step")

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The path's training loop."""
        raise self._unsupported("train")

    def kv_cache(self, recipe: Recipe, inputs: Trace) -> Trace:
        """A conversation with a cache and without one."""
        raise self._unsupported("KV cache")

    def decode(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Greedy decoding with a given adapter."""
        raise self._unsupported("decode")

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """What is really in effect, read back from live objects."""
        raise self._unsupported("config")

    def _unsupported(self, stage: str) -> Unsupported:
        return Unsupported(f"path {self.name!r} has no {stage}")
