"""Path `mlx-lm`: the shipped CLI, run as `mlx_lm.lora.main()` with a YAML file of its own.

The CLI prints three decimals. For full precision its call of `train` is replaced: there the
live model, optimizer, dataset and arguments that it built are read, and `train` itself is called
with a reporting callback and with an optimizer whose state carries the gradient norm out.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from parity.errors import Unsupported
from parity.names import canonical
from parity.paths import parts
from parity.paths.describe import defaults
from parity.paths.mlx import live as _mlx
from parity.paths.mlx.artefacts import MlxArtefacts, Read
from parity.paths.mlx.kv_cache import kv_cache_trace
from parity.paths.mlx.live import Batch, Setup, to_numpy
from parity.paths.mlx.loading import explained
from parity.paths.mlx.path import MlxPath
from parity.paths.mlx.settings import as_trained, one_step
from parity.paths.mlx.traces import decode_trace, given, recorded
from parity.paths.mlx_lm.settings import arguments, checkpoint
from parity.recipe import Recipe
from parity.timing import LOAD, timed
from parity.trace import Array, Trace


def _save(handed: dict[str, Any]) -> None:
    """The CLI's `train` without iterations: it ends with saving the adapter."""
    from mlx_lm.tuner.trainer import train

    handed["args"].iters = 0
    with _mlx.restored_layer_class(handed["model"]):
        train(**handed)


