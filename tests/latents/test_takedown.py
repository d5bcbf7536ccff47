"""Taking samples down where rows share text states: what the others had stays."""

from __future__ import annotations

from pathlib import Path

from stages.conftest import run_stage

from pipeline.distributed import Rank
from pipeline.loading.latents import LatentFolder
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.stages.takedown import takedown


def states(place: Path) -> dict[str, bytes]:
    """Text states of each sample, wherever they are stored."""
    folder = LatentFolder(place)
    texts = folder.read(range(len(folder)), ["caption_latents"])["caption_latents"]
    return {folder.key(position): text.numpy().tobytes() for position, text in enumerate(texts)}


def test_shared_text_states_move_to_the_first_row_that_stays(tmp_path: Path) -> None:
    images, latents = tmp_path / "data/download", tmp_path / "data/latents"
    run_stage("download", source="shapes", count=60, image_size=16, partition_size=30, output=str(images))
    settings = {"image_resolutions": (16,), "text_storage": "dedup"}
    run_stage("precompute", input=str(images), output=str(latents), **settings)
    before = states(latents)
    rows = RandomAccess(Dataset.open(latents)).rows(range(60))
    homes = {rows[place - row["caption_back"]]["key"] for place, row in enumerate(rows) if row["caption_back"]}
    assert homes
    (tmp_path / "list").write_text("\n".join(sorted(homes)))
    takedown(tmp_path / "data", tmp_path / "list", Rank())
    after = states(latents)
    assert after == {key: text for key, text in before.items() if key not in homes}
