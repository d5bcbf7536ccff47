"""Datasets given as Python objects."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pytest
from config.test_options import NONSENSE, one_option, other_than_default
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sources.test_datasets import photo, rows_of
from test_messages import named

from pipeline.config.cli import build
from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.formats import Reader
from pipeline.partitions.finalize import Unbalanced
from pipeline.partitions.planning import Stale
from pipeline.sources.torch_dataset import class_names, import_dataset


class Items(list[Any]):
    """A dataset; what is an exception is raised."""

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def test_items_of_every_kind_become_samples(memory: Path) -> None:
    array = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    items = Items(
        [
            (photo(0), "a caption"),
            (Image.fromarray(array), ["one", "two"]),
            {"image": array, "text": "three"},
            array,
            ValueError("broken"),
            (b"no image", "x"),
        ]
    )
    success = import_dataset(items, output=str(memory / "out"), partition_size=4, max_failed_fraction=1.0)
    assert success["reasons"] == {"failed:item_failed": 1, "failed:unknown_format": 1}
    rows = rows_of(memory / "out")
    assert [row["captions"] for row in rows] == [["a caption"], ["one", "two"], ["three"], []]
    assert [row["format"] for row in rows] == ["jpeg", "png", "png", "png"]
    items[4] = (photo(1), "mended")
    again = import_dataset(
        items, output=str(memory / "out"), partition_size=4, max_failed_fraction=1.0, retry_failed=True
    )
    assert again["counts"]["kept"] == 5
    fake_stage.assert_sound(memory / "out")


def test_labels(memory: Path) -> None:
    import_dataset(Items([(photo(0), 3), (photo(1), np.int64(4))]), output=str(memory / "out"), labels=True)
    assert [row["label"] for row in rows_of(memory / "out")] == [3, 4]


# ---- the rules of all sources


def test_datasets_that_wrap_others_keep_labels_and_names_of_classes(memory: Path) -> None:
    """Stand-ins of torch's Subset, what random_split returns, and ConcatDataset, with the same attributes."""

    class Classes(Items):
        def __init__(self, count: int, classes: list[str]) -> None:
            super().__init__((photo(number), number % 3) for number in range(count))
            self.classes = classes

    class Subset:
        def __init__(self, dataset: Any, indices: list[int]) -> None:
            self.dataset, self.indices = dataset, indices

        def __len__(self) -> int:
            return len(self.indices)

        def __getitem__(self, index: int) -> Any:
            return self.dataset[self.indices[index]]

    class Concatenated(Items):
        def __init__(self, datasets: list[Any]) -> None:
            super().__init__(dataset[index] for dataset in datasets for index in range(len(dataset)))
            self.datasets = datasets

    names = ["cat", "dog", "eel"]
    part = Subset(Classes(6, names), [5, 0, 4])
    both = Concatenated([part, Subset(Classes(3, names), [1])])
    for name, dataset, labels in (("part", part, [2, 0, 1]), ("both", both, [2, 0, 1, 1])):
        import_dataset(dataset, output=str(memory / name))
        rows = rows_of(memory / name)
        assert [row["label"] for row in rows] == labels
        assert [row["key"] for row in rows] == [f"{number:09d}-" for number in range(len(labels))]
        assert Reader(memory / name).classes == names
    import_dataset(part, output=str(memory / "texts"), labels=False)
    assert Reader(memory / "texts").classes == []
    assert class_names(Concatenated([Classes(1, names), Classes(1, ["other"])])) == []
    label = type("ClassLabel", (), {"names": names})()
    assert class_names(type("HubDataset", (), {"features": {"image": None, "label": label}})()) == names


def test_texts_are_repaired_and_nothing_is_invented(memory: Path) -> None:
    said: list[Any] = ["cut \ud83d", None, float("nan"), {"caption": "x"}, ["a", None, 3], b"caf\xc3\xa9", "  "]
    items = [{"image": photo(n), "caption": value} for n, value in enumerate(said)]
    success = import_dataset(items, output=str(memory / "out"))
    assert success["reasons"] == {}
    captions = [row["captions"] for row in rows_of(memory / "out")]
    assert captions == [["cut \ufffd"], [], [], ["x"], ["a"], ["café"], []]
    fake_stage.assert_sound(memory / "out")


