"""A hub id is looked up before any work: what the hub answers becomes one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

SCRIPT = "import sys; from parity.resources import check_model; check_model(sys.argv[1])"
ANSWERS = {
    "some/unknown": (404, "RepoNotFound", {}),
    "some/gated": (403, "GatedRepo", {}),
    "some/empty": (200, "", {"siblings": [{"rfilename": "README.md"}]}),
    "some/model": (
        200, "", {"siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]},
    ),
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub's interface does."""

    def do_GET(self):
        model = self.path.partition("?")[0].removeprefix("/api/models/")
        status, error, body = ANSWERS[model]
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(json.dumps({"id": model, **body}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "endpoint", "message"),
    [
        ("some/unknown", "", "the hub has no such model"),
        ("some/gated", "", "`hf auth login`"),
        ("some/empty", "", "on the hub it has no config.json"),
        ("some/model", "", ""),
        ("some/model", "http://127.0.0.1:9", "the hub is not reached"),
        ("some/mo..del", "", "no model 'some/mo..del'"),
    ],
)
def test_what_the_hub_answers(model, endpoint, message, hub, tmp_path):
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": endpoint or hub,
        "HF_HOME": str(tmp_path),
    }
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model], env=env, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1] if done.stderr else ""
    assert bool(done.returncode) is bool(message), done.stderr
    assert message in last
    assert not message or last.startswith("parity.errors.UsageError")
