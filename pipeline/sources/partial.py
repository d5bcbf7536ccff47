"""Partially downloaded files, from which the next download resumes.

A partial file is named by the hash of where it comes from and of the strong validator that the server gave, and only
ever written at explicit offsets, from one that is there already: however many processes write it, each byte is that of
one version of the file. A mark next to it says how much has reached the disk. Without a strong validator there is
nothing to go on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import xxhash

from pipeline.samples import SampleError, content_hash
from pipeline.sources.http import Head

_SYNC = 64 << 20  # bytes between two marks
_BLOCK = 1 << 20
MARK = ".json"


class Partial:
    """Where one file goes. A context; the file is gone at its end if :meth:`done` was called.

    Args:
        folder: survives a crash.
        scratch: does not; for files without a strong validator.
        name: where the file comes from, without secrets.
        sha256, md5: what it should be; empty: not known.
        accept: asked before anything is written; raises if the file is not to come.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path | None,
        name: str,
        sha256: str = "",
        md5: str = "",
        accept: Callable[[Head], None] = lambda head: None,
    ) -> None:
        self._accept = accept
        self._folder = folder
        self._scratch = scratch
        self._name = content_hash(name.encode())
        self._expected = {"sha256": sha256.lower(), "md5": md5.lower()}
        self._mark = folder / f"{self._name}{MARK}"
        self._path: Path | None = None
        self._validator = ""
        self._length = -1
        self._synced = 0
        self._size = 0
        self._file: IO[bytes] | None = None
        self._done = False

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._sync()
            self._file.close()
        if self._done or kind is SampleError:  # what is wrong now would be wrong again
            self.forget()

    # ---- as a sink

    def have(self) -> tuple[int, str]:
        try:
            said = json.loads(self._mark.read_bytes())
            validator, synced = str(said["validator"]), int(said["synced"])
            whole = synced == said["length"]
            if synced > 0 and self._place(validator).stat().st_size >= synced:
                return synced - whole, validator  # a range that begins at the end would be refused
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, ""

    def begin(self, head: Head) -> None:
        self._accept(head)
        if self._file:
            self._file.close()
        self._size = self._synced = head.offset
        self._validator, self._length = head.validator if head.strong else "", head.length
        if self._validator or head.offset:
            self._folder.mkdir(exist_ok=True)
            validator = self._validator or self.have()[1]
            self._path, self._validator = self._place(validator), validator
            self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0)  # noqa: SIM115
        else:
            self._path = None
            self._file = tempfile.TemporaryFile(dir=self._scratch, buffering=0)  # noqa: SIM115
        self._file.seek(self._size)

    def write(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._size += len(data)
        if self._size - self._synced >= _SYNC:
            self._sync()

    def _place(self, validator: str) -> Path:
        return self._folder / f"{self._name}.{content_hash(validator.encode())}"

    def _sync(self) -> None:
        """Say how much is on the disk, after it is."""
        if self._path is None or self._file is None or self._size <= self._synced:
            return
        os.fdatasync(self._file.fileno())
        self._synced = self._size
        mark = {"validator": self._validator, "synced": self._synced, "length": self._length}
        attempt = self._folder / f"{self._name}.{uuid.uuid4().hex}.tmp"
        attempt.write_text(json.dumps(mark))
        os.replace(attempt, self._mark)

    # ---- afterwards

    def whole(self) -> tuple[IO[bytes], str]:
        """The file, from its beginning, and its XXH3-128, all of it read and compared with the hashes that are known.

        Raises:
            SampleError: ``wrong_hash``.
        """
        assert self._file is not None
        self._sync()
        content = xxhash.xxh3_128()
        digests = {name: hashlib.new(name) for name, expected in self._expected.items() if expected}
        file = self._file
        file.truncate(self._size)
        file.seek(0)
        while block := file.read(_BLOCK):
            content.update(block)
            for digest in digests.values():
                digest.update(block)
        for name, digest in digests.items():
            if digest.hexdigest() != self._expected[name]:
                raise SampleError("wrong_hash", f"{name} is {digest.hexdigest()}", retryable=True)
        file.seek(0)
        return file, content.hexdigest()

    def done(self) -> None:
        """It is not needed any more."""
        self._done = True

    def forget(self) -> None:
        """Begin again the next time."""
        for path in (self._mark, self._path):
            if path is not None:
                path.unlink(missing_ok=True)