def test_one_bad_item_ends_nothing_and_a_failure_says_why(memory: Path) -> None:
    items: list[Any] = [(photo(0), "cat")] * 3 + [(photo(1), -1), (np.zeros((4, 4), np.float32), 1), None]
    success = import_dataset(items, output=str(memory / "out"), max_failed_fraction=1.0)
    assert success["reasons"] == {"failed:bad_label": 1, "failed:no_image": 2}
    with pytest.raises(
        Unbalanced, match=r"3 of 6 samples failed.*: no_image: .*2 times \(for example .*bad_label: -1 is no"
    ):
        import_dataset(items, output=str(memory / "again"), max_failed_fraction=0.1)
    with pytest.raises(Unbalanced, match=r"too_many_bytes: \d+ bytes, 3 times"):
        import_dataset(items[:3], output=str(memory / "small"), max_failed_fraction=0.1, max_member_bytes=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 5}, "count=5: has no effect in import_dataset"),
        ({"columns": ("x",)}, "columns=.*: has no effect"),
        ({"captions": "txt"}, "captions=txt: has no effect"),
        ({"mirror": "/data"}, "mirror=/data: has no effect"),
        ({"input": "/data"}, "input=/data: has no effect"),
        ({"source": "parquet"}, "source=parquet: has no effect"),
        ({"partitionsize": 3}, "partitionsize: there is no such setting; did you mean partition_size"),
        ({"partition_size": 0}, "partition_size=0: must be at least 1"),
        ({"max_failed_fraction": 7}, "max_failed_fraction=7.*: must be at least 0"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(
    memory: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        import_dataset([(photo(0), "x")], output=str(memory / "out"), **settings)


TAKEN = {
    *("data_dir", "dataset", "split", "output", "variant", "run_id", "overwrite", "retry_failed", "compact", "restore"),
    *("max_failed_fraction", "lease", "partition_size", "max_member_bytes", "labels"),
}
"""Settings of stage=download that have an effect on an import."""


@pytest.mark.parametrize("field", fields(DownloadConfig), ids=lambda field: field.name)
def test_every_setting_has_an_effect_or_is_refused(memory: Path, field: Any) -> None:
    text = other_than_default(field)
    value = getattr(build(one_option(field), {field.name: text}), field.name)
    settings = {"output": str(memory / "out"), "max_failed_fraction": 1.0, field.name: value}
    if field.name in ("output", "data_dir"):
        settings[field.name] = str(memory / "elsewhere")
    if field.name in TAKEN:
        assert import_dataset([(photo(0), "x")], **settings)["counts"]["in"] == 1
        return
    with pytest.raises(ConfigError, match=rf"^{field.name}=.*has no effect in import_dataset"):
        import_dataset([(photo(0), "x")], **settings)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from([field.name for field in fields(DownloadConfig)]), value=NONSENSE | st.none() | st.binary())
def test_nonsense_is_one_line_that_names_the_setting(name: str, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given_ = {"output": f"{folder}/out", "max_failed_fraction": 1.0}
        if name in ("output", "data_dir"):
            return  # any text is a place
        try:
            import_dataset([(photo(0), "x")], **{**given_, name: value})
        except ConfigError as error:
            assert name in str(error) and "\n" not in str(error)


def test_a_place_can_be_given_in_either_way(memory: Path) -> None:
    import_dataset([(photo(0), "x")], data_dir=memory / "data", dataset="mine")
    assert len(rows_of(memory / "data/mine/train/download")) == 1
    for given_ in ({}, {"data_dir": str(memory)}, {"dataset": "mine"}):
        with pytest.raises(ConfigError, match="import_dataset needs output=, or data_dir= and dataset="):
            import_dataset([(photo(0), "x")], **given_)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train": [1], "test": [2]}, "dict is a mapping of train, test: give one of its datasets"),
        (iter([1]), "list_iterator has no len"),
        (None, "NoneType has no len"),
        ({1, 2}, "set has no len.. and items by index"),
        ([], "list has no items"),
    ],
)
def test_what_is_no_map_style_dataset_is_an_error(memory: Path, dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"import_dataset: {message}"):
        import_dataset(dataset, output=str(memory / "out"))


def test_messages_name_settings_that_have_an_effect_here() -> None:
    from pipeline.sources import torch_dataset

    said = {name for _, _, name in named(Path(torch_dataset.__file__))}
    assert {"output", "data_dir", "dataset"} <= said <= TAKEN


def test_readers_of_our_formats_are_datasets_and_each_item_comes_once(memory: Path) -> None:
    items = [(photo(number), number) for number in range(7)]
    import_dataset(items, output=str(memory / "first"), partition_size=3)
    import_dataset(Reader(memory / "first", output="bytes"), output=str(memory / "again"), partition_size=2)
    assert [row["label"] for row in rows_of(memory / "again")] == list(range(7))
    assert [row["jpg"] for row in rows_of(memory / "again")] == [data for data, _ in items]


def test_a_failure_says_nothing_that_differs_between_runs(memory: Path) -> None:
    items = Items([(photo(0), 1), ValueError(object()), (b"", 1), ValueError("half an emoji: \ud83d")])
    digests = []
    for name in ("one", "two"):
        import_dataset(items, output=str(memory / name), max_failed_fraction=1.0)
        digests.append(json.loads((memory / name / "_SUCCESS").read_text())["content_digest"])
        items[1] = ValueError(object())
    assert digests[0] == digests[1]


def test_changed_inputs_are_noticed_as_far_as_an_object_tells(memory: Path) -> None:
    before = import_dataset([(photo(0), "x")], output=str(memory / "out"))
    assert import_dataset([(photo(0), "x")], output=str(memory / "out")) == before
    with pytest.raises(Stale, match="has changed since it was planned"):
        import_dataset([(photo(0), "x")] * 2, output=str(memory / "out"))

    class Fingerprinted(list[Any]):
        _fingerprint = "a"

    items = Fingerprinted([(photo(0), "x")])
    import_dataset(items, output=str(memory / "hf"))
    items._fingerprint = "b"
    with pytest.raises(Stale, match="has changed since it was planned"):
        import_dataset(items, output=str(memory / "hf"))
