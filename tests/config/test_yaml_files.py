"""YAML files as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import cli
from pipeline.config.options import ConfigError
from pipeline.config.yaml_files import read_settings


def test_no_is_a_word_and_a_time_is_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("resize_mode: no\nskip_reencode: no\nsplit_values: [no, 01, 1]\ntime: 12:30:00\nlr: 1e-3\n")
    assert read_settings(path)["time"] == "12:30:00"
    path.write_text("filter: {resize_mode: no, skip_reencode: no}\ntrain: {lr: 1e-3}\n")
    config = cli.load("filter", [f"dataset={path}"])
    assert (config.resize_mode, config.skip_reencode) == ("no", False)
    assert cli.load("train", [f"dataset={path}"]).lr == 1e-3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_yaml_knows_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("contact: a@b.org # é\n".encode(encoding))
    assert read_settings(path) == {"contact": "a@b.org"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("contact: é".encode("latin-1"), "not YAML"),
        ("contact: é".encode("utf-16-be"), "not YAML"),
        (b"a: 1\na: 2\n", "a is given more than once"),
        (b"[1", "not YAML"),
        (b"- a\n", "expected a mapping"),
        (b"text", "expected a mapping"),
        (b"a: !!python/object/apply:os.system [x]", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"[" * 5000, "not YAML"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_files_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for read in (lambda: cli.load("filter", [f"dataset={path}"]), lambda: read_settings(path)):
        with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{message}") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("min_image_sizes: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key") as error:
        cli.load("filter", [f"dataset={path}"])
    assert ".yaml.yaml" not in str(error.value)


def test_an_empty_file_has_no_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert read_settings(tmp_path / "mine.yaml") == {}
