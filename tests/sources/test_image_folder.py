"""A folder of images comes in as it is: every file accounted for, with its class, captions and hash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stage import assert_sound, outcomes, rows
from PIL import Image
from stages.conftest import run_stage

from pipeline.config.schema import ConfigError, DownloadConfig
from pipeline.distributed import Rank
from pipeline.partitions.dataset import Dataset
from pipeline.partitions.planning import Stale, open_or_plan
from pipeline.partitions.stage import Context
from pipeline.partitions.verify import verify
from pipeline.samples import content_hash, path_text, real_path
from pipeline.sources.caption_files import CaptionFile
from pipeline.sources.image_folder import ImageFolder, walk
from pipeline.stages.download import Download


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def settings(images: Path, **more: Any) -> dict[str, Any]:
    return {"source": "image_folder", "input": str(images), "output": str(images.parent / "download"), **more}


def download(images: Path, **more: Any) -> Path:
    run_stage("download", **settings(images, max_failed_fraction=1.0, **more))
    return images.parent / "download"


def plan_then(change: Callable[[], object], images: Path, **more: Any) -> Path:
    """What comes in if something happens between the planning and the reading."""
    stage = Download(DownloadConfig(**settings(images, max_failed_fraction=1.0, **more)), Rank())
    open_or_plan(stage)
    change()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Download, "rechecks", False)
        return download(images, **more)


def stored(output: Path) -> dict[str, dict[str, Any]]:
    dataset = Dataset.open(output)
    found = [sample.read() for index in range(dataset.partitions) for sample in dataset.samples(index)]
    return {row["key"]: row for row in found}


def captions(output: Path) -> dict[str, list[str]]:
    return {key: row["captions"] for key, row in stored(output).items()}


# ---- which files, in which order, with which class


def test_every_image_below_the_folder_comes_in_and_nothing_else(images: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a/x.JPG", "a/deep/er/y.jpeg", "a/z.webp", "a/t.tif", "c/g.gif", "c/b.bmp"):
        picture(images / name)
    (images / "a/drawing.svg").write_text("<svg/>")
    for name in ("a/notes.txt", "a/x.json", "README", "a/png", "b/archive.tar"):
        (images / name).write_text("x")
    output = download(images)
    found = [row["source"] for row in rows(output)]
    assert found == [
        "a/drawing.svg", "a/t.tif", "a/x.JPG", "a/z.webp", "a/deep/er/y.jpeg",
        "b/10.png", "b/2.png", "c/b.bmp", "c/g.gif",
    ]  # fmt: skip
    formats = {row["key"]: row["format"] for row in stored(output).values()}
    assert formats["a/x-JPG"] == formats["a/deep/er/y-jpeg"] == "jpeg"
    assert (formats["a/t-tif"], formats["a/drawing-svg"], formats["c/g-gif"]) == ("tiff", "svg", "gif")
    assert_sound(output)


def test_the_top_folder_is_the_class(images: Path) -> None:
    for name in ("cat/1.png", "cat/old/2.png", "ant/1.png", "zebra/1.png"):
        picture(images / name)
    output = download(images)
    assert {key: row["label"] for key, row in stored(output).items()} == {
        "cat/1-png": 1, "cat/old/2-png": 1, "ant/1-png": 0, "zebra/1-png": 2,
    }  # fmt: skip
    assert json.loads((output / "manifest.json").read_text())["classes"] == ["ant", "cat", "zebra"]


def test_there_are_no_classes_where_images_lie_beside_the_folders(images: Path) -> None:
    picture(images / "cat/1.png")
    picture(images / "2.png")
    assert "label" not in Dataset.open(download(images)).schema


def test_partitions_are_of_the_size_asked_for(images: Path) -> None:
    for number in range(7):
        picture(images / f"{number}.png")
    output = download(images, partition_size=3)
    dataset = Dataset.open(output)
    assert [dataset.partition(index).count for index in range(dataset.partitions)] == [3, 3, 1]


# ---- captions


def test_the_first_line_of_a_text_file_beside_the_image_is_its_caption(images: Path) -> None:
    for name in ("a.png", "b.png", "c.v2.png"):
        picture(images / "things" / name)
    (images / "things/a.txt").write_text("  A red square. \nde.utf8=Ein rotes Quadrat.\n", encoding="utf-8")
    (images / "things/b.txt").write_text("\n\n")
    (images / "things/c.v2.txt").write_bytes(b"caf\xe9 \xc3\xa9\n")
    assert captions(download(images)) == {
        "things/a-png": ["A red square."],
        "things/b-png": [],  # an empty file says that there is none
        "things/c=2Ev2-png": ["caf� é"],
    }


LISTED = {
    "captions.json": json.dumps({"a.png": ["one", "two"], "sub/b.png": "three"}),
    "list.json": json.dumps(
        [{"file_name": "a.png", "captions": ["one", "two"]}, {"image": "sub/b.png", "text": "three"}]
    ),
    "captions.jsonl": '{"file_name": "a.png", "caption": "one"}\n\n{"file_name": "a.png", "caption": "two"}\n'
    '{"file_name": "sub/b.png", "caption": "three"}\n',
    "captions.csv": '\ufefffile_name,caption\na.png,one\na.png,two\nsub/b.png,"three"\n',
}


@pytest.mark.parametrize("name", LISTED)
def test_one_file_may_list_the_captions_of_all(images: Path, name: str) -> None:
    picture(images / "a.png")
    picture(images / "sub/b.png")
    (images / name).write_text(LISTED[name], encoding="utf-8")
    setting = "auto" if name.startswith("captions") else name
    assert captions(download(images, captions=setting)) == {"a-png": ["one", "two"], "sub/b-png": ["three"]}


def test_a_caption_file_may_lie_anywhere(images: Path, tmp_path: Path) -> None:
    picture(images / "sub/b.png")
    (tmp_path / "said.csv").write_text("filename,text\nb.png,by its name alone\n")
    assert captions(download(images, captions=str(tmp_path / "said.csv"))) == {"sub/b-png": ["by its name alone"]}


@pytest.mark.parametrize(("setting", "expected"), [("folder", ["sub"]), ("none", []), ("txt", ["said"])])
def test_the_setting_says_where_captions_come_from(images: Path, setting: str, expected: list[str]) -> None:
    picture(images / "sub/b.png")
    (images / "sub/b.txt").write_text("said")
    assert captions(download(images, captions=setting)) == {"sub/b-png": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ('[{"caption": "x"}]', "row 1: a row needs a name .* but has caption"),
        ('[{"file": "x"}]', "and a caption .* but has file"),
        ("[3]", "row 1: no JSON object"),
        ("[]", "no row"),
    ],
)
def test_a_caption_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"captions.json: .*{message}"):
        CaptionFile(tmp_path / "captions.json")


def test_a_caption_file_that_is_not_there_is_named(images: Path) -> None:
    picture(images / "a.png")
    with pytest.raises(ConfigError, match="captions=nothing.csv: expected auto, txt, folder, none or an existing file"):
        download(images, captions="nothing.csv")


# ---- copied or referred to


@pytest.mark.parametrize("copy", [False, True])
def test_the_bytes_are_those_of_the_file_whether_copied_or_not(images: Path, copy: bool) -> None:
    for number in range(5):
        picture(images / f"{number}.png", f"#0000{number:02d}")
    output = download(images, copy=copy, partition_size=2)
    for key, row in stored(output).items():
        assert row["jpg"] == (images / f"{key[0]}.png").read_bytes()
    for row in rows(output):
        assert row["source_hash"] == content_hash((images / row["source"]).read_bytes())
    kept = sum(path.stat().st_size for path in output.glob("data/*/*/*") if path.suffix == ".tar")
    assert (kept > 0) == copy
    assert_sound(output)


def test_a_copy_outlives_its_source_and_a_reference_says_that_it_is_gone(images: Path) -> None:
    picture(images / "a.png")
    copied = download(images, copy=True, output=str(images.parent / "copied"))
    copied = images.parent / "copied"
    download(images)
    (images / "a.png").unlink()
    assert len(stored(copied)) == 1
    run_stage("filter", input=str(copied), output=str(images.parent / "filter"), min_image_size=1)
    run_stage(
        "filter", input=str(images.parent / "download"), output=str(images.parent / "filter2"),
        min_image_size=1, max_failed_fraction=1.0,
    )  # fmt: skip
    assert outcomes(images.parent / "filter") == {"a-png": "kept:"}
    assert outcomes(images.parent / "filter2") == {"a-png": "failed:missing"}
    assert any(
        "does not decode: missing" in finding.what for finding in verify(Dataset.open(images.parent / "download"))
    )


def test_a_referred_file_that_has_changed_is_not_taken_for_the_old_one(images: Path) -> None:
    picture(images / "a.png")
    output = download(images)
    picture(images / "a.png", "blue")
    run_stage("filter", input=str(output), output=str(images.parent / "f"), min_image_size=1, max_failed_fraction=1.0)
    assert outcomes(images.parent / "f") == {"a-png": "failed:changed_since_plan"}


# ---- what may go wrong with a file


def test_a_file_that_changed_or_vanished_since_the_plan_is_a_row_with_its_reason(images: Path) -> None:
    for name in ("same", "longer", "touched", "gone", "folder"):
        picture(images / f"{name}.png")

    def change() -> None:
        (images / "longer.png").write_bytes((images / "longer.png").read_bytes() + b"x")
        os.utime(images / "touched.png", ns=(1, 1))
        (images / "gone.png").unlink()
        (images / "folder.png").unlink()
        (images / "folder.png").mkdir()

    output = plan_then(change, images)
    assert outcomes(output) == {
        "same-png": "kept:",
        "longer-png": "failed:changed_since_plan",
        "touched-png": "failed:changed_since_plan",
        "gone-png": "failed:missing",
        "folder-png": "failed:unreadable",
    }
    assert_sound(output)


def test_a_file_that_came_back_is_retried(images: Path) -> None:
    path = picture(images / "a.png")
    picture(images / "b.png")
    state, data = path.stat(), path.read_bytes()
    output = plan_then(path.unlink, images)
    path.write_bytes(data)
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))
    download(images, retry_failed=True)
    assert outcomes(output) == {"a-png": "kept:", "b-png": "kept:"}
    assert_sound(output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_row_with_its_reason(images: Path) -> None:
    picture(images / "a.png").chmod(0)
    assert outcomes(download(images)) == {"a-png": "failed:unreadable"}


def test_a_link_to_nowhere_is_a_row_and_a_link_to_a_file_is_that_file(images: Path, tmp_path: Path) -> None:
    (images / "broken.png").symlink_to(tmp_path / "nothing.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "link.png").symlink_to(picture(tmp_path / "elsewhere" / "x.png"))
    picture(tmp_path / "elsewhere/more/y.png")
    (images / "folder").symlink_to(tmp_path / "elsewhere/more")
    (images / "round").symlink_to(images)
    assert outcomes(download(images)) == {
        "broken-png": "failed:missing",
        "loop-png": "failed:unreadable",
        "link-png": "kept:",
        "folder/y-png": "kept:",
    }


def test_what_is_no_regular_file_is_a_row_and_stops_nobody(images: Path) -> None:
    os.mkfifo(images / "pipe.png")
    (images / "endless.png").symlink_to("/dev/zero")
    assert outcomes(download(images)) == {"endless-png": "failed:not_regular", "pipe-png": "failed:not_regular"}


def test_files_that_were_opened_ahead_are_closed_when_nobody_wants_them(images: Path) -> None:
    for number in range(20):
        picture(images / f"{number:02d}.png")
    source = ImageFolder(DownloadConfig(**settings(images, copy=True)))
    before = len(os.listdir("/proc/self/fd"))
    samples = source.samples(next(source.plan()), Context())
    assert next(samples).key == "00-png" and len(os.listdir("/proc/self/fd")) > before
    samples.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_large_a_file_is_not_read(images: Path) -> None:
    picture(images / "a.png")
    assert outcomes(download(images, max_member_bytes=10)) == {"a-png": "failed:too_many_bytes"}


def test_an_empty_file_and_garbage_come_in_and_are_sorted_out_by_the_filter(images: Path) -> None:
    (images / "empty.png").write_bytes(b"")
    (images / "garbage.jpg").write_bytes(b"\x00\x01garbage" * 50)
    picture(images / "good.png")
    output = download(images)
    run_stage("filter", input=str(output), output=str(images.parent / "f"), min_image_size=1, max_failed_fraction=1.0)
    found = outcomes(images.parent / "f")
    assert found["good-png"] == "kept:"
    assert found["empty-png"].startswith("failed:")
    assert found["garbage-jpg"].startswith("failed:")


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", "café.png".encode(), b"a b%20.png", b"new\nline.png", b"\xff\xfe/x.png", b"%:x.png"]
)
def test_any_name_that_a_file_may_have_comes_in_under_a_safe_key(images: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(images) + b"/" + name))
    picture(path)
    output = download(images, copy=True)
    ((key, row),) = stored(output).items()
    assert key.isascii()
    assert "." not in key
    assert row["jpg"] == path.read_bytes()
    assert download(images, copy=True) == output  # the plan is found to be the same
    reference = images.parent / "reference"
    run_stage("download", **settings(images) | {"output": str(reference)})
    assert stored(reference)[key]["jpg"] == path.read_bytes()
    (source,) = [row["source"] for row in rows(reference)]
    assert os.fsencode(real_path(source)) == name


@pytest.mark.parametrize("path", ["a/b.png", "é/ü.png", "%:a", "\udce9.png", "%:\udcff/x.png", "a%3Ab"])
def test_a_path_comes_back_from_its_text(path: str) -> None:
    text = path_text(path)
    text.encode()
    assert real_path(text) == path


def test_different_paths_have_different_texts() -> None:
    assert path_text("%:a\udce9") != path_text("a\udce9")
    assert path_text("%:%E9") != path_text("\udce9")


def test_walking_sorts_by_bytes_and_ends_on_hard_cases(images: Path) -> None:
    for name in ("B.png", "a.png", "é.png", "Z/1.png", "a/1.png", "a/b/1.png"):
        picture(images / name)
    (images / "pipe.png").symlink_to("/dev/null")
    assert [found.path for found in walk(images)] == [
        "B.png",
        "a.png",
        "pipe.png",
        "é.png",
        "Z/1.png",
        "a/1.png",
        "a/b/1.png",
    ]


# ---- the folder as a whole


def test_a_folder_that_is_not_there_or_empty_is_named(images: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to do"):
        download(images)
    with pytest.raises(ConfigError, match="input=.*/nothing: no such folder"):
        run_stage("download", source="image_folder", input=str(images / "nothing"), output=str(images.parent / "o"))
    with pytest.raises(ConfigError, match="needs input="):
        run_stage("download", source="image_folder", output=str(images.parent / "o"))


def test_a_file_that_was_added_since_makes_the_output_stale(images: Path) -> None:
    picture(images / "a.png")
    download(images)
    picture(images / "b.png")
    with pytest.raises(Stale, match=r"the input has changed since it was planned \(b.png was added\)"):
        download(images)
    (images / "b.png").unlink()
    download(images)
