"""Faults that are put into a saved adapter."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from parity import resources
from tests.adapter_writers import MODEL


def copied(saved, writer, folder):
    shutil.copytree(saved / writer, folder / writer)
    return folder / writer


def weights(folder):
    return next(iter(sorted(folder.glob("*.safetensors"))))


def tensors(change):
    """A fault in the tensors: what a function of all of them returns is saved."""

    def damage(folder):
        file = weights(folder)
        save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}, file)

    return damage


def settings(change):
    """A fault in the settings, which are changed in place."""

    def damage(folder):
        file = folder / "adapter_config.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))

    return damage


def lora(**values):
    return settings(lambda found: found["lora_parameters"].update(values))


def top(**values):
    return settings(lambda found: found.update(values))


def without(*keys):
    def change(found):
        for key in keys:
            (found["lora_parameters"] if key in found.get("lora_parameters", {}) else found).pop(
                key
            )

    return settings(change)


def each(function, only=""):
    """A function of name and value on those tensors whose names hold a word."""
    return tensors(
        lambda found: {k: function(k, v) if re.search(only, k) else v for k, v in found.items()}
    )


def renamed(old, new):
    return tensors(lambda found: {re.sub(old, new, k): v for k, v in found.items()})


def dropped(pattern):
    return tensors(lambda found: {k: v for k, v in found.items() if not re.search(pattern, k)})


def moved(by):
    """Each layer under the number of another."""
    return renamed(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) + by}")


def spoiled(value):
    def change(_, values):
        values = values.copy()
        values.flat[3] = value
        return values

    return change


def added(name, shape):
    return tensors(lambda found: {**found, name: np.ones(shape, np.float32)})


def both(*damages):
    def damage(folder):
        for one in damages:
            one(folder)

    return damage


def the_base(folder):
    shutil.copy(f"{resources.model_dir(MODEL)}/model.safetensors", weights(folder))


def as_peft_without_prefix(folder):
    """mlx-lm's names in PEFT's file, as PEFT finds none of them (mlx-lm#1119)."""
    renamed(r"base_model\.model\.", "")(folder)


Q16 = "layers.16.self_attn.q_proj"
