from pathlib import Path

from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.record import Verdict
from parity.report.text import describe
from parity.stages import STAGES, find

SUBJECT = "tests.third_party:NumpyAdamW"


def test_a_path_of_forty_lines_is_held_against_the_others(engine, small):
    assert len(Path(__file__).with_name("third_party.py").read_text().splitlines()) <= 40
    for reference in ("hf", "mlx"):
        record = run_cell(engine, Cell(find("optimizer_step"), SUBJECT, reference, small))
        assert record.verdict is Verdict.AGREE, describe(record)
    wrong = {"subject": {"optim.weight_decay": 0.01}}
    record = run_cell(engine, Cell(find("optimizer_step"), SUBJECT, "hf", small, wrong))
    assert record.verdict is Verdict.DIVERGE


def test_what_it_does_not_do_is_skipped_with_a_reason(engine, small):
    for stage in STAGES:
        if stage.name != "optimizer_step":
            record = run_cell(engine, Cell(stage, SUBJECT, "hf", small))
            assert record.verdict is Verdict.SKIP
            assert "numpy-adamw" in record.reason
