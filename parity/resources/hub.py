"""Models of the hub: whether one is in the local cache, or can be downloaded."""

from __future__ import annotations

from pathlib import Path

from parity.errors import UsageError

PATIENCE = 10.0  # seconds that the hub may take to answer


def check(model: str) -> None:
    """Finds a hub id that cannot be had.

    Raises:
        UsageError: It is in no local cache, and the hub does not have it, refuses it or is not reached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    from parity.resources import hold_weights

    try:
        kept = Path(snapshot_download(model, local_files_only=True))
        if hold_weights(file.name for file in kept.iterdir()):
            return
    except HFValidationError as error:
        raise UsageError(f"no model {model!r}: {error}") from None
    except LocalEntryNotFoundError:
        pass
    what = f"model {model!r} is no folder and not in the cache of the hub"
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{what}, and HF_HUB_OFFLINE is set: download it first, or unset it")
    try:
        found = HfApi().model_info(model, timeout=PATIENCE)
    except GatedRepoError:
        raise UsageError(
            f"{what}, and the hub refuses it: ask for access on its page, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{what}, and the hub has no such model, or none that you may see: check the name"
        ) from None
    except Exception as error:  # what a connection may raise depends on the client
        raise UsageError(
            f"{what}, and the hub is not reached: {type(error).__name__}: give a folder instead"
        ) from None
    names = [file.rfilename for file in found.siblings or ()]
    if "config.json" not in names or not hold_weights(names):
        raise UsageError(f"{what}; on the hub it has no config.json with *.safetensors beside it")
