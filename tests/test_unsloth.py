"""Path `unsloth`: its settings and channels without unsloth-zoo, its trainer with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity import resources
from parity.capture.worker import environment
from parity.errors import CaptureError, Unsupported, WrongChannel
from parity.names import canonical
from parity.paths import demands
from parity.paths.unsloth import library as _unsloth_library
from parity.paths.unsloth import settings as _unsloth_settings
from parity.paths.unsloth.knobs import UnslothKnobs
from parity.paths.unsloth.library import Library
from parity.paths.unsloth.observer import Run
from parity.paths.unsloth.parts import CLIPPED, clip_in_effect
from parity.paths.unsloth.path import UnslothPath
from parity.recipe import Recipe
from parity.trace import Trace
from tests.cost import long

installed = pytest.mark.skipif(
    importlib.util.find_spec("unsloth_zoo") is None,
    reason=f"needs unsloth-zoo: {_unsloth_library.INSTALL}",
)

RECIPE = Recipe().with_knobs([UnslothKnobs])

# Settings and channels ---------------------------------------------------------------------------


def test_without_unsloth_zoo_every_method_is_unsupported_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(_unsloth_library.importlib.util, "find_spec", lambda *_: None)
    _unsloth_library.library.cache_clear()
    path = UnslothPath(tmp_path)
    try:
        for method in ("shipped", "config", "train", "lora_init", "tokenization"):
            with pytest.raises(Unsupported, match=r"pip install --no-deps unsloth-zoo$"):
                asked = getattr(path, method)
                asked() if method == "shipped" else asked(Recipe(), Trace())
    finally:
        _unsloth_library.library.cache_clear()


def release(**fields):
    """A release whose configuration has these fields."""
    base = [
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
        "warmup_steps", "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "seed",
        "logging_steps", "output_dir", "report_to", "save_steps", "eval_steps", "max_seq_length",
        "use_cce", "compile", "patch_mode", "gradient_checkpointing", "max_grad_norm",
        "max_grad_value",
    ]  # fmt: skip
    config = dataclasses.make_dataclass(
        "Config", [(name, object, None) for name in (*base, *fields)]
    )
    return Library(None, types.SimpleNamespace(MLXTrainingConfig=config), None, "2026.5.2")


NEWER = dict.fromkeys(
    ("adam_beta1", "adam_beta2", "adam_epsilon", "append_eos", "completion_only_loss")
)


def test_factors_become_its_own_knobs():
    recipe = Recipe().override(
        {"optim.eps": 1e-6, "seed.data": 5, "lora.num_layers": 4, "lora.rank": 4, "lora.scale": 0.5}
    )
    args = _unsloth_settings.training(release(**NEWER), recipe, "out")
    assert (args.adam_epsilon, args.adam_beta2, args.seed, args.max_steps) == (1e-6, 0.999, 5, 30)
    wired = _unsloth_settings.wiring(recipe)
    assert (wired["lora_alpha"], wired["random_state"]) == (2.0, 3407)
    assert wired["finetune_last_n_layers"] == 4
    assert _unsloth_settings.wiring(Recipe())["finetune_last_n_layers"] is None


def test_a_knob_that_the_release_lacks_is_refused_unless_it_does_that_anyway():
    args = _unsloth_settings.training(release(), Recipe(), "out")
    assert not hasattr(args, "adam_epsilon")
    with pytest.raises(Unsupported, match=r"unsloth-zoo 2026\.5\.2 has no adam_epsilon.* 1e-06"):
        _unsloth_settings.training(release(), Recipe().override({"optim.eps": 1e-6}), "out")


@pytest.mark.parametrize(
    ("clip", "explicit", "knobs"),
    [
        ("none", True, {"max_grad_value": 0.0, "max_grad_norm": 0.0}),
        ("norm", True, {"max_grad_value": 0.0, "max_grad_norm": 0.5}),
        ("value", True, {"max_grad_value": 0.5, "max_grad_norm": 0.0}),
        ("none", False, {}),
        ("norm", False, {"max_grad_norm": 0.5}),
    ],
)
def test_off_is_an_explicit_zero_and_unsaid_is_unsaid(clip, explicit, knobs):
    recipe = RECIPE.override(
        {"optim.clip": clip, "optim.clip_value": 0.5, "unsloth.explicit_clip": explicit}
    )
    assert _unsloth_settings.clipping(release(), recipe) == knobs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed.placement": "before_load"}, "always has seed.placement=before_lora"),
        ({"data.pad_extra": 0}, "always has data.pad_extra=1"),
        ({"optim.bias_correction": False}, "always has optim.bias_correction=True"),
        ({"train.accumulation": 2}, "always has train.accumulation_weighting=token, not mean"),
        ({"train.autocast": "bfloat16"}, "does not honour train.autocast=bfloat16"),
        ({"model.dtype": "float64"}, "no float64"),
    ],
)
def test_what_it_has_no_option_for_is_refused(changes, words):
    with pytest.raises(Unsupported, match=words):
        demands.check(UnslothPath, "train", Recipe().override(changes), Trace())


def ran(losses, norms, said=None, rate=1e-3):
    """A run of micro-batches of one, and what its callbacks said."""
    said = said or list(zip(losses, norms, strict=True))
    return Run(
        micro_losses=[np.array([loss]) for loss in losses],
        micro_tokens=[np.array([9.0]) for _ in losses],
        norms=norms,
        reports=[(i + 1, 3, loss, rate, 0, 0, 0, 0, n) for i, (loss, n) in enumerate(said)],
    )


def test_channels_that_agree_pass_and_an_unreported_norm_is_no_contradiction():
    ran([3.0, 2.0, 1.0], [0.5, 0.4, 0.3]).check(3, False)
    ran([3.0, 2.0], [0.5, 0.4], [(3.0, None), (2.0, None)]).check(2, False)
    ran([3.0] * 3, [0.5] * 3, rate=0.0).check(3, False)  # nothing moves, so nothing changes


@pytest.mark.parametrize(
    ("run", "steps", "words"),
    [
        (ran([3.0, 2.0, 1.0], [0.5] * 3), 3, "0.5 at each of 3 steps: this is no gradient norm"),
        (ran([3.0, 2.0], [0.5, 0.4]), 3, "3 steps were trained, but there are"),
        (ran([3.0, 2.0], [0.5, 0.4], [(3.0, 1.0), (2.0, 0.4)]), 2, "gradient norm of step 1"),
        (ran([3.0, 2.0], [0.5, 0.4], [(3.0, 0.5), (2.1, 0.4)]), 2, "loss of step 2"),
        (ran([3.0, 2.0], [0.5, float("nan")], [(3.0, 0.5), (2.0, 0.4)]), 2, "norm of step 2"),
    ],
)
def test_a_channel_that_is_not_what_it_should_be_is_an_error(run, steps, words):
    with pytest.raises(WrongChannel, match=words):
        run.check(steps, False)


def norm(gradient):
    return float(np.sqrt(sum((g**2).sum() for g in gradient.values())))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (lambda g: g, ("none", None)),
        (lambda g: {k: np.clip(v, -0.5, 0.5) for k, v in g.items()}, ("value", 0.5)),
        (lambda g: {k: v * 0.7 / (norm(g) + 1e-6) for k, v in g.items()}, ("norm", 0.7)),
        (
            lambda g: {k: v * min(1, 2 / (norm({k: v}) + 1e-6)) for k, v in g.items()},
            ("leaf_norm", 2.0),
        ),
    ],
)
def test_the_clip_in_effect_is_told_from_what_it_does(clip, expected):
    def step(weights, fed):
        assert weights.keys() == fed[0].keys()
        assert max(np.abs(v).max() for v in fed[0].values()) == CLIPPED
        return Run(updates=[clip(fed[0])])

    assert clip_in_effect(step) == expected


# The real trainer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(small):
    few = small.override({"train.steps": 4, "train.compile": False})
    return few.with_knobs([UnslothKnobs])


@installed
def test_aligned_it_is_the_loop_on_mlx_lms_parts_bit_for_bit(engine, few):
    ours, theirs = (engine.capture(path, "train", few, Trace()) for path in ("unsloth", "mlx"))
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, value in theirs.arrays.items():
        assert np.array_equal(ours.arrays[name], value), name


@installed
@pytest.mark.parametrize("way", [long("Borrowed"), "Lent"])
def test_parts_go_into_the_other_stacks_loop_both_ways(engine, few, way):
    """Sound ones leave the result as it is, and a faulty one must show (below)."""
    theirs = engine.capture("mlx", "train", few, Trace())
    hybrid = engine.capture(f"tests.unsloth_paths:{way}", "train", few, Trace())
    assert hybrid.digest() == theirs.digest()


@installed
@pytest.mark.parametrize("part", ["loss", long("optimizer"), long("clip")])
def test_a_faulty_part_that_is_lent_to_the_trainer_shows(engine, few, part):
    faulty = engine.capture(f"tests.unsloth_paths:Faulty{part.title()}", "train", few, Trace())
    own = engine.capture("unsloth", "train", few, Trace())
    at = int(np.argmax(faulty.arrays["loss"] != own.arrays["loss"]))
    assert at == (0 if part == "loss" else 1)


BARE = """
import json, os, sys
if sys.platform == "linux":
    os.environ.update(UNSLOTH_ZOO_DISABLE_GPU_INIT="1", UNSLOTH_IS_PRESENT="1")
