"""Known divergences: what they cover, what is left over, and that an entry cannot outlive its cause."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from parity import cli, resources
from parity.errors import UsageError
from parity.record import Metric, Record, Side, Verdict
from parity.report import html, markdown, terminal
from parity.report.text import describe
from parity.results.aggregate import aggregate
from parity.results.expected import chosen, keep, load, mark
from parity.results.folder import read

ENTRY = {
    "probe": "gradient",
    "reason": "sums in float32",
    "deterministic": True,
    "at_most": 10,
}


def record(
    *diverging: str, verdict="diverge", probe=5, seed=0, versions=None, reference="hf", **metric
):
    """A record of the tiny model in which these metrics diverge and one agrees."""
    sides = {
        "subject": Side(path="mlx", recipe={}, digest="0",
                        environment={"versions": versions or {"mlx-lm": "0.32.2"}}),
        "reference": Side(path=reference, recipe={}, digest="0",
                          environment={"versions": {"torch": "2.13.0+cpu"}}),
    }  # fmt: skip
    metrics = [
        Metric(**{"name": name, "verdict": word, "value": 1, "tolerance": 0,
                  "minimum_required_tolerance": 1} | more)
        for name, word, more in [("loss", Verdict.AGREE, {"tolerance": 1}),
                                 *((name, Verdict.DIVERGE, metric) for name in diverging)]
    ]  # fmt: skip
    if verdict == "diverge" and not diverging:
        metrics = []
    return Record(tool="0", probe=probe, stage="gradient", model="tiny-gemma3", seed=seed,
                  verdict=Verdict(verdict), reason="it differs", metrics=metrics, **sides)  # fmt: skip


def known(folder, *entries, name="mlx-vs-hf.toml"):
    """The entries as read from a file."""
    lines = []
    for entry in entries:
        lines.append("[[entry]]")
        for key, value in {**ENTRY, **entry}.items():
            table = isinstance(value, dict)
            inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if table else ""
            lines.append(f"{key} = {{ {inline} }}" if table else f"{key} = {json.dumps(value)}")
    file = folder / name
    file.write_text("\n".join(lines))
    return load(file)


def put_together(records, entries):
    return aggregate([mark(r, entries) for r in records], None, entries)


# What an entry covers


@pytest.mark.parametrize(
    ("entry", "covered"),
    [
        ({}, True),
        ({"probe": 5}, True),
        ({"probe": "05", "model": "tiny-gemma3", "metric": "gradient*"}, True),
        ({"metric": "gradient, B = 0"}, False),  # B ≠ 0 is left over
        ({"metric": "Gradient*"}, False),
        ({"probe": 6}, False),
        ({"model": "tiny-llama"}, False),
        ({"versions": {"mlx-lm": "<0.33"}}, True),
        ({"versions": {"mlx-lm": "<0.33", "torch": ">=2.13,<3"}}, True),
        ({"versions": {"mlx-lm": "<0.32"}}, False),
        ({"versions": {"mlx-lm": "<0.33", "torch": "<2"}}, False),
        ({"versions": {"unsloth-zoo": ">0"}}, False),  # no side runs it
    ],
)
def test_all_diverging_metrics_must_be_covered(tmp_path, entry, covered):
    entries = known(tmp_path, {**entry, "link": "https://example.org/1"})
    found = mark(record("gradient, B = 0", "gradient, B ≠ 0"), entries)
    assert found.expected == ("sums in float32 (https://example.org/1)" if covered else "")
    assert found.verdict is Verdict.DIVERGE


def test_entries_cover_together_and_each_is_told(tmp_path):
    both = known(
        tmp_path, {"metric": "* = 0", "reason": "one"}, {"metric": "* ≠ 0", "reason": "two"}
    )
    assert mark(record("B = 0", "B ≠ 0"), both).expected == "one; two"
    assert mark(record("B = 0"), both).expected == "one"


def test_what_does_not_gate_needs_no_entry_and_what_is_inconclusive_is_not_known(tmp_path):
    entries = known(tmp_path, {"metric": "a"}, {"metric": "b"})
    found = record("a", "b")
    found.metrics[-1].gate = False
    assert mark(found, entries).expected
    found.metrics[-1].gate, found.metrics[-1].verdict = True, Verdict.INCONCLUSIVE
    assert not mark(found, entries).expected


def test_names_that_do_not_match_are_covered_by_an_entry_for_every_metric_only(tmp_path):
    bare = record()
    assert not mark(bare, known(tmp_path, {"metric": "gradient*"})).expected
    assert mark(bare, known(tmp_path, {})).expected


@pytest.mark.parametrize("verdict", ["error", "inconclusive", "skip"])
def test_only_a_divergence_is_expected(tmp_path, verdict):
    assert not mark(record("a", verdict=verdict), known(tmp_path, {})).expected


def test_the_name_of_a_file_says_its_pair(tmp_path):
    for name, covered in (("mlx-vs-hf", True), ("mlx-vs-mlx-lm", False), ("mine", True)):
        entries = known(tmp_path, {}, name=f"{name}.toml")
        assert bool(mark(record("a"), entries).expected) is covered, name


def test_an_entry_does_not_cover_what_is_further_off(tmp_path):
    entries = known(tmp_path, {"at_most": 50})
    for value, covered in ((40e-6, True), (60e-6, False)):
        near = record("a", value=value, floor=1e-6)  # 40 and 60 floors
        assert bool(mark(near, entries).expected) is covered
    # Without a floor, as of ids, the value itself counts.
    assert mark(record("a", value=50), entries).expected
    assert not mark(record("a", value=51), entries).expected
    assert not mark(record("a", value=float("nan")), entries).expected
    # Of several the one that is covered does not excuse the other.
    both = known(tmp_path, {"metric": "a", "at_most": 2}, {"metric": "b", "at_most": 0.5})
    assert not mark(record("a", "b"), both).expected


def test_an_entry_that_need_not_show_is_stale_in_the_seeds_it_was_seen_with(tmp_path):
    entries = known(tmp_path, {"deterministic": False, "seeds": [3]})
    for model in ("tiny-gemma3", "smollm2-135m", "my-model"):
        green = record(verdict="agree", seed=3).model_copy(update={"model": model})
        assert "no longer diverges" in mark(green, entries).expected
        assert put_together([green], entries).verdict == "stale"
    assert not mark(record(verdict="agree", seed=4), entries).expected


# What a run makes of it


def test_an_expected_divergence_is_a_state_of_its_own_and_not_red(tmp_path):
    entries = known(tmp_path, {"link": "https://example.org/1"})
    found = put_together([record("a"), record(verdict="agree", probe=2)], entries)
    assert (found.verdict, found.exit_code, found.problems) == ("expected", 0, ())
    assert found.counts == {"agree": 1, "expected": 1}
    assert not found.failures() and not found.first
    row = found.rows.set_index("probe").loc[5]
    assert (row["expected"], row["diverge"], row["pass_rate"]) == (1, 0, 0.0)
    for text in (markdown.render(found), html.render(found), screen(found)):
        for words in ("Expected to diverge", "sums in float32", "x expected"):
            assert words in text, words
    assert "\n| 05 gradient | x |" in markdown.render(found)
    assert '<td class="expected">' in html.render(found)


def screen(found):
    file = io.StringIO()
    terminal.render(found, Console(file=file, width=200))
    return file.getvalue()


def test_one_metric_left_over_stays_red(tmp_path):
    entries = known(tmp_path, {"metric": "a"})
    found = put_together([record("a", "b")], entries)
    assert (found.verdict, found.exit_code) == ("diverge", 1)
    assert "matched no record" in found.problems[0]


def test_of_two_records_of_a_cell_the_unexpected_one_counts(tmp_path):
    entries = known(tmp_path, {"metric": "a"})
    for records in ([record("a"), record("a", "b")], [record("a", "b"), record("a")]):
        assert put_together(records, entries).exit_code == 1


def test_a_deterministic_entry_whose_cell_is_green_is_red_until_it_is_removed(tmp_path):
    entries = known(tmp_path, {})
    records = [record("a"), record(verdict="agree", seed=1)]
    found = put_together(records, entries)
    assert (found.verdict, found.exit_code) == ("stale", 1)
    assert found.counts == {"expected": 1, "stale": 1}
    says = f"no longer diverges: remove entry 1 from {tmp_path / 'mlx-vs-hf.toml'}"
    (first,) = found.first
    assert says in first.reason and first.seeds == (1,)
    for text in (html.render(found), screen(found), describe(found.failures()[0])):
        assert says in text
    assert put_together(records[1:], []).exit_code == 0
    # In versions or on models it does not speak of, it is not stale.
    for entry in ({"versions": {"mlx-lm": "<0.30"}}, {"model": "tiny-llama"}, {"probe": 2}):
        assert put_together(records[1:], known(tmp_path, entry)).exit_code == 0


def test_an_entry_that_need_not_show_may_be_green(tmp_path):
    entries = known(tmp_path, {"deterministic": False, "seeds": [9]})
    found = put_together([record("a"), record(verdict="agree", seed=1)], entries)
    assert (found.exit_code, found.problems) == (0, ())


def test_an_entry_that_matched_no_record_is_warned_about(tmp_path):
    entries = known(
        tmp_path,
        {"deterministic": False, "seeds": [9]},
        {"versions": {"mlx-lm": "<0.30"}},
        {"model": "tiny-gema3"},  # a typing error
        {"probe": 6},  # not run
        {"model": "smollm2-135m"},  # not run
    )
    found = put_together([record(verdict="agree")], entries)
    assert found.exit_code == 0
    numbers = [text.partition("entry ")[2][0] for text in found.problems]
    assert numbers == ["1", "2", "3"]
    for text in (markdown.render(found), html.render(found), screen(found)):
        assert "matched no record" in text
    other = known(tmp_path, {}, name="mlx-vs-unsloth.toml")  # of a pair that was not run
    assert "matched no record" in put_together([record(verdict="agree")], other).problems[0]


# Files


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"probe": 55}, "entry 1: probe: unknown probe '55'"),
        ({"versions": {"mlx-lm": "<<0.33"}}, "entry 1: versions: mlx-lm: Invalid specifier: '<<0.33'"),
        ({"reason": ""}, "entry 1: reason: String should have at least 1 character, got ''"),
        ({"deterministic": "yes"}, "entry 1: deterministic: Input should be a valid boolean, got 'yes'"),
        ({"at_most": 0}, "entry 1: at_most: Input should be greater than 0, got 0"),
        ({"deterministic": False}, "an entry that is not deterministic needs the seeds"),
        ({"metrik": "a"}, "entry 1: metrik: Extra inputs are not permitted, got 'a'"),
    ],
)  # fmt: skip
def test_an_entry_that_is_wrong_is_named_with_file_and_value(tmp_path, entry, says):
    with pytest.raises(UsageError) as error:
        known(tmp_path, entry)
    assert says in str(error.value) and str(tmp_path / "mlx-vs-hf.toml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "entry = 1", "[[entri]]", "[[entry]]", "=", "[[entry]]\nprobe"]
)
def test_what_is_no_file_of_entries_is_refused(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UsageError, match=r"x\.toml"):
        load(tmp_path / "x.toml")


def test_every_file_that_is_shipped_can_be_read():
    files = sorted((resources.fixtures() / "expected").glob("*.toml"))
    assert all(load(file) for file in files)
    assert [k.file for k in chosen("mlx", ["mlx-lm", "hf"], None, False)] == [
        file for file in files if file.stem in ("mlx-vs-mlx-lm", "mlx-vs-hf") for _ in load(file)
    ]
    assert chosen("mlx", ["hf"], None, True) == []


def test_a_run_keeps_its_files(tmp_path):
    entries = known(tmp_path, {})
    for shard in ("a", "b"):
        keep(entries, tmp_path / "run" / shard)
    record().save(tmp_path / "run" / "records")
    run, _ = read([tmp_path / "run"])
    assert [(str(k.file), k.entry) for k in run.known] == [("mlx-vs-hf.toml", entries[0].entry)]


# The command and the plugin


def test_the_command_marks_and_names(tmp_path, engine, capsys):
    file = tmp_path / "mine.toml"
    entry = '[[entry]]\nprobe = "lora_init"\nmetric = "{}"\nreason = "why"\nat_most = 10\ndeterministic = true\n'
    words = ["run", "--reference", "mlx-lm", "--seeds", "3407,", "--probes", "4"]
    fault = ["--set-subject", "lora.scale=4.0"]

    def run(out, *more):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--out", str(tmp_path / out), *more])
        return ended.value.code, capsys.readouterr().out

    file.write_text(entry.format("LoRA scale"))
    code, shown = run("a", "--expected", str(file), *fault)
    assert code == 0 and "PARITY expected" in shown and "why" in shown
    data = json.loads(next((tmp_path / "a" / "records").glob("*.json")).read_text())
    assert (data["verdict"], data["expected"]) == ("diverge", "why")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path / "a")])
    assert ended.value.code == 0
    assert run("b", *fault)[0] == 1
    code, shown = run("c", "--expected", str(file))
    assert code == 1 and f"remove entry 1 from {file}" in " ".join(shown.split())
    assert run("d", "--expected", str(file), "--no-expected")[0] == 2


def test_the_plugin_expects_strictly(tmp_path, engine):
    import subprocess
    import sys

    file = tmp_path / "mine.toml"
    file.write_text('[[entry]]\nprobe = 4\nreason = "why"\nat_most = 10\ndeterministic = true\n')
    words = ["probes/probe_04_lora_init.py", "-q", "--reference", "mlx-lm", "--seeds", "3407,",
             "--parity-out", str(tmp_path / "out"), "-rxf"]  # fmt: skip

    def shown(*more):
        command = [sys.executable, "-m", "pytest", *words, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    expected = ["--expected", str(file)]
    fault = ["--subject-factor", "lora.scale=4.0"]
    assert "1 xfailed" in (said := shown(*expected, *fault)) and "why" in said
    assert "1 failed" in (said := shown(*expected)) and "no longer diverges" in said
    assert "1 failed" in shown(*fault)
    assert "1 passed" in shown()
