"""How a torch process computes: threads, determinism, mixed precision, float64 throughout."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from typing import Any

from parity.paths.hf.live import device
from parity.recipe import Recipe

MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
)
"""What every path on torch uses."""


def prepare() -> None:
    """One thread, full float32, and the same bits run after run; imports transformers and PEFT.

    1 and 2 threads differ by 2e-6 in a loss. TF32 keeps 10 bits of a float32's mantissa, and sums in
    half precision lose as many: on CUDA both are switched off.

    Raises:
        RuntimeError: CUDA is wanted and there is none; torch itself would raise much later.
    """
    import torch

    if device().type == "cuda":
        # Read when cuBLAS starts; without the first one its sums may come in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Paths are held against what these are before any of them has run.
    for module in MODULES:
        importlib.import_module(module)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def describe_torch() -> dict[str, Any]:
    """Device, threads and the BLAS that torch was built with, which may be linked statically."""
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    cuda = device().type == "cuda"
    named = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if cuda else {}
    return {
        "device": str(device()),
        **named,
        "torch_threads": torch.get_num_threads(),
        "torch_blas": blas[1] if blas else None,
        "torch_float32_matmul": torch.get_float32_matmul_precision(),
    }


def autocast(recipe: Recipe) -> Any:
    """Mixed precision, or nothing of the kind."""
    import torch

    dtype, kind = recipe.train.autocast, device().type
    return contextlib.nullcontext() if dtype == "none" else torch.autocast(kind, torch.bfloat16)


def float64_throughout(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Makes a float64 run one of float64 everywhere; other dtypes are left alone.

    transformers casts norms, softmax, rotary embedding and the logits of its loss to float32 by
    name, whatever the dtype of the model: after that a float64 run is no more right than a float32
    run. Here every such cast becomes one to float64, so that the real functions stay in use.
    """
    if dtype != "float64":
        return contextlib.nullcontext()
    import torch
    from torch.overrides import TorchFunctionMode

    def raised(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Float64(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            named = {name: raised(value) for name, value in (kwargs or {}).items()}
            return func(*map(raised, args), **named)

    return Float64()
