"""stage=score: the same scores under any number of ranks, and more of them later without computing the others again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np
import pytest
from fake_stage import assert_sound, outcomes, run_ranks
from PIL import Image, ImageFilter
from stages.conftest import digests, run_stage

from pipeline.config.schema import ConfigError
from pipeline.curation.scorers.layout import ScoreLayout
from pipeline.partitions.dataset import Dataset
from pipeline.stages.score import Score

PIXELS = ("sharpness", "entropy", "seam")


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth colours with some texture."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = random.normal(0, 12, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images with captions: number 5 is blurred, and the file of number 9 is cut."""
    place = tmp_path_factory.mktemp("score")
    (place / "images").mkdir()
    for number in range(22):
        image = photo(number)
        path = place / "images" / f"{number:03d}.jpg"
        (image.filter(ImageFilter.GaussianBlur(3)) if number == 5 else image).save(path, quality=92)
        path.with_suffix(".txt").write_text(f"a photo of subject number {number} in the garden")
        if number == 9:
            path.write_bytes(path.read_bytes()[:400])
    run_stage(
        "download",
        source="image_folder",
        input=str(place / "images"),
        output=str(place / "download"),
        partition_size=6,
        captions="txt",
        copy=True,
    )
    return place


def scores_of(place: Path) -> dict[str, dict]:
    dataset = Dataset.open(place)
    return {stored.key: stored.read() for index in range(dataset.partitions) for stored in dataset.samples(index)}


def test_each_sample_has_its_scores_or_a_reason(downloaded: Path, tmp_path: Path) -> None:
    scorers = (*PIXELS, "jpeg_quality", "caption_words", "language")
    run_stage("score", input=str(downloaded / "download"), output=str(tmp_path / "score"), scorers=scorers, workers="1")
    found = scores_of(tmp_path / "score")
    assert len(found) == 21
    assert "009-jpg" not in found and outcomes(tmp_path / "score")["009-jpg"].startswith("failed:")
    assert min(found, key=lambda key: found[key]["sharpness"]) == "005-jpg"
    assert {row["caption_words"] for row in found.values()} == {9}
    assert {row["language"] for row in found.values()} == {"en"}
    assert all(abs(row["jpeg_quality"] - 92) <= 2 for row in found.values())
    assert_sound(tmp_path / "score")


def test_any_number_of_ranks_writes_the_same_bytes(downloaded: Path, tmp_path: Path) -> None:
    settings = {"input": str(downloaded / "download"), "scorers": (*PIXELS, "embedding:embedded"), "workers": "0"}
    settings["reuse"] = False
    for world in (1, 2, 3):
        run_ranks(tmp_path / str(world), Score, world, **settings)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "3") != {}


def test_a_scorer_that_is_added_leaves_the_others_as_they_are(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"input": str(downloaded / "download"), "workers": "0"}
    run_stage("score", output=str(tmp_path / "score"), scorers=("sharpness", "embedding:embedded"), **settings)
    before = scores_of(tmp_path / "score")
    asked: list[tuple[str, ...]] = []
    fill = ScoreLayout.fill
    monkeypatch.setattr(ScoreLayout, "fill", lambda self, *given: asked.append(self.names) or fill(self, *given))
    run_stage(
        "score",
        output=str(tmp_path / "score-more"),
        scorers=("entropy", "sharpness", "embedding:embedded", "caption_words"),
        **settings,
    )
    assert set(asked) == {("entropy",)}
    after = scores_of(tmp_path / "score-more")
    assert list(after) == list(before)
    for key, row in before.items():
        assert after[key]["sharpness"] == row["sharpness"]
        assert np.array_equal(after[key]["embedding"], row["embedding"])
    run_stage(
        "score",
        output=str(tmp_path / "fresh/score"),
        scorers=("entropy", "sharpness", "embedding:embedded", "caption_words"),
        **settings,
    )
    assert digests(tmp_path / "score-more") == digests(tmp_path / "fresh/score"), "as if all had been computed"


