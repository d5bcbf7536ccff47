"""Drawn scenes: one caption for each meaning, the same image everywhere, nothing that was to be left out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import shapes_scene as scenes
from pipeline.sources.shapes_scene import Scene, Thing

INDEX = st.integers(0, 2**40)
OBJECTS = st.sampled_from([0, 1, 2])


@given(st.integers(-(2**63), 2**63), INDEX, OBJECTS)
def test_a_scene_depends_on_seed_and_index_alone(seed: int, index: int, objects: int) -> None:
    first = scenes.sample_scene(seed, index, objects)
    scenes.sample_scene(seed + 1, index + 1, objects)
    assert scenes.sample_scene(seed, index, objects) == first


def meaning(scene: Scene) -> tuple[object, ...]:
    """What is where, with "below" and "right of" turned round, without the caption's help."""
    if len(scene.things) == 1:
        return (scene.things[0].shape, scene.things[0].colour, scene.things[0].size)
    first, second = scene.things
    down = abs(first.cy - second.cy) > abs(first.cx - second.cx)
    ordered = sorted(scene.things, key=lambda thing: thing.cy if down else thing.cx)
    return (down, *((thing.shape, thing.colour) for thing in ordered))


def test_captions_and_meanings_go_one_to_one() -> None:
    of_caption: dict[str, set[object]] = {}
    of_meaning: dict[object, set[str]] = {}
    for index in range(3000):
        scene = scenes.sample_scene(1, index, objects=0)
        of_caption.setdefault(scenes.caption(scene), set()).add(meaning(scene))
        of_meaning.setdefault(meaning(scene), set()).add(scenes.caption(scene))
    assert all(len(found) == 1 for found in (*of_caption.values(), *of_meaning.values()))


def test_captions_read_as_promised() -> None:
    red, blue = Thing("circle", "red", ""), Thing("square", "blue", "")
    assert scenes.caption(Scene((Thing("circle", "red", "small"),))) == "a small red circle"
    assert scenes.caption(Scene((red, blue), "above")) == "a red circle above a blue square"
    assert scenes.caption(Scene((red, blue), "left of")) == "a red circle left of a blue square"


@given(INDEX, OBJECTS)
def test_a_caption_can_be_parsed_again(index: int, objects: int) -> None:
    scene = scenes.sample_scene(0, index, objects, holdout=False)
    parsed = scenes.parse_caption(scenes.caption(scene))
    assert parsed is not None
    assert scenes.caption(parsed) == scenes.caption(scene)


@pytest.mark.parametrize("text", ["", "a red", "a pink circle", "a red circle below a blue square", "two red circles"])
def test_other_captions_are_not_parsed(text: str) -> None:
    assert scenes.parse_caption(text) is None


def test_held_out_pairs_do_not_occur_and_all_others_do() -> None:
    drawn = [scenes.sample_scene(0, index, objects=0) for index in range(1500)]
    pairs = {(thing.colour, thing.shape) for scene in drawn for thing in scene.things}
    assert pairs == set(scenes.seen_pairs())
    assert len(pairs) == 15
    everything = [scenes.sample_scene(0, index, objects=1, holdout=False) for index in range(600)]
    assert {(s.things[0].colour, s.things[0].shape) for s in everything} == set(scenes.all_pairs())


def test_each_held_out_colour_and_shape_is_seen_in_other_pairs() -> None:
    colours, shapes = zip(*scenes.seen_pairs(), strict=True)
    assert set(colours) == set(scenes.COLOURS)
    assert set(shapes) == set(scenes.SHAPES)


def test_prompts_are_fixed_and_cover_what_was_seen() -> None:
    prompts = scenes.fixed_prompts()
    assert len(prompts) == 32 and len(set(prompts)) == 30
    assert not set(prompts) & set(scenes.single_captions(held_out=True))
    assert len(scenes.single_captions(held_out=True)) == 6


@settings(max_examples=50)
@given(INDEX, OBJECTS)
def test_objects_lie_inside_the_picture_and_do_not_touch(index: int, objects: int) -> None:
    scene = scenes.sample_scene(0, index, objects, holdout=False)
    covers = [scenes.coverage(t.shape, t.cx * 96, t.cy * 96, t.radius * 96, (96, 96)) for t in scene.things]
    for cover in covers:
        assert not cover[[0, -1]].any() and not cover[:, [0, -1]].any()
    assert np.prod(covers, axis=0).max() == 0 or len(covers) == 1


def test_shapes_of_one_size_cover_the_same_area() -> None:
    areas = [scenes.coverage(shape, 50.3, 55.1, 20.0, (100, 100)).sum() for shape in scenes.SHAPES]
    assert areas == pytest.approx([np.pi * 400] * 3, rel=0.01)


@pytest.mark.parametrize("size", [8, 64, 100, 333])
def test_a_picture_has_any_size_and_the_same_content(size: int) -> None:
    picture = scenes.render(scenes.sample_scene(0, 0), size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    large = scenes.render(scenes.sample_scene(0, 0), 4 * size).astype(float)
    shrunk = large.reshape(size, 4, size, 4, 3).mean((1, 3))
    assert np.abs(shrunk - picture).mean() < 4


def test_edges_are_antialiased() -> None:
    picture = scenes.render(Scene((Thing("circle", "blue", "", 0.5, 0.5, 0.2),)), 64)
    assert len(np.unique(picture[..., 0])) >= 8


def test_pictures_are_the_same_on_every_platform() -> None:
    pictures = [scenes.render(scenes.sample_scene(7, index, objects=0, holdout=False), 64) for index in range(20)]
    assert hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()[:16] == "fa967ee201fb4979"


def test_other_numbers_of_objects_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="objects=3"):
        scenes.sample_scene(0, 0, objects=3)
    with pytest.raises(ValueError, match="unknown shape 'star'; known: circle"):
        scenes.coverage("star", 1, 1, 1, (2, 2))
