"""format=jsonl: one JSON object a line, with the image in base64."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from pipeline.formats import FlexibleFiles
from pipeline.registry import formats


@formats.register("jsonl")
class JsonLines(FlexibleFiles):
    name = "jsonl"
    suffix = ".jsonl"

    def pack(self, rows: Sequence[dict[str, Any]]) -> bytes:
        lines = (json.dumps({**row, "jpg": base64.b64encode(row["jpg"]).decode()}, sort_keys=True) for row in rows)
        return "\n".join(lines).encode()

    def unpack(self, data: bytes) -> Sequence[dict[str, Any]]:
        rows = map(json.loads, data.decode().splitlines())
        return [{**row, "jpg": base64.b64decode(row["jpg"])} for row in rows]
