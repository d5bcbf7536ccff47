"""Addresses in object stores and in dataset repositories of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.schema import ConfigError, public_text

SCHEMES = ("s3", "gs", "az", "hf")
HUB = "hf://datasets/"
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+([^/?#]+)/*([^?#]*)")  # a conversion to Path removes one slash
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/@]+|[^/@]+))?(?:/+(.*))?", re.DOTALL)


def is_url(place: str | Path) -> bool:
    """Whether ``place`` is in an object store, or on the Hub."""
    return _URL.match(str(place)) is not None


def is_hub(place: str | Path) -> bool:
    """Whether ``place`` is on the Hub, which can only be read."""
    return is_url(place) and str(place).startswith("hf:")


def canonical(place: str | Path) -> str:
    """``place`` as ``scheme://bucket/prefix`` without a trailing slash, even if it was converted to a :class:`Path`.

    Raises:
        ConfigError: ``place`` is not an address in an object store.
    """
    match = _URL.fullmatch(str(place))
    shapes = [f"{scheme}://bucket/prefix" for scheme in SCHEMES if scheme != "hf"]
    if match is None:
        expected = f"{', '.join(shapes)}, {HUB}owner/name/prefix"
        raise ConfigError(f"{public_text(str(place))}: expected {expected}")
    if "@" in match[2]:
        raise ConfigError(
            f"{public_text(str(place))}: an address holds no credentials: set them in the environment (AWS_*, "
            "GOOGLE_*, AZURE_*, HF_TOKEN) or in the files of the store's own tools"
        )
    if match[1] == "hf" and (match[2] != "datasets" or not _REPOSITORY.fullmatch(match[3].strip("/"))):
        raise ConfigError(
            f"{public_text(str(place))}: expected {HUB}owner/name/prefix or {HUB}owner/name@revision/prefix"
        )
    return f"{match[1]}://{match[2]}/{match[3].strip('/')}".rstrip("/")


def split(address: str) -> tuple[str, str]:
    """The bucket (on the Hub: the repository and its revision) of a canonical address, and the path in it."""
    scheme, _, rest = address.partition("://")
    if scheme == "hf":
        match = _REPOSITORY.fullmatch(rest.removeprefix("datasets/"))
        assert match is not None
        return f"{HUB}{match[1]}{f'@{match[2]}' if match[2] else ''}", match[3] or ""
    bucket, _, path = rest.partition("/")
    return f"{scheme}://{bucket}", path


def repository(root: str) -> tuple[str, str]:
    """``owner/name`` and the revision (empty if none is named) in the first part that :func:`split` returns."""
    name, _, revision = root.removeprefix(HUB).partition("@")
    return name, revision


def pinned(address: str, commits: Mapping[str, str]) -> str:
    """``address`` on the Hub at the commit that ``commits`` has for its repository; other addresses unchanged."""
    if not is_hub(address):
        return address
    root, path = split(canonical(address))
    if root not in commits:
        return address
    return f"{HUB}{repository(root)[0]}@{commits[root]}/{path}"


def is_pattern(address: str) -> bool:
    """Whether an address is a pattern that may match several objects."""
    return is_url(address) and (address.endswith("/") or "*" in address or "?" in address)
