"""Paths whose saver or loader loses something, each in one way that people have reported."""

from __future__ import annotations

import contextlib
import json
import re

from parity.paths.hf.path import HfPath
from parity.paths.mlx.path import MlxPath


class Damaged(MlxPath):
    """What mlx-lm's trainer saved is changed before it is loaded."""

    def save(self, recipe, setup, folder):
        super().save(recipe, setup, folder)
        self.settings(folder / "adapter_config.json", recipe)
        self.tensors(folder / "adapters.safetensors")

    def settings(self, file, recipe):
        found = json.loads(file.read_text())
        self.change(found, recipe)
        file.write_text(json.dumps(found))

    def change(self, found, recipe):
        """Settings, in place."""

    def tensors(self, file):
        import mlx.core as mx

        # Read whole before the file is written.
        arrays = dict(mx.load(str(file)))
        mx.eval(arrays)
        changed = {}
        for name, value in arrays.items():
            changed |= self.tensor(name, value)
        mx.save_safetensors(str(file), changed)

    def tensor(self, name, value):
        return {name: value}


class NoScale(Damaged):
    """The scale is not saved: mlx-lm's default, 20, stands in its place (mlx-examples#622)."""

    name = "no-scale"

    def change(self, found, recipe):
        found["lora_parameters"]["scale"] = 20.0


class AlphaAsScale(Damaged):
    """Alpha is saved where the scale, alpha / rank, belongs."""

    name = "alpha-as-scale"

    def change(self, found, recipe):
        found["lora_parameters"]["scale"] = recipe.lora.scale * recipe.lora.rank


class ZeroB(Damaged):
    """B is saved as zeros."""

    name = "zero-b"

    def tensor(self, name, value):
        return {name: value * 0 if name.endswith("lora_b") else value}


class LostB(Damaged):
    """One B is not saved; the loader, which allows that, leaves it at zero."""

    name = "lost-b"
    lost = "lora_b"

    def tensor(self, name, value):
        return {} if name.endswith(f"layers.3.self_attn.q_proj.{self.lost}") else {name: value}


class LostA(LostB):
    """One A is not saved; the loader leaves it at what it was drawn as."""

    name = "lost-a"
    lost = "lora_a"


class SavedInBfloat16(Damaged):
    """The adapter is saved in bfloat16."""

    name = "saved-in-bfloat16"

    def tensor(self, name, value):
        import mlx.core as mx

        return {name: value.astype(mx.bfloat16)}


class NextLayer(Damaged):
    """Each layer is saved under the name of the one before it, the first under that of the last."""

    name = "next-layer"

    def tensor(self, name, value):
        layer = int(re.search(r"layers\.(\d+)\.", name)[1])
        return {name.replace(f"layers.{layer}.", f"layers.{(layer - 1) % 18}."): value}


class StrangeName(Damaged):
    """One tensor is saved under a name that no module has, which mlx-lm refuses to load."""

    name = "strange-name"

    def tensor(self, name, value):
        return {name.replace("layers.3.self_attn.q_proj", "layers.3.self_attn.query"): value}


class FirstLayers(MlxPath):
    """Layers are counted from the wrong end as they are loaded; tensors without a place are dropped."""

    name = "first-layers"

    def read(self, recipe, folder, loader):
        import mlx.core as mx

        model, _ = loader.load(recipe)
        layers = model.layers
        model.model.layers = layers[::-1]
        self.wire(model, recipe)
        model.model.layers = layers
        model.load_weights(
            list(mx.load(str(folder / "adapters.safetensors")).items()), strict=False
        )
        return model


class NotLoaded(MlxPath):
    """The loader gives the base model."""

    name = "not-loaded"

    def read(self, recipe, folder, loader):
        return loader.load(recipe)[0]


class MagnitudesLost(MlxPath):
    """DoRA's magnitudes are left at those of the base's weights."""

    def read(self, recipe, folder, loader):
        model = super().read(recipe, folder, loader)
        for module in model.modules():
            if "m" in module:
                module.m = module.m * 1.5
        return model


class DefaultScale(MlxPath):
    """The reader takes mlx-lm's default in the place of the scale in the files."""

    def read(self, recipe, folder, loader):
        model = super().read(recipe, folder, loader)
        for module in model.modules():
            if hasattr(module, "lora_a"):
                module.scale = 20.0
        return model


class OtherForward(MlxPath):
    """The live model rounds in another way than the loaded one; `says` so or does not."""

    name = "other-forward"
    says = True

    def round_trip(self, recipe, inputs):
        import numpy as np

        trace = super().round_trip(recipe, inputs)
        trace.arrays["live"] = np.nextafter(trace.arrays["live"], np.float32(100))
        if self.says:
            trace.scalars["operations"] = "the live model has A and B in one product"
        return trace


class OtherForwardUnsaid(OtherForward):
    name = "other-forward-unsaid"
    says = False


class AlphaDivided(HfPath):
    """The scale is saved as PEFT's alpha, which PEFT divides by the rank."""

    name = "alpha-divided"

    @contextlib.contextmanager
    def saved(self, recipe, adapter, see):
        with super().saved(recipe, adapter, see) as folder:
            file = folder / "adapter_config.json"
            found = json.loads(file.read_text())
            file.write_text(json.dumps({**found, "lora_alpha": recipe.lora.scale}))
            yield folder


class SwitchedOff(HfPath):
    """The adapter is there, before and after, and takes no part."""

    name = "switched-off"

    @contextlib.contextmanager
    def saved(self, recipe, adapter, see):
        def off(model):
            model.base_model.disable_adapter_layers()
            see(model)

        with super().saved(recipe, adapter, off) as folder:
            yield folder

    def reloaded(self, recipe, folder):
        model = super().reloaded(recipe, folder)
        model.base_model.disable_adapter_layers()
        return model


class SavedTooEarly(MlxPath):
    """The trainer saves what it started from."""

    name = "saved-too-early"

    @contextlib.contextmanager
    def trained(self, recipe, inputs, see):
        with super().trained(recipe, inputs, see):
            pass
        with self.saved(recipe, inputs.group("adapter"), lambda _: None) as folder:
            yield folder


class NotTrained(MlxPath):
    """The trainer takes no step."""

    name = "not-trained"

    def loop(self, recipe, setup, batches):
        return {}
