"""Planted faults: each of the usual mistakes is found, said by its name, with partition and sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents.conftest import COUNT, Make

from pipeline.distributed import Rank
from pipeline.encoders.embedded import EmbeddedAutoencoder, EmbeddedTextEncoder
from pipeline.imaging.decoder import ImageDecoder
from pipeline.latents.validation import validate
from pipeline.partitions.dataset import Dataset, RandomAccess
from pipeline.partitions.verify import Finding
from pipeline.stages.repair import repair

Encode = Callable[[EmbeddedAutoencoder, torch.Tensor, Any], torch.Tensor]
right = EmbeddedAutoencoder.encode


def findings(dataset: Dataset) -> list[Finding]:
    with closing(ImageDecoder()) as decoder:
        return [finding for index in range(dataset.partitions) for finding in validate(dataset, index, decoder)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"latent": "moments"},
        {"vae": "embedded"},
        {"image_features": "embedded"},
        *({"text_storage": kind} for kind in ("int8+dedup", "fp8", "ragged", "int8+ragged+dedup")),
    ],
    ids=lambda settings: "-".join(settings.values()) or "dense",
)
def test_sound_latents_have_no_fault(make: Make, settings: dict[str, Any]) -> None:
    assert findings(make("-".join(settings.values()) or "dense", **settings)) == []


WRONG: dict[str, tuple[Encode, str]] = {
    "range": (lambda v, x, n=None: right(v, (x + 1) / 2), "images were given in [0, 1] instead of [-1, 1]"),
    "colours": (lambda v, x, n=None: right(v, x.flip(1)), "red and blue were swapped"),
    "mirror": (lambda v, x, n=None: right(v, x.flip(3)), "images were mirrored"),
    "scaling": (lambda v, x, n=None: right(v, x) / v.scaling, "the scaling factor is missing"),
    "channels": (lambda v, x, n=None: right(v, x)[:, [1, 0, 2, 3]], "the latents' channels are in the order [1, 0"),
    "neighbour": (lambda v, x, n=None: right(v, x).roll(1, 0), "they are those of sample shapes/"),
    "noise": (lambda v, x, n=None: torch.randn_like(right(v, x)), "none of the usual mistakes explains it"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_latents_are_found_and_explained(make: Make, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, explanation = WRONG[fault]
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedAutoencoder, "encode", encode)
        dataset = make(f"wrong-{fault}", vae="embedded", image_resolutions=(64,))
    found = findings(dataset)
    assert {finding.partition for finding in found} == set(range(dataset.partitions))
    assert any(explanation in finding.what for finding in found)
    for finding in found:
        first = fault == "neighbour" and "none of the usual mistakes" in finding.what  # it has the last one's
        assert first or explanation in finding.what
        assert finding.key and finding.file
        assert finding.what.startswith("latents_64 decodes to its image with ")


def test_captions_of_the_sample_before_are_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = EmbeddedTextEncoder.encode
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedTextEncoder, "encode", lambda self, captions: encode(self, captions).roll(1, 0))
        dataset = make("wrong-captions", image_resolutions=(64,))
    found = findings(dataset)
    assert {finding.partition for finding in found} == set(range(dataset.partitions))
    assert all("caption_latents: text states are " in finding.what and finding.key for finding in found)
    assert any("those of sample shapes/" in finding.what for finding in found)


def test_partitions_that_differ_from_the_others_are_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def drifting(vae: EmbeddedAutoencoder, x: torch.Tensor, noise: Any = None) -> torch.Tensor:
        calls.append(len(x))
        return right(vae, x) + 30.0 * (len(calls) == 2)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedAutoencoder, "encode", drifting)
        dataset = make("wrong-drift", image_resolutions=(64,))
    found = findings(dataset)
    assert {finding.partition for finding in found} == {1}
    assert "latents_64: channel" in found[0].what and "has mean" in found[0].what


def test_what_is_wrong_inside_is_made_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def once(vae: EmbeddedAutoencoder, x: torch.Tensor, noise: Any = None) -> torch.Tensor:
        calls.append(len(x))
        return right(vae, (x + 1) / 2 if len(calls) == 3 else x)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedAutoencoder, "encode", once)
        dataset = make("wrong-once", image_resolutions=(64,))
    assert {finding.partition for finding in findings(dataset)} == {2}
    place = dataset.root.path
    after = repair(place, Rank(), deep=True, workers=1)
    sound = make("sound", image_resolutions=(64,))
    assert after and findings(Dataset.open(place)) == []
    assert [row["latents_64"] for row in RandomAccess(Dataset.open(place)).rows(range(COUNT))] == [
        row["latents_64"] for row in RandomAccess(sound).rows(range(COUNT))
    ]


def corrupted(make: Make, name: str, column: str, change: Callable[[bytes], bytes]) -> list[Finding]:
    """Findings where one row of partition 2 comes with other bytes, as if it had been written so."""
    from pipeline.partitions.dataset import Stored

    dataset = make(name)
    key = list(dataset.samples(2))[5].key
    read = Stored.read

    def changed(self: Stored) -> dict[str, Any]:
        row = read(self)
        return {**row, column: change(row[column])} if row["key"] == key else row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read", changed)
        with closing(ImageDecoder()) as decoder:
            found = list(validate(dataset, 2, decoder))
    assert all(finding.partition == 2 for finding in found) and found[0].key == key
    return found


def test_values_that_are_not_finite_are_found(make: Make) -> None:
    nan = np.float16("nan").tobytes()
    for column in ("latents_32", "caption_latents"):
        found = corrupted(make, "dense", column, lambda data: data[:-2] + nan)
        assert [finding.what for finding in found] == [f"{column} has values that are NaN or infinite"]


def test_columns_that_were_swapped_are_found(make: Make) -> None:
    found = corrupted(make, "dense", "latents_32", lambda data: data * 4)
    assert [f.what for f in found] == ["latents_32 has 2048 bytes, expected 512 for (16, 4, 4)"]


def test_an_autoencoder_that_brings_nothing_back_is_found(make: Make, tmp_path: Path) -> None:
    """Wrong scaling within the encoder itself: there and back are both wrong, in the same way."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).save_pretrained(tmp_path)
    found = findings(make("random-weights", vae=str(tmp_path), image_resolutions=(32,)))
    assert [finding.partition for finding in found] == [-1]
    assert "reconstructs a smooth image with" in found[0].what


def test_other_weights_than_those_that_made_them_are_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make("fresh", image_resolutions=(32,))
    monkeypatch.setattr(EmbeddedAutoencoder, "version", 9)
    assert [finding.what for finding in findings(dataset)] == [
        "cannot be compared with its sources: vae: version is 9, was 1"
    ]
