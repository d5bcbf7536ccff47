"""Models on the Hugging Face Hub: whether one can be downloaded, before a library tries each of its files."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import repository
from pipeline.stores import StoreError, require_model

_log = logging.getLogger("pipeline")


def expect_model(setting: str, place: str) -> None:
    """Log that a model will be downloaded, and check that the Hub has it; nothing to do for a folder or a cached model.

    Args:
        setting: The setting and its value, for messages.
        place: A repository (``owner/name[@revision]``) or a folder.

    Raises:
        ConfigError: The Hub does not answer, has no such repository, or does not allow access to it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    name, revision = repository(place)
    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    if constants.HF_HUB_OFFLINE or Path(name).exists() or cached.is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError:  # the libraries say what is wrong with it
        return
    _log.info("%s: downloading %s from the Hub", setting, place)
    try:
        require_model(name, revision, constants.HF_HUB_ETAG_TIMEOUT)
    except StoreError as error:
        reason = error.advice or str(error).removeprefix(f"{name}: ")
        raise ConfigError(
            f"{setting}: cannot be loaded: {place} is not in the local cache, and cannot be downloaded from the Hub: "
            f"{reason}; or give the path of a folder with the model's files"
        ) from None
