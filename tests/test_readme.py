"""Commands in the README and in help exist, with the options that are written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from parity.cli import main
from parity.recipe import factor_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    helps = [CliRunner().invoke(main, [*name, "--help"]).output for name in ([], *NAMED)]
    text = "\n".join([README, *helps]).replace("\\\n", "")
    found = re.findall(r"^ *`?(parity \w[^\n`]*)", text, re.MULTILINE)
    return list(dict.fromkeys(re.split(r"  +|\s#", line)[0].strip() for line in found))


NAMED = [
    [name, *more]
    for name, command in main.commands.items()
    for more in [[], *([inner] for inner in getattr(command, "commands", ()))]
]


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_written_down_can_be_typed(line):
    _, name, *words = shlex.split(line)
    command = main.commands[name]
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    context = click.Context(command, info_name=name, resilient_parsing=True)
    values, rest, _ = command.make_parser(context).parse_args(words)
    assert not rest
    given = {param.name for param in command.params} & values.keys()
    assert given or not words
    for key, settings in values.items():
        if key in ("settings", "set_subject", "set_reference") and settings:
            for setting in settings:
                factor = setting.partition("=")[0]
                assert factor in factor_names() or factor.startswith("unsloth."), factor


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:reports|fixtures|probes|benchmarks|\.github)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_what_is_run_at_night_alone_is_long():
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    names = re.findall(
        r"`(test_\w+\.py)`", table.partition("| file | behaviour |")[2].partition("\n\n")[0]
    )
    assert len(names) > 30
    for name in names:
        assert re.search(r"mark\.long|\blong\(", (ROOT / "tests" / name).read_text("utf-8")), name
