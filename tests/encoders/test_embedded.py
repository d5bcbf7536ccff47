"""Encoders without weights: recognisable images, exact round trips, the same numbers everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.schema import ConfigError
from pipeline.encoders.base import autoencoder, image_encoder, posterior_noise, text_encoder, to_pixels
from pipeline.encoders.crop import Crop
from pipeline.encoders.preprocessing import fit
from pipeline.sources.shapes_scene import render, sample_scene

NAMES = ("embedded", "embedded16")


def pictures(count: int = 32, edge: int = 64) -> list[np.ndarray]:
    return [render(sample_scene(0, index), edge) for index in range(count)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * float(torch.log10((a - b).square().mean() / 4))


@pytest.mark.parametrize(("name", "channels", "least"), [("embedded", 4, 24.5), ("embedded16", 16, 29.0)])
def test_decoded_pictures_are_close_to_the_originals(name: str, channels: int, least: float) -> None:
    vae = autoencoder(name)
    x = vae.preprocess(pictures(), 64)
    z = vae.encode(x)
    assert z.shape == (32, channels, 8, 8) and z.dtype == torch.float32
    assert vae.decode(z).shape == x.shape
    assert psnr(x, vae.decode(z)) > least


@pytest.mark.parametrize("name", NAMES)
def test_encoding_a_decoded_picture_gives_the_same_latents(name: str) -> None:
    vae = autoencoder(name)
    z = 0.2 * vae.encode(vae.preprocess(pictures(4), 64))  # faint, so that nothing is clipped
    torch.testing.assert_close(vae.encode(vae.decode(z)), z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_latents_survive_half_precision(name: str) -> None:
    vae = autoencoder(name)
    z = vae.encode(vae.preprocess(pictures(4), 64))
    assert psnr(vae.decode(z), vae.decode(z.half())) > 60


def test_the_first_channel_is_brightness() -> None:
    vae = autoencoder("embedded16")
    grey = torch.full((1, 3, 16, 24), 0.5)
    z = vae.encode(grey)
    assert z.shape == (1, 16, 2, 3)
    torch.testing.assert_close(z[:, 0], torch.full((1, 2, 3), 8 * 0.5))
    assert float(z[:, 1:].abs().max()) < 1e-5
    torch.testing.assert_close(vae.decode(z), grey, atol=1e-4, rtol=0)


def test_results_are_the_same_bits_in_every_run() -> None:
    vae = autoencoder("embedded16")
    x = vae.preprocess(pictures(7), 64)
    assert torch.equal(vae.encode(x), autoencoder("embedded16").encode(x.clone()))
    assert torch.equal(vae.encode(x, noise=torch.randn(7, 16, 8, 8)), vae.encode(x))


def test_pictures_that_blocks_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match="20 x 16 pixels: both must be multiples of 8"):
        autoencoder("embedded").encode(torch.zeros(1, 3, 16, 20))


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_gets_plain_values(name: str) -> None:
    import json

    said = autoencoder(name).describe()
    assert json.loads(json.dumps(said)) == said
    assert said["name"] == name and said["channels"] in (4, 16) and said["downsample"] == 8


# ---- images of any size


@pytest.mark.parametrize(("height", "width"), [(100, 70), (70, 100), (64, 64), (64, 99), (33, 40), (301, 64)])
def test_preprocessing_equals_torchvisions(height: int, width: int) -> None:
    from torchvision import transforms

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    steps = [
        transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(64),
        transforms.ToTensor(),
    ]
    normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
    x = autoencoder("embedded").preprocess([picture], 64)[0]
    pillows = transforms.Compose([*steps, normalise])(Image.fromarray(picture))
    torch.testing.assert_close(x, pillows, atol=2.01 / 127.5, rtol=0)


def test_a_picture_of_the_right_size_keeps_its_pixels() -> None:
    picture = pictures(1)[0]
    assert np.array_equal(fit([picture], Crop(64))[0].numpy(), picture)
    assert np.array_equal(to_pixels(autoencoder("embedded").preprocess([picture], 64))[0], picture)


def test_noise_is_keyed_by_the_sample() -> None:
    a = posterior_noise(0, ["x", "y"], 64, (4, 8, 8))
    b = posterior_noise(0, ["y"], 64, (4, 8, 8))
    assert torch.equal(a[1:], b)
    assert not torch.equal(b, posterior_noise(1, ["y"], 64, (4, 8, 8)))
    assert not torch.equal(b, posterior_noise(0, ["y"], 128, (4, 8, 8)))


# ---- text


def test_captions_become_states_of_a_fixed_size() -> None:
    encoder = text_encoder("embedded")
    states = encoder.encode(["a small red circle", "", "word " * 40])
    assert states.shape == (3, encoder.length, encoder.width) == (3, 16, 64)
    assert states.dtype == torch.float32
    assert states[0, 4:].abs().max() == 0 and states[0, :4].abs().min(1).values.max() > 0
    assert states[1].abs().max() == 0
    assert states[2].abs().amax(1).min() > 0


def test_case_and_punctuation_do_not_matter_but_order_does() -> None:
    encoder = text_encoder("embedded")
    plain, loud, turned = encoder.encode(["a red dog", "A red -- DOG!", "red a dog"])
    assert torch.equal(plain, loud)
    assert not torch.equal(plain, turned)


def test_different_words_are_far_apart() -> None:
    words = [
        "red",
        "green",
        "blue",
        "yellow",
        "circle",
        "square",
        "triangle",
        "small",
        "large",
        "above",
        "ünïcödé",
        "数",
    ]
    first = torch.stack(list(text_encoder("embedded").encode(words)))[:, 0]
    first = first - first.mean(0)
    cosine = torch.nn.functional.cosine_similarity(first[:, None], first[None], dim=-1)
    assert float((cosine - torch.eye(len(words))).max()) < 0.45


def test_a_words_signs_are_the_same_everywhere() -> None:
    states = text_encoder("embedded").encode(["a small red circle"])
    signs = "".join("-+"[int(value > 0)] for value in states[0, 1])  # positions add less than one
    assert signs == "-++----++-++-+-------+++++-+--+--+++--+-++--+-+-+++-+---+-----++"


# ---- names


def test_embeddings_are_near_for_pictures_that_look_alike() -> None:
    encoder = image_encoder("embedded")
    scenes = pictures(6)
    e = encoder.encode(
        encoder.preprocess([*scenes, *(np.clip(s.astype(int) + 9, 0, 255).astype(np.uint8) for s in scenes)])
    )
    assert e.shape == (12, encoder.width)
    torch.testing.assert_close(e.square().sum(1), torch.ones(12))
    assert (e[:6] @ e[6:].T).argmax(1).tolist() == list(range(6))


def test_wrong_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="vae=embeded: did you mean embedded"):
        autoencoder("embeded")
    with pytest.raises(ConfigError, match=r"text_encoder=open_clip:x: did you mean openclip or clip\?"):
        text_encoder("open_clip:x")
    with pytest.raises(ConfigError, match=r"text_encoder=clip:x#length=3: clip takes layer after the #"):
        text_encoder("clip:x#length=3")
    with pytest.raises(ConfigError, match=r"layer=first: known: last, penultimate"):
        text_encoder("clip:x#layer=first")
    with pytest.raises(ConfigError, match=r"image_encoder=t5:x: known: clip, embedded, hf, openclip, program"):
        image_encoder("t5:x")
    with pytest.raises(ConfigError, match="model_dtype=bf16: did you mean"):
        autoencoder("embedded", dtype="bf16")
