"""Bundles: one side captured here, held against the other there; records as if both had run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cost import long

COMMAND = [sys.executable, "-m", "parity.cli"]
SMALL = ["--seeds", "3407,", "--set", "train.steps=4"]
PROBES = ["--probes", "01,02,05"]
TRAINED = ["--probes", "00,07"]
FRAMEWORKS = ("torch", "transformers", "peft", "trl", "mlx", "mlx_lm")
ROOT = Path(__file__).parents[1]

# As if they were not installed, in this process and in all that it starts.
HIDING = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {names!r}
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def parity(*words, env=None):
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=900, env=env,
    )  # fmt: skip


def without(folder, *names, **more):
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDING.replace("{names!r}", repr(names)))
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", **more}
    for name in names:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], env=env, check=False,
                              capture_output=True, text=True)  # fmt: skip
        assert "ModuleNotFoundError" in done.stderr
    return env


def records(folder):
    """Records without environment, times, and the lines that say where something lies."""
    found = {}
    for file in (folder / "records").glob("*.json"):
        record = json.loads(file.read_text())
        for passing in ("seconds", "reproduce", "artifacts", "git", "digest"):
            record.pop(passing)
        for side in ("subject", "reference"):
            assert record[side].pop("environment") or record["verdict"] in ("skip", "error")
        found[file.name] = record
    assert found
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, engine):
    """A bundle of hf, one of mlx against it, and a run of both as it would be without bundles."""
    folder = tmp_path_factory.mktemp("bundles")
    done = parity("capture", "hf", *PROBES, *SMALL, "--out", folder / "hf.bundle")
    assert done.returncode == 0, done.stderr
    done = parity("run", "--reference", "hf", *PROBES, *SMALL, "--out", folder / "live")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_subject_is_judged_without_torch_as_if_both_had_run(made, tmp_path):
    env, reference = without(tmp_path / "hidden", "torch"), made / "hf.bundle"
    words = ["--reference", reference, *PROBES, *SMALL]
    done = parity("run", *words, "--out", tmp_path / "run", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(tmp_path / "run") == records(made / "live")


@pytest.mark.long
def test_training_and_settings_are_judged_as_if_both_had_run(tmp_path):
    done = parity("capture", "hf", *TRAINED, *SMALL, "--out", tmp_path / "hf.bundle")
    assert done.returncode == 0, done.stderr
    for reference, out in (("hf", "live"), (tmp_path / "hf.bundle", "judged")):
        words = ["--reference", reference, *TRAINED, *SMALL, "--out", tmp_path / out]
        assert parity("run", *words).returncode == 0
    assert records(tmp_path / "judged") == records(tmp_path / "live")


def test_two_bundles_are_judged_with_neither_framework_nor_model(made, tmp_path):
    words = ["--reference", made / "hf.bundle", *PROBES, *SMALL]
    done = parity("capture", "mlx", *words, "--out", tmp_path / "mlx.bundle",
                  env=without(tmp_path / "hidden", "torch"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    env = without(tmp_path / "bare", *FRAMEWORKS, PARITY_CACHE=str(tmp_path / "cache"))
    words = ["--subject", tmp_path / "mlx.bundle", *words]
    done = parity("run", *words, "--out", tmp_path / "run", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(tmp_path / "run") == records(made / "live")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--probes", "02", "--seeds", "5000,"],
            "no capture of tokenization for seed 5000: made for seeds 3407",
        ),
        long(["--probes", "06"], "no capture of optimizer_step: made for probes 01, 02, 05"),
        (
            ["--set", "lora.rank=4", "--probes", "05"],
            "for lora.rank=4, lora.scale=4.0: made for lora.rank=8",
        ),
    ],
)
def test_what_a_bundle_lacks_is_named_and_not_green(made, tmp_path, words, says):
    wanted = [*SMALL, *words]
    done = parity("run", "--reference", made / "hf.bundle", *wanted, "--out", tmp_path / "run")
    assert done.returncode == 3, done.stdout + done.stderr
    [record] = records(tmp_path / "run").values()
    assert record["verdict"] == "error"
    assert says in record["reason"], record["reason"]


@pytest.mark.long
def test_a_module_is_looked_for_where_the_bundle_has_modules_and_else_it_is_said(made, tmp_path):
    rounded = ["--set-subject", "model.weights=bfloat16", "--probes", "02", *SMALL]
    run = ["run", *rounded, "--reference"]
    assert parity(*run, made / "hf.bundle", "--out", tmp_path / "a").returncode == 1
    [record] = records(tmp_path / "a").values()
    assert any("make it with --modules" in finding for finding in record["findings"])
    full = tmp_path / "full.bundle"
    words = ["capture", "hf", "--modules", "--probes", "02", *SMALL, "--out", full]
    assert parity(*words).returncode == 0
    assert parity(*run, full, "--out", tmp_path / "b").returncode == 1
    assert parity(*run, "hf", "--out", tmp_path / "c").returncode == 1
    assert records(tmp_path / "b") == records(tmp_path / "c")


@pytest.mark.long
def test_a_skip_travels_with_its_reason(tmp_path, engine):
    path, file = "tests.third_party:NumpyAdamW", tmp_path / "numpy.bundle"
    wanted = ["--probes", "02,06", *SMALL]
    assert parity("capture", path, *wanted, "--out", file).returncode == 0
    for reference, out in ((path, "live"), (file, "judged")):
        parity("run", "--reference", reference, *wanted, "--out", tmp_path / out)
    assert records(tmp_path / "live") == records(tmp_path / "judged")
    verdicts = {
        record["probe"]: record["verdict"] for record in records(tmp_path / "live").values()
    }
    assert verdicts == {2: "skip", 6: "agree"}


@pytest.mark.long
def test_bits_are_expected_of_one_framework_only_in_one_environment(tmp_path, engine):
    file, wanted = tmp_path / "cli.bundle", ["--probes", "06", *SMALL]
    assert parity("capture", "mlx-lm", *wanted, "--out", file).returncode == 0
    done = parity("run", "--reference", file, *wanted, "--out", tmp_path / "here")
    assert done.returncode == 0, done.stdout
    [record] = records(tmp_path / "here").values()
    assert (record["verdict"], record["expectation"]) == ("identical", "identical")

    def elsewhere(manifest):
        manifest["environment"]["device"] = "Device(gpu, 0)"

    rewritten(file, elsewhere)
    parity("run", "--reference", file, *wanted, "--out", tmp_path / "there")
    [record] = records(tmp_path / "there").values()
    assert record["expectation"] == "noise floor"
    assert any("device: Device(gpu, 0)" in finding for finding in record["findings"])


def rewritten(file, change):
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def newer(file):
    rewritten(file, lambda manifest: manifest.update(schema=99))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def foreign(file):
    file.write_text("no zip")


def other_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")


def other_model(file):
    rewritten(file, lambda manifest: manifest["content"].update({"model.source": "0" * 16}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (newer, "bundle schema 99 is newer than this tool's 1: upgrade mlx-parity"),
        (cut, "not a bundle of `parity capture`, or cut short"),
        (foreign, "not a bundle of `parity capture`, or cut short"),
        (other_zip, "not a bundle of `parity capture`, or cut short"),
        (Path.unlink, "no bundle at"),
        (other_model, "model.source=tiny-gemma3: its files are not those"),
    ],
)
def test_what_is_no_bundle_is_one_line_with_exit_code_2(made, tmp_path, harm, says):
    file = tmp_path / "x.bundle"
    file.write_bytes((made / "hf.bundle").read_bytes())
    harm(file)
    done = parity("run", "--reference", file, *PROBES, *SMALL, "--out", tmp_path / "run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_damaged_capture_is_an_error_of_its_cell(tmp_path, empty_cache):
    path, file = "tests.third_party:NumpyAdamW", tmp_path / "x.bundle"
    env = {**os.environ, "PARITY_CACHE": str(empty_cache)}
    wanted = ["--probes", "06", *SMALL]
    assert parity("capture", path, *wanted, "--out", file, env=env).returncode == 0
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if m.filename != "manifest.json"]
    data = bytearray(file.read_bytes())
    for member in members:
        at = member.header_offset + member.compress_size // 2
        data[at : at + 64] = bytes(64)
    file.write_bytes(data)
    words = ["run", "--subject", path, "--reference", file, *wanted]
    done = parity(*words, "--out", tmp_path / "run", env=env)
    assert done.returncode == 3, done.stdout + done.stderr
    [record] = records(tmp_path / "run").values()
    assert "is damaged" in record["reason"]


def test_a_side_is_captured_for_its_role(made, tmp_path):
    file = made / "hf.bundle"
    done = parity("run", "--subject", file, "--reference", "mlx")
    assert done.returncode == 2
    assert "was captured as a reference" in done.stderr
    subject = tmp_path / "numpy.bundle"
    words = ["tests.third_party:NumpyAdamW", "--reference", file, "--probes", "01", *SMALL]
    assert parity("capture", *words, "--out", subject).returncode == 0
    done = parity("run", "--reference", subject)
    assert done.returncode == 2
    assert "was captured as a subject against hf" in done.stderr


@pytest.mark.parametrize(("path", "framework"), [("hf", "torch"), long("mlx", "mlx")])
def test_a_path_without_its_framework_is_one_line(tmp_path, path, framework):
    env = without(tmp_path / "hidden", framework)
    for words in (["capture", path, "--out", "x.bundle"], ["run", "--subject", path]):
        done = parity(*words, env=env)
        assert done.returncode == 2
        assert f"path '{path}' needs {framework}, not installed here" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_bundle_is_not_searched(made):
    done = parity("bisect", "--reference", made / "hf.bundle")
    assert done.returncode == 2
    assert "give paths" in done.stderr


def test_two_bundles_are_compared_for_what_both_were_made_for(made, tmp_path):
    """The recipe, which is not the default one, comes from the bundles."""
    words = ["--reference", made / "hf.bundle", "--probes", "01,02,03", *SMALL]
    done = parity("capture", "mlx", *words, "--out", tmp_path / "mlx.bundle")
    assert done.returncode in (0, 3), done.stderr
    done = parity("compare", tmp_path / "mlx.bundle", made / "hf.bundle", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mlx.bundle alone has probes 3" in done.stderr
    assert "hf.bundle alone has probes 5" in done.stderr
    live = records(made / "live")
    assert records(tmp_path / "run") == {n: r for n, r in live.items() if r["probe"] in (1, 2)}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing", "nothing"], "does not exist"),
        ([__file__, __file__], "give a bundle of `parity capture`"),
    ],
)
def test_what_is_no_bundle_is_not_compared(words, says):
    done = parity("compare", *words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
