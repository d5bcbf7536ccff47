"""Arguments and YAML become configs; what is wrong is one clear line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass

import pytest

from pipeline.config import cli
from pipeline.config.options import NEVER, Options, condition_of
from pipeline.config.schema import (
    STAGES,
    ConfigError,
    FilterConfig,
    PrecomputeConfig,
    RunConfig,
    default_variant,
    identity,
    option,
    stage_folder,
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["image_resolutions=[256,512]", "batch_size=8", "save_images=true"],
        ["--image_resolutions", "256", "512", "--batch_size", "8", "--save_images"],
        ["--image-resolutions=[256, 512]", "--batch-size=8", "--save-images", "true"],
        ["--image_resolutions", "256", "512", "batch_size=8", "precompute.save_images=true"],
    ],
)
def test_ways_to_write_the_same_settings(arguments: list[str]) -> None:
    config = cli.load("precompute", arguments)
    assert (config.image_resolutions, config.batch_size, config.save_images) == ((256, 512), "8", True)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("filter", ["min_image_sze=3"], "unknown key 'min_image_sze'; did you mean min_image_size"),
        ("filter", ["min_image_size=small"], "min_image_size=small: expected a whole number"),
        ("filter", ["max_failed_fraction=much"], "expected a number"),
        ("filter", ["overwrite=perhaps"], "expected true or false"),
        ("filter", ["seed="], "expected a whole number"),
        ("precompute", ["image_resolutions=[256,big]"], "expected a list of whole numbers"),
        ("precompute", ["latent=mean"], "latent=mean: "),
        ("precompute", ["vae=${oc.env:HOME}"], "not supported"),
        ("repair", [], "missing: input=..."),
        ("filter", ["lease=1", "--lease", "2"], "lease is given more than once"),
        ("filter", ["lease"], "'lease' is not a setting"),
        ("filter", ["dataset=shaps"], "did you mean shapes?"),
        ("filter", ["filtr.lease=2"], "unknown key 'filtr.lease'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(stage: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.load(stage, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_program_ends_with_code_2_and_one_line() -> None:
    command = [sys.executable, "-m", "pipeline.stages.verify", "inptu=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean input?" in done.stderr


def test_a_tilde_that_the_shell_has_left_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = cli.load("filter", ["input=~/raw", "--output", "~/out", "variant=a~b"])
    assert (config.input, config.output, config.variant) == ("/home/somebody/raw", "/home/somebody/out", "a~b")


def test_command_line_wins_over_yaml_wins_over_defaults(tmp_path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("min_image_size: 100\nlease: 5\nfilter:\n  max_image_size: 700\nshard:\n  lease: 9\n")
    config = cli.load("filter", [f"dataset={yaml}", "lease=6"])
    assert (config.min_image_size, config.max_image_size, config.lease, config.encode_quality) == (100, 700, 6, 95)
    assert cli.load("shard", [f"dataset={yaml}"]).lease == 9


def test_a_yaml_with_an_unknown_key_names_file_and_key(tmp_path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("min_image_sizes: 100\n")
    with pytest.raises(ConfigError, match=r"mine.yaml.*min_image_sizes.*did you mean min_image_size"):
        cli.load("filter", [f"dataset={yaml}"])
    yaml.write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        cli.load("filter", [f"dataset={yaml}"])


def test_every_dataset_yaml_fits_every_stage() -> None:
    names = [path.stem for path in (cli.CONF / "dataset").glob("*.yaml")]
    assert "shapes" in names
    for name in names:
        for stage, cls in STAGES.items():
            if issubclass(cls, RunConfig):
                assert cli.load(stage, [f"dataset={name}", "data_dir=x"]).dataset == name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("width", [40, 80, 110])
def test_help_lists_every_option_with_its_meaning_within_the_width(stage: str, width: int) -> None:
    cls = STAGES[stage]
    text = cli.help_text(cls, "x", width=width)
    for line in text.splitlines():
        assert len(line) <= width or " " not in line.strip()
    words = " ".join(text.split())
    for f in fields(cls):
        assert f.metadata["help"], f"{stage}.{f.name} has no help"
        shown = condition_of(cls, f) != NEVER
        assert (f" {f.name} {' '.join(f.metadata['help'].split())}" in words) == shown


def test_help_states_a_condition_that_a_group_shares_once() -> None:
    words = " ".join(cli.help_text(STAGES["filter"], "x", width=100).split())
    assert "Images in folders (only with fuse=true and source=image_folder):" in words
    assert "values of that column that belong to this split [also needs split_column set]" in words
    assert words.count("source=image_folder") == 1
    augmentation = words = " ".join(cli.help_text(STAGES["train"], "x", width=100).split())
    assert "(only with task=classify, or task=caption and encoder set; with other values" in augmentation
    assert "[also needs randaugment set]" in augmentation
    assert words.count("only with task=classify)") == 0
    assert "[always]" in words[words.index("scan_backend") :][:300]


def test_help_begins_its_groups_with_the_stages_own_options_and_the_source() -> None:
    groups = list(cli.by_group(STAGES["filter"], fields(STAGES["filter"])))
    assert groups[:3] == ["", "Where samples come from", "Images in folders"]
    assert groups.index("Generated scenes") < groups.index("Every stage that runs on ranks")


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_survives_its_json(stage: str) -> None:
    required = [
        f"{f.name}=x" for f in fields(STAGES[stage]) if f.name in ("input", "data_dir", "takedown", "output_dir", "to")
    ]
    config = cli.load(stage, required)
    assert is_dataclass(config)
    assert cli.build(STAGES[stage], cli.to_json(config)) == config


def test_identity_holds_what_the_bytes_depend_on_and_nothing_else() -> None:
    base = FilterConfig()
    assert identity(base) == identity(FilterConfig(lease=5.0, data_dir="/elsewhere", run_id="x", output="/y"))
    assert identity(base) != identity(FilterConfig(min_image_size=1))
    assert identity(base) != identity(FilterConfig(seed=1))


def test_where_stages_lie() -> None:
    config = PrecomputeConfig(dataset="conf/jdb.yaml", data_dir="/data", vae="stabilityai/sdxl")
    assert str(stage_folder(config, "precompute", default_variant(config))) == "/data/jdb/train/precompute-sdxl"
    with pytest.raises(ConfigError, match="data_dir"):
        stage_folder(FilterConfig(), "filter")


def test_nothing_here_imports_torch() -> None:
    code = (
        "import sys, launch.submit, pipeline.stages.download, pipeline.stages.filter, pipeline.stages.shard,"
        " pipeline.stages.precompute, pipeline.sources.shapes, pipeline.stages.repair; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stage_does_not_load_pandas_with_pyarrow() -> None:
    program = (
        "import sys; import pipeline.stages.gc; from pipeline.config.cli import config_for\n"
        "config_for('gc', ['input=x'])\n"
        "import pyarrow as pa\n"
        "assert pa.array([1, None]).to_pylist() == [1, None] and 'pandas' not in sys.modules\n"
        "import pandas; assert pandas.Series([1]).sum() == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [("-0.1", "at least 0, less than 1"), ("1", "at least 0, less than 1"), ("nan", "finite"), ("inf", "finite")],
)
def test_numbers_out_of_range_are_refused_by_name(value, message):
    @dataclass(frozen=True, kw_only=True)
    class Numbers(Options):
        """Some numbers."""

        share: float = option(0.5, "a share", ge=0, lt=1)

    with pytest.raises(ConfigError, match=rf"^share=.*{message}"):
        cli.build(Numbers, {"share": value})
    assert cli.build(Numbers, {"share": "0"}).share == 0.0
    assert "[at least 0, less than 1]" in cli.help_text(Numbers, "x")


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        (["dataset=digits"], 1000, 40),
        (["dataset=digits", "steps=20"], 20, 0),
        (["dataset=digits", "train.steps=20"], 20, 0),
        (["dataset=shapes"], 2400, 0),
        (["dataset=shapes", "epochs=3"], 1000, 3),
    ],
)
def test_what_a_command_says_of_the_length_takes_the_place_of_a_files(
    arguments: list[str], steps: int, epochs: float
) -> None:
    config = cli.load("train", ["data_dir=/data", *arguments])
    assert (config.steps, config.epochs) == (steps, epochs)
    again = cli.load("train", cli.arguments_of(config))  # as ranks get it
    assert (again.steps, again.epochs) == (steps, epochs)


def test_steps_and_epochs_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps=5, epochs=2: give one of them"):
        cli.load("train", ["steps=5", "epochs=2"])
