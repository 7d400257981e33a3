"""Loading by mlx-lm: the tokenizer by itself, and in words why a model does not load."""

from __future__ import annotations

import contextlib
import inspect
import json
import linecache
import re
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parity import resources
from parity.errors import Unsupported
from parity.recipe import Recipe

LONGEST = 4000
"""Characters of an error that are shown."""


def loaded(source: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and configuration, as `mlx_lm.load` gives them.

    Releases before 0.28.3 give no configuration: there it is that of the folder.
    """
    import mlx_lm

    if "return_config" in inspect.signature(mlx_lm.load).parameters:
        model, tokenizer, config = mlx_lm.load(source, return_config=True)
        return model, tokenizer, config
    model, tokenizer = mlx_lm.load(source)
    file = Path(source, "config.json")
    return model, tokenizer, json.loads(file.read_text("utf-8")) if file.is_file() else {}


def tokenizer(recipe: Recipe) -> Any:
    """As `mlx_lm.load` makes it, which hands the configuration's ends of a sequence over."""
    from mlx_lm.utils import _download, load_config, load_tokenizer

    folder = _download(resources.model_dir(recipe.model.source))
    ends = load_config(folder).get("eos_token_id")
    return load_tokenizer(folder, eos_token_ids=ends)


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """An error of loading with the line of mlx-lm it came from, and what of the configuration that reads.

    Raises:
        Unsupported: mlx-lm has no such architecture.
        RuntimeError: It fails to make this model of its configuration and weights.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "not supported" in str(error):
            raise Unsupported(f"mlx-lm: {error}") from None
        raise RuntimeError(
            f"mlx-lm does not load the model: {type(error).__name__}: {_one_line(error)}"
            f"{_place(error, _keys(source))}"
        ) from error


def _one_line(error: Exception) -> str:
    """An error in one line, every name in it whole.

    A list of tensors has each kind once: `model.layers.N.mlp.up_proj.weight (2)` of those of two layers.
    """
    text = " ".join(str(error).split())
    listed = re.fullmatch(r"((?:Received|Missing) \d+ parameters[^:]*: )(.+?)\.?", text)
    if listed:
        kinds = Counter(re.sub(r"\.\d+(?=\.)", ".N", name) for name in listed[2].split(", "))
        return listed[1] + ", ".join(f"{k} ({n})" if n > 1 else k for k, n in kinds.items())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0]} …"


def _keys(source: str) -> dict[str, Any]:
    """Keys of a configuration with their values; `rope_parameters.rope_type` of nested ones."""
    file, found = Path(source, "config.json"), dict[str, Any]()

    def add(values: dict[str, Any], above: str = "") -> None:
        for key, value in values.items():
            found[f"{above}{key}"] = value
            if isinstance(value, dict):
                add(value, f"{above}{key}.")

    if file.is_file():
        add(json.loads(file.read_text("utf-8")))
    return found


def _place(error: Exception, keys: dict[str, Any]) -> str:
    """Where in mlx-lm's model files it was raised; keys that the message or that line of code names.

    Where the message has values of theirs as well, only those keys; then a variable's name is enough.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "mlx_lm/models/" in frame.filename.replace("\\", "/")
    ]
    line, where = "", ""
    if frames:
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        where = f"; models/{Path(last.filename).name}, line {last.lineno}: `{line}`"
    words = _identifiers(str(error))
    for attribute, text in re.findall(r"""\.([A-Za-z_]\w*)|["'](\w+)["']""", line):
        words.add(attribute or text)
    variables, given = set(re.findall(r"[A-Za-z_]\w+", line)), str(error).split()
    named = {key: value for key, value in keys.items() if key.rpartition(".")[2] in words}
    quoted = {
        key: value
        for key, value in keys.items()
        if str(value) in given
        and (key in named or (isinstance(value, str) and key.rpartition(".")[2] in variables))
    }
    shown = [f"{key}={json.dumps(value)[:80]}" for key, value in (quoted or named).items()]
    return where + (f"; named there, the configuration has {', '.join(shown)}" if shown else "")


def _identifiers(message: str) -> set[str]:
    """Words that a message marks as names: in quotes, or before an `=`; others are prose."""
    marked = re.findall(r"""["'`](\w+)["'`]|\b(\w+)=(?!=)""", message)
    return {quoted or given for quoted, given in marked}
