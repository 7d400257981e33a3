"""The contract of a path: what does not fit it is named, whoever got it wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from parity.capture.engine import Engine
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.errors import CaptureError, UsageError
from parity.paths.contract import METHODS, STAGES, table
from parity.paths.method import ContractError
from parity.paths.protocol import TrainingPath
from parity.paths.registry import resolve
from parity.recipe import Recipe
from parity.record import Verdict
from parity.stages import STAGES as JUDGED
from parity.stages import find
from parity.trace import Trace
from tests.test_worker import BATCH

STEPS = 3


def floats(*shape):
    return np.zeros(shape, np.float32)


def ints(*shape):
    return np.zeros(shape, np.int32)


def trained(**changes):
    """What `train` emits."""
    arrays = {
        "loss": floats(STEPS),
        "gradient_norm": floats(STEPS),
        "tokens": ints(STEPS),
        "adapter/layers.0.q_proj.lora_a": floats(4, 2),
        "adapter/layers.0.q_proj.lora_b": floats(2, 4),
        **{f"batches/ids.{i}": ints(2, 5) for i in range(STEPS)},
        **{f"batches/lengths.{i}": ints(2, 2) for i in range(STEPS)},
    }
    return Trace({k: v for k, v in (arrays | changes).items() if v is not None})


def complaint(method, outputs, inputs=None):
    found = METHODS[method]
    dimensions = found.check_inputs(inputs or Trace())
    try:
        found.check_outputs(outputs, dimensions)
    except ContractError as error:
        return str(error)
    return ""


def _computes(method):
    return any(getattr(spec, "kind", "") == "float" for spec in method.outputs)


def test_what_fits_passes():
    assert complaint("train", trained()) == ""
    inputs = Trace({"ids.0": ints(1, 3), "ids.1": ints(2, 9)})
    logits = {"logits.0": floats(1, 3, 7), "logits.1": floats(2, 9, 7)}
    assert complaint("logits", Trace(logits, {"dtype": "float32"}), inputs) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"gradient_norm": floats(2)},
            "gradient_norm has shape (2,), expected (steps), where steps is 3 in loss",
        ),
        ({"loss": None}, "loss (steps) float is missing (loss of each optimizer step)"),
        ({"losses": floats(3)}, "losses (3,) float32 is not part of it"),
        ({"loss": ints(3)}, "loss is int32, expected float"),
        ({"loss": floats(3, 1)}, "loss has shape (3, 1), expected (steps)"),
        ({"tokens": np.zeros(3, bool)}, "tokens is bool, expected number"),
        (
            {"adapter/layers.0.q_proj.lora_b": floats(3, 4)},
            "lora_b has shape (3, 4), expected (r, out) | (experts, out, r), where r is 2 in "
            "adapter/layers.0.q_proj.lora_a",
        ),
        ({"batches/lengths.1": None}, "batches/lengths.1 (rows, 2) int is missing: there are 3"),
        ({"batches/lengths.1": ints(3, 2)}, "where rows is 2 in batches/ids.1"),
        ({"batches/ids.3": ints(2, 5)}, "batches/lengths.3 (rows, 2) int is missing: there are 4"),
    ],
)
def test_every_item_that_does_not_fit_is_named(changes, says):
    assert says in complaint("train", trained(**changes))


def test_all_items_are_named_at_once():
    found = complaint("train", trained(loss=None, gradient_norm=ints(3), more=floats(1)))
    assert found.count(";") == 2
    found = complaint("train", trained(**{f"x{i}": floats(1) for i in range(9)}))
    assert found.endswith("and 4 more")


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (None, "it returned NoneType, expected a Trace"),
        (
            Trace({"ids.0": ints(2), "margin.0": floats(3), "completion_loss": floats(1)},
                  {"text": ["a", "b"]}),
            "scalar text has 2 items, but there are 1 of prompts; margin.0 has shape (3,), "
            "expected (n), where n is 2 in ids.0",
        ),
        (
            Trace({"ids.0": ints(2), "margin.0": floats(2), "completion_loss": floats(2)},
                  {"text": [3]}),
            "scalar text is [3], expected text: list[str] of P; completion_loss has shape (2,), "
            "expected (P), where P is 1 in prompts",
        ),
        (
            Trace({"completion_loss": floats(1)}, {"text": [""], "answer": 1}),
            "scalar answer = 1 is not part of it; ids.0 (n) int is missing: there are 1 of prompts",
        ),
    ],
)  # fmt: skip
def test_scalars_and_counts_are_held_together(outputs, says):
    adapter = trained().group("adapter")
    inputs = Trace(scalars={"prompts": ["x"], "expected": "y"}).with_group("adapter", adapter)
    assert says in complaint("decode", outputs, inputs)


def test_any_shape_is_the_same_shape_wherever_it_stands():
    inputs = Trace({"weight/a": floats(2, 3), "gradient.0/a": floats(2, 3)})
    assert complaint("optimizer_step", Trace({"weight.0/a": floats(2, 3)}), inputs) == ""
    wrong = complaint("optimizer_step", Trace({"weight.0/a": floats(3, 2)}), inputs)
    assert "weight.0/a has shape (3, 2), expected (*S), the shape (2, 3) of weight/a" in wrong


def test_inputs_are_checked_before_a_path_sees_them():
    with pytest.raises(UsageError, match=r"inputs of gradient: .*lengths \(B, 2\) int is missing"):
        METHODS["gradient"].check_inputs(Trace({k: v for k, v in BATCH.arrays.items() if
                                               k != "lengths"}))  # fmt: skip


def test_a_path_that_breaks_it_becomes_an_error_record(empty_cache):
    with Engine(cache=empty_cache, timeout=60) as engine:
        cell = Cell(find("optimizer_step"), "tests.faulty_paths:Faulty", "mlx-lm", Recipe())
        record = run_cell(engine, cell)
        assert record.verdict is Verdict.ERROR
        assert (
            "ContractError in optimizer_step: it returned dict, expected a Trace" in record.reason
        )
        with pytest.raises(UsageError, match=r"inputs of logits: ids.N .* is missing"):
            engine.capture("tests.faulty_paths:Faulty", "logits", Recipe(), Trace())
        with pytest.raises(CaptureError, match=r"pid \(1,\) int64 is not part of it"):
            engine.capture("tests.faulty_paths:Faulty", "lora_init", Recipe(), Trace())


def test_the_contract_covers_every_stage_and_nothing_else():
    assert sorted(STAGES) == sorted(stage.name for stage in JUDGED)
    shown = table()
    for method in METHODS:
        assert hasattr(TrainingPath, method)
        assert f"\n{method}: " in f"\n{shown}"
    with pytest.raises(UsageError, match="unknown method 'dance': give one of tokenization"):
        table(("dance",))


# Declarations ------------------------------------------------------------------------------------

GOOD = """
from parity.paths.protocol import TrainingPath
class P(TrainingPath):
    name = "p"
    framework = "torch"
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace('    name = "p"\n', ""), "it needs `name`, a string such as 'my-trainer'"),
        (GOOD.replace('framework = "torch"', "pass"), "it needs `framework`, a string"),
        (GOOD + "    honours = ('optim.lrr',)", "`honours` names 'optim.lrr', which is no factor: "
         "did you mean optim.lr"),
        (GOOD + "    honours = ('optimizer.',)", "`honours` names 'optimizer.'"),
        (GOOD + "    honours = 'optim.'", "`honours` is a tuple of strings, not 'optim.'"),
        (GOOD + "    fixed = {'lora.dora': True}", "`fixed` names 'lora.dora'"),
        (GOOD + "    fixed = ('lora.rank',)", "`fixed` is a mapping"),
        (GOOD + "    operations = {'training': 'x'}", "`operations` names the stage 'training'"),
        (GOOD + "    def optimiser_step(self, recipe, inputs): ...",
         "`optimiser_step` is no method of a path: did you mean `optimizer_step`?"),
        (GOOD + "    def fit(self, recipe, inputs): ...", "`fit` is no method of a path"),
        (GOOD + "    def train(self, recipe): ...", "`train` takes (self, recipe, inputs)"),
        (GOOD + "    knobs = dict", "`knobs` is a subclass of parity.factors.Knobs"),
        (GOOD + "raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        (GOOD + "import sys; sys.exit(1)", "SystemExit: 1"),
        (GOOD.replace("TrainingPath)", ")"), "is no subclass of"),
        ("class Q: pass", "has no attribute 'P'"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_one_line_before_any_work(text, says, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "declared.py").write_text(text)
    sys.modules.pop("declared", None)
    with pytest.raises(UsageError) as caught:
        resolve("declared:P")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_exit_code_2(tmp_path):
    (tmp_path / "declared.py").write_text(GOOD + "    def optimiser_step(self, a, b): ...\n")
    words = ["run", "--subject", "declared:P", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "parity.cli", *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("parity: path 'declared:P': `optimiser_step` is no method")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# The skeleton ------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_skeleton_runs_and_is_skipped_until_it_is_written(tmp_path):
    command = [sys.executable, "-m", "parity.cli"]

    def parity(*words):
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    made = parity("new-path", "my-trainer", "--methods", "--out", "my_trainer.py")
    assert made.returncode == 0, made.stderr
    assert "my_trainer:MyTrainer" in made.stdout
    again = parity("new-path", "my-trainer", "--out", "my_trainer.py")
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    assert parity("new-path", "3 d").returncode == 2
    # What a section of factors is not honoured for, and what is not written, are both said.
    words = ["run", "--subject", "my_trainer:MyTrainer", "--reference", "mlx-lm", "--seeds", "1"]
    done = parity(*words, "--probes", "01", "--out", "a")
    assert "does not honour" in done.stdout + (tmp_path / "a" / "report.md").read_text()
    file = tmp_path / "my_trainer.py"
    honours = '("model.", "data.", "seed.", "lora.", "mask.", "optim.", "train.", "decode.")'
    file.write_text(file.read_text().replace("honours = ()", f"honours = {honours}"))
    done = parity(*words, "--probes", "01", "--out", "b")
    assert "is not written yet" in (tmp_path / "b" / "report.md").read_text(), done.stdout
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", str(file)]
    assert subprocess.run(lint, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if _computes(m)])
def test_what_computes_with_floats_keeps_float64(name):
    """Else the float64 run would be a copy of the reference, and its distance from it nothing."""
    double = Recipe().override({"model.dtype": "float64"})
    assert METHODS[name].scope(double, Trace()).model.dtype == "float64"


def test_the_float64_run_of_an_optimizer_is_no_copy_of_the_reference(engine):
    record = run_cell(engine, Cell(find("optimizer_step"), "mlx", "hf", Recipe()))
    assert all(m.error_reference > 0 for m in record.metrics)
