"""Partially downloaded files, from which the next download resumes.

The name of a partial file is a hash of its origin and of the strong validator that the server sent, so all processes
that write to it write the same bytes at the same offsets. A mark file next to it records how many bytes are on the
disk. Without a strong validator, a download cannot be resumed.
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

_SYNC = 64 << 20  # bytes between updates of the mark
_BLOCK = 1 << 20
MARK = ".json"


class Partial:
    """The sink of a download. As a context manager, it deletes the file on exit if :meth:`done` was called.

    Args:
        folder: persistent folder for files that can be resumed.
        scratch: temporary folder for files without a strong validator.
        name: origin of the file, without secrets.
        sha256, md5: expected hashes; empty if unknown.
        accept: called before anything is written; raises to reject the file.
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
        if self._done or kind is SampleError:  # resuming would give the same error
            self.forget()

    # ---- the interface of a sink

    def have(self) -> tuple[int, str]:
        try:
            said = json.loads(self._mark.read_bytes())
            validator, synced = str(said["validator"]), int(said["synced"])
            whole = synced == said["length"]
            if synced > 0 and self._place(validator).stat().st_size >= synced:
                return synced - whole, validator  # servers reject a range that begins at the end
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
        """Flush the file to disk, then update the mark."""
        if self._path is None or self._file is None or self._size <= self._synced:
            return
        os.fdatasync(self._file.fileno())
        self._synced = self._size
        mark = {"validator": self._validator, "synced": self._synced, "length": self._length}
        attempt = self._folder / f"{self._name}.{uuid.uuid4().hex}.tmp"
        attempt.write_text(json.dumps(mark))
        os.replace(attempt, self._mark)

    # ---- after the download

    def whole(self) -> tuple[IO[bytes], str]:
        """Verify the known hashes; return the file, at its beginning, and its XXH3-128.

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
        """Mark the file as no longer needed."""
        self._done = True

    def forget(self) -> None:
        """Delete the file, so that the next download starts from the beginning."""
        for path in (self._mark, self._path):
            if path is not None:
                path.unlink(missing_ok=True)
