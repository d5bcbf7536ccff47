"""diffusers' autoencoders: the values of direct calls, noise from outside, weights in the manifest. No network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import save_autoencoder

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import autoencoder

pytestmark = pytest.mark.filterwarnings("ignore")
SCALING, SHIFT = 0.36, 0.12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder with random weights, 4x, with scaling and shift, as diffusers saves it."""
    place = tmp_path_factory.mktemp("vae")
    return save_autoencoder(place, (8, 8, 16), latent_channels=3, scaling_factor=SCALING, shift_factor=SHIFT)


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
    with pytest.raises(ConfigError, match="diffusion_pytorch_model.safetensors.* is not in the folder"):
        autoencoder(str(tmp_path))


def test_a_missing_repository_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub.utils._http import reset_sessions

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    try:
        with pytest.raises(ConfigError, match=r"^vae=.*Hub cannot be reached, and config.json of nobody/nothing is"):
            autoencoder("nobody/nothing")
    finally:
        reset_sessions()  # which would stay offline for the tests after this one


@torch.no_grad()
def test_moments_are_the_scaled_posterior(folder: Path, direct, x: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    posterior = direct.encode(x).latent_dist
    mean, deviation = autoencoder(str(folder)).moments(x).chunk(2, 1)
    assert torch.equal(mean, (posterior.mean - SHIFT) * SCALING)
    torch.testing.assert_close(deviation, posterior.std * SCALING)


@torch.no_grad()
def test_samples_scatter_about_the_mode_as_the_moments_say(folder: Path, x: torch.Tensor) -> None:
    vae = autoencoder(str(folder))
    mean, deviation = vae.moments(x[:1]).chunk(2, 1)
    noise = torch.randn(4000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([vae.encode(x[:1], part) for part in noise.split(1000)])
    torch.testing.assert_close(samples.mean(0), mean[0], atol=float(deviation.max()) * 0.08, rtol=0)
    torch.testing.assert_close(samples.std(0), deviation[0], rtol=0.08, atol=0)
    assert torch.equal(vae.encode(x[:1]), mean)


def test_a_model_that_overflows_in_half_precision_runs_in_single(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    assert autoencoder(str(folder), dtype="float16").describe()["dtype"] == "float32"  # force_upcast: the default
    safe = AutoencoderKL.from_pretrained(folder)
    safe.register_to_config(force_upcast=False)
    safe.save_pretrained(tmp_path)
    assert autoencoder(str(tmp_path), dtype="float16").describe()["dtype"] == "float16"


@torch.no_grad()
def test_deep_compression_autoencoders_have_no_posterior(tmp_path: Path, x: torch.Tensor) -> None:
    from diffusers import AutoencoderDC

    torch.manual_seed(2)
    blocks = {f"{way}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for way in ("encoder", "decoder")}
    widths = {f"{way}_block_out_channels": (8, 16, 16) for way in ("encoder", "decoder")}
    layers = {f"{way}_layers_per_block": (1, 1, 1) for way in ("encoder", "decoder")}
    scales = {f"{way}_qkv_multiscales": ((), (), (5,)) for way in ("encoder", "decoder")}
    direct = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.41, **blocks, **widths, **layers, **scales
    ).eval()
    direct.save_pretrained(tmp_path)
    vae = autoencoder(str(tmp_path))
    z = vae.encode(x, torch.randn(2, 4, 8, 8))
    assert (vae.channels, vae.downsample, z.shape) == (4, 4, (2, 4, 8, 8))
    assert torch.equal(z, direct.encode(x).latent * 0.41)
    assert torch.equal(vae.decode(z), direct.decode(z / 0.41).sample.clamp(-1, 1))
    assert float(vae.moments(x)[:, 4:].abs().max()) == 0


def test_other_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel", "_diffusers_version": "0.30.0"}')
    with pytest.raises(
        ConfigError, match="it is of class VQModel; known: AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, "
    ):
        autoencoder(str(tmp_path))


@torch.no_grad()
def test_statistics_of_latents_are_applied_as_diffusers_does_it(folder: Path, tmp_path: Path, x: torch.Tensor) -> None:
    """As StableDiffusionXLPipeline with Playground 2.5: z * std / scaling + mean is what is decoded."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(folder).eval()
    mean, std = [0.5, -1.0, 2.0], [2.0, 3.0, 0.5]
    model.register_to_config(latents_mean=mean, latents_std=std)
    model.save_pretrained(tmp_path)
    vae = autoencoder(str(tmp_path))
    m, s = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    posterior = model.encode(x).latent_dist
    scaling = model.config.scaling_factor
    expected = (posterior.mean - m) * scaling / s
    torch.testing.assert_close(vae.encode(x), expected)
    torch.testing.assert_close(vae.moments(x)[:, 3:], posterior.std * scaling / s)
    decoded = model.decode(expected * s / scaling + m).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(expected), decoded)
    said = vae.describe()
    assert said["latents_mean"] == mean and said["latents_std"] == std
    assert "latents_mean" not in autoencoder(str(folder)).describe()


def video(name: str) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(3)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 0.5]}
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    made: torch.nn.Module = getattr(diffusers, name)(**sizes, **statistics).eval()
    return made


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderKLWan"])
@torch.no_grad()
def test_video_autoencoders_take_an_image_as_one_frame(name: str, tmp_path: Path, x: torch.Tensor) -> None:
    """Normalised as QwenImageEditPipeline does it, whose code is called here."""
    from diffusers import QwenImageEditPipeline

    model = video(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    vae = autoencoder(str(tmp_path))
    z = vae.encode(x)
    stub = SimpleNamespace(vae=model, latent_channels=4)
    expected = QwenImageEditPipeline._encode_vae_image(stub, x[:, :, None], None)
    assert (vae.channels, vae.downsample, z.shape) == (4, 2, (2, 4, 16, 16))
    torch.testing.assert_close(z, expected[:, :, 0])
    mean, deviation = (torch.tensor(model.config[f"latents_{what}"]).view(1, 4, 1, 1) for what in ("mean", "std"))
    decoded = model.decode((z * deviation + mean)[:, :, None]).sample[:, :, 0].clamp(-1, 1)  # type: ignore[operator]
    torch.testing.assert_close(vae.decode(z), decoded)
    posterior = model.encode(x[:, :, None]).latent_dist  # type: ignore[operator]
    torch.testing.assert_close(vae.moments(x)[:, 4:], posterior.std[:, :, 0] / deviation)


@torch.no_grad()
def test_flux2_stacks_neighbours_and_normalises_by_its_running_statistics(tmp_path: Path, x: torch.Tensor) -> None:
    """As Flux2Pipeline does it, whose code is called here."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline

    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKLFlux2(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **blocks).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 3.0)
    model.save_pretrained(tmp_path)
    vae = autoencoder(str(tmp_path))
    z = vae.encode(x)
    stub = SimpleNamespace(vae=model, _patchify_latents=Flux2Pipeline._patchify_latents)
    assert (vae.channels, vae.downsample, z.shape) == (16, 4, (2, 16, 8, 8))
    torch.testing.assert_close(z, Flux2Pipeline._encode_vae_image(stub, x, None))
    std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    latents = Flux2Pipeline._unpatchify_latents(z * std + model.bn.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(vae.decode(z), model.decode(latents).sample.clamp(-1, 1))


@torch.no_grad()
def test_hunyuan_image_is_scaled(tmp_path: Path, x: torch.Tensor) -> None:
    from diffusers import AutoencoderKLHunyuanImage

    torch.manual_seed(5)
    model = AutoencoderKLHunyuanImage(3, 3, 4, (32, 32), 1, 2, 32, scaling_factor=0.7).eval()
    model.save_pretrained(tmp_path)
    vae = autoencoder(str(tmp_path))
    assert (vae.channels, vae.downsample) == (4, 2)
    torch.testing.assert_close(vae.encode(x), model.encode(x).latent_dist.mean * 0.7)


@torch.no_grad()
def test_sd3s_shift_is_that_of_its_pipeline(folder: Path, direct: torch.nn.Module, x: torch.Tensor) -> None:
    from diffusers import FluxImg2ImgPipeline

    stub = SimpleNamespace(vae=direct)
    expected = FluxImg2ImgPipeline._encode_vae_image(stub, x, torch.Generator().manual_seed(5))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(autoencoder(str(folder)).encode(x, noise), expected)
