"""What can be set, and what cannot: every option of every stage has a range, and holds to it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cli
from pipeline.config import STAGES, LaunchConfig, StatusConfig
from pipeline.options import (
    ConfigError,
    check_value,
    default_value,
    list_items,
    shown,
)

CONFIGS: dict[str, type] = {**STAGES, "submit": LaunchConfig, "status": StatusConfig}
EVERY = [(name, field) for name, cls in CONFIGS.items() for field in fields(cls)]
NUMERIC = [(name, field) for name, field in EVERY if "int" in str(field.type) or "float" in str(field.type)]


def required(cls: type) -> dict[str, str]:
    return {f.name: "x" for f in fields(cls) if default_value(f) is f.default and f.default is not f.default_factory}


def config_with(cls: type, **values: Any) -> Any:
    missing = {f.name: "x" for f in fields(cls) if not isinstance(default_value(f), str | int | float | bool | tuple)}
    return cli.build(cls, {**missing, **values})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_has_bounds_and_its_default_meets_them(name: str) -> None:
    without = [f.name for other, f in NUMERIC if other == name and not f.metadata["bounds"]]
    assert not without, f"{name}: declare ge=, gt=, le= or lt= for {', '.join(without)}"
    assert config_with(CONFIGS[name])


def test_every_value_in_the_shipped_yaml_files_is_in_its_range() -> None:
    for path in sorted((cli.CONF / "dataset").glob("*.yaml")):
        values = cli.dataset_settings(path.stem)
        parts = {key: values.get(key) or {} for key in ("splits", "subsets")}
        for split in parts["splits"] or ["train"]:
            for subset in ("", *parts["subsets"]):
                for stage in ("download", "filter", "shard", "precompute", "train"):
                    chosen = cli.chosen(values, split, subset, "")
                    assert cli.build(STAGES[stage], cli.select(chosen, stage, ""))
    for path in (cli.CONF / "recipe").glob("*.yaml"):
        for phase in cli.phases_of(path.stem):
            assert cli.build(STAGES["train"], cli.recipe_settings(path.stem, phase))


NONSENSE = st.one_of(
    st.sampled_from(
        ["-1", "nan", "inf", "-inf", "1e400", "", "[]", "[1,2,3]", "true", "None", "${x}", "???", "[", '"', "0x10", "١"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.lists(st.text(max_size=5), max_size=4).map(shown),
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nonsense_is_one_line_that_names_the_option(name: str, data: st.DataObject) -> None:
    """Whatever is written, a config comes out whose values are in their ranges, or an error in one line."""
    cls = CONFIGS[name]
    field = data.draw(st.sampled_from(fields(cls)))
    text = data.draw(NONSENSE)
    try:
        config = config_with(cls, **{field.name: text})
    except ConfigError as error:
        assert field.name in str(error) and "\n" not in str(error)
        return
    for one in fields(cls):
        check_value(one, getattr(config, one.name))
    assert cli.build(cls, {one.name: shown(getattr(config, one.name)) for one in fields(cls)}) == config


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        *(("train", text) for text in ("lr=-1", "lr=nan", "lr=0", "dropout=2", "valid_fraction=1.5", "threads=-1")),
        *(("train", text) for text in ("clip_norm=-1", "steps=0", "batch_size=0", "loggers=[tensorbord]")),
        *(("download", text) for text in ("fraction=7", "fraction=0", "max_failed_fraction=-1", "retries=-1")),
        *(("filter", text) for text in ("decode_timeout=-1", "workers=-1", "workers=many", "max_aspect_ratio=0.5")),
        *(("feidegger", text) for text in ("batch_size=-1", "image_size=[3]", "image_size=[0,0]", "valid_fraction=1")),
        *(("shard", text) for text in ("shape=[3]", "quality=0", "im_mode=CMYK", "shard_bytes=0")),
        *(("precompute", text) for text in ("batch_size=0", "batch_size=-1", "batch_size=all", "workers=-2")),
        *(("submit", text) for text in ("ranks=0", "nodes=0", "array=-1", "signal_seconds=0")),
        *(("status", text) for text in ("every=0", "port=65536", "lines=0")),
    ],
)
def test_out_of_range_is_refused_before_the_work(stage: str, setting: str) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"^{name}="):
        config_with(CONFIGS[stage], **{name: value})


def test_a_config_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size=0: must be at least 1"):
        STAGES["train"](batch_size=0)


def test_text_or_a_number() -> None:
    for value in ("auto", "0", "12"):
        assert config_with(STAGES["filter"], workers=value).workers == value
    with pytest.raises(ConfigError, match=r"workers=some: must be auto or a whole number of at least 0, at most 1024"):
        config_with(STAGES["filter"], workers="some")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        ("[]", []),
        ("a", ["a"]),
        ("[a,b]", ["a", "b"]),
        ("a, b", ["a", "b"]),
        ('["http://h/x?sig=a,b", c]', ["http://h/x?sig=a,b", "c"]),
        ("['a cat, on a mat','b']", ["a cat, on a mat", "b"]),
        ("[it's,dogs']", ["it's", "dogs'"]),
        (r'["say \"a, b\""]', ['say "a, b"']),
        ("[,x]", ["", "x"]),
    ],
)
def test_a_list_keeps_what_is_quoted(text: str, items: list[str]) -> None:
    assert list_items(text) == items
    assert list_items(shown(items)) == items


@pytest.mark.parametrize("text", ['["a]', "['a,b]", '["a"b]', '["a" "b"]'])
def test_quotes_that_do_not_match_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts=.*(quote)"):
        cli.load("generate", [f"prompts={text}"])


@given(st.lists(st.text(max_size=12), max_size=5))
def test_any_list_survives_being_written_and_read(items: list[str]) -> None:
    assert list_items(shown(items)) == [*items]


def test_several_words_after_a_key_are_one_item_each() -> None:
    config = cli.load("generate", ["--prompts", "a cat, on a mat", "a dog"])
    assert config.prompts == ("a cat, on a mat", "a dog")
    assert cli.load("generate", cli.arguments_of(config)) == config


def test_a_list_in_a_yaml_file_keeps_its_commas(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('source: url_list\nurls: ["http://h/list.csv?sig=a,b", http://h/2.csv]\n')
    assert cli.load("download", [f"dataset={path}"]).urls == ("http://h/list.csv?sig=a,b", "http://h/2.csv")
