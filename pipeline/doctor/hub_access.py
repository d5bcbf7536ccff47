"""Checks that models are in the cache, or that this node can reach the Hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.doctor.finding import Finding

_HOST = "huggingface.co"
_SECONDS = 5.0


def look(models: Sequence[str]) -> Iterator[Finding]:
    """Check the cache and the Hub.

    Args:
        models: encoders, written as in the settings ``vae=`` and ``text_encoder=``.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    offline = constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE
    reached = "" if offline else unreachable()
    missing = [repository for name in models if (repository := _repository(name)) and not _cached(cache, repository)]
    where = "offline (HF_HUB_OFFLINE)" if offline else f"not reached: {reached}" if reached else "reached"
    text = f"{_HOST} {where}; cache {cache}{'' if cache.is_dir() else ' (does not exist yet)'}"
    if missing and (offline or reached):
        advice = (
            f"on a machine with internet access: HF_HOME={os.environ.get('HF_HOME', cache.parent)} hf download "
            f"{missing[0]}"
        )
        yield Finding("hub", "fail", f"{', '.join(missing)} not in the cache; {text}", advice)
    elif reached and not models:
        advice = (
            "fill the cache on a machine with internet access, and set HF_HOME and HF_HUB_OFFLINE=1 in slurm/env.sh"
        )
        yield Finding("hub", "warn", text, advice)
    else:
        yield Finding("hub", "ok", text, values={"cache": str(cache)})


def unreachable() -> str:
    """Why the Hub, or the proxy if one is set, cannot be reached; empty if it can."""
    from urllib.parse import urlsplit

    proxy = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or "")
    host, port = (proxy.hostname, proxy.port or 80) if proxy.hostname else (_HOST, 443)
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return ""


def _repository(name: str) -> str:
    """``owner/name`` of an encoder on the Hub; empty for folders, embedded and random encoders."""
    spec = name.partition("#")[0]
    spec = spec.split(":", 1)[1] if spec.startswith(("openclip:", "clip:", "t5:")) else spec
    spec = spec.removeprefix("hf-hub:").partition("@")[0]
    if spec.count("/") != 1 or ":" in spec or Path(spec).exists():
        return ""
    return spec


def _cached(cache: Path, repository: str) -> bool:
    return (cache / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir()
