"""The model that an adapter is for: names and shapes of its modules, from headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity import resources
from parity.adapters.tensors import Tensor, read_object, shown, tensors_of
from parity.errors import UsageError
from parity.names import canonical, layer_of

INDEX = "model.safetensors.index.json"
_TURNED = ("gpt2",)  # model types whose checkpoints store weights as (in, out)
_FILES = ("config.json", INDEX, "model*.safetensors", "tokenizer*", "*.model", "*.jinja")


@dataclass(frozen=True)
class BaseModule:
    """A module that can be adapted.

    Attributes:
        key: As the files have it.
        inputs: Width of what it takes; for an embedding the size of the vocabulary.
        outputs: Width of what it gives. Both are None where they cannot be told.
        experts: How many it has, 0 where it is none of a mixture.
        bias: Whether it has one.
        embedding: Whether it is an embedding.
        only: The stack that calls it so, where the other has another name; empty where both do.
    """

    key: str
    inputs: int | None
    outputs: int | None
    experts: int = 0
    bias: bool = False
    embedding: bool = False
    only: str = ""


@dataclass(frozen=True)
class Base:
    """A folder with a model.

    Attributes:
        source: As it was given.
        config: What config.json holds.
        tensors: By the name in the files.
        modules: By canonical name.
        layers: How many it has.
    """

    source: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, BaseModule]
    layers: int

    @property
    def vocabulary(self) -> int | None:
        """Entries of the vocabulary."""
        text = self.config.get("text_config")
        found = (text if isinstance(text, dict) else self.config).get("vocab_size")
        return found if type(found) is int and found > 1 else None


def read_base(source: str) -> Base:
    """A base by fixture name, folder or hub id.

    Raises:
        UsageError: There is none, or its files are missing or damaged.
    """
    folder = _folder(source)
    config = read_object(folder / "config.json")
    tensors = model_tensors(folder)
    modules = _modules(tensors, config)
    numbers = [n for name in tensors if (n := layer_of(canonical(name))) is not None]
    if not modules or not numbers:
        raise UsageError(f"{folder}: its tensors are not those of a model with numbered layers")
    return Base(source, folder, config, tensors, modules, max(numbers) + 1)


def _folder(source: str) -> Path:
    found = Path(resources.model_dir(source))
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except Exception as error:  # of many kinds: no such id, no network, no permission
        line = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"no model {source!r} from the hub: {type(error).__name__}: {line}"
        ) from None


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's files.

    Raises:
        UsageError: A file is missing or damaged, or a name stands in two of them.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if (folder / INDEX).exists():
        placed = read_object(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise UsageError(f"{folder / INDEX}: weight_map does not name a file for each tensor")
        names = sorted(set(placed.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise UsageError(f"{folder / INDEX}: {shown(outside[0])} is no file of this folder")
        files = [folder / name for name in names]
    if not files:
        raise UsageError(f"{folder} holds no model*.safetensors")
    found = dict[str, Tensor]()
    for file in files:
        for name, tensor in tensors_of(file).items():
            if name in found:
                raise UsageError(
                    f"{file}: tensor {shown(name)} stands in {found[name].file.name} as well"
                )
            found[name] = tensor
    return found


def _modules(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, BaseModule]:
    turned = config.get("model_type") in _TURNED
    found = dict[str, BaseModule]()
    for name, tensor in tensors.items():
        key, _, part = name.rpartition(".")
        if part != "weight" or len(tensor.shape) not in (2, 3):
            continue
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
        outputs, inputs = tensor.shape[-2:]
        embedding = _is_embedding(key)
        # Packed weights have other widths than the module.
        if f"{key}.scales" in tensors:
            found_in = _unpacked(inputs, key, config)
        else:
            found_in = inputs if tensor.is_float else None
        sizes: tuple[int | None, int | None] = (
            found_in,
            outputs if tensor.is_float or found_in else None,
        )
        if embedding or (turned and not embedding):
            sizes = sizes[::-1]
        found[canonical(key)] = BaseModule(
            key, *sizes, experts, f"{key}.bias" in tensors, embedding
        )
    stacked = _stacked(found)
    if stacked:
        single = {n: m for n, m in found.items() if ".experts." in n}
        found |= {name: replace(module, only="peft") for name, module in single.items()}
    found |= stacked
    head = next((n for n in found if n.endswith("embed_tokens")), None)
    if head is not None and not any(name.endswith("lm_head") for name in found):
        # Tied: the head is the embedding, the other way round.
        tied = found[head]
        found["lm_head"] = BaseModule("lm_head", tied.outputs, tied.inputs)
    return found


def _is_embedding(key: str) -> bool:
    last = key.rpartition(".")[2]
    return "embed" in last or last in ("wte", "wpe")


def _unpacked(width: int, key: str, config: Mapping[str, Any]) -> int | None:
    """Width of a weight that MLX packed into 32-bit words."""
    settings = config.get("quantization") or config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    own = settings.get(key)
    bits = own.get("bits") if isinstance(own, dict) else settings.get("bits")
    return width * 32 // bits if type(bits) is int and 0 < bits <= 32 else None


def _stacked(modules: Mapping[str, BaseModule]) -> dict[str, BaseModule]:
    """MLX's names of experts, which it stacks into one module."""
    groups = dict[str, list[BaseModule]]()
    for name, module in modules.items():
        before, found, after = name.partition(".experts.")
        number, _, part = after.partition(".")
        if found and number.isdigit() and part:
            groups.setdefault(f"{before}.switch_mlp.{part}", []).append(module)
    return {
        name: BaseModule(
            members[0].key.partition(".experts.")[0] + name[name.index(".switch_mlp.") :],
            members[0].inputs,
            members[0].outputs,
            len(members),
            only="mlx",
        )
        for name, members in groups.items()
    }