class MlxLmPath(MlxPath):
    """The mlx-lm command line."""

    name: ClassVar[str] = "mlx-lm"
    # The command line calls the same functions as `mlx` does; `setup` puts others in their place.
    own_parts: ClassVar[tuple[str, ...]] = parts.ALL
    takes_parts: ClassVar[tuple[str, ...]] = tuple(parts.PARTS)
    fixed: ClassVar[Mapping[str, Any]] = {
        "model.weights": "stored",
        "data.pad_multiple": 32,
        "data.pad_extra": 1,
        "data.append_eos": True,
        "seed.placement": "before_lora",
        "mask.start_shift": 0,
        "mask.end_shift": 1,
        "optim.clip": "none",
        "train.accumulation_weighting": "mean",
    }

    @timed(LOAD)
    def load(self, recipe: Recipe) -> tuple[Any, Any]:
        """The checkpoint as `mlx_lm.load` gives it."""
        import mlx_lm

        source = checkpoint(recipe, self.cache)
        with explained(source):
            return mlx_lm.load(source)[:2]  # type: ignore[no-any-return]

    def setup(self, recipe: Recipe, adapter: Mapping[str, Array] | None = None) -> Setup:
        """The live objects that the CLI hands to `train`."""
        seen: dict[str, Any] = {}

        def at_train(**handed: Any) -> None:
            seen.update(self._swapped(recipe, handed), rng=_mlx.rng_state())

        with self._main(recipe, adapter, at_train):
            pass
        return self._live(recipe, seen)

    def _live(self, recipe: Recipe, seen: Mapping[str, Any]) -> Setup:
        """The objects that the CLI handed to `train`."""
        args, dataset = seen["args"], seen["train_dataset"]

        def iterate() -> Iterator[Batch]:
            return seen["iterate_batches"](  # type: ignore[no-any-return]
                dataset, args.batch_size, args.max_seq_length, loop=True
            )

        facts = {"seed.rng": seen["rng"]}
        return Setup(
            seen["model"],
            self.tokenizer(recipe),  # a model loaded now would draw weights behind the adapter's
            seen["optimizer"],
            dataset,
            seen["loss"],
            iterate,
            self.part("clip").clip(recipe),
            facts,
        )

    def gradient(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The gradient that one iteration of the CLI's `train` hands to its optimizer.

        At modules it is taken outside of `train`, of the live model and loss that are handed to it.
        """
        import mlx.core as mx

        if inputs.group("replace"):
            return super().gradient(recipe, inputs)
        batch = (mx.array(inputs.arrays["ids"]), mx.array(inputs.arrays["lengths"]))
        once = one_step(recipe)
        losses, observer, _ = self._train(once, inputs.group("adapter"), iter([batch]), True)
        gradient = observer.gradient()
        if inputs.scalars.get("modules", False):
            seen = super().gradient(recipe, inputs)
            for name, value in seen.group("gradient").items():
                # On a GPU the compiled step has other kernels, so that bits may differ.
                if not np.allclose(value, gradient[name], rtol=0, atol=1e-2 * np.abs(value).max()):
                    raise RuntimeError(f"outside of `train` the gradient of {name} is another one")
            return seen  # of one pass, as what is seen at its modules
        trace = Trace(
            {
                "loss": np.asarray(losses[0]["train_loss"], np.float32),
                "norm": np.asarray(observer.norm(), np.float32),
            },
            {"tokens": int(losses[0]["trained_tokens"])},
        )
        return trace.with_group("gradient", gradient)

    def train(self, recipe: Recipe, inputs: Trace) -> Trace:
        """The CLI's training, from `main()` to the adapter file it saves."""
        trace = Trace()
        norms: list[float] = []
        reports, _, adapter = self._train(
            recipe, inputs.group("adapter"), given(inputs, recipe), False, trace, norms
        )
        each = recipe.train.accumulation
        losses = np.asarray([r["train_loss"] for r in reports], np.float64)
        tokens = np.diff([0, *(r["trained_tokens"] for r in reports)])
        trace.arrays["loss"] = losses.reshape(-1, each).mean(axis=1)
        trace.arrays["gradient_norm"] = np.asarray(norms[each - 1 :: each])
        trace.arrays["tokens"] = tokens.reshape(-1, each).sum(axis=1)
        return trace.with_group("adapter", adapter)

    @contextlib.contextmanager
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> Iterator[Path]:
        """By a run of the CLI that resumes from the adapter and has no iterations left."""
        if "saver" in self.donors:
            with super().saved(recipe, adapter, see) as folder:
                yield folder
            return

        def at_train(**handed: Any) -> None:
            see(handed["model"])
            _save(handed)

        with self._main(recipe, adapter, at_train) as folder:
            yield folder

    def save(self, recipe: Recipe, setup: Setup, folder: Path) -> None:
        """By a run of the CLI without iterations, whose `train` is handed this live model."""
        with self._main(
            recipe, None, lambda **handed: _save({**handed, "model": setup.model})
        ) as left:
            shutil.copytree(left, folder, dirs_exist_ok=True)

    @contextlib.contextmanager
    def trained(self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]) -> Iterator[Path]:
        """By the CLI, from `main()` to the files that it leaves."""
        count = recipe.train.steps * recipe.train.accumulation
        seen: dict[str, Any] = {}

        def at_train(**handed: Any) -> None:
            from mlx_lm.tuner.trainer import train

            handed = self._swapped(recipe, handed)
            if (batches := given(inputs, recipe)) is not None:
                handed["iterate_batches"] = lambda **_: itertools.islice(batches, count)
            _mlx.clip_before(handed["optimizer"], self.part("clip").clip(recipe))
            with _mlx.restored_layer_class(handed["model"]):
                train(**handed)
            see(handed["model"])
            seen.update(handed, rng=None)

        with self._main(recipe, inputs.group("adapter"), at_train) as folder:
            if "saver" not in self.donors:
                yield folder
                return
        with self.left(recipe, self._live(recipe, seen)) as folder:
            yield folder

    def read(self, recipe: Recipe, folder: Path, loader: MlxArtefacts) -> Any:
        """By `mlx_lm.load`; with the loader of another path, by the second half of it."""
        import mlx_lm

        if loader is not self:
            return super().read(recipe, folder, loader)
        model = mlx_lm.load(checkpoint(recipe, self.cache), adapter_path=str(folder))[0]
        return as_trained(model, recipe)

    def merge(self, recipe: Recipe, folder: Path, read: Read | None, dequantize: bool) -> Any:
        """By `mlx_lm.fuse`, and `mlx_lm.load` of what it saves."""
        import mlx_lm.fuse
        from mlx_lm.utils import load_config

        source = checkpoint(recipe, self.cache)
        with tempfile.TemporaryDirectory() as saved, contextlib.ExitStack() as stack:
            words = ["mlx_lm.fuse", "--model", source]
            words += ["--adapter-path", str(folder), "--save-path", saved]
            words += ["--dequantize"] * dequantize
            stack.enter_context(mock.patch.object(sys, "argv", words))
            if read is not None:
                loaded = read(), self.tokenizer(recipe), load_config(Path(source))
                stack.enter_context(mock.patch.object(mlx_lm.fuse, "load", lambda *_, **__: loaded))
            mlx_lm.fuse.main()
            return mlx_lm.load(saved)[0]

    def kv_cache(self, recipe: Recipe, inputs: Trace) -> Trace:
        """As `mlx_lm.chat` does: the adapter saved and loaded back, one prompt cache for all turns."""
        adapter = inputs.group("adapter")
        model = self._reloaded(recipe, adapter)[0] if adapter else self.base(recipe)[0]
        return kv_cache_trace(model, self.prompt_cache, inputs)

    def _reloaded(self, recipe: Recipe, adapter: Mapping[str, Array]) -> tuple[Any, Any]:
        """Model and tokenizer with an adapter that was saved and loaded with `mlx_lm.load`."""
        import mlx_lm

        if self.donors.keys() & {"loader", "wiring"}:  # `mlx_lm.load` would make its own model
            setup = self.setup(recipe, adapter)
            return setup.model.eval(), setup.tokenizer
        with self.saved(recipe, adapter, lambda _: None) as folder:
            if "reader" in self.donors:
                return self.reloaded(recipe, folder).eval(), self.base(recipe)[1]
            return mlx_lm.load(checkpoint(recipe, self.cache), adapter_path=str(folder))[:2]  # type: ignore[no-any-return]

    def decode(self, recipe: Recipe, inputs: Trace) -> Trace:
        """Saves the adapter, loads it back with `mlx_lm.load`, streams greedily."""
        import mlx_lm

        model, tokenizer = self._reloaded(recipe, inputs.group("adapter"))

        def generate(prompt: str) -> Iterator[tuple[int, Any]]:
            for answer in mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=recipe.decode.max_tokens
            ):
                yield int(answer.token), answer.logprobs

        return decode_trace(model, tokenizer, generate, inputs)

    @classmethod
    def refused(cls, recipe: Recipe) -> dict[str, str]:
        """See `TrainingPath.refused`."""
        found = {}
        if recipe.seed.data not in (None, recipe.seed.value):
            found["seed.data"] = (
                "the mlx-lm CLI has one seed for LoRA init and data order (seed.data)"
            )
        if recipe.model.dtype == "float64":
            found["model.dtype"] = "the mlx-lm CLI has no float64"
        return found

    # The CLI and its call of `train` -----------------------------------------------------------

    def _arguments(self, recipe: Recipe, folder: str, resume: str | None = None) -> dict[str, Any]:
        model, source = self.base(recipe)[0], checkpoint(recipe, self.cache)
        return arguments(recipe, model, source, folder, resume)

    def _swapped(self, recipe: Recipe, handed: Mapping[str, Any]) -> dict[str, Any]:
        """What `train` is called with, parts of other paths in the place of the CLI's own."""
        from mlx_lm.tuner import trainer

        default = defaults(trainer.train)
        called = {name: default[name] for name in ("loss", "iterate_batches")} | dict(handed)
        if "loss" in self.donors:
            called["loss"] = self.donors["loss"].loss(recipe)
        if "optimizer" in self.donors:
            called["optimizer"] = self.donors["optimizer"].optimizer(recipe)
        if batching := self.donors.get("batching"):
            dataset = batching.dataset(recipe, self.tokenizer(recipe))
            draw = batching.iterate(recipe, dataset)
            called |= {"train_dataset": dataset, "iterate_batches": lambda *_, **__: draw()}
        return called

    @contextlib.contextmanager
    def _main(
        self,
        recipe: Recipe,
        adapter: Mapping[str, Array] | None,
        at_train: Callable[..., None],
    ) -> Iterator[Path]:
        """Runs the CLI, `at_train` standing where it calls `train`; gives the adapter's folder."""
        import mlx.core as mx
        import mlx_lm.lora
        import yaml

        with tempfile.TemporaryDirectory() as folder:
            resume = None
            if adapter:
                resume = str(Path(folder, "init.safetensors"))
                model, _ = self.base(recipe)
                self.part("wiring").wire(model, recipe)
                mx.save_safetensors(resume, _mlx.renamed(model, adapter))
            file, output = Path(folder, "config.yaml"), Path(folder, "adapter")
            settings = self._arguments(recipe, str(output), resume)
            file.write_text(yaml.safe_dump(settings), "utf-8")
            call = mock.Mock(side_effect=at_train)
            swaps: dict[str, Any] = {"train": call}
            if loader := self.donors.get("loader"):
                swaps["load"] = lambda *_, **__: loader.load(recipe)
            if wiring := self.donors.get("wiring"):
                swaps["linear_to_lora_layers"] = lambda model, *_, **__: wiring.wire(model, recipe)
            with (
                mock.patch.object(sys, "argv", ["mlx_lm.lora", "--config", str(file)]),
                mock.patch.multiple(mlx_lm.lora, **swaps),
                _mlx.compiled(recipe.train.compile),
            ):
                try:
                    mlx_lm.lora.main()
                except ValueError as error:
                    # What the CLI refuses is what this path cannot do.
                    raise Unsupported(f"mlx-lm: {error}") from None
            if call.call_count != 1:  # else nothing of the CLI was seen
                raise RuntimeError(
                    f"the mlx-lm CLI called `train` {call.call_count} times, not once"
                )
            yield output

    def _train(
        self,
        recipe: Recipe,
        adapter: Mapping[str, Array],
        batches: Iterator[Batch] | None,
        gradients: bool,
        trace: Trace | None = None,
        norms: list[float] | None = None,
    ) -> tuple[list[dict[str, Any]], Any, dict[str, Array]]:
        """Trains for real; returns the CLI's own reports, the observer and the saved adapter."""
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import train

        reports: list[dict[str, Any]] = []
        observers: list[Any] = []
        count = recipe.train.steps * recipe.train.accumulation

        class Report(TrainingCallback):  # type: ignore[misc]
            def on_train_loss_report(self, info: dict[str, Any]) -> None:
                reports.append(info)
                update = len(reports) % recipe.train.accumulation == 0
                if norms is not None:
                    norms.append(observers[0].norm() if update else float("nan"))

        def at_train(**handed: Any) -> None:
            handed = self._swapped(recipe, handed)
            iterate = handed["iterate_batches"]

            def drawn(**arguments: Any) -> Iterator[Batch]:
                rows = batches if batches is not None else iterate(**arguments)
                if trace is None:
                    return rows
                return recorded(trace, itertools.islice(rows, count), lazy=True)

            _mlx.clip_before(handed["optimizer"], self.part("clip").clip(recipe))
            observers.append(_mlx.Observer(handed["optimizer"], gradients))
            handed["training_callback"] = Report()
            with _mlx.restored_layer_class(handed["model"]):
                train(**{**handed, "iterate_batches": drawn})

        with self._main(recipe, adapter, at_train) as folder:
            saved = _mlx.load_arrays(folder / "adapters.safetensors")
        return reports, observers[0], {canonical(k): to_numpy(v) for k, v in saved.items()}
