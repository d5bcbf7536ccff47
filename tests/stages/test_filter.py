"""stage=filter: bad images cost a row each, whatever they do to the decoder; its options are the image path's."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from fake_stage import assert_sound, outcomes
from PIL import Image
from stages.conftest import digests, run_stage

from launch import precheck
from launch.finished import already_done
from launch.job import Job
from pipeline.config.schema import ConfigError, FilterConfig
from pipeline.imaging import transform


def folder_of_images(place: Path, count: int, **reds: int) -> Path:
    """PNGs of noise; `n<number>=red` sets the red of the first pixel of one."""
    place.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(3, 256, (24, 32, 3), np.uint8)
        pixels[0, 0, 0] = reds.get(f"n{number}", 3)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return place


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 40)
    run_stage("download", source="image_folder", input=str(source), output=str(tmp_path / "download"))
    for workers in (0, 1, 3):
        settings = {"max_image_size": 16, "min_image_size": 8, "workers": str(workers)}
        run_stage("filter", input=str(tmp_path / "download"), output=str(tmp_path / str(workers)), **settings)
    assert digests(tmp_path / "0") == digests(tmp_path / "1") == digests(tmp_path / "3")


def test_lists_of_keys_keep_and_deny_and_are_part_of_the_identity(tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 12)
    run_stage("download", source="image_folder", input=str(source), output=str(tmp_path / "download"))
    keep, deny = tmp_path / "keep.txt", tmp_path / "deny.txt"
    keep.write_text("".join(f"{number:03d}-png\n" for number in range(8)))
    deny.write_text("003-png\n011-png\n")
    settings = {"input": str(tmp_path / "download"), "min_image_size": 8, "workers": "0", "deny_keys": str(deny)}
    output = tmp_path / "filter"
    run_stage("filter", output=str(output), keep_keys=str(keep), **settings)
    said = outcomes(output)
    assert [key for key, what in said.items() if what == "kept:"] == [f"{n:03d}-png" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert said["003-png"] == "dropped:key_denied"
    assert said["011-png"] == said["008-png"] == "dropped:key_not_kept"
    assert_sound(output)
    moved = keep.rename(tmp_path / "moved.txt")
    run_stage("filter", output=str(output), keep_keys=str(moved), **settings)  # the same list
    given = {"output": str(output), "keep_keys": str(moved), **settings}
    job = Job.of("filter", [f"{name}={value}" for name, value in given.items()])
    precheck.check(job, ())
    assert already_done(job)
    moved.write_text("000-png\n")
    assert not already_done(job)
    with pytest.raises(ConfigError, match="keep_keys=xxh3"):
        precheck.check(job, ())
    with pytest.raises(ConfigError, match="keep_keys=xxh3"):
        run_stage("filter", output=str(output), keep_keys=str(moved), **settings)
    with pytest.raises(ConfigError, match="nowhere"):
        run_stage("filter", output=str(tmp_path / "other"), keep_keys="nowhere", **settings)


def test_every_rule_is_an_option_with_the_same_default() -> None:
    options = {field.name: field for field in fields(FilterConfig)}
    for rule in fields(transform.Rules):
        if rule.name != "scaled_decode":
            assert options[rule.name].default == rule.default, rule.name
            assert options[rule.name].metadata["identity"]
    for name, known in (
        ("resize_mode", transform.RESIZE_MODES),
        ("encode_format", transform.ENCODE_FORMATS),
        ("validate", transform.VALIDATIONS),
        ("icc", transform.ICC_MODES),
        ("resize", tuple(transform.RESIZERS)),
        ("interpolation", transform.INTERPOLATIONS),
    ):
        assert set(options[name].metadata["choices"]) == set(known)
