"""The cache of torch.compile in the run's folder, so that a requeued job does not compile again.

A node's own cache is lost when a job is restarted elsewhere. The cache contains code, so it is only loaded from files
that belong to this user and that nobody else may write.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress

import torch

from pipeline.distributed import Rank
from pipeline.storage import Folder

FOLDER = "compiled"


def load_compiled(run: Folder, rank: Rank) -> int:
    """Load the cache; returns the number of files for this torch and kind of device that could be used."""
    try:
        names = run.folder(FOLDER).listdir()
    except OSError:
        return 0
    return sum(_load(run, f"{FOLDER}/{name}", rank) for name in sorted(names) if name.startswith(_name(rank)))


def _load(run: Folder, name: str, rank: Rank) -> bool:
    with os.fdopen(run.open_file(name), "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
            rank.log.warning("%s/%s may be written by others: it is not used, but compiled again", run.path, name)
            return False
        data = file.read()
    if torch.compiler.load_cache_artifacts(data) is None:
        rank.log.warning("%s/%s cannot be used: it is compiled again", run.path, name)
        return False
    return True


def save_compiled(run: Folder, rank: Rank) -> None:
    """Save what was compiled so far, if anything; to be called by one rank. Failure to write is only a warning.

    What torch returns can only load artifacts that are new since the previous call, so each result gets its own file.
    """
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        return
    data, about = made
    known = hashlib.sha256(repr(sorted((kind, sorted(keys)) for kind, keys in about.artifacts.items())).encode())
    name = f"{_name(rank)}-{known.hexdigest()[:16]}"
    try:
        with suppress(FileExistsError):
            run.mkdir(FOLDER)
        with run.folder(FOLDER) as folder:
            if folder.exists(name):
                return
            attempt = f".{name}.{os.getpid()}"
            with folder.create(attempt) as file:
                file.write(data)
            os.chmod(folder.path / attempt, 0o600)
            folder.rename(attempt, name)
    except OSError as error:
        rank.log.warning("what was compiled is not kept: %s", error)


def _name(rank: Rank) -> str:
    device = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else "cpu"
    return hashlib.sha256(f"{torch.__version__} {device}".encode()).hexdigest()[:16]
