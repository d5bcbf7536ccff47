"""stage=generate with an output: any ranks draw the same images, each once; and what is refused."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stages.conftest import digests, run_stage
from training.test_diffuse import Scenes, config, train_task

from pipeline.config.schema import ConfigError, GenerateConfig
from pipeline.distributed import Rank
from pipeline.distributed.environment import Place
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.planning import Stale
from pipeline.partitions.verify import verify
from pipeline.stages import generate
from pipeline.storage import Folder

PROMPTS = ["a small red circle", "a large blue square", "a small green triangle"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run")
    data = Scenes(40)
    with Folder.open(path) as folder:
        train_task(config(steps=3), data, folder)
    return path


def settings(run: Path, output: Path, **more: object) -> dict[str, object]:
    given = {"checkpoint": str(run), "output": str(output), "prompts": PROMPTS, "images_per_prompt": 3}
    return {**given, "partition_size": 4, "batch_size": 3, "steps": 2, "threads": 1, **more}


def test_ranks_draw_each_picture_once_and_the_same_as_one(trained: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_stage("generate", **settings(trained, one))["counts"]["kept"] == 9
    for number in (1, 0):
        run_stage("generate", Rank(Place(number, 2, number, 2)), **settings(trained, two))
    assert digests(two) == digests(one)
    assert list(verify(Dataset.open(two))) == []


def test_a_picture_is_the_same_alone(trained: Path, tmp_path: Path) -> None:
    run_stage("generate", **settings(trained, tmp_path / "all"))
    rows = [stored.read() for index in range(3) for stored in Dataset.open(tmp_path / "all").samples(index)]
    assert [row["caption"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    painter = generate.load_painter(trained)
    again = generate.sample_images(painter, [row["caption"] for row in rows], 0, generate.Manner(2))
    stored = [np.asarray(Image.open(BytesIO(row["jpg"]))) for row in rows]
    assert np.abs(np.stack(stored).astype(int) - again).max() <= 1


def test_a_picture_of_a_seed_is_the_same_whatever_else_is_drawn(trained: Path, tmp_path: Path) -> None:
    more = {"images_per_prompt": 1, "seeds": [7, 3]}
    run_stage("generate", **settings(trained, tmp_path / "all", **more))
    rows = [stored.read() for index in range(2) for stored in Dataset.open(tmp_path / "all").samples(index)]
    assert [(row["caption"], row["seed"]) for row in rows] == [(text, seed) for text in PROMPTS for seed in (7, 3)]
    alone = generate.sample_images(generate.load_painter(trained), [PROMPTS[2]], 3, generate.Manner(2))[0]
    assert np.abs(np.asarray(Image.open(BytesIO(rows[5]["jpg"]))).astype(int) - alone).max() <= 1
    with pytest.raises(ConfigError, match="seeds=, images_per_prompt=: give only one of them"):
        run_stage("generate", **settings(trained, tmp_path / "both", seeds=[1]))


def test_only_an_autoencoder_with_such_latents_decodes(trained: Path) -> None:
    assert generate.load_painter(trained, vae="embedded").autoencoder.name == "embedded"
    with pytest.raises(ConfigError, match="vae=embedded16: has 16 channels .* trained on 4 channels and 8 pixels"):
        generate.load_painter(trained, vae="embedded16")


def test_other_prompts_or_weights_are_not_mixed_in(trained: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    given = settings(trained, tmp_path / "out", prompts=[str(prompts)])
    run_stage("generate", **given)
    run_stage("generate", **given)  # already finished
    with pytest.raises(Stale, match="steps=2"):
        run_stage("generate", **{**given, "steps": 3})
    prompts.write_text("\n".join([*PROMPTS[:2], "a large red square"]))
    with pytest.raises(ConfigError):
        run_stage("generate", **given)


def test_wrong_settings_are_named(trained: Path, tmp_path: Path) -> None:
    for more, message in (({"prompts": []}, "prompts="), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ConfigError, match=message):
            run_stage("generate", **settings(trained, tmp_path / "out", **more))
    listing = tmp_path / "prompts.txt"
    for content, message in (
        (None, "cannot be read: No such file"),
        (b"\n \n", "the file has no lines"),
        (b"\xff\xff", "not UTF-8 text"),
    ):
        if content is not None:
            listing.write_bytes(content)
        with pytest.raises(ConfigError, match=f"prompts=.*prompts.txt: {message}"):
            generate.prompts_of(GenerateConfig(prompts=(str(listing),)))
    caption = "a small red circle, " * 40  # longer than a file's name may be
    assert generate.prompts_of(GenerateConfig(prompts=(caption,))) == [caption]
    with pytest.raises(ConfigError, match="there is no such training run"):
        generate.main(GenerateConfig(checkpoint=str(tmp_path / "nowhere"), prompts=("a",)))


def test_without_an_output_pictures_and_a_grid_go_to_the_run(trained: Path) -> None:
    generate.main(GenerateConfig(checkpoint=str(trained), prompts=tuple(PROMPTS), images_per_prompt=2, steps=2))
    assert len(list((trained / "samples").glob("0*.png"))) == 6
    assert Image.open(trained / "samples" / "grid.png").size == (2 * 34 - 2, 3 * 34 - 2)
