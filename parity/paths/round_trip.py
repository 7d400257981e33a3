"""An adapter on its way through files: what is common to the paths of all frameworks."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.errors import Unsupported
from parity.paths.protocol import TrainingPath
from parity.recipe import Recipe
from parity.trace import Array, Trace


class Logits(NamedTuple):
    """(B, T, V) in evaluation mode, with the dtype that they were computed in."""

    values: Array
    dtype: str


class RoundTrips(TrainingPath):
    """A path that saves an adapter with its real saver and loads it with its real loader."""

    @abstractmethod
    def saved(
        self, recipe: Recipe, adapter: Mapping[str, Array], see: Callable[[Any], None]
    ) -> AbstractContextManager[Path]:
        """A folder with an adapter as the path saves it from its live model, which `see` is given."""

    def exported(
        self, recipe: Recipe, adapter: Mapping[str, Array], layout: str, see: Callable[[Any], None]
    ) -> AbstractContextManager[Path]:
        """As `saved`, by what the path ships that writes the files of another stack."""
        raise Unsupported(f"{self.name} ships nothing that writes files of {layout}")

    def trained(
        self, recipe: Recipe, inputs: Trace, see: Callable[[Any], None]
    ) -> AbstractContextManager[Path]:
        """A folder as the path's trainer leaves it; `see` is given the live model after training."""
        raise Unsupported(f"{self.name} has no training whose files mlx-parity loads")

    @abstractmethod
    def reloaded(self, recipe: Recipe, folder: Path) -> Any:
        """A model, loaded anew, with a saved adapter as the path loads it."""

    @abstractmethod
    def forward(self, model: Any, ids: Array) -> Logits:
        """What a live model gives for token ids (B, T)."""

    @abstractmethod
    def adapter_of(self, model: Any, recipe: Recipe) -> tuple[dict[str, Array], dict[str, float]]:
        """What is trained of a live model by canonical name; module → scale, of those with LoRA."""

    def round_trip(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract round_trip`.

        In one process, but into a model that was loaded anew: it shares no tensor with the live one.
        """
        ids, live = inputs.arrays["ids"], list[Array]()

        def see(model: Any) -> None:
            live.append(self.forward(model, ids).values)

        with self.saved(recipe, inputs.group("adapter"), see) as folder:
            trace = self._reloaded_trace(recipe, folder, ids)
            trace.scalars["files"] = sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))
        trace.arrays["live"] = live[0]
        return trace

    def merged(self, recipe: Recipe, folder: Path, dequantize: bool) -> Any:
        """A model with a saved adapter in its weights, by the path's own fuse, loaded anew.

        With `dequantize` a quantized base is not quantized again.
        """
        raise Unsupported(f"{self.name} has no fuse that mlx-parity runs")

    def quantized(self, recipe: Recipe) -> bool:
        """Whether the base is quantized, so that fusing quantizes again."""
        return False

    def fuse(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract fuse`."""
        ids, adapter = inputs.arrays["ids"], inputs.group("adapter")
        made = (
            contextlib.nullcontext(Path(inputs.scalars["folder"]))
            if "folder" in inputs.scalars
            else self.saved(recipe, adapter, lambda _: None)
        )
        with made as folder:
            apart = self.forward(self.reloaded(recipe, folder), ids)
            fused = self.forward(self.merged(recipe, folder, False), ids)
            trace = Trace({"apart": apart.values, "fused": fused.values}, {"dtype": apart.dtype})
            if self.quantized(recipe):
                model = self.merged(recipe, folder, True)
                trace.arrays["dequantized"] = self.forward(model, ids).values
        base = self.emit("logits", recipe, Trace({"ids.0": ids}, {"modules": False}))
        trace.arrays["base"] = base.arrays["logits.0"]
        return trace

    def save_adapter(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract save_adapter`."""
        ids, live = inputs.arrays["ids"], list[Logits]()
        adapter, layout = inputs.group("adapter"), inputs.scalars.get("layout", "")

        def see(model: Any) -> None:
            live.append(self.forward(model, ids))

        made = self.exported(recipe, adapter, layout, see) if layout else None
        with made or self.saved(recipe, adapter, see) as folder:
            files = {
                str(file.relative_to(folder)): np.frombuffer(file.read_bytes(), np.uint8)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
        trace = Trace({"live": live[0].values}, {"dtype": live[0].dtype})
        return trace.with_group("files", files)

    def train_and_load(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract train_and_load`."""
        ids, live = inputs.arrays["ids"], dict[str, Array]()
        adapter, scales = dict[str, Array](), dict[str, float]()

        def see(model: Any) -> None:
            found, factors = self.adapter_of(model, recipe)
            adapter.update(found)
            scales.update(factors)
            live["live"] = self.forward(model, ids).values

        with self.trained(recipe, inputs, see) as folder:
            trace = self._reloaded_trace(recipe, folder, ids)
            trace.scalars["files"] = sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))
        trace.arrays |= live
        trace.scalars["live_scales"] = scales
        return trace.with_group("trained", adapter)

    def load_adapter(self, recipe: Recipe, inputs: Trace) -> Trace:
        """See `parity contract load_adapter`."""
        folder = Path(inputs.scalars["folder"])
        trace = self._reloaded_trace(recipe, folder, inputs.arrays["ids"])
        magnitudes = [name for name in trace.arrays if name.endswith(".m")]
        found = {name.split("/", 1)[1][:-2]: trace.arrays.pop(name) for name in magnitudes}
        return trace.with_group("magnitude", found)

    def _reloaded_trace(self, recipe: Recipe, folder: Path, ids: Array) -> Trace:
        model = self.reloaded(recipe, folder)
        loaded = self.forward(model, ids)
        adapter, scales = self.adapter_of(model, recipe)
        trace = Trace({"loaded": loaded.values}, {"dtype": loaded.dtype, "scales": scales})
        return trace.with_group("adapter", adapter)
