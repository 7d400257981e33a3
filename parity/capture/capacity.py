"""How much may run at once: processors, free memory, and whether a GPU does the work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from parity import resources
from parity.capture import devices
from parity.recipe import Recipe

MOST = (
    32  # processes whose captures one process can compare: about 0.1 s for each few seconds of work
)
WARM = (
    5  # processes that stay alive where memory allows it, so that no path waits for imports again
)
PROCESS = (
    700_000_000  # bytes of a process with a framework and a tiny model: torch 0.6 GB, MLX 0.3 GB
)
ON_GPU = 2_000_000_000  # bytes of a GPU's memory of a process with a tiny model, half of them its context
COPIES = 4  # of a model's float32 weights that a process may hold: float64 counts twice
GROUPS = Path("/sys/fs/cgroup")


class Capacity(NamedTuple):
    """What a machine has for this command."""

    cores: int
    memory: int
    """Bytes that are free."""
    gpu: frozenset[str] = frozenset()
    """Frameworks that compute on the GPU."""
    gpu_memory: int = 0
    """Bytes that are free there."""


class Jobs(NamedTuple):
    """What runs at once: `busy` worker processes compute, `alive` hold memory.

    Of the frameworks in `gpu` at most `on_gpu` compute at a time: they share its memory.
    """

    busy: int
    alive: int
    gpu: frozenset[str] = frozenset()
    on_gpu: int = 1

    def __str__(self) -> str:
        """In words."""
        processes = f"{self.busy} process{'es' if self.busy > 1 else ''} at once"
        share = f", {self.on_gpu} on the GPU ({', '.join(sorted(self.gpu))})"
        return processes + (share if self.gpu else "")


def here() -> Capacity:
    """What this machine has now."""
    import psutil

    free = int(min([psutil.virtual_memory().available, *_limits("memory.max")]))
    gpu = frozenset(_on_gpu())
    # A Mac's GPU has the memory of the machine, which the other processes need as well.
    return Capacity(cores(), free, gpu, (_gpu_memory() or free // 2) if gpu else 0)


def jobs(capacity: Capacity, wanted: int = 0, weights: int = 0) -> Jobs:
    """How many processes to run at once.

    Args:
        capacity: Of this machine.
        wanted: Processes that a person wants to compute at once; 0: as many as there are cores and
            memory for.
        weights: Bytes of the model's weights in float32.
    """
    fit = max(1, capacity.memory // (PROCESS + COPIES * weights))
    busy = wanted or max(1, min(capacity.cores, fit, MOST))
    alive = max(busy, min(fit, max(WARM, busy + 1)))
    there = capacity.gpu_memory // (ON_GPU + COPIES * weights)
    return Jobs(busy, alive, capacity.gpu, wanted or max(1, min(busy, there)))


def of_recipe(recipe: Recipe, wanted: int = 0) -> Jobs:
    """The same for what is to be run here."""
    return jobs(here(), wanted, weights(recipe.model.source))


def cores() -> int:
    """Processors that this process may use."""
    available = os.cpu_count() or 1
    if sys.platform == "linux":
        available = len(os.sched_getaffinity(0))
    return max(1, int(min([available, *_limits("cpu.max")])))


def weights(model: str) -> int:
    """Bytes of a model's weights in float32, by the size of its files; 0 where it is not on this disk."""
    folder = Path(resources.model_dir(model))
    if not folder.is_dir():
        return 0
    files = [file for end in ("safetensors", "bin", "gguf") for file in folder.glob(f"*.{end}")]
    # Files hold mostly 2 bytes a number, or less.
    return 2 * sum(file.stat().st_size for file in files)


def _limits(name: str) -> Iterator[float]:
    """What control groups (version 2) allow: bytes, or processors; a container's are seen as the root."""
    group = Path()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = Path(next(line[3:] for line in lines if line.startswith("0::")).lstrip("/"))
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):
            limit, *period = (GROUPS / folder / name).read_text().split()
            yield float(limit) / float(period[0] if period else 1)  # `max` is no number


def _on_gpu() -> Iterator[str]:
    """Known without importing a framework: MLX takes the GPU wherever its build has one."""
    if sys.platform == "darwin" or any(map(_installed, ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"))):
        yield "mlx"
    if devices.current() != devices.DEFAULT:
        yield "torch"


def _gpu_memory() -> int:
    """Bytes that are free on the first NVIDIA GPU; 0 where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return int(answer.stdout.split()[0]) * 2**20
    return 0


def _installed(package: str) -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(distribution(package))
    return False