def test_images_are_decoded_while_a_model_computes(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model returns from the first of a partition's three batches only when the third is decoded."""
    from pipeline.encoders.model_scores import Embedding

    encode, fill = Embedding.encode, ScoreLayout.fill
    images, batches, changed = Counter[str](), Counter[str](), Condition()

    def filling(self: ScoreLayout, *given: Any) -> Any:
        found = fill(self, *given)
        with changed:
            images["decoded"] += 1
            changed.notify_all()
        return found

    def encoding(self: Embedding, *given: Any) -> Any:
        batches["encoded"] += 1
        first = batches["encoded"] in (1, 4, 7)
        with changed:
            wanted = 2 * batches["encoded"] + 4 if first else 0
            assert changed.wait_for(lambda: images["decoded"] >= wanted, 60), "nothing is decoded meanwhile"
        return encode(self, *given)

    monkeypatch.setattr(ScoreLayout, "fill", filling)
    monkeypatch.setattr(Embedding, "encode", encoding)
    settings = {"input": str(downloaded / "download"), "scorers": ("embedding:embedded",), "workers": "0"}
    run_stage("score", output=str(tmp_path / "score"), batch_size=2, **settings)
    assert (batches["encoded"], images["decoded"]) == (11, 22)


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        (("sharpnes",), "did you mean sharpness"),
        (("sharpness", "sharpness"), "named twice"),
        ((), "at least one"),
        (("head:aesthetic.safetensors",), "computed from an embedding"),
        (("clip_similarity:embedded",), "no text tower"),
        (("embedding:nowhere:x",), "known: clip, embedded, hf"),
    ],
)
def test_what_is_no_scorer_is_refused(downloaded: Path, tmp_path: Path, scorers: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_stage("score", input=str(downloaded / "download"), output=str(tmp_path / "score"), scorers=scorers)


def test_a_head_is_not_reused_with_another_embedding(downloaded: Path, tmp_path: Path) -> None:
    import torch

    from pipeline.encoders.preprocessing import Preprocessing
    from pipeline.encoders.vision import save_program

    torch.manual_seed(0)
    torch.save(torch.nn.Linear(192, 1).state_dict(), tmp_path / "taste.pth")
    network = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(64, 192))
    save_program(network, tmp_path / "net.pt2", 8, Preprocessing())
    settings = {"input": str(downloaded / "download"), "workers": "0"}
    head = f"head:{tmp_path / 'taste.pth'}"
    run_stage("score", output=str(tmp_path / "a/score"), scorers=("embedding:embedded", head), **settings)
    other = (f"embedding:program:{tmp_path / 'net.pt2'}", head)
    run_stage("score", output=str(tmp_path / "a/score-other"), scorers=other, **settings)
    run_stage("score", output=str(tmp_path / "b/score-other"), scorers=other, **settings)
    assert digests(tmp_path / "a/score-other") == digests(tmp_path / "b/score-other")
    before, after = (scores_of(tmp_path / "a" / name) for name in ("score", "score-other"))
    assert all(before[key]["taste"] != after[key]["taste"] for key in before)


def test_a_model_that_changes_stops_a_run_that_is_continued(downloaded: Path, tmp_path: Path) -> None:
    import torch

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(torch.nn.Linear(192, 1).state_dict(), tmp_path / "taste.pth")

    save(0)
    scorers = ("embedding:embedded", f"head:{tmp_path / 'taste.pth'}")
    settings = {"input": str(downloaded / "download"), "output": str(tmp_path / "score"), "workers": "0"}
    run_stage("score", scorers=scorers, **settings)
    assert [*Dataset.open(tmp_path / "score").header["model_files"]] == [str(tmp_path / "taste.pth")]
    run_stage("score", scorers=scorers, **settings)
    save(1)
    with pytest.raises(ConfigError, match=r"taste\.pth was modified since it was planned"):
        run_stage("score", scorers=scorers, **settings)
