"""What paths made of functions and trainers refuse, each with its one clear reason."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parity import plugin
from parity.audit.inputs import given, shapes
from parity.errors import Unsupported, UsageError
from parity.paths.plugin.on_torch.arrays import own_batch
from parity.paths.plugin.on_torch.loss import GivenLogits
from tests.cost import long

MLX, TORCH = "tests.user_trainers", "tests.torch_trainers"


@pytest.mark.parametrize(
    ("path", "method", "says"),
    [
        long(
            "LateSeed", "train", "draws its own batches: to train on others it must take `batches`"
        ),
        ("WrongDraw", "train", "does not train on the batches that are handed over: the function"),
        (
            "Decaying",
            "optimizer_step",
            "an update of it moves layers.* otherwise than its optimizer",
        ),
        long("LateSeed", "save_adapter", "takes no `out`, a folder: what it saves is not seen"),
        long("TwoFiles", "round_trip", "leaves 2 files of tensors and no configuration"),
        ("Early", "train", "its step was compiled when its module was imported"),
        long("NothingDrawn", "batches", "batches gives none"),
        long("AnotherModel", "lora_init", "wire gives another model"),
        ("Shapeless", "batches", r"the loss is given arrays \(2, 3, 4\).* read as ids, lengths"),
    ],
)
def test_what_a_path_on_mlx_refuses(path, method, says, engine, small):
    recipe = small.override({"train.compile": path == "Early"})
    refused(engine, f"{MLX}:{path}", method, says, recipe, "mlx")


@pytest.mark.parametrize(
    ("path", "method", "says"),
    [
        long(
            "FromAList",
            "train",
            "does not train on the batches that are handed over: it draws them",
        ),
        long(
            "Positioned",
            "train",
            "its batches hold position_ids, which cannot be told: give `batch=`",
        ),
        ("Swapping", "train", "its model is given other rows than those that were drawn before"),
        long(
            "Decaying",
            "optimizer_step",
            "an update of it moves layers.* otherwise than its optimizer",
        ),
        long("InTwos", "gradient", "makes a step of 2 micro-batches"),
        long("InTwos", "save_adapter", "takes no `out`, a folder: what it saves is not seen"),
    ],
)
def test_what_a_path_on_torch_refuses(path, method, says, engine, small):
    refused(engine, f"{TORCH}:{path}", method, says, small, "hf")


def refused(engine, path, method, says, recipe, base):
    inputs = given(method, shapes(engine, [base], recipe))
    with pytest.raises(Unsupported, match=says):
        engine.capture(path, method, recipe.override({"train.steps": 2}), inputs)


@pytest.mark.parametrize(
    "raw",
    [
        {"labels": torch.zeros(2, 3)},
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)),
        torch.zeros(2, 3, 4),
    ],
)
def test_batches_that_are_none(raw):
    with pytest.raises(Unsupported, match="batches are dicts with input_ids"):
        own_batch(raw, [], lambda *_: None)


def test_batches_in_each_form_give_the_same():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    labels = torch.where(ids == 0, -100, ids)
    lengths = np.array([[0, 3], [0, 2]])
    forms = (
        {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()},
        (ids, labels),
        (ids, torch.tensor(lengths)),
        (ids, torch.tensor(lengths[:, 1])),
    )
    rows = [[5, 6, 7], [8, 9]]
    for raw in forms:
        found = own_batch(raw, rows, lambda *_: labels[:, 1:].numpy())
        assert np.array_equal(found[0], ids) and np.array_equal(found[1], lengths)
        assert np.array_equal(found[2], labels[:, 1:])


def test_logits_of_other_rows_are_not_given():
    live = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    model = GivenLogits(live, torch.zeros(1, 4, 20))
    assert model.config.vocab_size == 20 and live.config.vocab_size == 9
    assert model(torch.zeros(1, 4)).logits.shape == model(torch.zeros(1, 5)).logits[:, :4].shape
    with pytest.raises(Unsupported, match="gives the model rows of 7 tokens where there are 5"):
        model(torch.zeros(1, 7))


@pytest.mark.parametrize("make", [plugin.from_parts, plugin.from_trainer])
def test_a_framework_that_is_none(make):
    named = {"loss": len} if make is plugin.from_parts else {"run": lambda steps: None}
    with pytest.raises(UsageError, match="framework='jax': give mlx or torch"):
        make(**named, framework="jax")
