"""Models that the Hub does not have, or does not send: one error in good time, and a line that says what is tried."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import STALL, FakeHub

from pipeline.config.schema import ConfigError
from pipeline.encoders.from_hub import expect_model
from pipeline.encoders.tokenizer import pretrained

SETTING = "vae=nosuch/model"


@pytest.fixture(autouse=True)
def cache(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models, and a short patience."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    return tmp_path / "models"


@pytest.fixture
def stalled(hub: FakeHub) -> None:
    hub.fault = lambda method, path: STALL


def test_what_is_downloaded_is_said_and_a_missing_repository_is_named(
    hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "pipeline"),
        pytest.raises(
            ConfigError,
            match=rf"^{SETTING}: cannot be loaded: .* there is no such repository.*HF_TOKEN.* path of a folder",
        ),
    ):
        expect_model(SETTING, "nosuch/model@v1")
    assert f"{SETTING}: downloading nosuch/model@v1 from the Hub" in caplog.text
    assert len(hub.requests) == 1


def test_a_hub_that_never_answers_is_an_error(hub: FakeHub, stalled: None) -> None:
    with pytest.raises(ConfigError, match=rf"^{SETTING}: .*the Hub does not answer .*HF_ENDPOINT.* path of a folder"):
        expect_model(SETTING, "nosuch/model")
    assert len(hub.requests) == 1


def _vae() -> object:
    from pipeline.encoders.base import autoencoder

    return autoencoder("nosuch/model")


def _text(kind: str) -> Callable[[], object]:
    def make() -> object:
        from pipeline.encoders.base import text_encoder

        return text_encoder(f"{kind}:nosuch/model")

    return make


def _images(kind: str) -> Callable[[], object]:
    def make() -> object:
        from pipeline.encoders.base import image_encoder

        return image_encoder(f"{kind}:nosuch/model")

    return make


@pytest.mark.parametrize(
    "make",
    [
        _vae,
        *map(_text, ("clip", "t5", "hf", "openclip:hf-hub")),
        *map(_images, ("clip", "hf", "openclip:hf-hub")),
        lambda: pretrained("nosuch/model"),
    ],
)
def test_every_setting_that_names_a_model_asks_once(hub: FakeHub, stalled: None, make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"^\w+=.*nosuch/model: .*the Hub does not answer"):
        make()
    assert len(hub.requests) == 1


def test_a_hub_that_is_busy_is_left_to_the_library(hub: FakeHub) -> None:
    hub.fault = lambda method, path: 503
    expect_model(SETTING, "nosuch/model")


def test_the_hub_is_not_asked_for_folders_and_cached_models(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    (cache / "models--nosuch--model/snapshots").mkdir(parents=True)
    expect_model(SETTING, "nosuch/model")
    expect_model(SETTING, str(tmp_path))
    assert not hub.requests
