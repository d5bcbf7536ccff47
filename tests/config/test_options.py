"""What can be set, and what cannot: every option of every stage has a range, and holds to it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages.conftest import run_stage

from launch.request import read
from launch.submit import jobs_of
from pipeline.config import cli
from pipeline.config.options import (
    ConfigError,
    Options,
    check_value,
    condition_names,
    condition_of,
    condition_text,
    default_value,
    holds,
    list_items,
    option,
    require_files,
    shown,
)
from pipeline.config.schema import STAGES, LaunchConfig, StatusConfig

CONFIGS: dict[str, type] = {**STAGES, "submit": LaunchConfig, "status": StatusConfig}
EVERY = [(name, field) for name, cls in CONFIGS.items() for field in fields(cls)]
NUMERIC = [(name, field) for name, field in EVERY if "int" in str(field.type) or "float" in str(field.type)]


def required(cls: type) -> dict[str, str]:
    return {f.name: "x" for f in fields(cls) if default_value(f) is MISSING}


def config_with(cls: type, **values: Any) -> Any:
    return cli.build(cls, {**required(cls), **values})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_has_bounds_and_its_default_meets_them(name: str) -> None:
    without = [f.name for other, f in NUMERIC if other == name and not f.metadata["bounds"]]
    assert not without, f"{name}: declare ge=, gt=, le= or lt= for {', '.join(without)}"
    assert config_with(CONFIGS[name])


def test_every_value_in_the_shipped_yaml_files_is_in_its_range_and_has_an_effect() -> None:
    for path in sorted((cli.CONF / "dataset").glob("*.yaml")):
        values = cli.dataset_settings(path.stem)
        for split in values.get("splits") or ["train"]:
            for subset in ("", *(values.get("subsets") or {})):
                assert cli.load("download", [f"dataset={path.stem}", f"split={split}", f"subset={subset}"])
    for path in (cli.CONF / "recipe").glob("*.yaml"):
        for phase in cli.phases_of(path.stem):
            settings = cli.recipe_settings(path.stem, phase)
            assert cli.build_given(STAGES["train"], {}, settings)


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


# ---- a setting that has no effect is an error


def other_than_default(field: Any) -> str:
    """A value that the option can have, other than its default, as it is written in a command."""
    default, meta, kind = default_value(field), field.metadata, str(field.type)
    if kind == "bool":
        return str(not default).lower()
    candidates = [choice for choice in meta["choices"] if choice] or [EXISTING.get(field.name, "x")]
    if "int" in kind or "float" in kind or meta["bounds"]:
        step = 1 if "int" in kind or kind == "str" else 0.25
        edges = [meta["bounds"].get(name) for name in ("ge", "gt", "le", "lt")]
        candidates = [shown(edge + sign * step) for edge in edges if edge is not None for sign in (0, 1, -1)]
    length = max(meta["lengths"], default=1)
    for candidate in candidates:
        text = shown([candidate] * length) if kind.startswith("tuple") else str(candidate)
        try:
            value = getattr(cli.build(one_option(field), {field.name: text}), field.name)
        except ConfigError:
            continue
        if value != default:
            return text
    raise AssertionError(f"{field.name}: no other value than the default")


def one_option(field: Any) -> type:
    """A config that has this option alone."""
    meta = {name: field.metadata[name] for name in ("choices", "also", "lengths")}
    default = default_value(field)
    body = {
        "__annotations__": {field.name: field.type},
        field.name: option(default, **meta, **field.metadata["bounds"]),
    }
    return dataclass(frozen=True, kw_only=True)(type("One", (Options,), body))


EXISTING = {"dataset": "mnist", "subset": "small", "recipe": "microdit", "phase": "256-masked"}


def settings_for(cls: type, choice: str) -> dict[str, str]:
    """Settings that meet one of the alternatives of a condition, and what these need themselves."""
    by_name = {f.name: f for f in fields(cls)}
    found: dict[str, str] = {}
    for term in filter(None, choice.split(" and ")):
        name, equals, wanted = term.partition("=")
        if name.startswith("!"):
            continue
        exact = equals and not name.endswith("!")
        name = name.rstrip("!^")
        found = {**settings_for(cls, condition_of(cls, by_name[name]).split(" or ")[0]), **found}
        found[name] = wanted.split("|")[0] if exact else other_than_default(by_name[name])
    return found


CONDITIONAL = [(name, f.name) for name, f in EVERY if condition_of(CONFIGS[name], f)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_condition_names_options_and_values_that_exist(name: str) -> None:
    cls = CONFIGS[name]
    by_name = {f.name: f for f in fields(cls)}
    conditions = {condition_of(cls, f) for f in fields(cls)} - {""}
    terms = {term for condition in conditions for choice in condition.split(" or ") for term in choice.split(" and ")}
    for condition in conditions:
        assert condition_names(condition) <= set(by_name), condition
    for key, value in {(t.partition("=")[0], v) for t in terms for v in t.partition("=")[2].split("|") if v}:
        assert config_with(cls, **{key.rstrip("!^"): value})


@pytest.mark.parametrize(("stage", "name"), [pair for pair in CONDITIONAL if pair[0] not in ("submit", "status")])
def test_a_setting_without_effect_is_refused_and_one_with_effect_is_taken(stage: str, name: str) -> None:
    cls = CONFIGS[stage]
    field = next(f for f in fields(cls) if f.name == name)
    condition = condition_of(cls, field)
    value = other_than_default(field)

    def loads(settings: dict[str, str]) -> bool:
        try:
            cli.load(stage, [f"{key}={text}" for key, text in {**required(cls), **settings, name: value}.items()])
        except ConfigError as error:
            assert str(error).startswith(f"{name}={value} has no effect"), error
            assert condition_text(condition) in str(error)
            return False
        return True

    held = holds(condition, {f.name: default_value(f) for f in fields(cls)})
    assert loads({}) == held
    if not held and condition != "never":
        assert all(loads(settings_for(cls, choice)) for choice in condition.split(" or "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=download", "source=torchvision", "files=[mnist]", "connections=3"], "it needs source=url_list"),
        (["stage=train", "task=diffuse", "mixup=0.2"], "mixup=0.2 has no effect with task=diffuse"),
        (["stage=train", "task=classify", "mix=[a*2]", "data_dir=x", "dataset=digits"], "it needs task=diffuse"),
        (["stage=filter,train", "train.quality=3"], "stage train has no key 'quality'"),
        (["stage=filter", "url_column=2"], "it needs fuse=true and source=url_list"),
        (["stage=shard", "nodes=4"], "nodes=4 has no effect with cluster=local: it needs cluster=slurm"),
        (["stage=shard", "slurm_mail_type=END"], "slurm_mail_type=END has no effect with cluster=local"),
        (["stage=shard", "cluster=slurm", "array_parallelism=4"], "it needs cluster=slurm and array set"),
        (["stage=shard", "cluster=inline", "ranks=2"], "ranks=2 has no effect with cluster=inline"),
    ],
)
def test_submit_refuses_what_has_no_effect(arguments: list[str], message: str) -> None:
    more = [] if any(text.startswith("data_dir") for text in arguments) else ["data_dir=x", "dataset=shapes"]
    with pytest.raises(ConfigError) as error:
        launch = read([*arguments, *more])
        jobs_of(launch.config, launch.settings, launch.requests)
    assert message in str(error.value)


def test_a_setting_goes_to_those_stages_in_which_it_has_an_effect() -> None:
    launch = read(["stage=download,filter", "source=shapes", "count=7", "data_dir=x", "dataset=shapes"])
    download, filtering = jobs_of(launch.config, launch.settings, launch.requests)
    assert "count=7" in download.arguments and "count=7" not in filtering.arguments


def test_a_value_that_is_the_default_is_what_happens_anyway() -> None:
    assert cli.load("train", ["task=diffuse", "mixup=0"]).mixup == 0


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        ("source: image_folder\ndownload: {url_column: u}", [], "mine.yaml: url_column=u has no effect"),
        ("source: image_folder\nurl_column: u", [], "mine.yaml: url_column=u has no effect"),
        ("url_column: u", ["source=url_list"], ""),
        ("source: url_list\ndownload: {url_column: u}", ["source=image_folder"], ""),  # the command has changed it
    ],
)
def test_settings_of_a_yaml_file_have_an_effect_too(
    tmp_path: Path, text: str, command: list[str], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    if not message:
        assert cli.load("download", [f"dataset={path}", *command]).url_column == "u"
        return
    with pytest.raises(ConfigError) as error:
        cli.load("download", [f"dataset={path}", *command])
    assert message in str(error.value)


def test_what_a_file_says_for_training_may_be_overridden() -> None:
    config = cli.load("train", ["dataset=cifar10", "task=diffuse"])
    assert config.mixup > 0 and config.task == "diffuse"


FILES = sorted({(name, f.name) for name, f in EVERY if f.metadata["path"]})


@pytest.mark.parametrize(("stage", "name"), FILES)
def test_a_file_that_a_setting_names_must_be_there(tmp_path: Path, stage: str, name: str) -> None:
    cls = CONFIGS[stage]
    field = next(f for f in fields(cls) if f.name == name)
    settings = {**required(cls), **settings_for(cls, condition_of(cls, field).split(" or ")[0])}

    def check(value: str) -> None:
        require_files(cli.build(cls, {**settings, name: value}))

    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("x")
    kind = field.metadata["path"]
    with pytest.raises(ConfigError, match=rf"^{name}={tmp_path}/nofile.txt: the {kind} does not exist( \(or: .*\))?$"):
        check(f"{tmp_path}/nofile.txt")
    for value in (f"{tmp_path}/file.txt", *field.metadata["words"], "https://example.org/nofile.txt"):
        check(value)
    if kind == "file":
        with pytest.raises(ConfigError, match=f"^{name}={tmp_path}/folder: is a folder, not a file"):
            check(f"{tmp_path}/folder")


def test_a_file_is_looked_for_when_a_stage_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.config_for("takedown", ["takedown=nofile.txt", "data_dir=/d"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: takedown=nofile.txt: the file does not exist\n"
    assert {name for _, name in FILES} >= {"takedown", "keep_keys", "deny_keys", "concepts", "captions", "split_file"}


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("download", ["source=image_folder", "seed=3"], "seed=3 has no effect with source=image_folder"),
        ("download", ["source=shapes", "seed=3"], ""),
        ("filter", ["seed=3"], "seed=3 has no effect: it needs fuse=true and source"),
        ("filter", ["fuse=true", "source=shapes", "seed=3"], ""),
        ("shard", ["seed=3"], "it needs shuffle set"),
        ("precompute", ["seed=3", "latent=mode"], "it needs latent=sample, or bucket_crop=random"),
        ("dedup", ["seed=3"], "it needs method=semantic"),
        ("download", ["source=shapes", "wait=3"], "wait=3 has no effect"),
    ],
)
def test_a_seed_is_for_stages_that_draw(stage: str, settings: list[str], message: str) -> None:
    if not message:
        assert cli.load(stage, settings).seed == 3
        return
    with pytest.raises(ConfigError) as error:
        cli.load(stage, settings)
    assert message in str(error.value)


def test_a_setting_without_effect_does_not_make_a_result_stale(tmp_path: Path) -> None:
    given = {"source": "digits", "output": str(tmp_path / "out"), "run_id": "x"}
    run_stage("download", **given, seed=3)  # as an earlier version stored it for every source
    assert run_stage("download", **given)["counts"]["failed"] == 0
