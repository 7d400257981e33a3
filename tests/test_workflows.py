"""The workflow files: valid, safe, pinned, and every `parity` line in them is a command that exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from parity.cli import main
from tests.made_records import record
from tests.test_ci import ROOT, saved

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCS = ROOT / "docs" / "github-actions.md"


def loaded(file: Path):
    # YAML 1.1 reads the key `on` as a boolean.
    return {
        ("on" if key is True else key): value
        for key, value in yaml.safe_load(file.read_text()).items()
    }


def tool(name: str) -> str:
    beside = f"{Path(sys.executable).parent}"
    if not (found := shutil.which(name, path=beside) or shutil.which(name)):
        pytest.skip(f"{name} is not installed")
    return found


def test_the_files_fit_the_schema_of_workflows():
    words = [
        tool("check-jsonschema"),
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, FILES),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_finds_nothing():
    words = [
        tool("zizmor"),
        "--offline",
        "--no-progress",
        "--persona",
        "pedantic",
        *map(str, FILES),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_file_would_be_found(tmp_path):
    """The two tests above can fail."""
    text = FILES[-1].read_text().replace("runs-on:", "runs_on:", 1)
    text = re.sub(r"checkout@[0-9a-f]{40} # v[\d.]+", "checkout@v7", text, count=1)
    file = tmp_path / "broken.yml"
    file.write_text(text)
    schema = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(file)]
    assert subprocess.run(schema, capture_output=True).returncode
    security = [tool("zizmor"), "--offline", "--no-progress", str(file)]
    assert subprocess.run(security, capture_output=True).returncode


def test_every_action_is_pinned_by_commit_and_names_its_release():
    used = [line for file in FILES for line in file.read_text().splitlines() if "uses:" in line]
    assert len(used) > 10
    for line in used:
        outside = re.search(r"uses: [\w-]+/[\w-]+(/[\w-]+)?@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)
        assert outside or "/.github/workflows/" in line, line
    commits = {}
    for name, commit in re.findall(r"uses: ([\w-]+/[\w-]+)[\w/-]*@(\w+)", "\n".join(used)):
        assert commits.setdefault(name, commit) == commit


def test_no_job_may_write():
    for file in FILES:
        flow = loaded(file)
        assert flow["permissions"] == {}, file
        for job in flow["jobs"].values():
            assert set(job["permissions"].items()) <= {("contents", "read")}


def steps(file: Path):
    return [step for job in loaded(file)["jobs"].values() for step in job.get("steps", [])]


def test_every_parity_line_is_a_command():
    """Options that were renamed would be found here, not on a Mac at night."""
    seen = set()
    for text in [step["run"] for file in FILES for step in steps(file) if "run" in step]:
        for line in text.replace("\\\n", " ").splitlines():
            if not (found := re.match(r"\s*(parity .*?)(>>.*)?$", line)):
                continue
            line = found[1].replace("${NEWEST:+--newest}", "--newest")
            context, words = (
                main.make_context("parity", shlex.split(line)[1:], resilient_parsing=True),
                [],
            )
            command, words = main, shlex.split(line)[1:]
            while hasattr(command, "commands"):
                name, *words = words
                seen.add(name)
                command = command.commands[name]
            known = {text for option in command.params for text in option.opts}
            assert {word for word in words if word.startswith("--")} <= known, line
            assert context
    assert {"plan", "shard", "annotate", "moved"} <= seen


def test_the_workflow_of_another_repository_in_the_docs_names_inputs_that_exist():
    called = loaded(ROOT / ".github" / "workflows" / "parity.yml")["on"]["workflow_call"]["inputs"]
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 14
    (job,) = yaml.safe_load(example)["jobs"].values()
    assert set(job["with"]) <= set(called)
    nightly = loaded(ROOT / ".github" / "workflows" / "nightly.yml")["jobs"]["newest"]
    assert set(nightly["with"]) <= set(called)


ONLY = """
import sys
from importlib.abc import MetaPathFinder
allowed = set(sys.argv[1].split(","))
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if path is None and top in {forbidden!r} and top not in allowed:
            raise ImportError(f"{{name}} is not installed where reports are made")
sys.meta_path.insert(0, Refuse())
from parity.cli import main
main(sys.argv[2:], prog_name="parity")
"""


@pytest.mark.parametrize("words", [("ci", "plan", "--harness", str(ROOT), "--out", "OUT"),
                                   ("report", "RUN"), ("ci", "annotate", "RUN"),
                                   ("ci", "moved", "RUN", "RUN")], ids=" ".join)  # fmt: skip
def test_plan_and_report_need_only_what_their_jobs_install(tmp_path, words):
    """The jobs that run on Linux install no framework."""
    light = set(loaded(ROOT / ".github" / "workflows" / "parity.yml")["env"]["LIGHT"].split())
    with_own = light | {"python-dateutil", "pytz", "six", "tzdata", "markupsafe", "pydantic-core",
                        "annotated-types", "typing-extensions", "typing-inspection", "markdown-it-py",
                        "mdurl", "pygments"}  # fmt: skip
    tops = packages_distributions()
    forbidden = {
        top
        for top, names in tops.items()
        if top != "parity" and not any(n.lower().replace("_", "-") in with_own for n in names)
    }
    folder = saved(tmp_path / "run", [record(0, 0), record(6, 0, "diverge")])
    places = {"RUN": str(folder), "OUT": str(tmp_path / "plan")}
    told = [places.get(word, word) for word in words]
    script = ONLY.format(forbidden=forbidden)
    done = subprocess.run([sys.executable, "-c", script, "", *told], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-1500:]
    assert "Traceback" not in done.stderr and done.stdout
