"""Factors are honoured or refused: what a path declares is what it does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from parity.capture.engine import Engine
from parity.cells.cell import Cell, reproduce
from parity.cells.run import run_cell
from parity.errors import Unsupported, UsageError
from parity.paths import demands
from parity.paths.contract import METHODS
from parity.paths.method import Method
from parity.paths.registry import knobs, resolve
from parity.paths.unsloth.knobs import UnslothKnobs
from parity.recipe import Recipe, factor_names, load
from parity.record import Verdict
from parity.stages import find
from parity.trace import Trace
from tests.third_party import NumpyAdamW

OWN = "tests.knobs_path:Half"


# Declared ----------------------------------------------------------------------------------------


def refusal(kind, method, changes, inputs=None):
    try:
        demands.check(kind, method, Recipe().override(changes), inputs or Trace())
    except Unsupported as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.clip": "norm"}, "does not honour optim.clip=norm"),
        ({"optim.schedule": "linear"}, "does not honour optim.schedule=linear"),
        ({"optim.bias_correction": False}, "does not honour optim.bias_correction=False"),
        ({"optim.name": "sgd"}, "path 'numpy-adamw' always has optim.name=adamw, not sgd"),
        (
            {"optim.clip": "norm", "optim.warmup_steps": 3},
            "does not honour optim.warmup_steps=3, optim.clip=norm, optim.clip_value=1.0",
        ),
    ],
)
def test_a_factor_that_is_read_and_not_honoured_is_refused_by_name(changes, says):
    assert says in refusal(NumpyAdamW, "optimizer_step", changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.lr": 0.5, "optim.eps": 1e-6},
        {"optim.clip_value": 0.1},  # there is no clip
        {"lora.dropout": 0.5, "train.accumulation": 4, "model.dtype": "bfloat16"},  # not read
    ],
)
def test_what_is_honoured_neutral_idle_or_not_read_is_no_reason(changes):
    assert not refusal(NumpyAdamW, "optimizer_step", changes)


def test_what_is_handed_over_is_not_read_from_factors():
    """Whoever is handed batches does not pad them."""
    train = METHODS["train"]
    ids = np.zeros((1, 3), np.int32)
    handed = Trace({"batches/ids.0": ids, "batches/lengths.0": ids[:, :2]})
    for factor in ("data.pad_multiple", "mask.prompt", "seed.data"):
        assert train.read(factor, Trace())
        assert not train.read(factor, handed)
    assert train.read("mask.end_shift", handed)
    assert not train.read("decode.max_tokens", Trace())


def test_a_factor_that_no_path_knows_is_refused_by_all(monkeypatch):
    """As a new one is until a path declares it."""
    for path in ("mlx", "mlx-lm", "hf", "trl", "unsloth"):
        kind = resolve(path)
        monkeypatch.setattr(kind, "honours", tuple(h for h in kind.honours if h != "lora."))
        assert "does not honour lora.rank=8" in refusal(kind, "lora_init", {}), path


def test_neutral_and_idle_values_are_declared_beside_each_factor():
    recipe = Recipe()
    assert recipe.neutral("lora.dropout")
    assert not recipe.neutral("optim.lr")
    assert not recipe.override({"train.accumulation": 2}).neutral("train.accumulation")
    assert "train.accumulation_weighting" not in recipe.active()
    assert "train.accumulation_weighting" in recipe.override({"train.accumulation": 2}).active()
    assert "optim.betas" not in recipe.override({"optim.name": "sgd"}).active()


def test_a_skip_names_the_factor(engine, small):
    recipe = small.override({"optim.clip": "norm"})
    record = run_cell(engine, Cell(find("06"), "tests.third_party:NumpyAdamW", "mlx", recipe))
    assert record.verdict is Verdict.SKIP
    assert (
        record.reason == "path 'numpy-adamw' does not honour optim.clip=norm, optim.clip_value=1.0"
    )


# Knobs -------------------------------------------------------------------------------------------


def test_knobs_are_factors_where_their_path_takes_part():
    with pytest.raises(
        UsageError, match=r"'unsloth\.use_cce': none of the paths has knobs 'unsloth'"
    ):
        load("default", ["unsloth.use_cce=true"], knobs(["mlx", "hf"]))
    for paths in (["unsloth"], ["hf", "unsloth@2026.5.2"], ["mlx+loss=unsloth"]):
        recipe = load("default", ["unsloth.use_cce=true"], knobs(paths))
        assert recipe.knobs(UnslothKnobs).use_cce
        assert recipe.factors()["unsloth.use_cce"] is True
        plain = load("default", knobs=knobs(paths))
        assert recipe.difference(plain) == {"unsloth.use_cce": (True, False)}
        assert recipe.digest() != plain.digest()
    with pytest.raises(UsageError, match=r"did you mean unsloth\.use_cce"):
        load("default", ["unsloth.use_cc=true"], knobs(["unsloth"]))
    with pytest.raises(UsageError, match=r"unsloth\.patch_mode.*got 'none'"):
        load("default", ["unsloth.patch_mode=none"], knobs(["unsloth"]))
    assert not [name for name in factor_names() if name.startswith("unsloth.")]


def test_a_knob_of_one_path_changes_no_capture_of_another(tmp_path, small):
    with Engine(cache=tmp_path, timeout=120) as engine:
        inputs = Trace(scalars={"texts": ["a"], "conversations": []})
        shared = small.with_knobs([UnslothKnobs])
        for value in (False, True):
            recipe = shared.override({"unsloth.use_cce": value})
            engine.capture("mlx", "tokenization", recipe, inputs)
        assert engine.captured == 1


def test_a_path_of_a_user_has_knobs_of_its_own(engine, small):
    recipe = load("default", ["half.factor=0.25"], knobs([OWN, "hf"]))
    cell = Cell(find("06"), OWN, "hf", recipe, {"subject": {"half.factor": 0.25}})
    record = run_cell(engine, cell)
    assert record.verdict is Verdict.DIVERGE
    assert "--set half.factor=0.25" in reproduce(cell)
    whole = recipe.override({"half.factor": 1.0})
    assert run_cell(engine, Cell(find("06"), OWN, "hf", whole)).verdict is Verdict.AGREE


def test_the_command_lists_and_takes_knobs():
    command = [sys.executable, "-m", "parity.cli"]

    def parity(*words):
        return subprocess.run([*command, *words], capture_output=True, text=True, check=False)

    assert "unsloth.use_cce = false" in parity("factors").stdout
    assert "unsloth.use_cce = true" in parity("factors", "--set", "unsloth.use_cce=true").stdout
    done = parity("run", "--subject", "mlx", "--set", "unsloth.use_cce=true")
    assert done.returncode == 2
    assert "unknown factor 'unsloth.use_cce'" in done.stderr


# Done --------------------------------------------------------------------------------------------

BASE = {
    "data.source": "mixed", "data.pad_multiple": 1, "data.pad_extra": 0, "mask.end_shift": 0,
    "train.steps": 2, "train.batch_size": 2, "train.compile": False, "decode.max_tokens": 3,
}  # fmt: skip
# Factor: another value, where it shows, and what both sides need for that.
FLIPS = {
    "model.source": ("tiny-llama", "tokenization", {}),
    "model.dtype": ("bfloat16", "logits", {}),
    "model.weights": ("float16", "logits", {}),
    "model.quantization": ("affine", "logits", {}),
    "model.bits": (8, "logits", {"model.quantization": "affine"}),
    "model.group_size": (32, "logits", {"model.quantization": "affine"}),
    "data.source": ("hello", "tokenization", {}),
    "data.max_length": (4, "tokenization", {}),
    "data.pad_multiple": (7, "batches", {}),
    "data.pad_extra": (1, "batches", {}),
    "data.append_eos": (False, "tokenization", {}),
    "seed.value": (5, "lora_init", {}),
    "seed.placement": ("before_load", "config", {}),
    "seed.data": (7, "batches", {}),
    "lora.kind": ("dora", "lora_init", {}),
    "lora.rank": (4, "lora_init", {}),
    "lora.scale": (0.5, "lora_init", {}),
    "lora.dropout": (0.5, "lora_init", {}),
    "lora.target_modules": (["q_proj"], "lora_init", {}),
    "lora.num_layers": (3, "lora_init", {}),
    "mask.prompt": (True, "tokenization", {"data.source": "chat"}),
    "mask.start_shift": (1, "supervised_positions", {}),
    "mask.end_shift": (1, "supervised_positions", {}),
    "optim.name": ("sgd", "optimizer_step", {}),
    "optim.lr": (0.1, "optimizer_step", {}),
    "optim.betas": ([0.5, 0.9], "optimizer_step", {}),
    "optim.eps": (0.1, "optimizer_step", {}),
    "optim.weight_decay": (0.5, "optimizer_step", {}),
    "optim.bias_correction": (False, "optimizer_step", {}),
    "optim.momentum": (0.9, "optimizer_step", {"optim.name": "sgd"}),
    "optim.schedule": ("linear", "optimizer_step", {}),
    "optim.warmup_steps": (1, "optimizer_step", {}),
    "optim.clip": ("norm", "optimizer_step", {"optim.clip_value": 0.01, "optim.eps": 0.1}),
    "optim.clip_value": (0.02, "optimizer_step", {"optim.clip": "norm", "optim.eps": 0.1}),
    "train.steps": (3, "train", {}),
    "train.batch_size": (3, "batches", {}),
    "train.accumulation": (2, "train", {}),
    "train.accumulation_weighting": ("token", "train", {"train.accumulation": 2}),
    "train.gradient_checkpointing": (True, "config", {}),
    "train.autocast": ("bfloat16", "train", {}),
    "train.compile": (True, "config", {}),
    "decode.max_tokens": (2, "decode", {}),
    "unsloth.use_cce": (True, "train", {}),
    "unsloth.load_in_4bit": (True, "logits", {}),
    "unsloth.explicit_clip": (False, "optimizer_step", {}),
    "unsloth.patch_mode": ("unpatched", "train", {}),
    "unsloth.cast_norm_output": (False, "config", {"model.dtype": "bfloat16"}),
}
SAME_BITS = ("unsloth.patch_mode",)
"""What only says how the same is computed."""
CHEAP = ("tokenization", "optimizer_step", "lora_init")


def declared(path):
    kind = resolve(path)
    own = tuple(f"{knob.section}." for knob in kind.knob_types())
    return [
        name
        for name in factor_names(kind.knob_types())
        if name.startswith((*kind.honours, *own))
        and name not in kind.fixed
        # What it never has takes the effect from others: no clip, no limit.
        and not any(kind.fixed.get(need, value) != value for need, value in FLIPS[name][2].items())
    ]


FLIPPED = [
    (path, name) for path in ("mlx", "mlx-lm", "hf", "trl", "unsloth") for name in declared(path)
]
CASES = [
    pytest.param(
        path, name, id=f"{path}-{name}",
        marks=() if path in ("mlx", "hf") and FLIPS.get(name, "??")[1] in CHEAP else pytest.mark.long,
    )
    for path, name in FLIPPED
]  # fmt: skip


def handed(method, engine, recipe):
    """Inputs of a method."""
    rng = np.random.default_rng(0)
    if method == "tokenization":
        return Trace(scalars={"texts": [], "conversations": []})
    if method == "logits":
        return Trace({"ids.0": rng.integers(1, 500, (1, 8)).astype(np.int32)})
    if method == "supervised_positions":
        ids = np.array([[5, 6, 7, 8, 9, 0, 0]], np.int32)
        lengths = np.array([[0, 5]], np.int32)
        return Trace({"batches/ids.0": ids, "batches/lengths.0": lengths})
    if method == "optimizer_step":
        names = {
            "layers.0.self_attn.q_proj.lora_a": (4, 2),
            "layers.0.self_attn.q_proj.lora_b": (2, 4),
        }
        weights = {
            name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in names.items()
        }
        trace = Trace().with_group("weight", weights)
        for step in range(2):
            fed = {n: rng.normal(0, 1, s).astype(np.float32) for n, s in names.items()}
            trace = trace.with_group(f"gradient.{step}", fed)
        return trace
    if method == "cross_entropy":
        ids, lengths = rng.integers(1, 20, (2, 9)).astype(np.int32), np.array([[0, 9], [0, 6]])
        logits = rng.normal(0, 3, (2, 8, 20)).astype(np.float32)
        return Trace({"logits": logits, "ids": ids, "lengths": lengths.astype(np.int32)})
    if method == "gradient":
        adapter = engine.capture("hf", "lora_init", recipe, Trace()).group("adapter")
        rows = {"ids": rng.integers(1, 500, (2, 9)), "lengths": np.array([[0, 9], [0, 6]])}
        ids = {name: value.astype(np.int32) for name, value in rows.items()}
        return Trace(ids).with_group("adapter", adapter)
    if method == "decode":
        adapter = engine.capture("hf", "lora_init", recipe, Trace()).group("adapter")
        texts = {"prompts": ["My name"], "expected": " is"}
        return Trace(scalars=texts).with_group("adapter", adapter)
    return Trace()


@pytest.mark.parametrize(("path", "name"), CASES)
def test_a_factor_that_is_honoured_has_an_effect_or_is_refused(path, name, engine):
    value, method, needs = FLIPS[name]
    kind = resolve(path)
    recipe = Recipe().with_knobs(kind.knob_types()).override({**BASE, **kind.fixed, **needs})
    inputs = handed(method, engine, recipe)
    before = engine.capture(path, method, recipe, inputs)
    try:
        after = engine.capture(path, method, recipe.override({name: value}), inputs)
    except Unsupported as error:
        assert name in str(error) or str(value) in str(error)
        return
    changed = after.digest() != before.digest()
    assert changed != (name in SAME_BITS)


def test_recipes_that_differ_in_what_is_not_read_share_a_capture(engine):
    rows = Trace({"ids.0": np.arange(5, 13, dtype=np.int32)[None]})
    once = engine.capture("mlx", "logits", Recipe().override(BASE), rows)
    count = engine.captured
    other = Recipe().override({**BASE, "optim.lr": 0.5, "train.steps": 3, "seed.value": 2})
    assert engine.capture("mlx", "logits", other, rows).file == once.file
    assert engine.captured == count
    rounded = engine.capture("mlx", "logits", other.override({"model.weights": "float16"}), rows)
    assert rounded.file != once.file


@pytest.mark.long
@pytest.mark.parametrize("path", ["mlx", "hf"])
@pytest.mark.parametrize(
    "method",
    [
        "tokenization", "batches", "supervised_positions", "logits", "cross_entropy", "lora_init",
        "gradient", "optimizer_step", "decode",
    ],
)  # fmt: skip
def test_a_factor_that_a_method_does_not_read_changes_nothing(path, method, engine, monkeypatch):
    """Also where it is not put back to its default: what the contract says is so."""
    monkeypatch.setattr(Method, "scope", lambda self, recipe, inputs: recipe)
    recipe = Recipe().override(BASE)
    inputs = handed(method, engine, recipe)
    unread = [n for n in recipe.factors() if not METHODS[method].read(n, inputs) and n in FLIPS]
    assert unread
    changed = []
    for name in unread:
        value, _, needs = FLIPS[name]
        base = recipe.override(needs)
        try:
            before = engine.capture(path, method, base, inputs)
            after = engine.capture(path, method, base.override({name: value}), inputs)
        except Unsupported:
            continue
        if after.digest() != before.digest():
            changed.append(name)
    assert not changed


@pytest.mark.skipif(sys.platform != "linux", reason="there MLX compiles kernels into no files")
@pytest.mark.parametrize("path", ["mlx", "mlx-lm"])
def test_a_gradient_is_compiled_only_where_the_recipe_compiles_the_step(path, small, tmp_path):
    recipe = small.override({"model.source": "tiny-llama", "lora.num_layers": 1})
    rows = {"ids": np.ones((1, 5), np.int32), "lengths": np.array([[1, 4]], np.int32)}
    with Engine(cache=tmp_path, timeout=900) as engine:
        init = engine.capture("mlx", "lora_init", recipe, Trace()).group("adapter")
        engine.capture(path, "gradient", recipe, Trace(rows).with_group("adapter", init))
    assert not [*(tmp_path / "kernels").rglob("*.so")]
