"""Path `unsloth`: unsloth-zoo's real `FastMLXModel` and `MLXTrainer`.

The trainer gets ready-made batches, and losses and gradient norms leave its compiled step in its
optimizer's state. All that it computes with is its own, but for parts taken from another path.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from parity import resources
from parity.errors import Unsupported
from parity.paths import parts
from parity.paths.measured import seed_facts
from parity.paths.mlx import live as _mlx
from parity.paths.mlx import modules as _mlx_modules
from parity.paths.mlx.artefacts import MlxArtefacts, Read
from parity.paths.mlx.live import Batch, Loss, Setup
from parity.paths.mlx.observed import seeding
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx.quantized import elements
from parity.paths.mlx.settings import one_step
from parity.paths.mlx.traces import config_trace, given
from parity.paths.unsloth import settings as _unsloth_settings
from parity.paths.unsloth import trainer as _unsloth_trainer
from parity.paths.unsloth.knobs import UnslothKnobs
from parity.paths.unsloth.library import PACKAGE, library
from parity.paths.unsloth.observer import Run
from parity.paths.unsloth.parts import Rows, clip_in_effect, loss_of, stepping, tree_of
from parity.paths.unsloth.trainer import ReplacedParts
from parity.recipe import Recipe
from parity.timing import LOAD, timed
from parity.trace import Array, Trace

AHEAD = 8  # micro-batches that are planned at least: the configuration shows these


class UnslothPath(MlxPath):
    """unsloth-zoo's loader, adapter wiring, batching, loss, clip, optimizer and trainer.

    A mask that its loss does not have is had by giving it other lengths. Its padding of unlike
    widths to a few shapes for the compiler is not applied: it trains on the batches as they are
    recorded.
    """

    name: ClassVar[str] = "unsloth"
    packages: ClassVar[tuple[str, ...]] = (*MlxPath.packages, PACKAGE)
    release: ClassVar[str] = PACKAGE
    without_dependencies: ClassVar[tuple[str, ...]] = (PACKAGE,)
    fixed: ClassVar[Mapping[str, Any]] = {
        "model.weights": "stored",
        "model.quantization": "stored",
        "data.pad_multiple": 32,
        "data.pad_extra": 1,
        "seed.placement": "before_lora",
        "optim.bias_correction": True,
        "optim.momentum": 0.0,
        "train.accumulation_weighting": "token",
    }
    own_parts: ClassVar[tuple[str, ...]] = parts.ALL
    takes_parts: ClassVar[tuple[str, ...]] = tuple(parts.PARTS)
    knobs: ClassVar[type[UnslothKnobs]] = UnslothKnobs
    patches: ClassVar[bool] = True  # its loader changes functions of mlx-lm and of transformers

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, str]:
        """See `TrainingPath.refused`."""
        found = {}
        if recipe.model.dtype == "float64":
            found["model.dtype"] = "unsloth-zoo has no float64"
        if recipe.lora.kind == "full":
            found["lora.kind"] = "mlx-parity runs unsloth-zoo with an adapter only (lora.kind=full)"
        return found

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self._plain: dict[type, Any] = {}

    # Its defaults ------------------------------------------------------------------------------

    def shipped(self) -> dict[str, Any]:
        """Defaults of its signatures and of a trainer made with none set."""
        found = library()
        with tempfile.TemporaryDirectory() as folder:
            args = found.trainer.MLXTrainingConfig(output_dir=folder)
            optimizer = stepping(found, args).make(1)
        return _unsloth_settings.shipped(found, optimizer)

    def defaults(self, recipe: Recipe, inputs: Trace) -> Trace:
        """As shipped, with the dtype that its loader casts this checkpoint to."""
        found = library()
        model, _ = found.loader.FastMLXModel.from_pretrained(
            resources.model_dir(recipe.model.source), load_in_4bit=False, text_only=True
        )
        census = _mlx.dtype_census(model.parameters(), elements(model))
        return Trace(
            scalars={**self.shipped(), "model.dtype": max(census, key=lambda name: census[name])}
        )

    # Parts -------------------------------------------------------------------------------------

    def base(self, recipe: Recipe) -> tuple[Any, Any]:
        """See `MlxPath.base`; a package that is not installed is reported before any import."""
        library()
        return super().base(recipe)

    def read_tokenizer(self, recipe: Recipe) -> Any:
        """Its loader changes the tokenizer by the model."""
        return self.base(recipe)[1]

    @timed(LOAD)
    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """The checkpoint as `FastMLXModel.from_pretrained` gives it."""
        arguments = _unsloth_settings.loading(recipe)
        return library().loader.FastMLXModel.from_pretrained(**arguments)  # type: ignore[no-any-return]

    def wire(self, model: Any, recipe: Recipe) -> None:
        """`FastMLXModel.get_peft_model`, in place."""
        found = library()
        # Checkpointing patches the layers' class for the whole process, not for one recipe.
        found.utils.remove_gradient_checkpointing(model)
        kind = type(model.layers[0])
        kind.__call__ = self._plain.setdefault(kind, kind.__call__)
        try:
            found.loader.FastMLXModel.get_peft_model(model, **_unsloth_settings.wiring(recipe))
        except (ValueError, NotImplementedError) as error:
            raise Unsupported(f"{PACKAGE}: {error}") from None

    def dataset(self, recipe: Recipe, tokenizer: Any) -> Any:
        """The training rows, each as the trainer's own preparation makes a batch of it."""
        folder = resources.data_dir(recipe.data.source)
        text = Path(folder, "train.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        model = next((m for m, t in self._loaded.values() if t is tokenizer), None)
        return Rows(library(), recipe, model, tokenizer, rows)

    def iterate(self, recipe: Recipe, dataset: Any) -> Callable[[], Iterator[Batch]]:
        """The trainer's own batches in its own order."""
        count = max(AHEAD, recipe.train.steps * recipe.train.accumulation)
        return lambda: iter(dataset.batches(count))

    def loss(self, recipe: Recipe) -> Loss:
        """Its real loss, under the signature of mlx-lm's."""
        return loss_of(library(), recipe)

    def optimizer(self, recipe: Recipe) -> Any:
        """Its real optimizer; schedule and weight decay, which its trainer applies, come along."""
        found = library()
        with tempfile.TemporaryDirectory() as folder:
            args = _unsloth_settings.training(found, recipe, folder)
            return stepping(found, args).complete(recipe.train.steps)

    def clip(self, recipe: Recipe) -> Callable[[Any], Any] | None:
        """Its real clip functions, where the release has them apart from its step."""
        if recipe.optim.clip == "none" and recipe.knobs(UnslothKnobs).explicit_clip:
            return None
        found = library()

        def clip(gradient: Any) -> Any:
            resolve = getattr(found.trainer, "_resolve_mlx_grad_clipping", None)
            if resolve is None:
                raise Unsupported(f"{PACKAGE} {found.version} clips inside its step only")
            with tempfile.TemporaryDirectory() as folder:
                args = _unsloth_settings.training(found, recipe, folder)
            norm, value, leaf, mode = resolve(args)
            if mode == "global_norm":
                return found.trainer._clip_grad_norm_fp32(gradient, norm)[0]
            if mode == "value":
                return found.trainer._clip_grad_by_value(gradient, value)
            return found.trainer._clip_grad_by_leaf_norm(gradient, leaf)

        return clip

    def seed(self, recipe: Recipe) -> None:
        """Nothing of its own draws from a generator that it does not seed itself."""
        if self.donors.keys() & {"wiring", "batching"}:
            super().seed(recipe)

    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """See `MlxPath.setup`."""
        library()
        return super().setup(recipe, adapter)

    def save(self, recipe: Recipe, setup: Setup, folder: Path) -> None:
        """By `MLXTrainer.save_model`."""
        if getattr(setup.model, "_hf_repo", None) is None:
            # Its loader notes where the base is from, and its saver writes that.
            setup.model._hf_repo = resources.model_dir(recipe.model.source)
        live = _unsloth_trainer.trainer(
            library(), recipe, setup.model, setup.tokenizer, [], str(folder)
        )
        live.save_model(str(folder))

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """As `MLXTrainer.train` leaves it."""
        setup = self.setup(recipe, inputs.group("adapter"))
        count = recipe.train.steps * recipe.train.accumulation
        batches = given(inputs, recipe) or setup.iterate()
        with tempfile.TemporaryDirectory() as folder:
            drawn = list(itertools.islice(batches, count))
            saver = self.donors.get("saver")
            self._run(recipe, setup, drawn, keep=None if saver else Path(folder))
            see(setup.model)
            if saver:
                saver.save(recipe, setup, Path(folder))
            yield Path(folder)

    def export(self, recipe: Recipe, live: Callable[[], Setup], layout: str, folder: Path) -> None:
        """By its `save_lora_adapters`, which newer releases let write PEFT's files."""
        save = library().utils.save_lora_adapters
        if layout != "peft" or "adapter_format" not in inspect.signature(save).parameters:
            raise Unsupported(f"this {PACKAGE} ships nothing that writes files of {layout}")
        save(live().model, str(folder), adapter_format=layout)

    def read(self, recipe: Recipe, folder: Path, loader: MlxArtefacts) -> Any:
        """By `FastMLXModel.from_pretrained`, which reads from the adapter which base it needs.

        With the loader of another path, that is called where it loads this base.
        """
        kind = library().loader.FastMLXModel
        arguments = {**_unsloth_settings.loading(recipe), "model_name": str(folder)}
        whole = kind.from_pretrained
        with contextlib.ExitStack() as stack:
            if loader is not self:
                inner = staticmethod(lambda *_, **__: loader.load(recipe))
                stack.enter_context(mock.patch.object(kind, "from_pretrained", inner))
            return whole(**arguments)[0]

    def merge(self, recipe: Recipe, folder: Path, read: Read | None, dequantize: bool) -> Any:
        """By its `save_pretrained_merged`, and its loader of what that saves."""
        found = library()
        if (save := getattr(found.utils, "save_pretrained_merged", None)) is None:
            raise Unsupported(f"{PACKAGE} {found.version} has no save_pretrained_merged")
        model = read() if read else self.reloaded(recipe, folder)
        packed = any("scales" in module for module in model.modules())
        method = "merged_4bit" if packed and not dequantize else "merged_16bit"
        with tempfile.TemporaryDirectory() as saved:
            save(model, self.base(recipe)[1], saved, save_method=method)
            arguments = {**_unsloth_settings.loading(recipe), "model_name": saved}
            return found.loader.FastMLXModel.from_pretrained(**arguments)[0]

    def loop(
        self, recipe: Recipe, setup: Setup, batches: Iterator[Batch]
    ) -> dict[str, list[float]]:
        """The real `MLXTrainer.train()`, with what is taken from other stacks in its own place."""
        count = recipe.train.steps * recipe.train.accumulation
        run = self._run(recipe, setup, list(itertools.islice(batches, count)))
        by_token = recipe.train.accumulation_weighting == "token"
        return {
            "loss": [
                float(np.average(losses, weights=tokens if by_token else None))
                for losses, tokens in zip(run.micro_losses, run.micro_tokens, strict=True)
            ],
            "gradient_norm": run.norms,
            "tokens": [int(tokens.sum()) for tokens in run.micro_tokens],
        }

    # Stages that only its trainer can answer ---------------------------------------------------

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The gradient inside one step of the trainer, before any clip."""
        import mlx.core as mx

        once = one_step(recipe)
        setup = self.setup(once, inputs.group("adapter"))
        batch = mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"])
        run = self._run(once, setup, [batch], gradients=True)
        trace = Trace(
            {
                "loss": np.asarray(run.micro_losses[0][0], np.float32),
                "norm": np.asarray(run.norms[0], np.float32),
            },
            {"tokens": int(run.micro_tokens[0][0])},
        )
        return trace.with_group("gradient", run.gradient)

    def optimizer_step(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Steps of the trainer, fed with gradients in the place of those of the loss."""
        fed: list[dict[str, Array]] = []
        while gradient := inputs.group(f"gradient.{len(fed)}"):
            fed.append(gradient)
        run = self._fed(recipe, inputs.group("weight"), fed)
        trace = Trace()
        for step, weights in enumerate(run.weights):
            trace = trace.with_group(f"weight.{step}", weights)
        return trace

    def config(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract config`; clip, optimizer and precision are read from steps of the trainer."""
        placement = self._placement(recipe)
        with seeding() as events:
            model = self.setup(recipe).model
        measured = self.training_facts(recipe, model)
        kind, limit = clip_in_effect(lambda *given: self._fed(recipe, *given))
        setup = self.setup(recipe)
        once = recipe.override({"train.steps": 1, "train.accumulation": 1})
        with _mlx_modules.module_outputs(setup.model) as seen:
            run = self._run(once, setup, list(itertools.islice(setup.iterate(), 1)))
        setup.facts |= {
            "dtype.activations": _mlx.activation_census(seen.outputs.values()),
            "clip.mode": kind,
            "clip.value": limit,
            "seed.placement": placement,
        }
        if "optimizer" not in self.donors:
            setup.facts |= stepping(library(), run.trainer.args).facts(recipe.train.steps)
        return config_trace(recipe, setup, seed_facts(events) | measured)

    def _placement(self, recipe: Recipe) -> str:
        """Where the seed that LoRA init draws from is set, found by setting others before it."""
        import mlx.core as mx

        states = set()
        for other in (0, 1):
            model, _ = self.base(recipe)
            mx.random.seed(other)
            self.part("wiring").wire(model, recipe)
            states.add(_mlx.rng_state())
        return "before_lora" if len(states) == 1 or "wiring" in self.donors else "before_load"

    # The trainer -------------------------------------------------------------------------------

    def _run(
        self,
        recipe: Recipe,
        setup: Setup,
        batches: list[Batch],
        gradients: bool = False,
        keep: Path | None = None,
    ) -> Run:
        replaced = ReplacedParts(
            loss=setup.loss if "loss" in self.donors else None,
            optimizer=setup.optimizer if "optimizer" in self.donors else None,
            clip=setup.clip if "clip" in self.donors else None,
            clips="clip" in self.donors,
        )
        if recipe.model.dtype != "float32":
            # The trainer keeps norms in float32 from then on: the next run loads anew.
            self._loaded.clear()
        return _unsloth_trainer.run(
            library(), recipe, setup.model, setup.tokenizer, batches, replaced, gradients, keep=keep
        )

    def _fed(
        self, recipe: Recipe, weights: Mapping[str, Array], fed: list[dict[str, Array]]
    ) -> Run:
        """The trainer on a module of bare weights; each gradient stands for that of one step."""
        import mlx.core as mx

        recipe = recipe.with_knobs([UnslothKnobs]).override(
            {
                "train.compile": False,
                "train.accumulation": 1,
                "train.steps": max(len(fed), recipe.train.steps),
                "train.gradient_checkpointing": False,
                "unsloth.use_cce": False,
            }
        )
        nothing = mx.zeros((1, 2), mx.int32), mx.array([[0, 2]])
        replaced = ReplacedParts(
            optimizer=self.part("optimizer").optimizer(recipe)
            if "optimizer" in self.donors
            else None,
            clip=self.part("clip").clip(recipe) if "clip" in self.donors else None,
            clips="clip" in self.donors,
        )
        return _unsloth_trainer.run(
            library(),
            recipe,
            tree_of(weights, module=True),
            None,
            [nothing] * recipe.train.steps,
            replaced,
            fed=[tree_of(gradient) for gradient in fed],
        )
