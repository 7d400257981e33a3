"""Tensors of a checkpoint that one side takes no notice of, found by putting zeros in their place."""

from __future__ import annotations

import re
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from parity.sweep.models import Model, Store

FILE = "model.safetensors"


def kinds(model: Model) -> list[str]:
    """Names of tensors without the number of their layer or expert, each once."""
    from safetensors import safe_open

    file = model.folder / FILE
    if not file.is_file():
        return []
    with safe_open(file, "numpy") as tensors:
        return list(dict.fromkeys(map(kind_of, tensors.keys())))


def kind_of(name: str) -> str:
    """`model.layers.N.mlp.gate.weight` of a tensor of layer 3."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def zeroed(store: Store, model: Model, kind: str) -> Model:
    """The same checkpoint with zeros in all tensors of one kind."""
    from safetensors.numpy import load_file, save_file

    key = sha256(f"{model.folder}\n{kind}".encode()).hexdigest()[:16]
    folder = store.root / "edited" / f"zeros-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        for file in model.folder.iterdir():
            if file.name != FILE:
                (made / file.name).symlink_to(file.resolve())
        tensors = load_file((model.folder / FILE).resolve())
        changed = {k: v * 0 if kind_of(k) == kind else v for k, v in tensors.items()}
        save_file(changed, made / FILE, {"format": "pt"})
        try:
            made.rename(folder)
        except OSError:  # another thread was first
            shutil.rmtree(made, ignore_errors=True)
    return Model(folder, model.modules, model.parameters, model.config)
