"""Each score says what its name says, on images and captions made for it."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from pipeline.config.options import ConfigError
from pipeline.curation.scorers import Scorer, get_scorer, get_scorers, scorer
from pipeline.curation.scorers import caption_scores as text
from pipeline.curation.scorers import pixels as look
from pipeline.curation.scorers.layout import ScoreLayout
from pipeline.curation.scorers.pixels import View
from pipeline.encoders.crop import Crop
from pipeline.imaging.headers import probe
from pipeline.imaging.transform import decode
from pipeline.registry import scorers


def view(image: Image.Image, format: str = "PNG", **options: int) -> View:
    file = BytesIO()
    image.save(file, format, **options)
    return View(np.asarray(image.convert("RGB")), file.getvalue(), probe(file.getvalue()))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
    noise = random.normal(0, 10, (240, 320, 1))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def test_a_blurred_image_is_less_sharp(photo: Image.Image) -> None:
    blurred = photo.filter(ImageFilter.GaussianBlur(3))
    assert look.sharpness(view(blurred)) < 0.05 * look.sharpness(view(photo))


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    grey = np.random.default_rng(1).integers(0, 256, (40, 50), np.uint8)
    expected = scipy.laplace(grey.astype(np.float64))[1:-1, 1:-1].var()
    assert look.sharpness(view(Image.fromarray(grey))) == pytest.approx(expected, rel=1e-5)


def test_exposure_and_contrast(photo: Image.Image) -> None:
    black, half = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")
    half.paste(black.crop((0, 0, 16, 32)), (0, 0))
    assert (look.brightness(view(black)), look.clipped(view(black)), look.entropy(view(black))) == (0, 1, 0)
    assert look.contrast(view(half)) == pytest.approx(0.5)
    assert look.entropy(view(half)) == pytest.approx(1)
    grey = np.asarray(photo.convert("L")) / 255
    assert look.contrast(view(photo)) == pytest.approx(grey.std(), abs=1e-6)
    assert look.entropy(view(photo)) > 6


def test_a_letterbox_is_a_border(photo: Image.Image) -> None:
    boxed = Image.new("RGB", (320, 320))
    boxed.paste(photo, (0, 40))
    assert look.border(view(boxed)) == pytest.approx(0.25, abs=0.01)
    assert look.border(view(photo)) == 0
    assert look.border(view(Image.new("RGB", (20, 20), "red"))) == 1


def test_an_image_that_is_in_focus_in_one_place_is_locally_sharp(photo: Image.Image) -> None:
    blurred = photo.filter(ImageFilter.GaussianBlur(6))
    focused = blurred.copy()
    focused.paste(photo.crop((80, 60, 160, 120)), (80, 60))
    assert look.local_sharpness(view(focused)) > 10 * look.local_sharpness(view(blurred))


def test_a_collage_has_a_seam_and_a_photo_has_none(photo: Image.Image) -> None:
    collage = photo.copy()
    collage.paste(photo.transpose(Image.Transpose.ROTATE_180).point(lambda level: 255 - level), (160, 0))
    assert look.seam(view(collage)) > 0.6 > 0.3 > look.seam(view(photo))


def test_text_on_a_plain_ground_is_flat(photo: Image.Image) -> None:
    page = Image.new("RGB", (320, 240), "white")
    for line in range(12):
        ImageDraw.Draw(page).text((10, 10 + 18 * line), "the quick brown fox jumps over the lazy dog", "black")
    assert look.flat_share(view(page)) > 0.7 > 0.3 > look.flat_share(view(photo))


def test_colour(photo: Image.Image) -> None:
    grey = photo.convert("L").convert("RGB")
    assert look.colourfulness(view(grey)) == 0 and look.grey_share(view(grey)) == 1
    assert look.colourfulness(view(photo)) > 30 and look.grey_share(view(photo)) < 0.2


@pytest.mark.parametrize("quality", [20, 50, 75, 90, 98])
def test_the_quality_of_a_jpeg_is_read_from_its_table(photo: Image.Image, quality: int) -> None:
    assert look.jpeg_quality(view(photo, "JPEG", quality=quality)) == pytest.approx(quality, abs=1.5)
    assert np.isnan(look.jpeg_quality(view(photo)))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (5, 700)])
def test_every_score_is_a_number_for_tiny_and_thin_images(size: tuple[int, int]) -> None:
    small = view(Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)))
    for name, builtin in scorers.builtin.items():
        if builtin.module == look.__name__:
            assert np.isfinite(get_scorer(name).function(small)) or name == "jpeg_quality", name


def test_captions() -> None:
    assert (text.caption_length("zwei Hunde"), text.caption_words("zwei  Hunde ")) == (10, 2)
    assert text.caption_repetition("buy now " * 10) > 0.8
    assert text.caption_repetition("a dog that runs along the beach") == 0
    assert text.caption_nonwords("DSC_0042.JPG") == text.caption_nonwords("") == 1
    assert text.caption_nonwords("Two dogs, one ball: 12 metres apart.") == 0
    assert text.language("Ein Hund läuft am Strand entlang und bellt") == "de"
    assert text.language_probability("Ein Hund läuft am Strand entlang und bellt") > 0.9
    assert text.language_probability("A quetzal.") < 0.5
    assert (text.language("12 34"), text.language_probability("12 34")) == ("", 0)


def test_a_slot_has_what_the_functions_say_and_what_models_take(photo: Image.Image) -> None:
    given, crops = view(photo, "JPEG", quality=90), (Crop(32), Crop(20, squash=True))
    found = View(decode(given.data, given.header), given.data, given.header)
    layout = ScoreLayout(("sharpness", "seam"), crops)
    slots = np.full((2, layout.starts[-1]), 9, np.uint8)
    assert layout.fill(slots[0], found.data, "key") == (*photo.size, "", "")
    assert layout.scores(slots)[0].tolist() == [look.sharpness(found), look.seam(found)]
    for crop, start in zip(crops, layout.starts[1:], strict=False):
        cut = slots[0, start : start + crop.bytes].reshape(crop.edge, crop.edge, 3)
        assert np.array_equal(cut, crop.cut(found.pixels))
    width, height, reason, _ = layout.fill(slots[1], found.data[:300], "key")
    assert (width, height, reason) == (0, 0, "truncated") and not slots[1].any()


def test_an_image_that_takes_too_much_memory_has_a_reason(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "added", dict(scorers.added))

    @scorer("pixels")
    def greedy(found: View) -> float:
        raise MemoryError

    layout = ScoreLayout(("greedy",))
    said = layout.fill(np.zeros(layout.starts[-1], np.uint8), view(photo).data, "key")
    assert said == (0, 0, "out_of_memory", "")


def test_a_scorer_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "added", dict(scorers.added))

    @scorer("pixels", revision=3)
    def reds(found: View) -> float:
        return float(found.pixels[..., 0].mean())

    assert get_scorer("reds") == Scorer("reds", "pixels", "float", reds, 3)
    assert get_scorer("reds").describe() == "version 3"
    with pytest.raises(ConfigError, match="known|did you mean"):
        get_scorer("blues")
    with pytest.raises(ConfigError, match="sharpness: there is another scorers of this name, built in"):

        @scorer("pixels")
        def sharpness(found: View) -> float:
            return 0.0

    with pytest.raises(ConfigError, match="greens: type=str: expected float"):

        @scorer("pixels", "str")
        def greens(found: View) -> str:
            return "green"


def test_each_name_is_registered_by_the_module_that_the_table_says() -> None:
    for name, builtin in scorers.builtin.items():
        if builtin.module != "pipeline.encoders.model_scores":
            found = get_scorer(name)
            assert found.name == name and found.function.__module__ == builtin.module
    with pytest.raises(ConfigError, match="accepts nothing after a colon"):
        get_scorer("sharpness:x")
    with pytest.raises(ConfigError, match="name its model, as head:<model>"):
        get_scorer("head")
    assert [*get_scorers(["seam", "entropy"])] == ["seam", "entropy"]


def test_an_optional_package_that_is_not_installed_is_named() -> None:
    lacking = Scorer("guess", "caption", "str", str, package="no-such-package")
    with pytest.raises(ConfigError, match=r"scorers=guess needs the package no-such-package: pip install"):
        lacking.describe()
    assert "py3langid" in get_scorer("language").describe()
