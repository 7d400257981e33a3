"""Path `hf`: transformers + PEFT + torch.optim in a plain loop; in float64 it is the referee.

Every factor is honoured but `optim.bias_correction = false`, which torch cannot do, and
`train.compile`, which names MLX's compiler and changes nothing here. Base weights in bfloat16 or
float16 carry an adapter in float32, PEFT's default; in float64 everything is float64.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from parity import resources
from parity.errors import Unsupported, UsageError
from parity.paths import parts
from parity.paths.describe import defaults, describe_process, model_key
from parity.paths.documentation import documented
from parity.paths.hf import live as _torch
from parity.paths.hf import loading, process, wiring
from parity.paths.hf.live import Batch
from parity.paths.hf.stages import TorchStages
from parity.paths.hf.tensors import trainable, transplant
from parity.paths.hf.work import accumulate
from parity.recipe import Recipe
from parity.timing import LOAD, timed
from parity.trace import Array, Trace

KEPT = 2
"""Base models kept in memory: the float32 run and its float64 referee take turns."""


class HfPath(TorchStages):
    """Fine-tuning with transformers and PEFT."""

    name: ClassVar[str] = "hf"
    framework: ClassVar[str] = "torch"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "numpy")
    release: ClassVar[str] = "transformers"
    undone: ClassVar[bool] = True
    """Whether what `wire` does to a base can be taken back, so that the base is used again."""
    honours: ClassVar[tuple[str, ...]] = (
        "model.", "data.", "seed.", "lora.", "mask.", "optim.", "decode.max_tokens",
        "train.steps", "train.batch_size", "train.accumulation", "train.accumulation_weighting",
        "train.gradient_checkpointing", "train.autocast",
    )  # fmt: skip
    fixed: ClassVar[Mapping[str, Any]] = {"optim.bias_correction": True}
    own_parts: ClassVar[tuple[str, ...]] = parts.TRAINING
    takes_parts: ClassVar[tuple[str, ...]] = tuple(p for p in parts.TRAINING if p in parts.PARTS)

    def __init_subclass__(cls, **named: Any) -> None:
        """Whose parts a class trains with is not known where it changes any and does not declare it."""
        super().__init_subclass__(**named)
        for attribute in ("own_parts", "takes_parts"):
            if attribute not in vars(cls):
                setattr(cls, attribute, ())

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._bases: dict[tuple[str, ...], Any] = {}
        self.donors: dict[str, HfPath] = {}

    # Its defaults, and where it runs -----------------------------------------------------------

    def shipped(self) -> dict[str, Any]:
        """Defaults of PEFT, torch's AdamW and transformers' collator and loss."""
        import torch
        from peft import LoraConfig
        from transformers import DataCollatorForSeq2Seq
        from transformers.loss.loss_utils import ForCausalLMLoss

        lora, adamw = LoraConfig(), defaults(torch.optim.AdamW)
        collator = defaults(DataCollatorForSeq2Seq)
        ignored = defaults(ForCausalLMLoss)["ignore_index"]
        return {
            "lora.rank": lora.r,
            "lora.scale": lora.lora_alpha / lora.r,
            "lora.dropout": lora.lora_dropout,
            "lora.num_layers": -1 if lora.layers_to_transform is None else 1,
            "optim.name": "adamw",
            "optim.betas": adamw["betas"],
            "optim.eps": adamw["eps"],
            "optim.weight_decay": adamw["weight_decay"],
            "optim.bias_correction": True,
            "optim.clip": "none",
            "mask.end_shift": 0 if collator["label_pad_token_id"] == ignored else 1,
            "data.pad_multiple": collator["pad_to_multiple_of"] or 1,
            "data.pad_extra": 0,
        }

    def documents(self) -> dict[str, Any]:
        """From the docstrings of LoraConfig and torch's AdamW."""
        import torch
        from peft import LoraConfig

        lora = {"r": "lora.rank", "lora_dropout": "lora.dropout"}
        adamw = {name: f"optim.{name}" for name in ("betas", "eps", "weight_decay")}
        return documented([LoraConfig.__doc__], lora) | documented(
            [torch.optim.AdamW.__doc__], adamw
        )

    def environment(self) -> dict[str, Any]:
        """Versions, device, threads, BLAS and variables of this process."""
        return {**describe_process(self.packages), **process.describe_torch()}

    # Parts -------------------------------------------------------------------------------------

    def part(self, name: str) -> HfPath:
        """The path that a part (see `parity.paths.parts`) is taken from: this one, unless it is a hybrid."""
        return self.donors.get(name, self)

    def tokenizer(self, recipe: Recipe) -> Any:
        """The tokenizer that comes with the model."""
        return self.part("loader").read_tokenizer(recipe)

    def read_tokenizer(self, recipe: Recipe) -> Any:
        """What the loader gives beside the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(resources.model_dir(recipe.model.source))

    @timed(LOAD)
    def load(self, recipe: Recipe) -> Any:
        """The base model, see `parity.paths.hf.loading`."""
        return loading.load(recipe, self.cache)

    @contextlib.contextmanager
    def pristine(self, recipe: Recipe) -> Iterator[Any]:
        """The base model without adapter."""
        with process.float64_throughout(recipe.model.dtype):
            key = model_key(recipe)
            base = self._bases.pop(key, None)
            self._keep(key, base := self.part("loader").load(recipe) if base is None else base)
            yield base

    @contextlib.contextmanager
    def adapted(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Iterator[Any]:
        """The model with LoRA in it, initialised from the seed or from a given adapter."""
        import torch

        with process.float64_throughout(recipe.model.dtype):
            key, load = model_key(recipe), self.part("loader").load
            base = self._bases.pop(key, None)
            if recipe.seed.placement == "before_load":
                torch.manual_seed(recipe.seed.value)
                base = load(recipe)
            else:
                base = load(recipe) if base is None else base
                torch.manual_seed(recipe.seed.value)
            pristine = _torch.Pristine(base)
            wiring = self.part("wiring")
            model = wiring.wire(base, recipe)
            pristine.keep_trained()
            try:
                if adapter is not None:
                    transplant(trainable(model), adapter)
                yield model
            finally:
                if wiring.undone:
                    pristine.restore(recipe, model)
                    # Only here: a base that did not come back clean is never used again.
                    self._keep(key, base)

    def _keep(self, key: tuple[str, ...], base: Any) -> None:
        self._bases[key] = base
        while len(self._bases) > KEPT:
            del self._bases[next(iter(self._bases))]

    def wire(self, base: Any, recipe: Recipe) -> Any:
        """Makes trainable what `lora.kind` says: a PeftModel, or the base itself.

        Raises:
            Unsupported: More layers, or other modules, than the model has; what PEFT refuses.
        """
        from peft import get_peft_model

        config = None if recipe.lora.kind == "full" else wiring.lora_config(base, recipe)
        if recipe.train.gradient_checkpointing:
            # Before PEFT, which sees it and makes the frozen embedding's output require a gradient.
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if config is None:
            return wiring.unfrozen(base, recipe)
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            raise Unsupported(f"PEFT: {error}") from None

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """By PEFT's `save_pretrained`."""
        with self.adapted(recipe, adapter) as model, tempfile.TemporaryDirectory() as folder:
            see(model)
            model.save_pretrained(folder)
            yield Path(folder)

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """As `saved`, after the path's loop."""
        own = self.part("batching").iterate
        batches = _torch.given(inputs, recipe) or own(recipe, self.tokenizer(recipe))
        adapter = inputs.group("adapter") or None
        with self.adapted(recipe, adapter) as model, tempfile.TemporaryDirectory() as folder:
            self.loop(recipe, model, batches)
            see(model)
            model.save_pretrained(folder)
            yield Path(folder)

    def reloaded(self, recipe: Recipe, folder: Path) -> Any:
        """By `PeftModel.from_pretrained`."""
        from peft import PeftModel

        if recipe.lora.kind == "full":
            full = recipe.override({"model.source": str(folder)})
            return self.part("wiring").wire(self.part("loader").load(full), recipe)
        return PeftModel.from_pretrained(self.part("loader").load(recipe), str(folder))

    def merged(self, recipe: Recipe, folder: Path, dequantize: bool) -> Any:
        """By PEFT's `merge_and_unload`, saved and loaded by transformers."""
        with tempfile.TemporaryDirectory() as saved:
            self.reloaded(recipe, folder).merge_and_unload().save_pretrained(saved)
            return self.load(recipe.override({"model.source": saved}))

    def iterate(self, recipe: Recipe, tokenizer: Any) -> Iterator[Batch]:
        """Endless batches: all rows shuffled anew each epoch, an incomplete batch dropped."""
        import torch

        rows, size = self.rows(recipe, tokenizer), recipe.train.batch_size
        if len(rows) < size:
            raise UsageError(
                f"data {recipe.data.source!r} has {len(rows)} rows, fewer than "
                f"train.batch_size={size}"
            )
        seed = recipe.seed.value if recipe.seed.data is None else recipe.seed.data
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(rows) - size + 1, size):
                chosen = [rows[index] for index in order[start : start + size]]
                yield _torch.padded(chosen, recipe, _torch.padding_id(tokenizer))

    def loop(self, recipe: Recipe, model: Any, batches: Iterator[Batch]) -> dict[str, list[float]]:
        """Trains; returns loss, gradient norm and supervised tokens of each optimizer step."""
        parameters = _torch.trainable(model)
        optimizer, schedule = self.part("optimizer").optimizer(recipe, parameters)
        clip, share = self.part("clip").clip(recipe), self.part("loss").loss(recipe)
        labels = self.part("batching").labels
        model.train()
        result: dict[str, list[float]] = {"loss": [], "gradient_norm": [], "tokens": []}
        for step in range(recipe.train.steps):
            batch = list(itertools.islice(batches, recipe.train.accumulation))
            if len(batch) < recipe.train.accumulation:
                raise ValueError(f"the batches that were handed over end in step {step + 1}")
            loss, tokens = accumulate(recipe, model, batch, share, labels)
            result["loss"].append(loss)
            result["gradient_norm"].append(_torch.gradient_norm(parameters))
            result["tokens"].append(tokens)
            _torch.update(parameters, clip, optimizer, schedule)
        return result
