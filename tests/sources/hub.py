"""The part of the Hugging Face Hub's protocol that datasets are fetched by, on the loopback server."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler

from sources.server import Reply, Server, ranged, redirect, status

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_repo(server: Server, repo: str, files: dict[str, bytes], token: str = "") -> None:
    """Serve a dataset's repository; with a ``token``, a gated one. Files redirect to another path, as to a CDN."""

    def guarded(reply: Reply) -> Reply:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            allowed = not token or handler.headers.get("Authorization") == f"Bearer {token}"
            (reply if allowed else status(401, b"{}", X_Error_Code="GatedRepo"))(handler)

        return answer

    siblings = [{"rfilename": path} for path in files]
    info = {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
    tree = [
        {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134},
        }
        for path, data in sorted(files.items())
    ]
    for revision in ("main", COMMIT):
        server.put(f"/api/datasets/{repo}/revision/{revision}", guarded(_json(info)))
        server.put(f"/api/datasets/{repo}/tree/{revision}", guarded(_json(tree)))
        for folder in {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}:
            inside = [entry for entry in tree if str(entry["path"]).startswith(f"{folder}/")]
            for quoted in (folder, folder.replace("/", "%2F")):
                server.put(f"/api/datasets/{repo}/tree/{revision}/{quoted}", guarded(_json(inside)))
    for path, data in files.items():
        server.put(f"/cdn/{repo}/{path}", ranged(data, f'"{hashlib.sha256(data).hexdigest()}"'))
        server.put(f"/datasets/{repo}/resolve/{COMMIT}/{path}", guarded(redirect(f"/cdn/{repo}/{path}")))


def _json(value: object) -> Reply:
    return status(200, json.dumps(value).encode(), Content_Type="application/json")
