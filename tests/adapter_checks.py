"""`parity adapter check` as it is typed."""

from __future__ import annotations

import contextlib
import importlib.util
import json

import pytest
from click.testing import CliRunner

from parity.adapters import check as adapters
from parity.cli import main
from tests.adapter_writers import MODEL


def run(folder, *words):
    """Exit code and output; no exception but the exit itself."""
    words = ["adapter", "check", str(folder), "--files-only", *map(str, words)]
    done = CliRunner().invoke(main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert "Traceback" not in done.output
    if done.exit_code == 2:
        assert done.stderr.startswith("parity: ") and done.stderr.count("\n") == 1, done.stderr
        assert not done.stdout
    else:
        assert done.exit_code in (0, 1)
        assert done.stdout
    return done.exit_code, done.output


def loaded(engine, folder, loader=None):
    """With a real loader, on the workers that all tests share."""
    result = adapters.check(folder, MODEL, None, loader, lambda: contextlib.nullcontext(engine))
    return result.as_dict()


def check(folder, *words, base=MODEL, files_only=True):
    words = [str(folder), *words]
    words += ["--base", base] if base else []
    words += ["--files-only"] if files_only else []
    done = CliRunner().invoke(main, ["adapter", "check", *map(str, words), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    if done.exit_code == 2:
        return 2, done.stderr
    return done.exit_code, json.loads(done.stdout)


def findings(result):
    return [finding for outcome in result["checks"] for finding in outcome["findings"]]


def needs(writer):
    if writer.startswith("unsloth") and importlib.util.find_spec("unsloth_zoo") is None:
        pytest.skip("needs unsloth-zoo")


def assert_found(folder, name, words):
    """A check, by its name, says so of an adapter that has a fault."""
    code, result = check(folder)
    assert code == 1, result
    lines = [f"{f['where']}: {f['text']}" for f in findings(result) if f["check"] == name]
    assert any(words in line for line in lines), findings(result)
