"""diffusers' autoencoders: the values of direct calls, noise from outside, weights in the manifest. No network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.encoders.base import autoencoder

pytestmark = pytest.mark.filterwarnings("ignore")
SCALING, SHIFT = 0.36, 0.12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder with random weights, 4x, with scaling and shift, as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        norm_num_groups=4,
        scaling_factor=SCALING,
        shift_factor=SHIFT,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture
def direct(folder: Path) -> object:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_the_mode_is_that_of_diffusers(folder: Path, direct, x: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    expected = (direct.encode(x).latent_dist.mode() - SHIFT) * SCALING
    z = autoencoder(str(folder)).encode(x)
    assert z.shape == (2, 3, 8, 8)
    assert torch.equal(z, expected)


@torch.no_grad()
def test_a_sample_is_that_of_diffusers_with_the_same_noise(folder: Path, direct, x: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    expected = (direct.encode(x).latent_dist.sample(torch.Generator().manual_seed(5)) - SHIFT) * SCALING
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(autoencoder(str(folder)).encode(x, noise), expected)


@torch.no_grad()
def test_decoding_is_that_of_diffusers(folder: Path, direct, x: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    vae = autoencoder(str(folder))
    z = vae.encode(x)
    assert torch.equal(vae.decode(z), direct.decode(z / SCALING + SHIFT).sample.clamp(-1, 1))


def test_shape_and_scaling_come_from_the_config(folder: Path) -> None:
    vae = autoencoder(str(folder))
    assert (vae.channels, vae.downsample, vae.scaling) == (3, 4, SCALING)
    assert vae.describe()["shift"] == SHIFT


def test_the_manifest_tells_weights_apart_but_not_precisions(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    said = autoencoder(str(folder)).describe()
    half = autoencoder(str(folder), dtype="bfloat16").describe()
    assert said["weights_xxh3"] == half["weights_xxh3"] and half["dtype"] == "bfloat16"
    other = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert autoencoder(str(tmp_path)).describe()["weights_xxh3"] != said["weights_xxh3"]


def test_reduced_precision_is_close_and_comes_out_as_float32(folder: Path, x: torch.Tensor) -> None:
    exact, half = (autoencoder(str(folder), dtype=dtype).encode(x) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)


def test_the_vae_of_a_whole_pipeline_is_found(folder: Path, tmp_path: Path, x: torch.Tensor) -> None:
    (tmp_path / "vae").symlink_to(folder)
    (tmp_path / "model_index.json").write_text("{}")
    assert torch.equal(autoencoder(str(tmp_path)).encode(x), autoencoder(str(folder)).encode(x))


def test_weights_that_are_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="no AutoencoderKL can be loaded"):
        autoencoder(str(tmp_path))


def test_a_missing_repository_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="vae=nobody/nothing: no AutoencoderKL can be loaded from there"):
        autoencoder("nobody/nothing")