from unsloth_zoo.mlx.loader import FastMLXModel
from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

model_dir, data, out = sys.argv[1:]
rows = [json.loads(line) for line in open(data)]
model, tokenizer = FastMLXModel.from_pretrained(model_dir, dtype="float32", load_in_4bit=False)
model = FastMLXModel.get_peft_model(
    model, r=8, lora_alpha=16, lora_dropout=0.1, use_gradient_checkpointing=False
)
trainer = MLXTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=MLXTrainingConfig(
    per_device_train_batch_size=6, gradient_accumulation_steps=1, max_steps=4, warmup_steps=0,
    lr_scheduler_type="constant", learning_rate=3e-3, weight_decay=0.0, output_dir=out,
    gradient_checkpointing=False,
))
reported = []
trainer.add_step_callback(lambda *said: reported.append(said[2]))
trainer.train()
print("REPORTED", json.dumps(reported))
"""


@pytest.mark.long
@installed
def test_an_instrumented_run_ends_like_a_bare_one(engine, small, tmp_path):
    """Its default loss (CCE) and clip, compiled, with dropout, on rows of unlike lengths."""
    recipe = small.with_knobs([UnslothKnobs]).override(
        {
            "train.steps": 4,
            "mask.end_shift": 0,
            "lora.dropout": 0.1,
            "data.source": "mixed",
            "unsloth.use_cce": True,
            "unsloth.explicit_clip": False,
        }
    )
    rows = Path(resources.data_dir("mixed")) / "train.jsonl"
    model = resources.model_dir(recipe.model.source)
    done = subprocess.run(
        [sys.executable, "-c", BARE, model, str(rows), str(tmp_path)],
        env=environment("mlx", engine.cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = load_file(tmp_path / "adapters.safetensors")
    bare = {canonical(name): value for name, value in saved.items()}
    trace = engine.capture("unsloth", "train", recipe, Trace())
    adapter = trace.group("adapter")
    assert adapter.keys() == bare.keys()
    assert all(adapter[name].tobytes() == value.tobytes() for name, value in bare.items())
    assert any(np.any(v) for k, v in bare.items() if k.endswith("lora_b")), "nothing was trained"
    assert len({value.shape for value in trace.group("batches").values()}) > 2
    [line] = [line for line in done.stdout.splitlines() if line.startswith("REPORTED")]
    np.testing.assert_allclose(trace.arrays["loss"], json.loads(line.split(" ", 1)[1]), rtol=1e-6)


@pytest.mark.long
@installed
def test_checkpointing_of_one_run_does_not_reach_the_next(engine, few):
    """It recomputes the forward, so that what is left of it shows in the masks of the dropout."""
    once = few.override({"train.steps": 2})
    engine.capture(
        "unsloth", "train", once.override({"train.gradient_checkpointing": True}), Trace()
    )
    dropped = once.override({"lora.dropout": 0.1})
    ours, theirs = (engine.capture(p, "train", dropped, Trace()) for p in ("unsloth", "mlx"))
    assert ours.digest() == theirs.digest()


@installed
def test_what_is_in_effect_is_read_from_the_trainer(engine, few):
    defaults = engine.capture("unsloth", "defaults", few, Trace()).scalars
    assert defaults["model.dtype"] in ("bfloat16", "float16")  # of a float32 checkpoint
    unsaid = few.override({"unsloth.explicit_clip": False, "mask.end_shift": 0})
    scalars = engine.capture("unsloth", "config", unsaid, Trace()).scalars
    assert scalars["clip.mode"] in ("leaf_norm", "value")
    assert scalars["clip.value"] == 1.0
    assert scalars["seed.placement"] == "before_lora"
    assert scalars["dtype.activations"].keys() == {"float32"}
    aligned = engine.capture("unsloth", "config", few, Trace()).scalars
    assert (aligned["clip.mode"], aligned["clip.value"]) == ("none", None)
    assert {a - b for a, b in zip(
        aligned["mask.supervised"], scalars["mask.supervised"], strict=True
    )} == {1}  # fmt: skip


@pytest.mark.long
@installed
def test_a_constant_norm_becomes_an_error_that_names_it(engine, few):
    with pytest.raises(CaptureError, match=r"WrongChannel in train: .* at each of 4 steps"):
        engine.capture("tests.unsloth_paths:ConstantNorm", "train", few, Trace())
