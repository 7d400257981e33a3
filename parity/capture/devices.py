"""Where the torch paths compute: the CPU unless a person says otherwise; never MPS.

Workers inherit the choice as an environment variable, which is part of the key of their captures.
"""

from __future__ import annotations

import os
import subprocess
import sys

from parity.capture import keys as content
from parity.errors import UsageError

DEVICES = ("cpu", "cuda")
DEFAULT = "cpu"
VARIABLE = "PARITY_TORCH_DEVICE"

# In a process of its own: the process that compares imports no framework.
_QUESTION = """
import torch
built = torch.version.cuda or torch.version.hip
print("" if torch.cuda.is_available() else f"torch {torch.__version__} " + (
    "finds no GPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES and the driver" if built
    else "is built without CUDA: install a CUDA build of torch"))
"""


def current() -> str:
    """The device that torch workers started from now on will use."""
    return os.environ.get(VARIABLE) or DEFAULT


def choose(name: str | None) -> None:
    """Sets the device of all torch workers; None keeps what the environment says.

    Raises:
        UsageError: No such device, or not on this machine.
    """
    wanted = name or current()
    setting = f"--device {name}" if name else f"{VARIABLE}={wanted}"
    if wanted not in DEVICES:
        raise UsageError(f"{setting}: torch paths run on {' or '.join(DEVICES)}")
    if wanted == "cuda" and (missing := _without_cuda()):
        raise UsageError(
            f"{setting}: {missing}, or leave the torch paths on the CPU (--device cpu)"
        )
    if wanted == DEFAULT:  # without a variable, so that naming the default gives no other key
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = wanted
    content.of_path.cache_clear()


def _without_cuda() -> str:
    """Why there is no CUDA here, empty where there is."""
    answer = subprocess.run(
        [sys.executable, "-c", _QUESTION], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return f"torch cannot be imported ({answer.stderr.strip().rpartition(chr(10))[2]})"
    return answer.stdout.strip()
