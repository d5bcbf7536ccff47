"""Tokens and signatures, through the launcher as a user starts it: in no log, plan, ledger, manifest, event or table.

What single sources do with them is in test_http_archive.py and test_datasets.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from fake_stage import assert_sound
from sources.packing import tar_of
from sources.server import Server
from sources.test_datasets import jdb, photo

ROOT = Path(__file__).parents[2]
SECRET = "hushhush"


def submit(*arguments: str, **variables: str) -> str:
    """Run the launcher; what it said."""
    command = [sys.executable, "launch/submit.py", *arguments, "allow_private_hosts=true", "retries=0"]
    environment = {**os.environ, **variables, "LOGLEVEL": "DEBUG"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def texts(folder: Path) -> str:
    """All that is in files below ``folder``, and their names."""
    found = []
    for path in folder.rglob("*"):
        found.append(str(path))
        if path.suffix == ".parquet":  # compressed
            found.append(str(pq.read_table(path).to_pylist()))
        if path.is_file():
            found.append(path.read_bytes().decode("latin-1"))
    return "\n".join(found)


def test_a_token_of_the_hub(server: Server, memory: Path) -> None:
    case = jdb(server, memory)
    said = submit(
        "stage=download,filter",
        "keep_raw=false",
        "workers=0",
        "dataset=jdb",
        f"data_dir={memory / 'data'}",
        *case.arguments,
        HF_ENDPOINT=server.url(""),
        HF_TOKEN=case.token,
    )
    assert case.token.endswith(SECRET) and SECRET not in said + texts(memory / "data")
    assert any(SECRET in str(request.headers) for request in server.requests)  # but the server was shown it
    train = memory / "data/jdb-small/train"
    assert_sound(train / "download")
    assert_sound(train / "filter")
    assert list(train.rglob("download/data/*/*/*.tar")) == [] and list(train.rglob("filter/data/*/*/*.tar"))


def test_a_signed_url(server: Server, memory: Path) -> None:
    server.put("/a.tar", tar_of({"a.jpg": photo(0)}))
    url = f"http://me:{SECRET}@127.0.0.1:{server.port}/a.tar?X-Amz-Signature={SECRET}&token={SECRET}"
    (memory / "links.txt").write_text(f"a.tar\t{url}\nb.tar\t{url.replace('a.tar', 'gone.tar')}\n")
    for number, given in enumerate((f"urls=[{url}]", f"input={memory / 'links.txt'}")):
        data = memory / f"data{number}"
        said = submit(
            "stage=download",
            "source=http_archive",
            "dataset=image_folder",
            given,
            f"data_dir={data}",
            "check_space=false",
            "max_failed_fraction=1",
        )
        assert SECRET not in said + texts(data)
    assert all(SECRET in request.path for request in server.requests)
