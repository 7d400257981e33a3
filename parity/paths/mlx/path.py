"""Path `mlx`: an in-process loop on mlx-lm's loader, adapter wiring, batching and loss.

Every factor is honoured but `train.autocast`, which names torch's. The parts (load, wire, dataset,
iterate, loss, optimizer, clip, save, read, merge, loop) are methods, so that a subclass can put in a
part of another stack.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.paths import parts
from parity.paths.describe import defaults as defaults_of
from parity.paths.describe import describe_process, model_key
from parity.paths.documentation import documented
from parity.paths.mlx import live as _mlx
from parity.paths.mlx import loading, settings
from parity.paths.mlx.artefacts import MlxArtefacts
from parity.paths.mlx.live import Batch, Loss, Setup
from parity.paths.mlx.pristine import Pristine
from parity.paths.mlx.quantized import quantize
from parity.paths.mlx.settings import lr_schedule, optimizer_config, pad
from parity.recipe import Recipe
from parity.timing import LOAD, timed
from parity.trace import Array

WRITTEN_AS = {
    "loader": ("load",),
    "wiring": ("wire",),
    "batching": ("dataset", "iterate"),
    "loss": ("loss",),
    "clip": ("clip",),
    "optimizer": ("optimizer",),
    "saver": ("save", "export"),
    "reader": ("read",),
    "fuse": ("merge",),
    parts.LOOP: ("loop",),
}
"""The methods of a part."""
OPTIONS = {
    "num_layers": "lora.num_layers",
    "mask_prompt": "mask.prompt",
    "grad_accumulation_steps": "train.accumulation",
}
OPTIMIZER = {name: f"optim.{name}" for name in ("betas", "eps", "weight_decay", "bias_correction")}
"""What documentation calls them → factors."""
_TRAINS = ("setup", "train")
_FILES = ("round_trip", "train_and_load")
_USED_BY = {
    "loader": ("setup",),
    "wiring": ("setup", "lora_init"),
    "batching": ("setup", "tokenization", "batches"),
    "loss": (*_TRAINS, "gradient", "cross_entropy", "supervised_positions"),
    "clip": (*_TRAINS, "optimizer_step"),
    "optimizer": (*_TRAINS, "optimizer_step"),
    "saver": (*_FILES, "saved", "trained", "exported", "save_adapter"),
    "reader": (*_FILES, "reloaded", "load_adapter"),
    "fuse": ("merged", "fuse"),
    parts.LOOP: ("train",),
}
"""The methods that use a part: where one of them is replaced, nobody knows whether it still does."""


class MlxPath(MlxArtefacts):
    """In-process fine-tuning on mlx-lm's parts."""

    name: ClassVar[str] = "mlx"
    framework: ClassVar[str] = "mlx"
    packages: ClassVar[tuple[str, ...]] = ("mlx", "mlx-lm", "transformers", "numpy")
    release: ClassVar[str] = "mlx-lm"
    honours: ClassVar[tuple[str, ...]] = (
        "model.", "data.", "seed.", "lora.", "mask.", "optim.", "decode.max_tokens",
        "train.steps", "train.batch_size", "train.accumulation", "train.accumulation_weighting",
        "train.compile", "train.gradient_checkpointing",
    )  # fmt: skip
    hidden: ClassVar[tuple[str, ...]] = ("torch",)
    own_parts: ClassVar[tuple[str, ...]] = parts.ALL
    takes_parts: ClassVar[tuple[str, ...]] = tuple(parts.PARTS)

    def __init_subclass__(cls, **named: Any) -> None:
        """A part whose method a class replaces is its own.

        A part that it inherits, while it replaces what uses the part, is not known to be what it trains
        with: it can neither be lent nor replaced, unless the class declares so.
        """
        super().__init_subclass__(**named)
        own = vars(cls)
        written = {part for part, names in WRITTEN_AS.items() if own.keys() & set(names)}
        unsure = {part for part, names in _USED_BY.items() if own.keys() & set(names)} - written
        if "own_parts" not in own:
            cls.own_parts = tuple(p for p in parts.ALL if p in {*cls.own_parts, *written} - unsure)
        if "takes_parts" not in own:
            cls.takes_parts = tuple(part for part in cls.takes_parts if part not in unsure)

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._loaded: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self._pristine: dict[tuple[str, ...], Pristine] = {}
        self.donors: dict[str, MlxPath] = {}

    # Its defaults, and where it runs -----------------------------------------------------------

    def shipped(self) -> dict[str, Any]:
        """mlx-lm's own defaults, from its live modules."""
        import mlx.optimizers as optim
        from mlx_lm.lora import CONFIG_DEFAULTS as defaults

        name = str(defaults["optimizer"])
        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[name]
        signature = defaults_of(kind)
        lora: Any = defaults["lora_parameters"]
        return {
            "lora.rank": lora["rank"],
            "lora.scale": lora["scale"],
            "lora.dropout": lora["dropout"],
            "lora.num_layers": defaults["num_layers"],
            "optim.name": name,
            "optim.betas": signature["betas"],
            "optim.eps": signature["eps"],
            "optim.weight_decay": signature.get("weight_decay", 0.0),
            "optim.bias_correction": signature["bias_correction"],
            "mask.prompt": defaults["mask_prompt"],
            "mask.end_shift": 1,
            "data.pad_multiple": 32,
            "data.pad_extra": 1,
            "train.accumulation": defaults["grad_accumulation_steps"],
        }

    def documents(self) -> dict[str, Any]:
        """From `mlx_lm.lora --help` and the docstring of its optimizer."""
        import mlx.optimizers as optim
        from mlx_lm.lora import CONFIG_DEFAULTS as defaults
        from mlx_lm.lora import build_parser

        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[
            str(defaults["optimizer"])
        ]
        options = [f"{action.dest}: {action.help}" for action in build_parser()._actions]
        return documented(options, OPTIONS) | documented([kind.__doc__], OPTIMIZER)

    def environment(self) -> dict[str, Any]:
        """Versions, device, BLAS and variables of this process."""
        import mlx.core as mx

        return {**describe_process(self.packages), "device": str(mx.default_device())}

    # Parts -------------------------------------------------------------------------------------

    def part(self, name: str) -> MlxPath:
        """The path that a part (see `parity.paths.parts`) is taken from: this one, unless it is a hybrid."""
        return self.donors.get(name, self)

    @timed(LOAD)
    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """Model and tokenizer, cast to the recipe's dtype."""
        import mlx.core as mx

        if recipe.model.dtype == "float64":
            raise Unsupported("MLX has no float64 on the GPU and no fast kernels for it elsewhere")
        source = resources.model_dir(recipe.model.source)
        with loading.explained(source):
            model, tokenizer, config = loading.loaded(source)
        if recipe.model.weights != "stored":
            model.set_dtype(getattr(mx, recipe.model.weights))
        else:
            model.set_dtype(getattr(mx, recipe.model.dtype))
        if recipe.model.quantization != "stored":
            model = quantize(model, config, recipe)
        model.set_dtype(getattr(mx, recipe.model.dtype))
        mx.eval(model.parameters())
        return model, tokenizer

    def tokenizer(self, recipe: Recipe) -> Any:
        """As `mlx_lm.load` makes it, without the model."""
        return self.part("loader").read_tokenizer(recipe)

    def read_tokenizer(self, recipe: Recipe) -> Any:
        """What `load` makes beside the model."""
        return loading.tokenizer(recipe)

    def wire(self, model: Any, recipe: Recipe) -> None:
        """Freezes the base and makes trainable what `lora.kind` says."""
        settings.wire(model, recipe)

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """mlx-lm's dataset over the training rows."""
        from mlx_lm.tuner.datasets import CacheDataset, load_dataset

        args = types.SimpleNamespace(
            data=str(resources.data_dir(recipe.data.source)),
            train=True,
            test=False,
            mask_prompt=recipe.mask.prompt,
        )
        try:
            train, _, _ = load_dataset(args, tokenizer)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        rows = CacheDataset(train)
        if not recipe.data.append_eos:
            for index in range(len(rows)):
                ids, offset = rows[index]
                if ids[-1] == tokenizer.eos_token_id:
                    rows._proc_data[index] = (ids[:-1], offset)
        return rows

    def iterate(self, recipe: Recipe, dataset: Any) -> Callable[[], Iterator[Batch]]:
        """mlx-lm's batches, padded anew where the recipe pads otherwise."""
        from mlx_lm.tuner.trainer import iterate_batches

        def batches() -> Iterator[Batch]:
            for ids, lengths in iterate_batches(
                dataset, recipe.train.batch_size, recipe.data.max_length, loop=True
            ):
                yield pad(ids, lengths, recipe), lengths

        return batches

    def loss(self, recipe: Recipe) -> Loss:
        """mlx-lm's loss; another mask rule is other lengths handed to the same function."""
        import mlx.core as mx
        from mlx_lm.tuner.trainer import default_loss

        start, end = recipe.mask.start_shift, recipe.mask.end_shift - 1
        if (start, end) == (0, 0):
            return default_loss  # type: ignore[no-any-return]

        def shifted(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
            first = mx.maximum(lengths[:, 0], 1) + start
            return default_loss(  # type: ignore[no-any-return]
                model, batch, mx.stack([first, lengths[:, 1] + end], axis=1)
            )

        return shifted

    def optimizer(self, recipe: Recipe) -> Any:
        """The optimizer with its schedule."""
        import mlx.optimizers as optim
        from mlx_lm.tuner.utils import build_schedule

        kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}[recipe.optim.name]
        schedule = lr_schedule(recipe)
        rate = build_schedule(schedule) if schedule else recipe.optim.lr
        return kind(learning_rate=rate, **optimizer_config(recipe))

    def clip(self, recipe: Recipe) -> Callable[[Any], Any] | None:
        """What happens to a gradient before the optimizer sees it."""
        import mlx.core as mx
        import mlx.optimizers as optim
        from mlx.utils import tree_map

        limit = recipe.optim.clip_value
        if recipe.optim.clip == "value":
            return lambda gradient: tree_map(lambda g: mx.clip(g, -limit, limit), gradient)
        if recipe.optim.clip == "norm":
            return lambda gradient: optim.clip_grad_norm(gradient, limit)[0]
        return None

    def seed(self, recipe: Recipe) -> None:
        """Seeds the generators that LoRA init and the order of the data draw from."""
        import mlx.core as mx

        seed = recipe.seed
        np.random.seed(seed.value if seed.data is None else seed.data)
        mx.random.seed(seed.value)

    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """All live objects just before the first step, in the order mlx-lm makes them."""
        if recipe.seed.placement == "before_load":
            self.seed(recipe)
            model, tokenizer = self.part("loader").load(recipe)
        else:
            model, tokenizer = self.base(recipe)
            self.seed(recipe)
        self.part("wiring").wire(model, recipe)
        facts = {"seed.rng": _mlx.rng_state()}
        if adapter:
            model.load_weights(list(_mlx.renamed(model, adapter).items()), strict=False)
        batching = self.part("batching")
        dataset = batching.dataset(recipe, tokenizer)
        return Setup(
            model,
            tokenizer,
            self.part("optimizer").optimizer(recipe),
            dataset,
            self.part("loss").loss(recipe),
            batching.iterate(recipe, dataset),
            self.part("clip").clip(recipe),
            facts,
        )

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """The loaded model without adapter, kept over calls and put back as it was loaded."""
        key = model_key(recipe)
        # What the wiring of another stack does to a model cannot be known, nor undone.
        if key not in self._loaded or "wiring" in self.donors:
            self._loaded = {key: self.part("loader").load(recipe)}
            self._pristine = {key: Pristine(self._loaded[key][0])}
        return self._pristine[key].restore().eval(), self._loaded[key][1]

    def quantized(self, recipe: Recipe) -> bool:
        """Whether a module of the base holds packed weights."""
        return any("scales" in module for module in self.base(recipe)[0].modules())

    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """Trains; returns loss, gradient norm and supervised tokens of each optimizer step."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_map
        from mlx_lm.tuner.trainer import grad_checkpoint

        model, optimizer, count = setup.model, setup.optimizer, recipe.train.accumulation
        if recipe.train.gradient_checkpointing:
            grad_checkpoint(model.layers[0])
        # A single micro-batch has all the tokens: weighing it would round it for nothing.
        by_token = count > 1 and recipe.train.accumulation_weighting == "token"
        value_and_grad = nn.value_and_grad(model, setup.loss)
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(ids: Any, lengths: Any, previous: Any, seen: Any, update: bool) -> Any:
            (loss, tokens), gradient = value_and_grad(model, ids, lengths)
            if by_token:
                gradient = tree_map(lambda g: g * tokens, gradient)
            if previous is not None:
                gradient = tree_map(lambda g, p: g + p, gradient, previous)
            seen = tokens if seen is None else seen + tokens
            if not update:
                return loss, tokens, gradient, seen, mx.array(0.0)
            if by_token:
                gradient = tree_map(lambda g: g / seen, gradient)
            elif count > 1:
                gradient = tree_map(lambda g: g / count, gradient)
            norm = _mlx.gradient_norm(gradient)
            if setup.clip is not None:
                gradient = setup.clip(gradient)
            optimizer.update(model, gradient)
            return loss, tokens, None, None, norm

        model.train()
        result: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "tokens": []}
        for _ in range(recipe.train.steps):
            gradient = seen = None
            losses, counts = [], []
            for part, (ids, lengths) in enumerate(itertools.islice(batches, count)):
                loss, tokens, gradient, seen, norm = step(
                    ids, lengths, gradient, seen, part == count - 1
                )
                mx.eval(state, loss, tokens, gradient, seen, norm)
                losses.append(loss.item())
                counts.append(tokens.item())
            weights = counts if by_token else None
            result["loss"].append(float(np.average(losses, weights=weights)))
            result["gradient_norm"].append(norm.item())
            result["tokens"].append(sum(counts))
        return result
