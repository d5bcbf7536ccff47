"""Answers of a server, stored until the partition is committed, so that a restarted rank does not pay for them twice.

Each attempt at a partition appends to a separate file in ``partial/answers``; the next attempt reads all of them.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline.captioning.base import Question, Written
from pipeline.partitions.gc import PARTIAL
from pipeline.samples import content_hash
from pipeline.storage import GONE

if TYPE_CHECKING:
    from pipeline.storage import Folder

_FOLDER = f"{PARTIAL}/answers"


class Journal:
    """Answers for partition ``index`` of the output ``root``. Damaged entries are ignored.

    Raises:
        OSError: the output cannot be written.
    """

    def __init__(self, root: Folder, index: int) -> None:
        self._root = root
        self._index = index
        self._name = f"{_FOLDER}/{index:05d}.{uuid.uuid4().hex}.jsonl"
        root.mkdir(PARTIAL, exist_ok=True)
        root.mkdir(_FOLDER, exist_ok=True)
        self._known: dict[str, Written] = {}
        for name in self._files():
            for line in root.read(f"{_FOLDER}/{name}").splitlines():
                self._read(line)

    def _files(self) -> list[str]:
        with self._root.folder(_FOLDER) as folder:
            return [name for name in folder.listdir() if name.startswith(f"{self._index:05d}.")]

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            body, digest = entry["answer"], entry["digest"]
            if digest == _digest(entry["question"], body):
                self._known[entry["question"]] = Written(**{**body, "noted": Counter(body["noted"])})
        except (ValueError, KeyError, TypeError):
            return  # the last line of a process that was killed

    def get(self, question: Question) -> Written | None:
        """The stored answer to ``question``; None if there is none."""
        return self._known.get(_name(question))

    def add(self, question: Question, written: Written) -> None:
        """Store an answer."""
        name = _name(question)
        body = {field: getattr(written, field) for field in Written.__dataclass_fields__} | {
            "noted": dict(written.noted)
        }
        entry = {"question": name, "answer": body, "digest": _digest(name, body)}
        self._root.append(self._name, json.dumps(entry, sort_keys=True).encode() + b"\n")

    def discard(self) -> None:
        """Delete the answers, once the partition is committed."""
        try:
            for name in self._files():
                self._root.unlink(f"{_FOLDER}/{name}", missing_ok=True)
        except OSError as error:
            if error.errno not in GONE:
                raise


def _name(question: Question) -> str:
    parts = [question.key, question.number, question.prompt, question.source_hash]
    return content_hash(json.dumps(parts).encode())


def _digest(name: str, body: Any) -> str:
    return content_hash(f"{name} {json.dumps(body, sort_keys=True)}".encode())
