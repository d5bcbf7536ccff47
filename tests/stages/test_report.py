"""The report: one page, self-contained, that says what is below a folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from recorded import event, write_events

from pipeline.config.cli import build
from pipeline.config.schema import STAGES, ReportConfig
from pipeline.distributed import Rank
from pipeline.partitions import engine
from pipeline.stages import get_stage, report


def run(stage: str, **settings: object) -> None:
    engine.run(get_stage(stage)(build(STAGES[stage], settings), Rank()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with a finished download and filter of a folder with a large, a small and a broken image."""
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("large", (90, 60)), ("wide", (120, 60)), ("small", (20, 20))):
        Image.new("RGB", size, (200, 30, 40)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"a {name} <red> thing\n")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    folder = tmp_path / "data" / "mine" / "train"
    run("download", source="image_folder", input=str(images), output=str(folder / "download"))
    settings = {"min_image_size": 40, "max_failed_fraction": 0.5}
    run("filter", input=str(folder / "download"), output=str(folder / "filter"), **settings)
    return tmp_path / "data"


def test_counts_reasons_pictures_and_captions_are_on_the_page(data: Path) -> None:
    page = report.page(data, 24)
    cells = re.findall(
        r"<tr><td>(?:[^<]|<wbr>)*filter</td>\s*<td>(\d+)</td><td>(\d+)</td><td>(\d+)</td>\s*<td[^>]*>(\d+)</td>", page
    )
    assert cells == [("4", "2", "1", "1")]
    assert "too_small" in page
    assert "a large &lt;red&gt; thing" in page  # captions cannot become markup
    assert page.count("data:image/svg+xml") == 2  # sizes and aspect ratios
    assert page.count("data:image/jpeg") + page.count("data:image/png") == 2 + 1  # kept, and dropped
    (dropped,) = re.findall(r'<img class="thumb" src="data:image/png;base64,[^"]+" alt="([^"]*)">', page)
    assert dropped == "small-png" and "broken-png" in page  # of a broken one there is but the name


@pytest.mark.parametrize(
    ("folder", "path", "name"),
    [
        ("/d", "/d/mine/train/filter", "mine/train/filter"),
        ("/d/mine", "/d/mine/train/filter", "mine/train/filter"),
        ("/d/mine/train", "/d/mine/train/filter", "train/filter"),
        ("/d", "/d/mine/runs/diffuse", "mine/runs/diffuse"),
        ("/d", "/d/old/mine/train/filter", "old/mine/train/filter"),
        ("/d/filter", "/d/filter", "filter"),
    ],
)
def test_headings_begin_with_the_dataset(folder: str, path: str, name: str) -> None:
    assert report.name_of(Path(path), Path(folder)) == name


def test_a_report_shows_no_images_of_samples_whose_data_are_gone(data: Path) -> None:
    shutil.rmtree(data / "mine/train/download")
    page = report.page(data, 24)
    assert "small-png" in page and 'class="thumb"' not in page


def test_the_page_needs_nothing_from_outside(data: Path) -> None:
    page = report.page(data, 24)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "url(" not in page


def test_a_training_run_shows_curve_samples_and_judgement(data: Path) -> None:
    run_folder = data / "mine" / "runs" / "diffuse"
    for name in ("checkpoints", "logs", "samples"):
        (run_folder / name).mkdir(parents=True)
    lines: list[dict[str, float]] = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    lines += [{"step": step, **{f"loss_t{q}": q / step for q in (1, 2, 3, 4)}} for step in (10, 20)]
    (run_folder / "logs" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nhalf a li")
    Image.new("RGB", (64, 64)).save(run_folder / "samples" / "0.png")
    listing = {"samples": [{"prompt": "a small red circle", "seed": 1, "file": "0.png"}]}
    (run_folder / "samples" / "samples.json").write_text(json.dumps(listing))
    (run_folder / "evaluation.json").write_text(json.dumps({"scores": [{"name": "prompts", "right": 30, "of": 32}]}))
    (run_folder / "fidelity.json").write_text(
        json.dumps({"images": 12, "reference": "/real", "scores": [], "values": {"fid": 31.25, "clip_score": 27.5}})
    )
    facts = {"cpu": 300.0, "cpus": 4, "peak": 10**9, "node_memory": 16 * 10**9, "job": "7", "step": 29, "of": 29}
    write_events(run_folder, [event("finish", 0, 1, 1e9, 1e9 + 600, 0, gpu={"use": 0.9, "mean": 0.75}, **facts)])
    page = report.page(data, 4)
    assert "step 29, loss 0.0345" in page
    assert "took 10 min with 1 rank, CPU 12% of 4 for each rank, GPU 75%" in page
    assert "memory 1.0 GB a node of 16.0 GB asked; next time: cpus_per_task=1 mem=2G time=00:20:00" in page
    assert 'alt="loss at each quarter of the noise levels"' in page
    assert "12 images against /real" in page and "<td>fid</td><td>31.25</td>" in page
    assert "a small red circle" in page
    assert re.search(r"<td>prompts</td><td>30</td><td>32</td>", page)


def test_an_unfinished_dataset_is_said_to_be_so(data: Path) -> None:
    (data / "mine/train/filter/_SUCCESS").unlink()
    assert "unfinished: 1 of 1 partitions committed" in report.page(data, 4)


def test_an_empty_folder_gives_a_page_and_a_missing_one_an_error(tmp_path: Path) -> None:
    report.main(ReportConfig(data_dir=str(tmp_path)))
    assert "Nothing here yet" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        report.main(ReportConfig(data_dir=str(tmp_path / "missing")))
