"""Adapters that one stack saved and another loads; the conversion where no stack ships one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil

import pytest
from click.testing import CliRunner

from parity.adapters import check as adapters
from parity.adapters.convert import convert
from parity.cells.cell import Cell
from parity.cells.run import run_cell
from parity.cli import main
from parity.errors import UsageError
from parity.record import Record, Verdict
from parity.report.exchange import table, way
from parity.report.text import describe
from parity.stages.exchange import AS_WRITTEN, CONVERTED, EXPORTED, NOT_READ, Exchange
from tests.adapter_writers import MODEL, written


@pytest.fixture(scope="module")
def saved():
    return written()


def exchange(engine, recipe, writer, reader, with_ours=True):
    for path in (writer, reader):
        if path == "unsloth" and importlib.util.find_spec("unsloth_zoo") is None:
            pytest.skip("needs unsloth-zoo")
    writer, reader = (
        f"tests.round_trip_paths:{path}" if path[0].isupper() else path for path in (writer, reader)
    )
    stage = Exchange(convert if with_ours else None)
    return run_cell(engine, Cell(stage, reader, writer, recipe))


PAIRS = [
    ("mlx-lm", "mlx-lm", Verdict.IDENTICAL, AS_WRITTEN),
    ("mlx-lm", "mlx", Verdict.IDENTICAL, AS_WRITTEN),
    ("mlx-lm", "unsloth", Verdict.IDENTICAL, CONVERTED),
    ("mlx-lm", "hf", Verdict.AGREE, CONVERTED),
    ("unsloth", "unsloth", Verdict.IDENTICAL, AS_WRITTEN),
    ("unsloth", "mlx-lm", Verdict.IDENTICAL, AS_WRITTEN),
    ("unsloth", "hf", Verdict.AGREE, EXPORTED),
    ("hf", "hf", Verdict.IDENTICAL, AS_WRITTEN),
    ("hf", "mlx-lm", Verdict.AGREE, CONVERTED),
    ("hf", "unsloth", Verdict.AGREE, AS_WRITTEN),
    ("trl", "hf", Verdict.IDENTICAL, AS_WRITTEN),
    ("trl", "mlx-lm", Verdict.AGREE, CONVERTED),
]


@pytest.mark.parametrize(
    ("writer", "reader", "verdict", "how"), PAIRS, ids=["-".join(pair[:2]) for pair in PAIRS]
)
def test_what_one_stack_writes_another_reads(writer, reader, verdict, how, engine, small):
    record = exchange(engine, small, writer, reader)
    assert (record.verdict, way(record)) == (verdict, how), describe(record)
    metrics = {metric.name: metric for metric in record.metrics}
    assert metrics["modules with an adapter, subject"].total == 126
    logits = metrics["logits after loading, subject"]
    assert (logits.tolerance == 0) == (verdict is Verdict.IDENTICAL)
    assert "effect of the adapter, subject" in metrics


def test_what_is_not_read_is_no_pass_and_in_the_words_of_the_loader(engine, small):
    record = exchange(engine, small, "mlx-lm", "hf", with_ours=False)
    assert record.verdict is Verdict.DIVERGE
    assert NOT_READ in record.findings
    assert "KeyError in load_adapter: 'peft_type'" in record.reason
    assert any("ships nothing that writes files of peft" in text for text in record.findings)
    assert "✗ not read" in table([record])


@pytest.mark.parametrize(
    ("writer", "reader", "metric", "words"),
    [
        ("NoScale", "mlx", "scale · A · B after loading, subject", "scale 20 in the place of 2, times 10"),
        ("mlx-lm", "NotLoaded", "modules with an adapter, subject", "none has an adapter after loading"),
    ],
)  # fmt: skip
def test_what_writer_or_reader_loses_is_found(writer, reader, metric, words, engine, small):
    record = exchange(engine, small, writer, reader)
    assert record.verdict is Verdict.DIVERGE, describe(record)
    assert record.first_divergence["metric"] == metric
    assert words in record.reason


@pytest.mark.long
def test_a_reader_that_takes_files_without_their_effect_is_not_converted_for(engine, small):
    record = exchange(engine, small, "hf", "SwitchedOff")
    assert (record.verdict, way(record)) == (Verdict.DIVERGE, AS_WRITTEN)


# The conversion -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "layout"),
    [("mlx-lm", "peft"), ("mlx-lm-dora", "peft"), ("peft", "mlx"), ("peft-rslora", "mlx"), ("peft-dora", "mlx"), ("trl", "mlx")],
)  # fmt: skip
def test_a_converted_adapter_is_the_same_to_real_loaders(writer, layout, saved, tmp_path, engine):
    out, back = tmp_path / "out", tmp_path / "back"
    convert(saved / writer, layout, out)
    result = adapters.check(
        out, MODEL, saved / writer, None, lambda: contextlib.nullcontext(engine)
    )
    assert result.findings == []
    assert {o.check for o in result.unchecked} <= {"trained_on"}, result
    own = adapters.read(saved / writer).layout
    convert(out, own, back)
    result = adapters.check(back, None, saved / writer)
    assert result.findings == []


REFUSED = {
    "mlx-lm-full": ("peft", "full: no pair of A and B to convert"),
    "mlx-lm-embedding": ("peft", "adapters of embeddings are not converted"),
    "peft-embedding": ("mlx", "only A, B and DoRA's magnitude can be converted"),
    "peft-patterns": ("mlx", "mlx-lm's files hold one rank for all modules, it has 4, 8"),
    "peft-head": ("mlx", "it has base_model.model.lm_head.weight"),
    "peft": ("peft", "holds files of peft already"),
    "fused": ("peft", "is a whole model, no adapter"),
}


@pytest.mark.parametrize("writer", REFUSED)
def test_what_the_other_files_cannot_hold_is_refused(writer, saved, tmp_path):
    layout, words = REFUSED[writer]
    with pytest.raises(UsageError, match=words):
        convert(saved / writer, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_scales_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "peft", tmp_path / "peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": {"q_proj": 4}}))
    with pytest.raises(UsageError, match=r"one scale for all modules, it has 0\.5, 2"):
        convert(folder, "mlx", tmp_path / "out")


def test_the_command_says_whose_conversion_it_is(saved, tmp_path):
    words = ["adapter", "convert", str(saved / "mlx-lm"), "--to", "peft", "--out"]
    done = CliRunner().invoke(main, [*words, str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "converted by mlx-parity" in done.stdout
    done = CliRunner().invoke(main, [*words, str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "exists" in done.stderr


@pytest.mark.long
def test_the_matrix_is_a_table_or_json():
    words = ["adapter", "matrix", "--path", "mlx-lm", "--path", "hf"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    for text in (
        "= identical, as saved",
        "≈ agree, converted by mlx-parity",
        "mlx-lm → hf: not read as",
    ):
        assert text in done.stdout
    done = CliRunner().invoke(main, [*words, "--json"])
    records = [Record.model_validate(record) for record in json.loads(done.stdout)]
    assert [r.reference.path for r in records] == ["mlx-lm", "mlx-lm", "hf", "hf"]
    assert "adapter matrix --model tiny-gemma3 --path mlx-lm --path hf" in records[1].reproduce
    assert [way(r) for r in records] == [AS_WRITTEN, CONVERTED, CONVERTED, AS_WRITTEN]
