"""Paths that read a configuration otherwise, for the tests of the sweep. They compute nothing a user would use."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

from parity import resources
from parity.errors import Unsupported
from parity.paths.mlx.path import MlxPath


class _Edited(MlxPath):
    """Loads a checkpoint as if its config.json were another."""

    def edit(self, config):
        raise NotImplementedError

    def load(self, recipe):
        source = Path(resources.model_dir(recipe.model.source))
        config = json.loads((source / "config.json").read_text())
        self.edit(config)
        with tempfile.TemporaryDirectory() as folder:
            for file in source.iterdir():
                if file.name != "config.json":
                    (Path(folder) / file.name).symlink_to(file.resolve())
            Path(folder, "config.json").write_text(json.dumps(config))
            return super().load(recipe.override({"model.source": folder}))


class NoTheta(_Edited):
    """Takes no notice of rope_parameters.rope_theta, but reads the older rope_theta at the top."""

    name = "no-theta"

    def edit(self, config):
        config["rope_parameters"]["rope_theta"] = config.get("rope_theta", 10_000.0)


class OtherEpsilon(_Edited):
    """Takes no notice of the norms' epsilon; there is no other name for it."""

    name = "other-epsilon"

    def edit(self, config):
        config["rms_norm_eps"] = 1e-6


class WrongModule(MlxPath):
    """Scales the output of every MLP: no setting explains it."""

    name = "wrong-module"

    def load(self, recipe):
        model, tokenizer = super().load(recipe)
        for layer in model.layers:
            layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * 1.05
        return model, tokenizer


class Unknown(MlxPath):
    """Has no model of this type."""

    name = "unknown-type"

    def load(self, recipe):
        raise Unsupported("mlx-lm: Model type qwen3 not supported.")


class Dies(MlxPath):
    """Its process dies of one architecture."""

    name = "dies"

    def load(self, recipe):
        source = Path(resources.model_dir(recipe.model.source))
        if json.loads((source / "config.json").read_text())["model_type"] == "gemma":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(recipe)
