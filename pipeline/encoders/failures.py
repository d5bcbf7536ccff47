"""Error messages for models that cannot be loaded."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import repository

UNLOADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""Exceptions that libraries raise for a model that is missing, of another kind, or damaged."""


def not_loaded(setting: str, place: str, error: Exception, *files: str) -> ConfigError:
    """The error for a model that cannot be loaded; it names the file that is missing, or else quotes ``error``.

    Args:
        setting: the setting and its value.
        place: a repository (``owner/name[@revision]``) or a folder.
        files: the files required from it; ``a|b``: either of the two.
    """
    from huggingface_hub import try_to_load_from_cache

    name, revision = repository(place)
    folder = Path(name)
    if folder.is_dir():
        lacks = [file for file in files if not any((folder / one).is_file() for one in file.split("|"))]
        if lacks:
            return ConfigError(f"{setting}: cannot be loaded: {lacks[0].replace('|', ' or ')} is not in the folder")
    elif _unreachable(error):
        try:
            cached = [[try_to_load_from_cache(name, one, revision=revision) for one in f.split("|")] for f in files]
        except ValueError:  # not a valid repository name
            cached = []
        lacks = [f for f, found in zip(files, cached, strict=False) if not any(isinstance(one, str) for one in found)]
        what = f"{lacks[0].replace('|', ' or ')} of {name} is not" if lacks else f"not all of {name} is"
        return ConfigError(
            f"{setting}: cannot be loaded: the Hugging Face Hub cannot be reached, and {what} in its local cache; "
            "give the path of a folder with the model's files instead, or fetch them beforehand with `hf download`"
        )
    return ConfigError(f"{setting}: cannot be loaded: {' '.join(str(error).split())[:300]}")


def _unreachable(error: BaseException | None) -> bool:
    """Whether ``error`` was caused by an unreachable Hub: no network, or HF_HUB_OFFLINE."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return True
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False
