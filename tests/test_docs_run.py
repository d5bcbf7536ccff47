"""Commands of README and docs, run on small data; and all of their Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import PAGES, ROOT, blocks, commands

SMALL = {
    "download": "count=24 download.partition_size=12",
    "filter": "min_image_size=32",
    "precompute": "vae=embedded text_encoder=embedded image_resolutions=[64] batch_size=8",
    "train": "train.steps=2 train.batch_size=4 train.valid_fraction=0 train.evaluate_every=0 train.show=0",
}
"""Settings with which a stage takes seconds."""
RUN = {
    "docs/howto/look_after.md": [
        "python -m pipeline.stages.verify data_dir=/data trace=cat/17-png",
        "python -m pipeline.stages.report data_dir=/data",
    ],
    "docs/howto/takedown.md": ["python -m pipeline.stages.takedown data_dir=/data"],
    "README.md": [
        "latentmill run stage=download,filter,shard",
        "latentmill status",
        "latentmill trace",
    ],
    "docs/quickstart.md": ["python launch/submit.py stage=filter,shard", "python -m pipeline.stages.filter --help"],
    "docs/tutorials/images_to_latents.md": ["python launch/submit.py stage=download,filter,shard"],
    "docs/tutorials/text_to_image.md": [
        "python launch/submit.py stage=download,filter,shard,precompute dataset=shapes",
        "python launch/submit.py stage=train task=diffuse",
        "python -m pipeline.stages.generate dataset=shapes",
    ],
    "docs/howto/duplicates.md": ["python launch/submit.py stage=filter,dedup,shard"],
    "docs/howto/less_disk.md": ["python -m pipeline.stages.compact"],
    "docs/howto/curate.md": ["python launch/submit.py stage=filter,score,select,shard"],
    "docs/howto/watch.md": [
        "python launch/status.py /data json=true",
        "python launch/status.py /data html=status.html",
    ],
}
"""By page, how the commands begin that are run here, in this order."""
GIVEN = """
import os
import numpy as np
rank, ranks = 0, 1
def my_transform(image):
    return np.asarray(image.resize((8, 8)))
"""
"""Names that pages leave to their readers."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in class folders, and what the line makes of them."""
    home = tmp_path_factory.mktemp("docs")
    for folder in ("photos", "data/caltech256"):
        for name in ("cat", "dog"):
            (home / folder / name).mkdir(parents=True)
            for number in range(20):
                tone = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
                image = Image.fromarray(tone).resize((300, 280), Image.Resampling.BICUBIC)
                image.save(home / folder / name / f"{number}.png")
                (home / folder / name / f"{number}.txt").write_text(f"a {name} on chair {number}")
    (home / "optouts.txt").write_text("cat/3-png\n")
    given = f"dataset=image_folder input={home}/photos data_dir={home}/data ranks=2"
    execute(f"python launch/submit.py stage=download,filter,shard {given}", home)
    place = home / "data/image_folder/train"
    for latents in ("mine/latents", "more/latents", "image_folder/train/latents"):
        output = f"input={place}/shard-mds output={home}/data/{latents} image_resolutions=[256] threads=1"
        execute(f"python -m pipeline.stages.precompute {output} vae=embedded text_encoder=embedded batch_size=8", home)
    execute(f"python -m pipeline.stages.filter input={place}/download output={home}/data/mine/filter", home)
    return home


def execute(command: str, home: Path) -> str:
    """Run a command of a page in ``home``, with the folders there instead of those that the page names."""
    words = [re.sub(r"(^|[=\[,])(/data|/path/to/images)", rf"\g<1>{home}\2", word) for word in shlex.split(command)]
    words = [word.replace(f"{home}/path/to/images", f"{home}/photos") for word in words]
    stages = next((word.partition("=")[2] for word in words if word.startswith("stage=")), "")
    words = [re.sub(r"^ranks=.*", "ranks=2", word) for word in words]
    remade = {"filter", "dedup", "score", "select", "shard"} & set(stages.split(","))  # pages share a folder
    words += [f"{stage}.overwrite=true" for stage in sorted(remade)]
    for stage in stages.split(","):
        small = SMALL.get(stage, "").split() if stage != "download" or "dataset=shapes" in words else []
        words += [word for word in small if not any(given.startswith(word.partition("=")[0] + "=") for given in words)]
    if words[0] == "latentmill":
        words = [sys.executable, "-m", "launch.command", *words[1:]]
    elif words[0] == "python":
        words = [sys.executable, *(str(ROOT / word) if word.startswith("launch/") else word for word in words[1:])]
    return done(words, home)


def done(words: list[str], home: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LATENTMILL_CACHE": str(home / "cache"),
    }
    process = subprocess.run(
        words, cwd=home, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, f"{shlex.join(words)}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.mark.timeout(1800)
def test_commands_of_pages_do_what_the_pages_say(home: Path) -> None:
    """In one test, as pages use what the commands of pages before them have made."""
    for page, begins in RUN.items():
        known = list(commands(ROOT / page))
        for begin in begins:
            found = [command for command in known if command.startswith(begin)]
            assert found, f"{page} has no command that begins so: {begin}"
            execute(found[0], home)


def test_the_tutorial_on_latents_in_a_store(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its commands, with a store on loopback; what it says of their results."""
    from object_stores import s3_environment

    for name, value in s3_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    page = ROOT / "docs/tutorials/latents_on_s3.md"
    known = [command for command in commands(page) if not command.startswith("export ")]
    small = {"train": " batch_size=4 threads=1 show=0", "publish": "", "verify": "", "submit": ""}
    said = []
    for command in known:
        stage = re.split(r"[. ]", command.removeprefix("python -m pipeline.stages.").removeprefix("python launch/"))[0]
        command = command.replace("/tmp/latents", f"{tmp_path}/cache").replace("steps=100", "steps=2")
        said.append(execute(command + small[stage], tmp_path))
    assert "files with" in said[1] and " requests" in said[1] and "published at s3://latents/shapes" in said[2]
    assert len(known) == 5 and len(list((tmp_path / "runs/shapes").glob("checkpoints/*"))) > 0
    assert list((tmp_path / "cache").rglob("*.mds"))


_SNIPPETS = [page for page in PAGES if any(not block.reason for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", _SNIPPETS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page: Path, home: Path) -> None:
    texts = [block.text for block in blocks(page, "python") if not block.reason]
    text = "\n".join(texts).replace('"/data', f'"{home}/data')
    text = text.replace("image_size=256", "image_size=256, cap_seq_size=16, cap_emb_dim=64")  # of the embedded encoder
    text = text.replace("batch_size=64", "batch_size=8")
    if 'checkpoint["loader"]' in text:
        text = text.replace(
            "loader.load_state_dict(", 'checkpoint = {"loader": loader.state_dict()}\nloader.load_state_dict('
        )
    program = home / f"{page.stem}.py"
    program.write_text(GIVEN + text)
    done([sys.executable, str(program)], home)
